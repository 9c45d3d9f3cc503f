"""Where vLLM is absent, asking for it says what to install; nothing else needs it."""

import subprocess
import sys

import pytest

from pyrl.rollout import RolloutError, make_rollout
from pyrl.testing import tiny_model_folder


def test_a_missing_vllm_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    folder = tiny_model_folder(tmp_path)
    with pytest.raises(RolloutError, match=r"pip install pyrl\[vllm\].*make test-vllm"):
        make_rollout("vllm", model_path=folder)


def test_the_room_imports_without_vllm():
    code = "import sys; sys.modules['vllm'] = None; import pyrl.rollout; print('fine')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert out.stdout.strip() == "fine", out.stderr
