"""`pytest benchmarks`: the quick cases through pytest-benchmark. No time is ever asserted, only
that what is timed computes the right thing."""

import pytest
from logits_peers import LogitsCase
from peers import Case
from registry import REGISTRY, Implementation
from small_peers import SmallCase
from suite import CANNOT, GATE, GATE_ROUNDED, errors_of, op_named

from pyrl import BackendUnavailableError

#: The row primitives that a backend supplies have tests of their own.
ROWS = [r for r in REGISTRY if "cpu" in r.devices and r.op not in ("logits_stats", "logits_grad")]


def case_of(row: Implementation, dtype: str) -> Case | LogitsCase | SmallCase:
    if row.op == "linear_policy_loss":
        return Case(tokens=256, hidden=64, vocab=4096, dtype=dtype)
    if row.op == "logits_policy_loss":
        return LogitsCase(tokens=256, vocab=4096, dtype=dtype)
    return SmallCase(op=row.op, tokens=4096)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.op}-{row.name}")
def test_quick(benchmark, row: Implementation, dtype: str) -> None:
    if dtype not in row.dtypes:
        pytest.skip(f"{row.op} takes {' and '.join(row.dtypes)}")
    case, op = case_of(row, dtype), op_named(row.op)
    inputs = op.draw(case, 0)
    try:
        call = row.make(case)
        output = call(inputs)
    except CANNOT as error:
        # A peer may be absent or too old; of ours only a backend that this machine cannot have.
        if row.name.startswith("pyrl") and not isinstance(error, BackendUnavailableError):
            raise
        pytest.skip(f"{type(error).__name__}: {error}".splitlines()[0])
    if row.role != "limit":
        gate = (GATE_ROUNDED if row.rounds_logprob else GATE)[dtype]
        assert max(errors_of(output, op.reference(inputs)).values()) <= gate
    benchmark.group = f"{row.op} {dtype}"
    benchmark.pedantic(call, args=(inputs,), setup=inputs.clear, rounds=3)
