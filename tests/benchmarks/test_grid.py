"""The registry, the CPU grid and the document: every row runs or says why, and files suffice."""

import dataclasses
import math

import harness
import linear_policy_loss
import logits_peers
import logits_policy_loss
import pytest
import registry
import suite
import torch

from pyrl import BackendUnavailableError

CASE = logits_peers.LogitsCase(tokens=48, vocab=301, kept_share=0.5, length=16)
PROVENANCE = {
    "op", "implementation", "backend", "package", "version", "dtype", "shape", "kept_share",
    "device", "threads", "torch", "triton", "python", "commit", "date", "load",
}  # fmt: skip


def test_registry_names_are_unique_and_each_op_has_a_limit():
    keys = [(row.op, row.name) for row in registry.REGISTRY]
    assert len(set(keys)) == len(keys)
    for op in {row.op for row in registry.REGISTRY}:
        limit = suite.op_named(op).limit
        assert registry.find(op, limit).role == "limit"
    heads = {row.package for row in registry.REGISTRY if row.op == "linear_policy_loss"}
    assert {"torch", "liger-kernel", "trl", "cut-cross-entropy", "verl", "quack-kernels",
            "pyrl"} == heads  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", ["linear_policy_loss", "logits_policy_loss", "group_advantage"])
def test_a_row_runs_here_or_says_why(op, device):
    chosen = {r.name for r in registry.select(op, device=device, dtype="float32")}
    rest = registry.elsewhere(op, device=device, dtype="float32")
    assert chosen.isdisjoint(row.name for row, _ in rest)
    assert len(chosen) + len(rest) == sum(row.op == op for row in registry.REGISTRY)
    assert all(reason for _, reason in rest)
    if device == "cpu" and op == "linear_policy_loss":
        assert {row.name: why for row, why in rest}["quack"] == "needs a CUDA device"


def test_a_missing_package_is_named():
    row = dataclasses.replace(registry.REGISTRY[0], package="no-such-package")
    assert suite.why(row, ImportError("x")) == "package no-such-package is not installed"
    assert "TypeError: y" in suite.why(row, TypeError("y"))


def test_rows_of_a_run_without_names_include_those_that_need_a_gpu():
    rows = suite.run_case(
        suite.op_named("group_advantage"),
        suite.importlib.import_module("small_peers").SmallCase(op="group_advantage", tokens=64),
        rounds=1,
        memory=False,
    )
    by_name = {row["implementation"]: row for row in rows}
    assert by_name["pyrl-triton"]["status"] == "absent"
    assert by_name["pyrl-triton"]["reason"] == "needs a CUDA device"
    assert by_name["naive"]["share_of_limit"] > 0 and by_name["naive"]["backend"] == "torch"
    for row in rows:
        assert set(row) >= PROVENANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["naive", "trl", "pyrl-torch", "pyrl-cpu", "pyrl-cpu-inplace"])
def test_logits_to_loss_agrees_with_float64_twice(name, dtype):
    impl = registry.find("logits_policy_loss", name)
    case = dataclasses.replace(CASE, dtype=dtype)
    inputs = logits_peers.draw(case, 1)
    truth = logits_peers.reference(inputs)
    gate = suite.GATE_ROUNDED if impl.rounds_logprob else suite.GATE
    try:
        call = impl.make(case)
        call(inputs)
    except (BackendUnavailableError, ImportError) as error:
        pytest.skip(str(error))
    for _ in range(2):  # the second call needs what an in-place gradient overwrote
        inputs.clear()
        output = call(inputs)
        assert max(suite.errors_of(output, truth).values()) <= gate[dtype]
    inputs.clear()
    assert torch.equal(inputs.z.detach(), inputs.original)


def test_an_inplace_gradient_lies_in_the_logits():
    inputs = logits_peers.draw(CASE, 0)
    try:
        registry.find("logits_policy_loss", "pyrl-cpu-inplace").make(CASE)(inputs)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert inputs.z.grad.data_ptr() == inputs.z.data_ptr()


@pytest.mark.parametrize("name", ["torch-lce", "liger-ce", "trl-logits", "verl"])
def test_peers_of_the_head_agree_with_float64(name):
    import peers

    impl = registry.find("linear_policy_loss", name)
    case = peers.Case(tokens=64, hidden=16, vocab=512, kept_share=0.5, length=16)
    inputs = peers.draw(case, 1)
    try:
        output = impl.make(case)(inputs)
    except ImportError as error:
        pytest.skip(str(error))
    assert max(suite.errors_of(output, peers.reference(inputs)).values()) <= suite.GATE["float32"]


def test_slow_variants_sit_rounds_out_and_keep_their_pairs():
    import time

    calls = {"limit": lambda _: time.sleep(0.001), "slow": lambda _: time.sleep(0.02)}
    samples = harness.interleave(calls, lambda i: i, rounds=6, device="cpu", limit="limit", slow=3)
    assert [math.isnan(v) for v in samples["slow"]] == [False, True, True, True, True, False]
    assert harness.Timing.of(samples["slow"]).rounds == 2
    every = harness.interleave(
        calls, lambda i: i, rounds=3, device="cpu", limit="limit", slow=3, always=["slow"]
    )
    assert not any(math.isnan(v) for v in every["slow"])
    assert 1 < harness.median_ratio(samples["slow"], samples["limit"]) < math.inf


def test_the_grid_names_known_rows_and_holds_the_issues_cells():
    for cell in (*linear_policy_loss.GRID, *linear_policy_loss.QUICK):
        chosen = registry.select(
            "linear_policy_loss", device="cpu", dtype=cell.case.dtype, names=cell.names
        )
        assert {"limit", "pyrl"} <= {row.role for row in chosen}
        if not isinstance(cell.memory, bool):
            assert set(cell.memory) <= {row.name for row in chosen}
    default = [cell for cell in linear_policy_loss.GRID if not cell.extra]
    cpu = {r.name for r in registry.select("linear_policy_loss", device="cpu", dtype="bfloat16")}
    assert cpu == {name for cell in default for name in cell.names or cpu}
    assert any(cell.absent for cell in default)  # and the others say why they are not there
    for dtype in ("float32", "bfloat16"):
        cells = [c for c in default if c.case.dtype == dtype]
        shares = {c.case.kept_share for c in cells if c.case.tokens == 2048}
        assert shares == {1.0, 0.5, 0.2}
        whole = [c for c in cells if c.case.kept_share == 1]
        held = {c.case.tokens for c in whole if c.case.vocab == 49152 and c.memory}
        assert {1024, 2048} <= held and (dtype == "float32" or {512, 4096} <= held)
        assert any(c.case.vocab == 151936 for c in whole)
    for cell in (*logits_policy_loss.GRID, *logits_policy_loss.QUICK):
        names = registry.known_names("logits_policy_loss")
        assert isinstance(cell.memory, bool) or set(cell.memory) <= set(names)


def test_quick_logits_rows_are_written(tmp_path):
    rows = logits_policy_loss.run(
        tmp_path, quick=True, rounds=1, names=("copy", "naive"), say=lambda text: None
    )
    assert [r["status"] for r in rows] == ["ok", "ok"]
    assert len(harness.read_rows(tmp_path / "logits_policy_loss.jsonl")) == 2
