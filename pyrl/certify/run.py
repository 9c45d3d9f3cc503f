"""Runs the certificate's rows and peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from pyrl.certify import advantages, cases, formulas, peers
from pyrl.certify.batches import MISSING, PADDED, RAGGED, SHAPES, SUPPORTS, Shape
from pyrl.certify.measure import linear_row, objective_row
from pyrl.certify.rule import Row, interpreted
from pyrl.ops.backend import TABLE, backends
from pyrl.ops.spec import LossSpec
from pyrl.parity import DEVICE, serving

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Half-precision rows are means over this many batches (options; heads, shapes and supports): in a
#: batch of 17 kept tokens a handful of roundings decides, and each is a draw.
BATCHES = (2, 8)
#: The options that the quick run tries.
QUICK = ("none", cases.BOTH, "all at once")


@dataclasses.dataclass
class Certificate:
    """Every row, what the peers compute, and why a backend has no column."""

    rows: list[Row]
    peers: list[peers.Comparison]
    columns: list[str]
    interpreted: list[str]
    """Columns whose kernels ran in an interpreter."""
    absent: dict[str, str]

    @property
    def failures(self) -> list[str]:
        """What broke the rule, in words; empty when all is well."""
        found = [text for row in self.rows for text in row.failures]
        return found + [text for peer in self.peers for text in peer.failures]


def certify(say: Callable[[str], None] = print, *, quick: bool = False) -> Certificate:
    """Every objective x option x backend x dtype against float64, and the installed peers."""
    torch.set_num_threads(1)  # small tensors, and one order of summation on every machine
    columns, slow = serving(), interpreted()
    rows: list[Row] = []
    for make in (
        _objectives, _losses, _logits, _heads, _shapes, _supports, advantages.groups,
        advantages.gae, formulas.value, formulas.preference, advantages.kl_reward,
    ):  # fmt: skip
        before = len(rows)
        rows += make(columns, quick)
        say(f"{rows[before].section}: {len(rows) - before} rows")
    absent = {name: reason for name, reason in backends().items() if reason is not None}
    for name in TABLE:
        if name not in columns and name not in absent:
            absent[name] = f"serves {' and '.join(TABLE[name][1])} tensors, not {DEVICE.type}"
    return Certificate(rows, peers.compare(), columns, slow, absent)


def _which(columns: Sequence[str], objective: str, dtype: torch.dtype) -> Sequence[str]:
    """Interpreted backends take half precision on two objectives: a dtype changes their loads and
    stores, whatever is computed between."""
    slow = dtype != torch.float32 and objective not in cases.TWO
    return _compiled(columns) if slow else columns


def _batches(shape: Shape, dtype: torch.dtype, kind: int) -> int:
    return 1 if dtype == torch.float32 or shape.tokens > 1000 else BATCHES[kind]


def _compiled(columns: Sequence[str]) -> list[str]:
    slow = interpreted()
    return [name for name in columns if name not in slow]


def _spec(*parts: dict) -> LossSpec:
    found = cases.spec(*parts)
    assert found is not None
    return found


def _objectives(columns: Sequence[str], quick: bool) -> Iterator[Row]:
    """Objective x option; layouts on two options. Tokens are few, so interpreters take it all."""
    for name, objective in cases.OBJECTIVES.items():
        for option, extra in cases.OPTIONS.items():
            spec = cases.spec(objective, extra)
            if spec is None or (quick and option not in QUICK):
                continue
            more = {cases.BOTH: (RAGGED,), "all at once": (PADDED,)}.get(option, ())
            for shape in (MISSING, *more)[: 1 if quick else None]:
                yield objective_row("policy_objective", name, spec, shape, columns, option)


def _losses(columns: Sequence[str], quick: bool) -> Iterator[Row]:
    """Objective x option x dtype; interpreted backends as `_which` says, with one option."""
    for name, objective in cases.OBJECTIVES.items():
        for option, extra in cases.OPTIONS.items():
            spec = cases.spec(objective, extra)
            if spec is None or (quick and option not in QUICK):
                continue
            for dtype in DTYPES[: 1 if quick else None]:
                which = _which(columns, name, dtype) if option == cases.BOTH else _compiled(columns)
                yield linear_row("linear_policy_loss", name, spec, RAGGED, dtype, which, option,
                                 batches=_batches(RAGGED, dtype, 0))  # fmt: skip


def _logits(columns: Sequence[str], quick: bool) -> Iterator[Row]:
    for name, objective in cases.OBJECTIVES.items():
        spec = _spec(objective, cases.OPTIONS[cases.BOTH])
        for dtype in DTYPES[: 1 if quick else None]:
            yield linear_row(
                "logits_policy_loss", name, spec, RAGGED, dtype, _which(columns, name, dtype),
                cases.BOTH, logits=True, batches=_batches(RAGGED, dtype, 0),
            )  # fmt: skip


def _heads(columns: Sequence[str], quick: bool) -> Iterator[Row]:
    """What stands between hidden states and log-prob; interpreted backends take fp32."""
    for logits, heads in ((False, cases.HEADS), (True, cases.LOGITS_HEADS)):
        for head, (settings, options) in heads.items():
            for name in cases.TWO:
                spec = _spec(cases.OBJECTIVES[name], cases.OPTIONS[cases.BOTH], settings)
                for dtype in DTYPES[: 1 if quick else None]:
                    full = dtype == torch.float32
                    yield linear_row(
                        "heads", f"logits: {head}" if logits else head, spec, RAGGED, dtype,
                        columns if full else _compiled(columns), name, head_options=options,
                        logits=logits, batches=_batches(RAGGED, dtype, 1),
                    )  # fmt: skip


def _shapes(columns: Sequence[str], quick: bool) -> Iterator[Row]:
    for shape in SHAPES[: 6 if quick else None]:
        yield from _on(shape, "shapes", columns, quick)


def _supports(columns: Sequence[str], quick: bool) -> Iterator[Row]:
    for shape in SUPPORTS[: 2 if quick else None]:
        yield from _on(shape, "sampling support", columns, quick)


def _on(shape: Shape, section: str, columns: Sequence[str], quick: bool) -> Iterator[Row]:
    """Both objectives, from hidden states and from logits, on one shape.

    Interpreted backends take fp32.
    """
    for name in cases.MANY if shape.tokens > 1000 else cases.TWO:
        spec = _spec(cases.OBJECTIVES[name], cases.OPTIONS[cases.BOTH])
        for dtype in DTYPES[: 1 if quick else None]:
            # An interpreter walks the 64 tiles of a long sequence for a quarter of a minute.
            slow = shape.compiled or (name == "clip, sequence" and shape.tokens > 1000)
            every = dtype == torch.float32 and not slow
            which = columns if every else _compiled(columns)
            for logits in (False, True):
                if logits and shape.vocabulary * shape.tokens > 1 << 19:
                    continue  # the same row kernels on the same rows
                yield linear_row(
                    section, shape.name, spec, shape, dtype, which,
                    f"{'logits' if logits else 'linear'}, {name}", logits=logits,
                    batches=_batches(shape, dtype, 1),
                )  # fmt: skip
