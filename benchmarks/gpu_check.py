"""What a GPU can show, in under ten minutes: tests, the grid against the peers, sweeps.

    python benchmarks/gpu_check.py [--part NAME ...] [--minutes 9] [--dry-run]
    python benchmarks/gpu_check.py --resume FOLDER    # go on from what an earlier run left there

The parts of gpu_parts.py run in their order, in a process that is replaced when a part hangs or
breaks it: a part that takes twice its budget is ended and the next one goes on. An implementation
that broke the device (a CUDA error) is left out of that part, which runs once more; one at which a
part hung is left out when the part runs again. Rows go to
$OUT/gpu_check.jsonl (default: benchmarks/results/) as each part ends, and what became of each part
to $OUT/gpu_check_parts.jsonl. A part that is recorded there as done, for this device and this code,
is skipped; --again runs it anew. A part is not begun when its budget would pass --minutes. Without
a CUDA device it says so and exits with 2; 1 means that a part failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from gpu_parts import PARTS, PATIENCE, Part
from harness import HERE, device_name, read_rows, write_rows
from table import print_cells

FILE, DONE = "gpu_check.jsonl", "gpu_check_parts.jsonl"
#: Seconds until a fresh process has imported everything and begins its first part.
START_SECONDS = 90.0


def code_stamp() -> str:
    """A hash of what is measured: kernels, C++ and CUDA sources, ops and losses. A copy of the
    checkout without git has no commit."""
    found = hashlib.sha256()
    for folder in ("csrc", "kernels", "pyrl/ops", "pyrl/losses"):
        for path in sorted((HERE.parent / folder).rglob("*")):
            if path.suffix in {".py", ".cpp", ".cu", ".cuh", ".h"}:
                found.update(path.relative_to(HERE.parent).as_posix().encode())
                found.update(path.read_bytes())
    return found.hexdigest()[:12]


def finished(folder: Path, device: str, code: str) -> set[str]:
    """Names of the parts that are done, on this device and with this code."""
    return {
        row["part"] for row in read_rows(folder / DONE)
        if row["status"] == "ok" and (row["device"], row["code"]) == (device, code)
    }  # fmt: skip


def record(folder: Path, part: str, status: str, seconds: float, **fields: Any) -> None:
    row = {"op": "gpu_check", "implementation": part, "part": part, "status": status,
           "seconds": round(seconds, 1), **fields}  # fmt: skip
    write_rows(folder / DONE, [row])


def culprits(folder: Path, device: str, code: str) -> set[tuple[str, str]]:
    """(part, implementation) at which a part hung or broke the device, with this code."""
    return {
        (row["part"], row["at"]) for row in read_rows(folder / DONE)
        if row.get("at") and (row["device"], row["code"]) == (device, code)
    }  # fmt: skip


def worker(
    results: Path, until: float, names: Sequence[str], without: Iterable[tuple[str, str]] = ()
) -> list[str]:
    left_out = [f"{part}:{name}" for part, name in sorted(without) if part in names]
    command = [sys.executable, str(HERE / "gpu_parts.py"), str(results), str(until), *names]
    return [*command, "--without", *left_out] if left_out else command


def _forward(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def end(process: subprocess.Popen[str]) -> None:
    """The process and what it started (pytest of a tests part)."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclasses.dataclass
class _Now:
    """What a worker is at: no part (it starts or is between parts), and since when."""

    limit: float
    part: Part | None = None
    at: str = ""
    began: float = dataclasses.field(default_factory=time.monotonic)


def supervise(
    parts: Sequence[Part],
    until: float,
    command: Callable[[Sequence[str]], list[str]],
    tell: Callable[[str, str, float, str, str], bool | None],
    start_seconds: float = START_SECONDS,
) -> None:
    """Runs the parts in order, in as few processes as it takes; `tell(part, status, seconds,
    reason, at)` once a part, status `ok`, `failed`, `broke` (the device), `timeout` or `skipped`
    (`until` is near); `at` is the implementation last begun. Where it returns True the part runs
    again."""
    left = {part.name: part for part in parts}

    def ended(now: _Now, status: str, reason: str) -> None:
        part = now.part or next(iter(left.values()))
        seconds = 0.0 if status == "skipped" else time.monotonic() - now.began
        if not tell(part.name, status, seconds, reason, now.at):
            left.pop(part.name)

    while left:
        process = subprocess.Popen(
            command(list(left)), stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
        now = _Now(limit=start_seconds)
        try:
            while left:
                try:
                    line = lines.get(timeout=max(0.0, now.began + now.limit - time.monotonic()))
                except queue.Empty:
                    ended(now, "timeout", f"ended at {now.limit:.0f} s")
                    break
                if line is None:
                    ended(now, "failed", f"the process ended with status {process.wait()}")
                    break
                word, _, rest = line.partition(" ")
                name, _, reason = rest.partition(" ")
                if word == "@begin":
                    now = _Now(part=left[name], limit=PATIENCE * left[name].seconds)
                elif word == "@at":
                    now.at = reason
                elif word == "@broke":
                    ended(now, "broke", reason)
                    break
                elif word in ("@end", "@failed", "@skip"):
                    now.part, now.at = left[name], ""
                    ended(now, {"@end": "ok", "@failed": "failed", "@skip": "skipped"}[word],
                          reason)  # fmt: skip
                    now = _Now(limit=start_seconds)
                else:
                    print(line, flush=True)
        finally:
            end(process)


def listing(parts: Sequence[Part], done: set[str]) -> None:
    rows = [
        [p.name, p.kind, f"{p.seconds:.0f}", f"{PATIENCE * p.seconds:.0f}",
         "done" if p.name in done else ""]
        for p in parts
    ]  # fmt: skip
    total = sum(p.seconds for p in parts if p.name not in done)
    columns = ("part", "kind", "seconds", "ended at", "state")
    print_cells("parts", columns, [*rows, ["all that is left", "", f"{total:.0f}", "", ""]], 2)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=[p.name for p in PARTS], metavar="NAME",
                        help="only these: " + " ".join(p.name for p in PARTS))  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts together")
    parser.add_argument("--again", action="store_true", help="run parts that are already done")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="what an earlier run left")
    parser.add_argument("--dry-run", action="store_true", help="list the parts and their budgets")
    args = parser.parse_args(given)
    out = Path(os.environ.get("OUT") or HERE / "results")
    if args.resume is not None:
        if not (args.resume / DONE).exists():
            parser.error(f"--resume {args.resume}: no {DONE} there")
        out.mkdir(parents=True, exist_ok=True)
        for name in (FILE, DONE):
            if args.resume.resolve() != out.resolve() and (args.resume / name).exists():
                shutil.copyfile(args.resume / name, out / name)
    cuda = torch.cuda.is_available()
    device, code = device_name("cuda" if cuda else "cpu"), code_stamp()
    done = set() if args.again else finished(out, device, code)
    wanted = [p for p in PARTS if not args.part or p.name in args.part]
    if args.dry_run:
        listing(wanted, done)
        return 0
    if not cuda:
        print(
            "gpu_check needs a CUDA device: torch.cuda.is_available() is False "
            f"(torch {torch.__version__}); the CPU benchmarks are `python benchmarks/run.py`",
            file=sys.stderr,
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    states: dict[str, str] = {}

    left_out = culprits(out, device, code)

    def tell(name: str, status: str, seconds: float, reason: str, at: str) -> bool:
        if at and status in ("broke", "timeout", "failed"):
            reason += f" (at {at})"
        print(f"== {name}: {status} {reason} ({seconds:.0f} s)", flush=True)
        again = status in ("broke", "failed") and bool(at) and (name, at) not in left_out
        if at and status != "ok":
            left_out.add((name, at))
        states[name] = status
        if status != "skipped":
            record(out, name, status, seconds, reason=reason, device=device, code=code, at=at)
        return again

    until = time.time() + 60 * args.minutes
    parts = [p for p in wanted if p.name not in done]
    supervise(parts, until, lambda names: worker(out / FILE, until, names, left_out), tell)
    summary = {s: [n for n, state in states.items() if state == s] for s in set(states.values())}
    print(json.dumps({"done before": len(done), **{k: len(v) for k, v in summary.items()}}))
    for part, name in sorted(left_out):
        print(f"left out: {name} of {part}, which hung or broke the device")
    for status in ("failed", "broke", "timeout", "skipped"):
        if status in summary:
            print(f"{status}: {' '.join(summary[status])}")
    if "skipped" in summary:
        print(f"run again with --resume {out} for what was not begun")
    return int(bool({"failed", "broke", "timeout"} & set(summary)))


if __name__ == "__main__":
    sys.exit(main())
