"""How every figure here is taken: interleaved variants, fresh random data, medians, peak memory in
a fresh process, and the conditions beside the number.

Times: each round draws new inputs, then runs every variant once in a shuffled order, so drift of a
shared machine meets all of them alike; a ratio is the median over rounds of (variant / limit in the
same round). A difference smaller than the p20..p80 spread is noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MIB = 1024.0 * 1024.0
#: Larger than any last-level cache (H100: 50 MiB of L2); written before each timed CUDA call.
FLUSH_BYTES = 256 * 1024 * 1024
#: Times that it is written: about 0.3 ms of an H100, in which the host queues what is timed.
FLUSHES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one variant over the rounds of one run."""

    p20: float
    p50: float
    p80: float
    rounds: int
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """NaN marks a round that the variant sat out."""
        samples = [value for value in samples if value == value]
        return cls(
            p20=quantile(samples, 0.2),
            p50=quantile(samples, 0.5),
            p80=quantile(samples, 0.8),
            rounds=len(samples),
            samples=tuple(samples),
        )


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, as numpy's default."""
    if not values:
        raise ValueError("quantile of no values")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median_ratio(samples: Sequence[float], limit: Sequence[float]) -> float:
    """median_i samples[i] / limit[i]: the pairs come from the same round, so drift cancels. NaN
    marks a round that either sat out."""
    if len(samples) != len(limit):
        raise ValueError(f"{len(samples)} samples against {len(limit)} of the limit")
    pairs = zip(samples, limit, strict=True)
    return statistics.median(a / b for a, b in pairs if a == a and b == b)


def timed_ms(call: Callable[[], Any], device: str, flush: torch.Tensor | None = None) -> float:
    """Milliseconds of one call; device events on CUDA, the host clock elsewhere. The device is
    still writing `flush` when the call is queued, which hides the host's part of a short call."""
    if device == "cuda":
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if flush is not None:
            for _ in range(FLUSHES):
                flush.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def interleave(
    calls: Mapping[str, Callable[[Any], Any]],
    draw: Callable[[int], Any],
    *,
    rounds: int,
    device: str,
    seed: int = 0,
    inner: int = 1,
    between: Callable[[Any], None] | None = None,
    limit: str = "",
    slow: float = math.inf,
    always: Collection[str] = (),
) -> dict[str, list[float]]:
    """Milliseconds per variant and round. `draw(round)` makes that round's inputs; `between` (for
    example dropping gradients) runs untimed before every call; `inner` repeats a short call inside
    one timing and divides. A variant that took longer than `slow` times `limit`, which opens the
    first round, runs in every fifth round only, unless named in `always`; the others are NaN."""
    order = list(calls)
    shuffler = random.Random(seed)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if device == "cuda" else None
    samples: dict[str, list[float]] = {name: [] for name in order}
    for i in range(rounds):
        inputs = draw(i)
        shuffler.shuffle(order)
        for name in sorted(order, key=lambda name: i > 0 or name != limit):
            rests = i % 5 and limit in calls and name not in always
            if rests and samples[name][0] > slow * samples[limit][0]:
                samples[name].append(math.nan)
                continue
            if between is not None:
                between(inputs)
            call = calls[name]

            def repeat(call: Callable[[Any], Any] = call, inputs: Any = inputs) -> None:
                for _ in range(inner):
                    call(inputs)

            samples[name].append(timed_ms(repeat, device, flush) / inner)
        if between is not None:
            between(inputs)
    return samples


class BusyCores:
    """Cores that other processes kept busy between the construction and `others()`."""

    def __init__(self) -> None:
        self.began, self.start = time.perf_counter(), self._seconds()

    def others(self) -> float | None:
        """None where the system does not say (no /proc/stat)."""
        now = self._seconds()
        if now is None or self.start is None:
            return None
        seconds = time.perf_counter() - self.began
        # Both counts go in hundredths of a second: a short span can come out below zero.
        return round(max(0.0, now - self.start) / max(seconds, 1e-9), 2) + 0.0

    @staticmethod
    def _seconds() -> float | None:
        """CPU seconds of the machine (user, nice, system, interrupts) less this process' own."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _idle, _waiting, irq, softirq = map(int, fields[:7])
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return busy - own.user - own.system - own.children_user - own.children_system


# ---- peak memory -------------------------------------------------------------------------------


def resident_mib() -> float:
    return _status_mib("VmRSS")


def peak_resident_mib() -> float:
    """High-water mark of this process' resident memory since the last `reset_peak`."""
    return _status_mib("VmHWM")


def reset_peak() -> bool:
    """Set the high-water mark to what is resident now (Linux); False where the kernel refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim() -> None:
    """Give freed heap back to the system, so that a later allocation shows up again."""
    import ctypes
    import gc

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return float(line.split()[1]) / 1024.0
    raise OSError(f"/proc/self/status has no {key}")


def measure_peak(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Peak memory of `call` above what is held when it starts, in MiB, its result included.

    Run in a fresh process with the inputs already made. The first call's growth (code, compiled
    kernels, thread pools and whatever it keeps) is `peak_first_mib`; `retained_mib` is what stays
    after its result is dropped; `peak_mib` is the second call's growth.
    """
    if device == "cuda":
        return _measure_peak_cuda(call)
    trim()
    start = resident_mib()
    if not reset_peak():
        raise OSError("cannot reset the resident high-water mark (/proc/self/clear_refs)")
    result = call()
    first = peak_resident_mib() - start
    del result
    trim()
    before = resident_mib()
    reset_peak()
    result = call()
    peak = peak_resident_mib() - before
    del result
    return {"peak_mib": peak, "peak_first_mib": first, "retained_mib": before - start}


def _measure_peak_cuda(call: Callable[[], Any]) -> dict[str, float]:
    peaks = []
    start = torch.cuda.memory_allocated()
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peaks.append((torch.cuda.max_memory_allocated() - before) / MIB)
        del result
        retained = (torch.cuda.memory_allocated() - start) / MIB
    return {"peak_mib": peaks[1], "peak_first_mib": peaks[0], "retained_mib": retained}


def run_child(script: str, *args: str, timeout: float = 600.0) -> dict[str, Any]:
    """Run `python benchmarks/<script> ...` in a fresh process; its last line of output is a JSON
    object. A child that fails returns {"error": its last line of stderr}."""
    command = [sys.executable, str(HERE / script), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {timeout:.0f} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- provenance and result files ---------------------------------------------------------------


def known_or_raise(benchmark: str, names: Iterable[str] | None, known: Iterable[str]) -> None:
    """ValueError names the first of `names` that `benchmark` does not have."""
    known = sorted(set(known))
    for name in names or ():
        if name not in known:
            raise ValueError(f"{benchmark} has no implementation {name!r}: expected one of {known}")


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """`NVIDIA H200`, or the processor's name with its cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


def commit() -> str:
    """Short hash of the checkout, with `+` when files differ from it (results of benchmarks, which
    a run itself writes, are no difference); `unknown` outside git."""

    def git(*args: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(HERE.parent), *args], capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    try:
        head = git("rev-parse", "--short", "HEAD")
        made = (":!benchmarks/results", ":!benchmarks/RESULTS.md")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *made)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def conditions(device: str) -> dict[str, Any]:
    """What every row says about where and when it was taken. `load` is the machine's load average
    before the run, this process' own earlier work included."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
    }


#: Fields that identify a measurement; a newer row replaces the older one with the same key.
KEY = ("op", "implementation", "dtype", "shape", "kept_share", "device", "settings")


def row_key(row: Mapping[str, Any]) -> str:
    return json.dumps([row.get(k) for k in KEY], sort_keys=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for at, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {at}: {error}") from error
    return rows


def case_key(row: Mapping[str, Any]) -> str:
    """What the rows of one table have in common."""
    return json.dumps([row.get(k) for k in KEY if k != "implementation"], sort_keys=True)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], *, whole_cases: bool = False) -> None:
    """Merge `rows` into the JSONL file at `path`: one object a line, newest per key. With
    `whole_cases` older rows of the same cases go: a table then holds one run, under one load."""
    rows = list(rows)
    gone = {case_key(row) for row in rows} if whole_cases else set()
    merged = {row_key(row): dict(row) for row in read_rows(path) if case_key(row) not in gone}
    for row in rows:
        merged.pop(row_key(row), None)
        merged[row_key(row)] = dict(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in merged.values()))
    aside.replace(path)
