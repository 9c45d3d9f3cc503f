"""One benchmark run of one op: check every implementation, time the sound ones in turn, measure
each one's peak memory in a fresh process, and return rows with their conditions."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import json
import math
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from harness import (
    BusyCores,
    Timing,
    conditions,
    interleave,
    measure_peak,
    median_ratio,
    run_child,
)
from registry import Implementation, elsewhere, find, select

#: Allowed beyond the naive form's own error against float64 (relative norm): the loss contract's
#: rule for this package's backends, reported for everybody.
RULE = {"float32": 5e-6, "bfloat16": 1e-3}
#: Beyond this an implementation computes something else and is not timed: twice the naive form's
#: error (peers round at other places) plus a margin of one dtype's accumulated rounding.
GATE = {"float32": 1e-4, "bfloat16": 1e-2}
#: The same for log-probs rounded to bf16: 2^-9 of |log-prob| = 11 is 2 % of a token's gradient.
GATE_ROUNDED = {"float32": 1e-4, "bfloat16": 5e-2}
#: What an implementation may raise to say that it cannot run here, other people's bugs included.
CANNOT = (
    ImportError, NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError,
    AssertionError, LookupError, ArithmeticError, OSError, MemoryError,
)  # fmt: skip
#: Op -> the module that draws its inputs and has its float64 answer, and its class of cases.
HOMES = {
    "linear_policy_loss": ("peers", "Case"),
    "logits_policy_loss": ("logits_peers", "LogitsCase"),
    "policy_objective": ("small_peers", "SmallCase"),
    "group_advantage": ("small_peers", "SmallCase"),
    "logits_stats": ("row_peers", "RowCase"),
    "logits_grad": ("row_peers", "RowCase"),
}


class BrokenDeviceError(RuntimeError):
    """A CUDA error that `implementation` caused: nothing works in this process any more."""

    def __init__(self, implementation: str, error: BaseException) -> None:
        super().__init__(f"{implementation}: {error}".splitlines()[0][:200])
        self.implementation = implementation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """What the suite needs to know of an op: its inputs, its float64 answer, and its limit."""

    name: str
    case: Callable[..., Any]
    draw: Callable[[Any, int], Any]
    reference: Callable[[Any], Any]
    limit: str

    @staticmethod
    def rate(case: Any, seconds: float) -> dict[str, float]:
        """{"gflops": ...} of a case that counts flops, {"gbytes_per_second": ...} of bytes."""
        if hasattr(case, "flops"):
            return {"gflops": round(case.flops / seconds / 1e9, 1)}
        return {"gbytes_per_second": round(case.bytes / seconds / 1e9, 2)}


def op_named(name: str) -> Op:
    if name not in HOMES:
        raise ValueError(f"no op {name!r}: expected one of {sorted(HOMES)}")
    module_name, case = HOMES[name]
    module = importlib.import_module(module_name)
    return Op(
        name=name,
        case=getattr(module, case),
        draw=module.draw,
        reference=module.reference,
        limit="gemm" if name == "linear_policy_loss" else "copy",
    )


def errors_of(output: Any, truth: Any) -> dict[str, float]:
    """Per field of the output: |a - b| of a scalar, ||a - b|| / ||b|| of a tensor, in float64."""
    found = {}
    for field in dataclasses.fields(truth):
        want, got = getattr(truth, field.name), getattr(output, field.name)
        if want is None:
            continue
        if got is None:
            found[field.name] = math.inf
            continue
        apart = (got.detach().double() - want).norm()
        scale = want.norm() if want.dim() else 1.0
        found[field.name] = float(apart / scale)
    return found


def describe(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in errors.items())


def run_case(
    op: Op,
    case: Any,
    *,
    rounds: int,
    names: tuple[str, ...] | None = None,
    memory: bool | Sequence[str] = True,
    inner: int = 1,
    seed: int = 0,
    slow: float = math.inf,
    check: bool = True,
    without: Sequence[str] = (),
    absent: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Rows for every implementation of `op` at `case`, or for `names`; without names or if
    `absent`, those that cannot run here are rows that say why. `memory` may name whose peak is
    measured. A peer slower than `slow` times the limit is timed in every fifth round only;
    without `check` nothing is compared with float64 (a large N repeats what a smaller one showed);
    `without` names what is left out. A CUDA error raises BrokenDeviceError."""
    table = select(op.name, device=case.device, dtype=case.dtype, names=names)
    where = conditions(case.device)
    run = uuid.uuid4().hex[:8]
    rows = {impl.name: _blank(op, impl, case, where, run) for impl in table}
    for name in set(without) & set(rows):
        rows[name].update(status="failed", reason="left out: it hung or broke the device here")
    table = [impl for impl in table if impl.name not in without]
    calls: dict[str, Callable[[Any], Any]] = {}

    inputs = op.draw(case, seed)
    truth = op.reference(inputs) if check else None
    yardstick: dict[str, float] | None = None
    # The naive form goes first: its error in this dtype is what the others are judged by.
    for impl in sorted(table, key=lambda impl: impl.name != "naive"):
        row = rows[impl.name]
        say(f"{op.name} {case.dtype}: checking {impl.name}")
        try:
            call = impl.make(case)
            inputs.clear()
            output = call(inputs)  # warms it up too
        except CANNOT as error:
            row.update(refused(impl, error))
            continue
        if impl.role == "limit" or not check:
            row["status"] = "ok"
            calls[impl.name] = call
            continue
        errors = errors_of(output, truth)
        row["errors"] = {name: float(f"{value:.3e}") for name, value in errors.items()}
        if impl.name == "naive":
            yardstick = errors
        # Without a naive form (it may not fit in memory) nothing is said of the rule.
        bounds = yardstick or dict.fromkeys(errors, 0.0)
        if yardstick is not None:
            within = all(e <= bounds[k] + RULE[case.dtype] for k, e in errors.items())
            row["within_rule"] = within
        gate = (GATE_ROUNDED if impl.rounds_logprob else GATE)[case.dtype]
        # `not <=` so that a NaN fails.
        if not all(e <= 2 * bounds[k] + gate for k, e in errors.items()):
            row.update(status="wrong", reason=f"differs from float64: {describe(errors)}")
            continue
        row["status"] = "ok"
        calls[impl.name] = call
        output = None
    inputs.clear()
    del truth, inputs

    say(f"{op.name} {case.dtype}: timing {len(calls)} variants, {rounds} rounds")
    broken: dict[str, BaseException] = {}

    def guarded(name: str, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run_it(drawn: Any) -> Any:
            if name in broken:
                return None
            try:
                return call(drawn)
            except CANNOT as error:
                broken[name] = error
                return None

        return run_it

    busy = BusyCores()
    samples = interleave(
        {name: guarded(name, call) for name, call in calls.items()},
        lambda i: op.draw(case, seed + 1 + i),
        rounds=rounds,
        device=case.device,
        seed=seed,
        inner=inner,
        between=lambda drawn: drawn.clear(),
        limit=op.limit,
        slow=slow,
        # Targets are stated of these: their medians are of every round.
        always=[impl.name for impl in table if impl.role == "pyrl" and impl.backend != "torch"],
    )
    others = busy.others()
    for name, error in broken.items():
        rows[name].update(refused(find(op.name, name), error))
        calls.pop(name)
        samples.pop(name)
    limit = samples.get(op.limit)
    for name, values in samples.items():
        timing = Timing.of(values)
        rows[name].update(
            ms_p20=round(timing.p20, 4), ms_p50=round(timing.p50, 4), ms_p80=round(timing.p80, 4),
            rounds=timing.rounds, other_cores=others, **op.rate(case, timing.p50 / 1e3),
        )  # fmt: skip
        if limit:
            ratio = median_ratio(values, limit)
            rows[name].update(ratio_to_limit=round(ratio, 4), share_of_limit=round(1 / ratio, 4))
    if memory:
        chosen = list(calls) if memory is True else [n for n in calls if n in memory]
        say(f"{op.name} {case.dtype}: peak memory of {len(chosen)}, a fresh process each")
        for name, found in peaks_of(op, case, {n: calls[n] for n in chosen}).items():
            rows[name].update(
                {"memory_reason": found["error"]}
                if "error" in found
                else {key: round(value, 1) for key, value in found.items()}
            )
    found = list(rows.values())
    if names is None or absent:
        for impl, reason in elsewhere(op.name, device=case.device, dtype=case.dtype):
            found.append(
                _blank(op, impl, case, where, run) | {"status": "absent", "reason": reason}
            )
    return found


def refused(impl: Implementation, error: BaseException) -> dict[str, Any]:
    """`absent` where something that it needs is not here, `failed` where it broke."""
    from pyrl import BackendUnavailableError

    if "CUDA error" in str(error):
        raise BrokenDeviceError(impl.name, error) from error
    lacking = (ImportError, NotImplementedError, BackendUnavailableError)
    return {
        "status": "absent" if isinstance(error, lacking) else "failed", "reason": why(impl, error),
    }  # fmt: skip


def peaks_of(
    op: Op, case: Any, calls: Mapping[str, Callable[[Any], Any]]
) -> dict[str, dict[str, Any]]:
    """Each one's `measure_held`, or {"error": why}. On a CPU in fresh processes, two at a time: how
    fast they are does not matter here. CUDA's allocator counts exactly in any process."""
    if case.device == "cuda":
        inputs = op.draw(case, 0)
        return {name: _held_or_why(name, call, inputs) for name, call in calls.items()}
    described = json.dumps(dataclasses.asdict(case))

    def measured(name: str) -> dict[str, Any]:
        return run_child("suite.py", "--peak", op.name, name, described)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(calls, pool.map(measured, calls), strict=True))


def _held_or_why(name: str, call: Callable[[Any], Any], inputs: Any) -> dict[str, Any]:
    try:
        return dict(measure_held(call, inputs))
    except CANNOT as error:
        if "CUDA error" in str(error):
            raise BrokenDeviceError(name, error) from error
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def why(impl: Implementation, error: BaseException) -> str:
    """In a line: the missing package, or what the implementation said."""
    if isinstance(error, ImportError) and impl.version is None:
        return f"package {impl.package} is not installed"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _blank(
    op: Op, impl: Implementation, case: Any, where: dict[str, Any], run: str
) -> dict[str, Any]:
    return {
        "op": op.name,
        "implementation": impl.name,
        "role": impl.role,
        "backend": impl.backend or "torch",
        "package": impl.package,
        "version": impl.version,
        "dtype": case.dtype,
        "shape": case.shape,
        "kept_share": case.kept_share,
        "status": None,
        "run": run,
        "note": impl.note,
        **where,
    }


def peak_of(op_name: str, implementation: str, case_json: str) -> dict[str, float]:
    """In a fresh process: make the inputs, then measure two calls."""
    op, impl = op_named(op_name), find(op_name, implementation)
    case = op.case(**json.loads(case_json))
    inputs = op.draw(case, 0)
    return measure_held(impl.make(case), inputs)


def measure_held(call: Callable[[Any], Any], inputs: Any) -> dict[str, float]:
    """`measure_peak` of call(inputs). Gradients are part of the peak; `grads_mib` is their own
    size."""
    grads = 0

    def once() -> Any:
        nonlocal grads
        inputs.clear()
        output = call(inputs)
        held = [t for t in vars(output).values() if isinstance(t, torch.Tensor) and t.dim()]
        grads = sum(t.numel() * t.element_size() for t in held)
        inputs.clear()
        return output

    found = measure_peak(once, inputs.case.device)
    return {**found, "grads_mib": grads / 2**20}


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 4 or arguments[0] != "--peak":
        raise SystemExit("usage: suite.py --peak OP IMPLEMENTATION CASE_JSON")
    print(json.dumps(peak_of(*arguments[1:])))


if __name__ == "__main__":
    main(sys.argv[1:])
