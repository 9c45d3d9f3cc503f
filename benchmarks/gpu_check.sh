#!/usr/bin/env bash
# make gpu-check: build for the GPU, then tests, the benchmark grid and sweeps (gpu_check.py), within
# ten minutes. It installs nothing, so that it works offline on an image that has torch, nvcc and
# pytest; PYTHON says which interpreter (3.11 or newer; default: .venv's if there is one, else
# python3). JSONL goes to $OUT. MINUTES bounds the parts, PARTS names some, RESUME is a folder that
# an earlier run left: its finished parts are not run again.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export OUT=${OUT:-$root/benchmarks/results}
mkdir -p "$OUT"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu-check needs a CUDA device, and $PYTHON sees none" >&2
  exit 2
fi
# For this device alone: three targets take three times as long.
export PYRL_CUDA_ARCHS=${PYRL_CUDA_ARCHS:-$("$PYTHON" -c \
  'import torch; print("%d%d-real" % torch.cuda.get_device_capability())')}
echo "== build for $PYRL_CUDA_ARCHS"
if ! PYRL_BUILD=cuda "$PYTHON" -m pip install -q --no-deps --no-build-isolation --no-index -e . \
  >"$OUT/build.log" 2>&1; then
  tail -20 "$OUT/build.log"
  exit 1
fi
"$PYTHON" - <<'PY'
import pyrl, torch
print(torch.cuda.get_device_name(), "torch", torch.__version__)
for name, reason in pyrl.backends().items():
    print(f"  {name}: {reason or 'usable'}")
PY
echo "== parts"
arguments=(--minutes "${MINUTES:-8}")
[ -n "${PARTS:-}" ] && read -ra names <<<"$PARTS" && arguments+=(--part "${names[@]}")
[ -n "${RESUME:-}" ] && arguments+=(--resume "$RESUME")
exec "$PYTHON" benchmarks/gpu_check.py "${arguments[@]}"
