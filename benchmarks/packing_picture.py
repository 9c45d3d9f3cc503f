"""What packing does to a batch shaped like Temporal Clue's: docs/images/packing.png.

    python benchmarks/packing_picture.py [--out PATH]

A picture and two counts, not a timing, so it is not one of run.py's benchmarks. 6 prompts of about
1,220 tokens with 50 completions of about 1,000 each, in rows of 16,384 tokens: every sample with
its own prompt on the left, shared prefixes on the right, at the same scale.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from pyrl import Sample, pack
from pyrl.trainer.packing_view import PALETTE, STRENGTH, describe, draw, mixed

PROMPTS, COMPLETIONS, CAPACITY = 6, 50, 16_384
OUT = Path(__file__).resolve().parents[1] / "docs/images/packing.png"


def batch(seed: int = 0) -> list[Sample]:
    """PROMPTS x COMPLETIONS samples; P ~ N(1220, 250), C log-normal of median 900, mean 1,000."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(PROMPTS):
        prompt = rng.integers(0, 100_000, max(200, round(rng.normal(1220, 250))))
        sizes = np.clip(rng.lognormal(math.log(900), 0.46, COMPLETIONS), 16, 4096).astype(int)
        found += [Sample(prompt, rng.integers(0, 100_000, size)) for size in sizes]
    return found


def describe_both() -> dict[str, dict[str, Any]]:
    """The whole batch packed plain and with shared prefixes."""
    samples, out = batch(), {}
    for name, share in (("plain", False), ("shared", True)):
        packed = pack(samples, CAPACITY, share_prefix=share, aligned=False)
        # Rows of the same prompts stand together: those of a plan have no order of their own.
        rows = sorted(packed, key=lambda row: int(row.sequence_ids.min()))
        out[name] = describe(rows, max_rows=10_000, max_segments=1_000_000)
    return out


def plot(path: Path) -> dict[str, dict[str, Any]]:
    """Draws both panels into `path`; returns what it drew."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    both = describe_both()
    plain, shared = both["plain"], both["shared"]
    tall = max(plain["rows"], shared["rows"])
    figure = Figure(figsize=(12.5, 1.3 + 0.165 * tall), dpi=130)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, wspace=0.03)
    left, right = figure.subplots(1, 2, sharey=True, sharex=True)
    for axes, view, title in (
        (left, plain, "Plain: every sample has its own prompt"),
        (right, shared, "Shared: every prompt once a row"),
    ):
        draw(axes, view)
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=24)
        axes.annotate(
            f"{view['tokens']:,} tokens computed in {view['rows']} rows",
            xy=(0, 1), xycoords="axes fraction", xytext=(0, 8), textcoords="offset points",
            fontsize=9.5, color="#3b4350",
        )  # fmt: skip
        axes.set_xlabel(f"tokens of a row, at most {CAPACITY:,}", fontsize=9, color="#3b4350")
        axes.set_xticks(
            range(0, CAPACITY + 1, 4096), [f"{t:,}" for t in range(0, CAPACITY + 1, 4096)]
        )
    left.set_ylim(tall, 0)
    left.set_yticks([i + 0.5 for i in range(4, tall, 5)], [str(i + 1) for i in range(4, tall, 5)])
    left.set_ylabel("row", fontsize=9, color="#3b4350")
    colour = PALETTE[0]
    right.legend(
        handles=[
            Patch(color=colour, label="prompt, computed once for several samples"),
            Patch(color=mixed(colour, STRENGTH["alone"]), label="prompt of one sample"),
            Patch(color=mixed(colour, STRENGTH["completion"]), label="completion of one sample"),
        ],
        title=f"{PROMPTS} prompts (colour, number), {COMPLETIONS} samples each",
        title_fontsize=9.5, fontsize=9, frameon=False, alignment="left", loc="lower left",
        borderaxespad=0,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    for name, view in plot(out).items():
        print(f"{name}: {view['tokens']:,} tokens in {view['rows']} rows")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
