"""What tuning tables hold, tried one by one on a GPU: the head's chunks, the kernels' tiles.

Candidates of a sweep run interleaved on the same fresh inputs; each one's result is compared with
that of the table's own choice first. Rows: op `sweep`, implementation the candidate, `chosen` where
it is what kernels/tuning.py or CHUNK_BYTES holds.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Timing, conditions, interleave, median_ratio, version_of
from peers import Case
from row_peers import RowCase
from small_peers import SmallCase
from suite import op_named

MIB = 1 << 20
#: Relative norm beyond which a candidate computes something else: sums in another order.
SAME = 1e-3


@contextlib.contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """holder.name, or holder[name] of a dict, is `value` inside."""
    mapping = isinstance(holder, dict)
    before = holder[name] if mapping else getattr(holder, name)
    setter = holder.__setitem__ if mapping else lambda key, v: setattr(holder, key, v)
    setter(name, value)
    try:
        yield
    finally:
        setter(name, before)


def candidates(sweep: str) -> tuple[Any, str, dict[str, Any]]:
    """(holder, name in it, label → value); the first is the table's own."""
    from pyrl.kernels import logits, objective, tuning

    if sweep == "chunk":
        from pyrl.ops.linear_logprob import CHUNK_BYTES

        own = CHUNK_BYTES["cuda"]
        sizes = dict.fromkeys([own, *(size * MIB for size in (256, 512, 1024, 2048, 4096))])
        return CHUNK_BYTES, "cuda", {f"{size // MIB} MiB": size for size in sizes}
    if sweep == "stats_tile":
        tiles = [tuning.StatsTile(s, b, w) for s, b, w in (
            (4, 2048, 8), (2, 2048, 8), (1, 4096, 8), (4, 1024, 4), (8, 1024, 4), (2, 4096, 16),
            (4, 4096, 16),
        )]  # fmt: skip
        own1 = tuning.stats_tile(151936, 2)
        values = {f"{t.steps}x{t.lanes} {t.warps} warps": t for t in dict.fromkeys([own1, *tiles])}
        made = {label: (lambda v, i, t=tile: t) for label, tile in values.items()}
        return logits, "stats_tile", made
    if sweep == "grad_tile":
        tiles2 = [tuning.Tile(b, w) for b, w in (
            (2048, 4), (4096, 8), (8192, 8), (1024, 4), (8192, 16), (16384, 16),
        )]  # fmt: skip
        own2 = tuning.grad_tile(151936, 2)
        values2 = {f"{t.block} {t.warps} warps": t for t in dict.fromkeys([own2, *tiles2])}
        made2 = {label: (lambda v, i, t=tile: t) for label, tile in values2.items()}
        return logits, "grad_tile", made2
    if sweep == "objective":
        tiles3 = [tuning.Tile(b, w) for b, w in ((256, 4), (256, 8), (512, 4), (1024, 8))]
        each = dict.fromkeys([tuning.OBJECTIVE, *tiles3])
        return objective, "OBJECTIVE", {f"{t.block} {t.warps} warps": t for t in each}
    raise ValueError(f"no sweep {sweep!r}: expected chunk, stats_tile, grad_tile or objective")


def workload(sweep: str, device: str = "cuda") -> tuple[str, Any, int]:
    """(op, case, rounds) that a sweep is timed on."""
    if sweep == "chunk":
        case = Case(tokens=8192, hidden=4096, vocab=151936, dtype="bfloat16", device=device)
        return "linear_policy_loss", case, 5
    if sweep == "objective":
        case_ = SmallCase(op="policy_objective", tokens=2**22, device=device)
        return "policy_objective", case_, 11
    op = "logits_stats" if sweep == "stats_tile" else "logits_grad"
    return op, RowCase(op=op, tokens=4096, vocab=151936, device=device), 11


def apart(a: Any, b: Any) -> float:
    """The largest relative norm of difference among two outputs' tensors."""
    worst = 0.0
    for name, value in vars(b).items():
        if isinstance(value, torch.Tensor):
            scale = value.double().norm().clamp(min=1e-30)
            worst = max(worst, float((vars(a)[name].double() - value.double()).norm() / scale))
    return worst


def kept(output: Any) -> Any:
    """A copy that the next call does not overwrite."""
    fields = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(output).items()}
    return type(output)(**fields)


def run(sweep: str) -> list[dict[str, Any]]:
    """A row a candidate."""
    from registry import find

    holder, name, values = candidates(sweep)
    op_name, case, rounds = workload(sweep)
    op, make = op_named(op_name), find(op_name, "pyrl-triton").make
    where, run_id = conditions(case.device), uuid.uuid4().hex[:8]
    inputs = op.draw(case, 0)
    plain = make(case)
    truth: Any = None
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[Any], Any]] = {}
    for label, value in values.items():
        row = rows[label] = {
            "op": "sweep", "implementation": label, "backend": "triton", "package": "pyrl",
            "version": version_of("pyrl"), "dtype": case.dtype, "shape": case.shape,
            "kept_share": 1.0, "settings": sweep, "role": "pyrl", "run": run_id,
            "chosen": truth is None, **where,
        }  # fmt: skip

        def call(drawn: Any, value: Any = value) -> Any:
            with replaced(holder, name, value):
                return plain(drawn)

        inputs.clear()
        try:
            output = call(inputs)
        # A tile that does not fit the chip's registers or shared memory.
        except (RuntimeError, ValueError) as error:
            row.update(status="absent", reason=f"{type(error).__name__}: {error}"[:200])
            continue
        truth = kept(output) if truth is None else truth
        difference = apart(output, truth)
        if not difference <= SAME:
            row.update(status="wrong", reason=f"differs from the table's choice: {difference:.1e}")
            continue
        row["status"] = "ok"
        calls[label] = call
    samples = interleave(
        calls, lambda i: op.draw(case, 1 + i), rounds=rounds, device=case.device,
        between=lambda drawn: drawn.clear(),
    )  # fmt: skip
    first = next(iter(samples.values()))
    for label, each in samples.items():
        timing = Timing.of(each)
        rows[label].update(
            ms_p20=round(timing.p20, 4), ms_p50=round(timing.p50, 4), ms_p80=round(timing.p80, 4),
            rounds=timing.rounds, ratio_to_chosen=round(median_ratio(each, first), 4),
            **op.rate(case, timing.p50 / 1e3),
        )  # fmt: skip
    return list(rows.values())
