"""What packing did to a step, to look at: `describe` its rows for packing.json, `picture` them for
report.html, `draw` them with matplotlib.

A row is drawn from left to right in the order of its tokens, in the colour of the prompt they
belong to: full colour where several samples share a token, half where it is a prompt's and one
sample's, light for completions. Nothing here imports torch, nor matplotlib before it draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrl.trainer.charts import label, nice_ticks

if TYPE_CHECKING:
    from pyrl.packing import PackedBatch

MAX_ROWS = 24
MAX_SEGMENTS = 2000

#: A prompt's colour each, in turn: 0.08 apart in OKLab, and neighbours 0.12, for the common kinds
#: of colour vision. page.css has them too, and their twins for a dark page.
PALETTE = (
    "#1841b2", "#bc7c2d", "#7f63cf", "#4e0e6a", "#79466e", "#b72a0c", "#641d04", "#1f837f",
)  # fmt: skip
#: Of these, the one that white text cannot be read on.
PALE = PALETTE[1]
#: Tokens that samples of several prompts share.
NEUTRAL = "#6b7280"
#: How much of its colour a token has: shared, of a prompt but one sample's, of a completion.
STRENGTH = {"shared": 1.0, "alone": 0.45, "completion": 0.22}


def describe(
    batches: Iterable[PackedBatch], max_rows: int = MAX_ROWS, max_segments: int = MAX_SEGMENTS
) -> dict[str, Any]:
    """The rows of `batches`, in their order, as JSON can hold them.

    `tokens` computed, `sample_tokens` (what `tokens` would be if no prefix were shared), `samples`,
    `rows`, `capacity` (None where rows differ in it), and `shown`: of the first rows their
    `tokens`, `samples` and `segments`, each segment [start, length, group, depth, samples, prompt].

    `group` numbers the prompts in order of appearance, -1: samples of several prompts; `depth`
    counts the segments above; `samples` pass through the segment, 1 = it is not shared; the first
    `prompt` of its `length` tokens are a prompt's. At most `max_rows` rows and `max_segments`
    segments are shown, the last row perhaps cut short, but the totals are those of all rows.
    """
    rows = [row for batch in batches for row in batch]
    groups: dict[bytes, int] = {}
    shown: list[dict[str, Any]] = []
    room = max_segments
    for row in rows[:max_rows]:
        if room <= 0:
            break
        segments = _segments(row, groups)[:room]
        room -= len(segments)
        shown.append({"tokens": row.num_tokens, "samples": row.num_sequences, "segments": segments})
    capacities = {row.capacity for row in rows}
    return {
        "tokens": sum(row.num_tokens for row in rows),
        "sample_tokens": sum(row.sample_tokens for row in rows),
        "samples": sum(row.num_sequences for row in rows),
        "rows": len(rows),
        "capacity": capacities.pop() if len(capacities) == 1 else None,
        "shown": shown,
    }


def _segments(row: PackedBatch, groups: dict[bytes, int]) -> list[list[int]]:
    """The segments of one row; `groups` numbers the prompts met so far."""
    tokens = row.tokens.cpu().numpy()
    starts, parents = row.segment_starts.tolist(), row.segment_parents.tolist()
    leaves, prompts = row.sequence_segments.tolist(), row.prompt_lengths.tolist()
    count = len(parents)
    begin, depth = [0] * count, [0] * count  # preorder: a parent comes before its children
    for g, parent in enumerate(parents):
        if parent >= 0:
            begin[g] = begin[parent] + starts[parent + 1] - starts[parent]
            depth[g] = depth[parent] + 1

    through, prompt_end = [0] * count, [2**62] * count
    group: list[int | None] = [None] * count

    def add(g: int, samples: int, of: int | None, end: int) -> None:
        through[g] += samples
        group[g] = of if group[g] in (None, of) else -1
        prompt_end[g] = min(prompt_end[g], end)

    for leaf, length in zip(leaves, prompts, strict=True):
        path, at = [], leaf
        while at >= 0:
            path.append(at)
            at = parents[at]
        pieces = [
            tokens[starts[g] : min(starts[g + 1], starts[g] + max(0, length - begin[g]))]
            for g in reversed(path)
        ]
        key = np.concatenate(pieces).tobytes()
        add(leaf, 1, groups.setdefault(key, len(groups)), length)
    for g in reversed(range(count)):
        if parents[g] >= 0:
            add(parents[g], through[g], group[g], prompt_end[g])
    found = []
    for g, (start, stop) in enumerate(itertools.pairwise(starts)):
        of_prompt = min(max(0, prompt_end[g] - begin[g]), stop - start)
        named = group[g]
        assert named is not None, "a segment that no sample passes through"
        found.append([start, stop - start, named, depth[g], through[g], of_prompt])
    return found


# -- reading --------------------------------------------------------------------------------------


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < 2**53:
        raise ValueError(f"{str(value)[:40]!r} is no count")
    return value


def checked(value: Any) -> dict[str, Any]:
    """A description read from a file, its numbers checked; ValueError for anything else."""
    try:
        out: dict[str, Any] = {
            k: _number(value[k]) for k in ("tokens", "sample_tokens", "samples", "rows")
        }
        capacity = value["capacity"]
        out["step"] = _number(value.get("step", -1))
        shown: list[dict[str, Any]] = [
            {
                "tokens": _number(row["tokens"]),
                "samples": _number(row["samples"]),
                "segments": [
                    tuple(map(_number, segment))
                    for segment in itertools.islice(row["segments"], MAX_SEGMENTS)
                ],
            }
            for row in itertools.islice(value["shown"], MAX_ROWS)
        ]
        if not shown or any(len(s) != 6 for row in shown for s in row["segments"]):
            raise ValueError("no rows, or segments that are not six numbers")
        capacity = None if capacity is None else _number(capacity)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a description of packed rows: {error!r}") from None
    return {**out, "capacity": capacity, "shown": shown}


def views(packing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the report draws of packing.json: the latest step, then the first if it is another;
    nothing of an empty one. ValueError when it is not what the trainer writes."""
    if not packing:
        return []
    latest, first = (checked(packing.get(name)) for name in ("latest", "first"))
    return [picture(step) for step in ([latest] if first == latest else [latest, first])]


# -- drawing --------------------------------------------------------------------------------------


def _boxes(segment: Sequence[int]) -> list[tuple[str, int, int]]:
    """(kind, start, length) of the segment's parts of one strength."""
    start, length, _, _, samples, prompt = segment
    if samples > 1:
        return [("shared", start, length)]
    parts = [("alone", start, prompt), ("completion", start + prompt, length - prompt)]
    return [part for part in parts if part[2] > 0]


def _width(description: Mapping[str, Any]) -> int:
    """Tokens that the drawing is wide."""
    longest = max(row["tokens"] for row in description["shown"])
    return max(1, longest, description["capacity"] or 0)


def _words(segment: Sequence[int]) -> str:
    _, length, group, _, samples, prompt = segment
    name = f"prompt {group + 1}" if group >= 0 else "several prompts"
    if samples > 1:
        return f"{name}: {_count(length, 'token')}, shared by {samples:,} samples"
    rest = length - prompt
    parts = [f"{prompt:,} prompt"] * (prompt > 0) + [f"{rest:,} completion"] * (rest > 0)
    last = rest or prompt
    return f"{name}: {' and '.join(parts)} token{'s' if last != 1 else ''} of one sample"


def _count(n: int, what: str) -> str:
    """`1 row`, `2,048 tokens`."""
    return f"{n:,} {what}{'s' if n != 1 else ''}"


def sentence(description: Mapping[str, Any]) -> str:
    """`1,812 of 4,920 tokens computed (37%), prompts once per row`."""
    computed, whole = description["tokens"], description["sample_tokens"]
    if computed >= whole:
        return f"{computed:,} tokens computed, none of them shared"
    share = computed / whole
    return f"{computed:,} of {whole:,} tokens computed ({share:.0%}), prompts once per row"


def _room(description: Mapping[str, Any]) -> str:
    """`3 rows of at most 2,048 tokens, 96% filled`."""
    rows, capacity = description["rows"], description["capacity"]
    text = _count(rows, "row")
    if not capacity:
        return text
    filled = description["tokens"] / (max(1, rows) * capacity)
    return f"{text} of at most {capacity:,} tokens, {filled:.0%} filled"


def left_out(description: Mapping[str, Any]) -> str:
    """What is not drawn, in words; empty when everything is."""
    shown = description["shown"]
    rows = description["rows"] - len(shown)
    cut = sum(row["tokens"] - sum(segment[1] for segment in row["segments"]) for row in shown)
    parts = [_count(rows, "more row")] * (rows > 0)
    parts += [f"{_count(cut, 'token')} of the last row drawn"] * (cut > 0)
    return f"Not drawn: {' and '.join(parts)}." if parts else ""


def picture(description: Mapping[str, Any]) -> dict[str, Any]:
    """What the template draws of a `checked` description; lengths in per cent of the width."""
    scale = 100 / _width(description)
    rows, kinds = [], set()
    for row in description["shown"]:
        pieces = []
        for segment in row["segments"]:
            boxes = _boxes(segment)
            kinds |= {"several" if segment[2] < 0 else kind for kind, _, _ in boxes}
            head = boxes[0] if boxes and boxes[0][0] != "completion" else None
            named = head is not None and segment[2] >= 0 and head[2] * scale >= 2.4
            pieces.append(
                {
                    "group": segment[2],
                    "colour": f"p{segment[2] % len(PALETTE)}" if segment[2] >= 0 else "several",
                    "title": _words(segment),
                    "boxes": [
                        (kind, round(start * scale, 3), round(length * scale, 3))
                        for kind, start, length in boxes
                    ],
                    "name": (round((head[1] + head[2] / 2) * scale, 3), head[0])
                    if named and head
                    else None,
                }
            )
        rows.append({"width": round(row["tokens"] * scale, 3), "pieces": pieces})
    ticks = nice_ticks(0, 100 / scale, 5)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else None
    return {
        "step": description["step"],
        "sentence": sentence(description),
        "room": _room(description),
        "left_out": left_out(description),
        "rows": rows,
        "kinds": kinds,
        "edge": round(description["capacity"] * scale, 3) if description["capacity"] else None,
        "x": [(round(t * scale, 3), label(t, step)) for t in ticks],
        "y": [(round(100 * (1 - (i + 0.5) / len(rows)), 3), str(i + 1)) for i in range(len(rows))],
    }


def mixed(colour: str, strength: float) -> str:
    """`colour` over white."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 + (part - 255) * strength):02x}" for part in parts)


def draw(axes: Any, description: Mapping[str, Any], *, names: bool = True) -> None:
    """The rows on matplotlib `axes`: tokens to the right, the first row on top.

    `names`: the number of its prompt stands on every stretch that is wide enough for it.
    """
    from matplotlib.collections import PolyCollection

    width, rows = _width(description), description["shown"]
    corners, colours = [], []
    for i, row in enumerate(rows):
        for segment in row["segments"]:
            full = PALETTE[segment[2] % len(PALETTE)] if segment[2] >= 0 else NEUTRAL
            for kind, start, length in _boxes(segment):
                x, y = (start, start + length), (i + 0.07, i + 0.93)
                corners.append([(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])])
                colours.append(mixed(full, STRENGTH[kind]))
                if names and kind != "completion" and segment[2] >= 0 and length > 0.03 * width:
                    dark = kind != "shared" or full == PALE
                    axes.text(
                        start + length / 2, i + 0.52, str(segment[2] + 1),
                        ha="center", va="center", fontsize=6.5,
                        color="#171b22" if dark else "white", fontweight="bold",
                    )  # fmt: skip
    axes.add_collection(
        PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=0.4)
    )
    if description["capacity"]:
        axes.axvline(description["capacity"], color="#565f6d", linewidth=1, linestyle=(0, (3, 2)))
    axes.set_xlim(0, width * 1.004)
    axes.set_ylim(len(rows), 0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8, length=0, colors="#3b4350")
