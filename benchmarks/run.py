"""The one entry to the benchmarks (`pyrl bench` and `make bench` start it).

    python benchmarks/run.py                          # under 20 minutes, then RESULTS.md
    python benchmarks/run.py --only trainer_step      # one of them
    python benchmarks/run.py --all                    # every cell and more rounds: hours
    python benchmarks/run.py --quick                  # seconds; proves the machinery, not the speed
    python benchmarks/run.py --static                 # GPU kernels, compiled and counted, no timing
    python benchmarks/run.py --only report            # RESULTS.md and the plots again, no timing

Results go to benchmarks/results/NAME.jsonl (quick ones to results/quick/), one object a line; a new
row replaces the older row of the same measurement. Ctrl-C keeps what is finished. Exit status: 0, 1
(a part broke; the others ran), 2 (bad arguments), 130 (interrupted).
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
import traceback
from pathlib import Path

from suite import CANNOT
from table import print_cells, terminal

BENCHMARKS = (
    "linear_policy_loss", "logits_policy_loss", "small_ops", "packing", "shared_prefix",
    "trainer_step", "memory",
)  # fmt: skip
HERE = Path(__file__).resolve().parent


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=(*BENCHMARKS, "report"), help="run one benchmark")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--all", action="store_true", help="every cell of every benchmark: hours")
    parser.add_argument("--static", action="store_true", help="GPU kernels without a GPU")
    parser.add_argument(
        "--rounds", type=int, help="rounds (steps of the trainers) instead of the default"
    )
    parser.add_argument("--implementations", nargs="+", help="only these rows of the registry")
    parser.add_argument("--out", type=Path, help="folder for the result files")
    args = parser.parse_args(given)
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")
    if args.implementations and not args.only:
        parser.error("--implementations names rows of one benchmark: give --only NAME too")
    if args.static and args.only:
        parser.error(f"--static and --only {args.only} are two different things: give one")
    return args


def cannot_write(folder: Path) -> str | None:
    """Why no file can be made in `folder`, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"--out {folder}: {error.strerror or error}"


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    console = terminal()
    out = args.out or HERE / "results" / ("quick" if args.quick else "")
    if problem := cannot_write(out):
        print(problem, file=sys.stderr)
        return 2
    names = tuple(args.implementations) if args.implementations else None
    chosen = [args.only] if args.only else [*BENCHMARKS]
    if args.static:
        chosen = ["static"]
    spent: dict[str, float] = {}
    broken: list[str] = []
    try:
        for benchmark in chosen:
            if benchmark == "report":
                continue
            began = time.perf_counter()
            module = importlib.import_module(benchmark)
            try:
                rows = module.run(
                    out, quick=args.quick, everything=args.all, rounds=args.rounds, names=names,
                    say=lambda text: console.print(f"[dim]{text}"),
                )  # fmt: skip
                getattr(module, "show", importlib.import_module("table").show)(rows)
            except CANNOT as error:
                if names and isinstance(error, ValueError):  # a name that no row has
                    print(error, file=sys.stderr)
                    return 2
                traceback.print_exc()
                broken.append(benchmark)
            spent[benchmark] = time.perf_counter() - began
        if not args.quick or args.only == "report":
            began = time.perf_counter()
            report = importlib.import_module("report")
            try:
                for path in report.write(out):
                    console.print(f"wrote {path}")
            except ValueError as error:  # nothing to report on, a line that is no JSON
                print(error, file=sys.stderr)
                return 2
            spent["report"] = time.perf_counter() - began
    except KeyboardInterrupt:
        print(f"interrupted; what was finished is in {out}", file=sys.stderr)
        return 130
    show_seconds(spent)
    if broken:
        print(f"broke (see above): {', '.join(broken)}", file=sys.stderr)
    return int(bool(broken))


def show_seconds(spent: dict[str, float]) -> None:
    """Where the time went."""
    total = sum(spent.values())
    rows = [[name, f"{seconds:.0f}", f"{seconds / total:.0%}"] for name, seconds in spent.items()]
    print_cells(
        "seconds", ("part", "seconds", "share"), [*rows, ["all", f"{total:.0f}", "100%"]], 1
    )


if __name__ == "__main__":
    raise SystemExit(main())
