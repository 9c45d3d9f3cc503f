"""What packing did to a step: described, kept, read back, drawn."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyrl.packing import PackedBatch, Sample, pack
from pyrl.trainer import html, packing_view, report, tracking
from pyrl.trainer.packing_view import PALETTE, checked, describe, draw, picture, sentence, views
from pyrl.trainer.report import write_report
from pyrl.trainer.tracking import RunFolder

A, B = [11, 12, 13, 14], [21, 22]


def two_prompts(a: list[int] = A, b: list[int] = B) -> list[Sample]:
    """Three samples of prompt a, two of prompt b; 24 tokens."""
    return [
        Sample(a, [1, 1]), Sample(a, [2]), Sample(a, [3, 3]), Sample(b, [4]), Sample(b, [5, 5]),
    ]  # fmt: skip


def random_samples(seed: int) -> list[Sample]:
    """Prompts of 1 to 9 tokens out of few, completions of 0 to 6: all kinds of trees."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 3, rng.integers(1, 10)).tolist() for _ in range(5)]
    return [
        Sample(prompts[rng.integers(5)], rng.integers(0, 2, rng.integers(0, 7)).tolist())
        for _ in range(30)
    ]


def rows_off(samples: list[Sample]) -> list[PackedBatch]:
    return [pack([s], len(s.prompt) + len(s.completion), aligned=False) for s in samples]


# -- describe -------------------------------------------------------------------------------------


def test_a_shared_row_by_hand() -> None:
    found = describe([pack(two_prompts(), 32, aligned=False)])
    (row,) = found.pop("shown")
    assert found == {"tokens": 14, "sample_tokens": 24, "samples": 5, "rows": 1, "capacity": 32}
    assert (row["tokens"], row["samples"]) == (14, 5)
    #           start, length, group, depth, samples, prompt tokens
    by_group: dict[int, list[list[int]]] = {}
    for segment in row["segments"]:
        by_group.setdefault(segment[2], []).append(segment)
    first, second = sorted(by_group.values(), key=lambda s: -s[0][4])
    assert [s[1:2] + s[3:] for s in first] == [
        [4, 0, 3, 4], [2, 1, 1, 0], [1, 1, 1, 0], [2, 1, 1, 0],
    ]  # fmt: skip
    assert [s[1:2] + s[3:] for s in second] == [[2, 0, 2, 2], [1, 1, 1, 0], [2, 1, 1, 0]]
    assert {first[0][2], second[0][2]} == {0, 1}


def test_a_plain_row_by_hand() -> None:
    (row,) = describe([pack(two_prompts(), 32, share_prefix=False, aligned=False)])["shown"]
    found = sorted(segment[1:2] + segment[3:] for segment in row["segments"])
    assert found == [[3, 0, 1, 2], [4, 0, 1, 2], [5, 0, 1, 4], [6, 0, 1, 4], [6, 0, 1, 4]]
    assert {segment[2] for segment in row["segments"]} == {0, 1}


def test_a_beginning_of_several_prompts_belongs_to_none() -> None:
    system = [7, 8, 9]
    (row,) = describe([pack(two_prompts(system + A, system + B), 40, aligned=False)])["shown"]
    assert row["segments"][0] == [0, 3, -1, 0, 5, 3]
    assert all(s[2] >= 0 and s[3] > 0 for s in row["segments"][1:])


def test_packing_off_has_rows_of_their_own() -> None:
    found = describe(rows_off(two_prompts()))
    assert found["capacity"] is None and found["rows"] == 5
    assert [row["segments"][0][1:] for row in found["shown"]] == [
        [6, 0, 0, 1, 4], [5, 0, 0, 1, 4], [6, 0, 0, 1, 4], [3, 1, 0, 1, 2], [4, 1, 0, 1, 2],
    ]  # fmt: skip


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("mode", ["shared", "plain", "off"])
@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_somewhere(mode: str, aligned: bool, seed: int) -> None:
    samples = random_samples(seed)
    batches = (
        [pack([s], 20, aligned=aligned) for s in samples]
        if mode == "off"
        else [pack(samples, 20, share_prefix=mode == "shared", aligned=aligned)]
    )
    found = describe(batches, max_rows=1000)
    assert found["sample_tokens"] == sum(len(s.prompt) + len(s.completion) for s in samples)
    assert found["samples"] == len(samples) == sum(row["samples"] for row in found["shown"])
    weighed = prompts = 0
    for row in found["shown"]:
        end = 0
        for start, length, group, depth, through, prompt in row["segments"]:
            assert start == end and 0 <= prompt <= length and through >= 1 and depth >= 0
            assert group >= 0 or through > 1
            end, weighed = start + length, weighed + length * through
            prompts = max(prompts, group + 1)
        assert end == row["tokens"]
    assert weighed == found["sample_tokens"]
    assert prompts <= len({tuple(s.prompt) for s in samples})  # type: ignore[arg-type]
    if mode != "shared":
        assert found["tokens"] == found["sample_tokens"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("aligned", [False, True])
def test_a_sample_is_the_path_to_its_segment(aligned: bool) -> None:
    samples = random_samples(3)
    for row in pack(samples, 20, aligned=aligned):
        for sample, leaf in zip(
            row.sequence_ids.tolist(), row.sequence_segments.tolist(), strict=True
        ):
            path, at = [], leaf
            while at >= 0:
                path.insert(0, row.tokens[row.segment_starts[at] : row.segment_starts[at + 1]])
                at = int(row.segment_parents[at])
            expected = [*samples[sample].prompt, *samples[sample].completion]
            assert torch.cat(path).tolist() == expected


def test_what_is_shown_is_bounded_and_the_totals_are_not() -> None:
    rows = rows_off(two_prompts() * 20)
    found = describe(rows)
    assert (found["rows"], len(found["shown"])) == (100, packing_view.MAX_ROWS)
    assert found["tokens"] == 480
    assert picture(checked(found))["left_out"] == "Not drawn: 76 more rows."
    (row,) = (cut := describe([pack(two_prompts(), 32, aligned=False)], max_segments=3))["shown"]
    assert len(row["segments"]) == 3 and row["tokens"] == 14
    left = 14 - sum(segment[1] for segment in row["segments"])
    assert picture(checked(cut))["left_out"] == f"Not drawn: {left} tokens of the last row drawn."
    assert describe([])["shown"] == []


# -- packing.json ---------------------------------------------------------------------------------


def step(number: int, samples: list[Sample] | None = None) -> dict[str, Any]:
    batch = pack(two_prompts() if samples is None else samples, 32, aligned=False)
    return {"step": number, **describe([batch])}


def steps(folder: RunFolder) -> tuple[int, int]:
    found = json.loads(folder.packing_path.read_bytes())
    return found["first"]["step"], found["latest"]["step"]


def test_the_first_and_the_latest_step_are_kept(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for number in (1, 2, 3):
        run.write_packing(step(number))
    assert steps(run) == (1, 3)
    resumed = RunFolder(tmp_path)
    resumed.write_packing(step(3))
    assert steps(resumed) == (1, 3)
    again = RunFolder(tmp_path)
    again.write_packing(step(1))
    assert steps(again) == (1, 1)


@pytest.mark.parametrize("held", ["{", "[]", "[[", '{"first": 3}', '{"first": {"step": "x"}}'])
def test_a_damaged_file_is_written_anew(tmp_path: Path, held: str) -> None:
    run = RunFolder(tmp_path)
    run.packing_path.write_text(held)
    run.write_packing(step(4))
    assert steps(run) == (4, 4)


def test_a_full_disk_keeps_one_version_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    run, real, tried = RunFolder(tmp_path, told.append), tracking.write_atomic, []

    def full(path: Path, data: bytes) -> None:
        tried.append(len(data))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking, "write_atomic", full)
    for number in range(1, 6):
        run.write_packing(step(number))
    assert len(told) == 1 and "packing.json could not be written: No space left" in told[0]
    assert max(tried) < 2 * min(tried)
    monkeypatch.setattr(tracking, "write_atomic", real)
    run.flush()
    assert steps(run) == (1, 5) and len(told) == 2
    run.close()
    assert len(told) == 2


GOOD = {"first": step(1), "latest": step(2)}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("latest",), None),
        (("latest",), []),
        (("first",), "<script>"),
        (("latest", "tokens"), "<script>"),
        (("latest", "tokens"), float("nan")),
        (("latest", "rows"), True),
        (("latest", "capacity"), "2,048"),
        (("latest", "step"), "</p>"),
        (("latest", "shown"), []),
        (("latest", "shown"), 7),
        (("latest", "shown", 0, "segments"), [[0, 1, 2]]),
        (("latest", "shown", 0, "segments"), [[0, "<b>", 2, 0, 1, 1]]),
        (("latest", "shown", 0, "segments"), [[0, -5, 2, 0, 1, 1]]),
        (("latest", "shown", 0, "segments"), [[0, 10**400, 2, 0, 1, 1]]),
    ],
)
def test_what_the_trainer_does_not_write_is_no_picture(path: tuple[Any, ...], value: Any) -> None:
    packing: Any = copy.deepcopy(GOOD)
    at = packing
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ValueError, match=r"is no count|description of packed rows|six numbers"):
        views(packing)


def test_views() -> None:
    assert views({}) == []
    latest, first = views(GOOD)
    assert (latest["step"], first["step"]) == (2, 1)
    assert len(views({"first": step(1), "latest": step(1)})) == 1


# -- the report -----------------------------------------------------------------------------------


class Titles(HTMLParser):
    """The <title> texts and the rects of a page's packing section."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.inside, self.titles, self.rects = False, [""][:0], [{}][:0]
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "title"
        if tag == "rect":
            self.rects.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.titles.append(data)
            self.inside = False


def numberless(titles: list[str]) -> list[str]:
    """Sorted, without `prompt N`: the order of a row's prompts is the planner's."""
    return sorted(re.sub(r"^prompt [12]: ", "", title) for title in titles)


def section(folder: RunFolder) -> str:
    """The report's section as HTML, "" without one."""
    page = write_report(folder).read_text("utf-8")
    found = re.search(r"<h2>Packing</h2>.*?(?=<h2>)", page, re.DOTALL)
    return found[0] if found else ""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(report, "write_curves", lambda *_: None)
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1, "reward_mean": 0.5, "tokens": 14, "shared_tokens": 10})
    return folder


def test_the_section(run: RunFolder) -> None:
    run.write_packing(step(1))
    run.write_packing(step(2))
    html_of_it = section(run)
    assert "Step 2: 14 of 24 tokens computed (58%), prompts once per row. " in html_of_it
    assert "1 row of at most 32 tokens, 44% filled." in html_of_it
    assert "The rows of step 1" in html_of_it
    found = Titles(html_of_it)
    assert numberless(found.titles[: len(found.titles) // 2]) == [
        *["1 completion token of one sample"] * 2,
        *["2 completion tokens of one sample"] * 3,
        "2 tokens, shared by 2 samples",
        "4 tokens, shared by 3 samples",
    ]
    widths = [float(str(r["width"]).rstrip("%")) for r in found.rects if r["class"] != "track"]
    assert sum(widths) == pytest.approx(2 * 100 * 14 / 32, abs=0.05)


def test_old_runs_and_runs_without_a_row_have_none(run: RunFolder) -> None:
    assert section(run) == ""
    assert "Unreadable" not in run.report_path.read_text("utf-8")


@pytest.mark.parametrize("held", ["{", "[]", json.dumps({**GOOD, "latest": {"step": "<script>"}})])
def test_a_damaged_file_costs_the_section_and_is_said(run: RunFolder, held: str) -> None:
    run.packing_path.write_text(held)
    assert section(run) == ""
    page = run.report_path.read_text("utf-8")
    assert "Unreadable in packing.json" in page and 'step": "<script>' not in page


def test_tokens_are_a_chart(run: RunFolder) -> None:
    run.append_metrics({"step": 2, "tokens": 15, "shared_tokens": 9})
    page = write_report(run).read_text("utf-8")
    assert "<b>Tokens of the update</b>" in page
    assert "computed from 14 at step 1 to 15 at step 2; shared from 10 at step 1 to 9" in page


def test_words() -> None:
    whole = step(1, [Sample(A, [1]), Sample(B, [2])])
    assert sentence(whole) == "8 tokens computed, none of them shared"
    (row,) = picture(checked(whole))["rows"]
    assert numberless([piece["title"] for piece in row["pieces"]]) == [
        "2 prompt and 1 completion token of one sample",
        "4 prompt and 1 completion token of one sample",
    ]


# -- looks ----------------------------------------------------------------------------------------


def test_draw() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw(axes, step(1))
    (drawn,) = axes.collections
    assert len(drawn.get_paths()) == 7
    boxes = [path.get_extents() for path in drawn.get_paths()]
    assert sum(box.width for box in boxes) == pytest.approx(14)
    assert {text.get_text() for text in axes.texts} == {"1", "2"}


def colours(theme: int) -> tuple[list[str], str]:
    css = (html.PAGE / "page.css").read_text()
    found = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\);", css)
    pairs = {name: pair for name, *pair in found}
    return [pairs[f"p{i}"][theme] for i in range(len(PALETTE))], pairs["card"][theme]


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


#: Linear sRGB as seen with full deuteranopia, protanopia and tritanopia (Machado et al. 2009).
SEEN = {
    "all": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Linear sRGB -> OKLab (Ottosson 2020), where distances are about as large as they look."""
    lms = np.cbrt(
        np.array(
            [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
             [0.0883024619, 0.2817188376, 0.6299787005]]) @ np.clip(rgb, 0, 1)
    )  # fmt: skip
    return np.array(
        [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]]) @ lms  # fmt: skip


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("seen", SEEN)
def test_prompts_are_told_apart(theme: int, seen: str) -> None:
    palette, card = colours(theme)
    if theme == 0:
        assert tuple(palette) == PALETTE
    n = len(palette)
    points = [oklab(SEEN[seen] @ linear(c)) for c in palette]
    away = [np.linalg.norm(points[i] - points[j]) for i in range(n) for j in range(i)]
    assert min(away) >= 0.08  # about four times what is just noticed side by side
    assert min(np.linalg.norm(points[i] - points[(i + 1) % n]) for i in range(n)) >= 0.12
    weights = np.array([0.2126, 0.7152, 0.0722])
    for colour in palette:
        low, high = sorted(float(weights @ linear(c)) for c in (colour, card))
        assert (high + 0.05) / (low + 0.05) >= 3, colour  # WCAG 2.2, 1.4.11
