"""Charts: scales, ticks, smoothing, colours, and curves.png."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyrl.trainer import charts, html
from pyrl.trainer.report import write_report
from pyrl.trainer.tracking import RunFolder

ROOT = Path(__file__).resolve().parents[2]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize(
    ("names", "rows"),
    [(["entropy"], 1), ([f"metric_{i}" for i in range(5)], 2), ([f"m{i}" for i in range(50)], 4)],
)
def test_curves_grow_with_the_number_of_charts(names: list[str], rows: int, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in range(1, 31):
        run.append_metrics({"step": step, "lr": 1e-5, **{n: step * len(n) for n in names}})
    write_report(run)
    assert png_size(run.curves_path) == (1512, 324 * rows)


@pytest.mark.parametrize(
    "metrics",
    [
        [{"step": 1}],
        [{"step": 1, "reward_mean": 0.0}],
        [{"step": 5, "loss": None, "grad_norm": 0.0}, {"step": 9, "loss": -1.0, "grad_norm": 9e9}],
        [{"step": 1, "$\\frac{$": 1.0, "reward_mean": 0.5, "heldout_mean": 0.5}],
    ],
)
def test_curves_of_odd_runs(metrics: list[dict[str, Any]], tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for m in metrics:
        run.append_metrics(m)
    write_report(run)
    assert png_size(run.curves_path) == (1512, 324)


def test_a_reading_starts_without_torch() -> None:
    """`pyrl report` should not wait for torch, so the modules beneath it must not import it."""
    code = (
        "import sys, types\n"
        "for name in ('pyrl', 'pyrl.trainer'):\n"
        "    module = types.ModuleType(name)\n"
        f"    module.__path__ = [{str(ROOT)!r} + '/' + name.replace('.', '/')]\n"
        "    sys.modules[name] = module\n"
        "import pyrl.trainer.report, pyrl.trainer.console, pyrl.trainer.tracking\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_that_wcag_asks_for(theme: int) -> None:
    css = (html.PAGE / "page.css").read_text()
    pairs = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\);", css)
    colours = {name: pair[theme] for name, *pair in pairs}
    for surface in ("page", "card", "sunk"):
        for name in ("ink", "soft", "accent", "good", "warn"):
            # WCAG 2.2, 1.4.3: 4.5:1 for text of ordinary size.
            assert contrast(colours[name], colours[surface]) >= 4.5, (name, surface)
    for name in (f"c{i}" for i in range(8)):
        # WCAG 2.2, 1.4.11: 3:1 for the parts of a graphic.
        assert contrast(colours[name], colours["card"]) >= 3, name


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, ["0", "0.5", "1.0"]),
        (0.21, 0.83, ["0.4", "0.6", "0.8"]),
        (0, 28.3, ["0", "10", "20"]),
        (0, 2930, ["0", "1,000", "2,000"]),
        (-0.034, 0.004, ["−0.03", "−0.02", "−0.01", "0"]),
        (0, 2.4e-5, ["0", "1e−5", "2e−5"]),
    ],
)
def test_ticks_are_round_and_fit_their_labels(low: float, high: float, expected: list[str]) -> None:
    axis = charts.Axis([low, high], zero=low == 0)
    assert [text for _, text in axis.labels()] == expected
    assert all(0 <= at <= 100 for at, _ in axis.labels())


def test_log_axes() -> None:
    axis = charts.Axis([0.5, 30.0], log=True)
    assert [text for _, text in axis.labels()] == ["0.5", "1", "2", "5", "10", "20"]
    assert [text for _, text in charts.Axis([1e-7, 10.0], log=True).labels()] == [
        "1e−7", "1e−5", "0.001", "0.1", "10",
    ]  # fmt: skip
    assert not charts.Axis([0.0, 30.0], log=True).log  # no logarithm of 0
    assert not charts.Axis([1.0, 2.0], log=True).log


def test_smoothing_starts_unbiased_and_keeps_gaps() -> None:
    flat = [(float(i), 2.0 if i != 5 else math.nan) for i in range(30)]
    smoothed = charts.smooth(flat)
    assert [y for _, y in smoothed if not math.isnan(y)] == pytest.approx([2.0] * 29, rel=1e-12)
    assert math.isnan(smoothed[5][1])
    assert charts.smooth(flat[:8]) == []


def test_thinning_keeps_the_extremes_of_every_bin() -> None:
    line = [(float(i), math.sin(i)) for i in range(5000)] + [(5000.0, math.nan)]
    line[1234] = (1234.0, 99.0)
    line[4321] = (4321.0, -99.0)
    thinned = charts.thin(line, 400)
    assert len(thinned) <= 402
    assert (1234.0, 99.0) in thinned and (4321.0, -99.0) in thinned
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)


def test_a_gap_lifts_the_pen() -> None:
    line = [(0.0, 0.0), (1.0, math.nan), (2.0, 1.0), (3.0, 0.0)]
    path = charts.svg_path(line, charts.Steps(0, 3), charts.Axis([0.0, 1.0], zero=True))
    assert path == "M0.00 100.00M66.67 4.76L100.00 100.00"


def test_the_rewards_of_domains_are_one_chart(tmp_path):
    run = RunFolder(tmp_path / "run").make()
    run.write_config('[task.mix.code]\n[task.mix.logic]\ntask = "letters"\n')
    for step in range(1, 21):
        rewards = {"reward_logic": step / 20, "reward_code": 0.5 - step / 40, "reward_mean": 0.5}
        run.append_metrics({"step": step, **rewards})
    page = write_report(run.path).read_text()
    assert "reward logic" not in page
    chart = page[page.index("Reward by domain") :]
    assert chart.index("code") < chart.index("logic")
