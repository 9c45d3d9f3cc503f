"""The registry, the CPU grid and the document: every row runs or says why, and files suffice."""

import dataclasses
import math

import harness
import linear_policy_loss
import logits_peers
import logits_policy_loss
import plots
import pytest
import registry
import report
import run
import suite
import table
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
    samples = harness.interleave(calls, lambda i: i, rounds=6, device="cpu", slow_ms=15)
    assert [math.isnan(v) for v in samples["slow"]] == [False, True, True, True, True, False]
    assert harness.Timing.of(samples["slow"]).rounds == 2
    assert 1 < harness.median_ratio(samples["slow"], samples["limit"]) < math.inf


def test_the_grid_names_known_rows_and_holds_the_issues_cells():
    for cell in (*linear_policy_loss.GRID, *linear_policy_loss.QUICK):
        chosen = registry.select(
            "linear_policy_loss", device="cpu", dtype=cell.case.dtype, names=cell.names
        )
        assert {"limit", "pyrl"} <= {row.role for row in chosen}
        if not isinstance(cell.memory, bool):
            assert set(cell.memory) - {"trl", "liger-batch"} <= {row.name for row in chosen}
    default = [cell.case for cell in linear_policy_loss.GRID if not cell.extra]
    for dtype in ("float32", "bfloat16"):
        shares = {c.kept_share for c in default if c.tokens == 2048 and c.dtype == dtype}
        assert shares == {1.0, 0.5, 0.2}
        sizes = {c.tokens for c in default if c.dtype == dtype and c.vocab == 49152}
        assert {1024, 2048, 4096} <= sizes


def loss_rows():
    """A synthetic grid: naive linear in N, ours flat and twice as fast."""
    base = {
        "op": "linear_policy_loss", "package": "x", "version": "1", "status": "ok",
        "device": "cpu", "threads": 2, "torch": "2", "triton": None, "python": "3", "commit": "c",
        "date": "2026-01-01T00:00:00+00:00", "load": 0.0, "rounds": 3, "backend": "torch",
        "errors": {"loss": 1e-7, "grad_hidden": 2e-7}, "within_rule": True,
    }  # fmt: skip
    rows = []
    for dtype in ("float32", "bfloat16"):
        for n in (512, 1024, 2048):
            for kept in (1.0, 0.5, 0.2) if n == 1024 else (1.0,):
                for name, role, factor, peak in (
                    ("gemm", "limit", 1.0, 0), ("naive", "peer", 1.5, n), ("trl", "peer", 4, 300),
                    ("pyrl-cpu", "pyrl", 1.02, 60),
                ):  # fmt: skip
                    share = 1.0 if name in ("naive", "trl") else kept
                    ms = n * factor * share
                    rows.append(base | {
                        "implementation": name, "role": role, "dtype": dtype,
                        "shape": [n, 576, 49152], "kept_share": kept, "ms_p20": ms, "ms_p50": ms,
                        "ms_p80": ms, "ratio_to_limit": factor * share / kept,
                        "share_of_limit": kept / factor / share, "gflops": 100.0,
                        "peak_mib": float(peak), "grads_mib": 55.0,
                    })  # fmt: skip
    return rows


def test_the_document_is_the_same_bytes_from_the_same_files(tmp_path):
    harness.write_rows(tmp_path / "linear_policy_loss.jsonl", loss_rows())
    first = {path.name: path.read_bytes() for path in report.write(tmp_path)}
    second = {path.name: path.read_bytes() for path in report.write(tmp_path)}
    assert first == second and len(first) == 4
    text = first["RESULTS.md"].decode()
    assert "| 1024 576 49152 | bfloat16 | 50% | 512 | pyrl-cpu | 522 | 1.02 | 5 | naive |" in text
    assert "| pyrl-cpu | N 1024 D 576 V 49152 | float32 | 1044 | 0.50 | 0.20 |" in text
    assert "| naive | N 1024 D 576 V 49152 | float32 | 1536 | 1.00 | 1.00 |" in text


def test_scoring_rows_look_different_and_are_shown():
    text = report.scoring_markdown([{
        "commit": "0123456789", "machine": "m", "versions": {"torch": "2"}, "steps": 1,
        "added": {"none": 0.0, "after": 0.08},
        "rows": {arm: [{"seconds": 2.0, "score": 0.5}] for arm in ("none", "after")},
    }])  # fmt: skip
    assert "| after | 2.00 | 0.500 | +8.0% |" in text and "commit 0123456" in text


def test_no_curve_without_three_sizes_and_no_picture_without_rows(tmp_path):
    rows = [r for r in loss_rows() if r["shape"][0] == 1024]
    assert plots.curves(rows, tmp_path / "x.png") is None
    assert plots.bars([], tmp_path / "x.png") is None
    assert plots.shares([], tmp_path / "x.png") is None
    assert plots.curves(loss_rows(), tmp_path / "x.png") == tmp_path / "x.png"


def test_rates_of_a_gpu_read_in_teraflops():
    row = loss_rows()[0] | {"gflops": 612_345.0}
    assert table.cells(row)[4] == "612 TFLOP/s"


def test_run_shows_where_the_time_went(tmp_path, monkeypatch, capsys):
    class Fake:
        @staticmethod
        def run(out, **options):
            Fake.options = options
            return []

    monkeypatch.setattr(run.importlib, "import_module", lambda name: Fake)
    Fake.show = staticmethod(lambda rows: None)
    Fake.write = staticmethod(lambda out: [])
    assert run.main(["--only", "packing", "--all", "--rounds", "2", "--out", str(tmp_path)]) == 0
    assert Fake.options["everything"] is True and Fake.options["rounds"] == 2
    text = capsys.readouterr().out
    assert "packing" in text and "report" in text and "100%" in text
    for wrong in (["--rounds", "0"], ["--implementations", "naive"], ["--static", "--only",
                                                                      "packing"]):  # fmt: skip
        with pytest.raises(SystemExit):
            run.main(wrong)


def test_quick_logits_rows_are_written(tmp_path):
    rows = logits_policy_loss.run(
        tmp_path, quick=True, rounds=1, names=("copy", "naive"), say=lambda text: None
    )
    assert [r["status"] for r in rows] == ["ok", "ok"]
    assert len(harness.read_rows(tmp_path / "logits_policy_loss.jsonl")) == 2
