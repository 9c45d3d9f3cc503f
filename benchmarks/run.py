"""The one entry to the benchmarks.

    python benchmarks/run.py                          # everything (minutes), then RESULTS.md
    python benchmarks/run.py --only trainer_step      # one of them
    python benchmarks/run.py --quick                  # seconds; proves the machinery, not the speed
    python benchmarks/run.py --only report            # RESULTS.md and the plots again, no timing

Results go to benchmarks/results/NAME.jsonl (quick ones to results/quick/), one object a line; a new
row replaces the older row of the same measurement.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from table import terminal

BENCHMARKS = (
    "linear_policy_loss", "small_ops", "packing", "shared_prefix", "trainer_step", "memory",
)  # fmt: skip
HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=(*BENCHMARKS, "report"), help="run one benchmark")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument(
        "--rounds", type=int, help="rounds (steps of the trainers) instead of the default"
    )
    parser.add_argument("--implementations", nargs="+", help="only these rows of the registry")
    parser.add_argument("--out", type=Path, help="folder for the result files")
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")

    if args.implementations and not args.only:
        parser.error("--implementations names rows of one benchmark: give --only NAME too")

    console = terminal()
    out = args.out or HERE / "results" / ("quick" if args.quick else "")
    names = tuple(args.implementations) if args.implementations else None
    for benchmark in (args.only,) if args.only else BENCHMARKS:
        if benchmark == "report":
            continue
        began = time.perf_counter()
        module = importlib.import_module(benchmark)
        rows = module.run(
            out, quick=args.quick, rounds=args.rounds, names=names,
            say=lambda text: console.print(f"[dim]{text}"),
        )  # fmt: skip
        getattr(module, "show", importlib.import_module("table").show)(rows)
        console.print(f"{benchmark}: {time.perf_counter() - began:.0f} s")
    if not args.quick:
        report = importlib.import_module("report")
        for path in report.write(out):
            console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
