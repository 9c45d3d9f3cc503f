"""Runs the certificate's rows and peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from pyrl.certify import cases, groups, peers
from pyrl.certify.batches import SHAPES, Shape
from pyrl.certify.measure import Row, linear_row, objective_row
from pyrl.ops.backend import backends
from pyrl.parity import serving

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
RAGGED = SHAPES[0]
#: Rows that decide whether padding, masks and missing log-probs are handled.
OBJECTIVE_SHAPES = tuple(
    shape for shape in SHAPES if shape.name in ("ragged", "padded", "missing log-probs")
)
#: Objectives on which heads, shapes and dtypes are tried: one that is formed in a single pass, one
#: that couples the tokens of a sequence.
TWO = ("clip", "clip, sequence")
KL_AND_BONUS = {"kl_coef": 0.1, "entropy_coef": 0.02}


@dataclasses.dataclass
class Certificate:
    """Every row, what the peers compute, and why a backend has no column."""

    rows: list[Row]
    peers: list[peers.Comparison]
    columns: list[str]
    absent: dict[str, str]

    @property
    def failures(self) -> list[str]:
        """What broke the rule, in words; empty when all is well."""
        found = [text for row in self.rows for text in row.failures]
        return found + [text for peer in self.peers for text in peer.failures]


def certify(say: Callable[[str], None] = print, *, quick: bool = False) -> Certificate:
    """Every objective x option x backend x dtype against float64, and the installed peers."""
    columns = serving()
    rows: dict[tuple[str, str, torch.dtype], Row] = {}
    for make in (_objectives, _losses, _heads, _shapes, groups.rows):
        for row in make(columns, quick):
            known = rows.setdefault((row.section, row.name, row.dtype), row)
            if known is not row:
                known.merge(row)
        say(f"{make.__name__.strip('_')}: {len(rows)} rows so far")
    absent = {name: reason for name, reason in backends().items() if reason is not None}
    return Certificate(list(rows.values()), peers.compare(), columns, absent)


def _objectives(columns: list[str], quick: bool) -> Iterator[Row]:
    for name, objective in cases.OBJECTIVES.items():
        for option, extra in cases.OPTIONS.items():
            if quick and option not in ("none", "all at once"):
                continue
            spec = cases.spec(objective, extra)
            if spec is None:
                continue
            for shape in OBJECTIVE_SHAPES[: 1 if quick else None]:
                yield objective_row("policy_objective", f"{name} · {option}", spec, shape, columns)


def _losses(columns: list[str], quick: bool) -> Iterator[Row]:
    for name, objective in cases.OBJECTIVES.items():
        spec = cases.spec(objective, KL_AND_BONUS)
        assert spec is not None
        for dtype in DTYPES[: 1 if quick else None]:
            for section in ("linear_policy_loss", "logits_policy_loss"):
                logits = section == "logits_policy_loss"
                yield linear_row(section, name, spec, RAGGED, dtype, columns, logits=logits)


def _heads(columns: list[str], quick: bool) -> Iterator[Row]:
    for head, (settings, bias) in cases.HEADS.items():
        for name in TWO:
            spec = cases.spec(cases.OBJECTIVES[name], KL_AND_BONUS, settings)
            assert spec is not None
            for dtype in DTYPES[: 1 if quick else None]:
                yield linear_row("heads", f"{head} · {name}", spec, RAGGED, dtype, columns, bias)


def _shapes(columns: list[str], quick: bool) -> Iterator[Row]:
    for shape in SHAPES[: 4 if quick else None]:
        # An entropy bonus over -inf logits is finite here and NaN in plain torch's p log p.
        for name in TWO:
            spec = cases.spec(cases.OBJECTIVES[name], KL_AND_BONUS)
            assert spec is not None
            for dtype in DTYPES[: 1 if quick or _large(shape) else 2]:
                yield linear_row("shapes", f"{shape.name} · {name}", spec, shape, dtype, columns)


def _large(shape: Shape) -> bool:
    return sum(shape.lengths) > 1000
