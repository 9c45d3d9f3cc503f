"""How figures are taken: ratios by round, honest memory, rows that replace older rows."""

import json
import os
import sys
import time
import types

import harness
import numpy as np
import pytest


def test_quantiles_are_numpys():
    values = np.random.default_rng(0).normal(size=11).tolist()
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert harness.quantile(values, q) == pytest.approx(np.quantile(values, q), abs=1e-15)
    with pytest.raises(ValueError, match="no values"):
        harness.quantile([], 0.5)


def test_ratio_pairs_rounds():
    # Twice the limit in every round, while the machine slows down threefold: the ratio is 2, where
    # the ratio of medians taken at different times would not be.
    limit = [1.0, 2.0, 3.0]
    assert harness.median_ratio([2.0, 4.0, 6.0], limit) == 2.0
    with pytest.raises(ValueError, match="2 samples against 3"):
        harness.median_ratio([1.0, 2.0], limit)


def test_interleave_runs_every_variant_once_a_round_on_that_rounds_inputs():
    seen, cleaned = [], []
    calls = {name: lambda drawn, name=name: seen.append((name, drawn)) for name in "abc"}
    samples = harness.interleave(
        calls, lambda i: f"inputs {i}", rounds=4, device="cpu", between=cleaned.append
    )
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", 4)
    for i in range(4):
        assert sorted(seen[3 * i : 3 * i + 3]) == [(name, f"inputs {i}") for name in "abc"]
    # Shuffled: the order differs between rounds (seed 0, fixed).
    assert len({tuple(name for name, _ in seen[3 * i : 3 * i + 3]) for i in range(4)}) > 1
    assert len(cleaned) == 4 * 4


def test_timing_counts_the_call_and_not_what_runs_between():
    samples = harness.interleave(
        {"sleep": lambda _: time.sleep(0.02)},
        lambda i: i,
        rounds=1,
        device="cpu",
        inner=2,
        between=lambda _: time.sleep(1.0),
    )
    # A sleep is never shorter than asked; 500 ms (1 s over `inner`) would mean a pause was counted.
    assert all(20 <= value < 500 for value in samples["sleep"])


MEASURE = """
import json, sys, time
sys.path.insert(0, {folder!r})
import harness, numpy as np
inputs = np.ones(2 << 20)  # 16 MiB, not to be counted
kept = []
def call():
    if {keeps} and not kept:
        kept.append(np.ones(1 << 20))  # 8 MiB that the first call keeps
    scratch = np.ones(12 << 20)  # 96 MiB
    out = scratch[: 4 << 20].copy()  # 32 MiB more
    del scratch
    return out
print(json.dumps(harness.measure_peak(call, "cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("keeps", [False, True])
def test_peak_memory_is_the_growth_above_the_inputs(tmp_path, keeps):
    script = tmp_path / "measure.py"
    script.write_text(MEASURE.format(folder=str(harness.HERE), keeps=keeps))
    found = harness.run_child(os.fspath(script))
    # 128 MiB by construction; 2 MiB for the interpreter's own pages.
    assert found["peak_mib"] == pytest.approx(128, abs=2)
    assert found["peak_first_mib"] == pytest.approx(136 if keeps else 128, abs=2)
    assert found["retained_mib"] == pytest.approx(8 if keeps else 0, abs=2)


def test_a_child_that_fails_says_why(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise RuntimeError('no such kernel')")
    assert harness.run_child(os.fspath(script)) == {"error": "RuntimeError: no such kernel"}
    script.write_text("import time; time.sleep(60)")
    assert "no answer" in harness.run_child(os.fspath(script), timeout=0.5)["error"]


def row(**changes):
    base = {"op": "x", "implementation": "a", "dtype": "float32", "shape": [4], "kept_share": 1.0,
            "device": "cpu", "ms_p50": 1.0}  # fmt: skip
    return base | changes


def test_a_newer_row_replaces_the_same_measurement_only(tmp_path):
    path = tmp_path / "results" / "x.jsonl"
    harness.write_rows(path, [row(), row(implementation="b")])
    harness.write_rows(path, [row(ms_p50=2.0), row(shape=[8])])
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((r["implementation"], r["shape"][0], r["ms_p50"]) for r in kept) == [
        ("a", 4, 2.0), ("a", 8, 1.0), ("b", 4, 1.0),
    ]  # fmt: skip
    assert list(path.parent.iterdir()) == [path]


def test_a_whole_case_replaces_what_another_run_left_of_it(tmp_path):
    path = tmp_path / "x.jsonl"
    harness.write_rows(path, [row(), row(implementation="b"), row(implementation="b", shape=[8])])
    harness.write_rows(path, [row(ms_p50=2.0)], whole_cases=True)
    kept = [(r["implementation"], r["shape"], r["ms_p50"]) for r in harness.read_rows(path)]
    assert kept == [("b", [8], 1.0), ("a", [4], 2.0)]


def test_conditions_say_where_and_when():
    where = harness.conditions("cpu")
    wanted = {"device", "threads", "torch", "triton", "python", "commit", "date", "load"}
    assert set(where) == wanted
    assert where["date"].endswith("+00:00") and where["threads"] >= 1


def test_other_work_is_counted_without_this_process(monkeypatch):
    seconds = iter([100.0, 101.5, 7.0, 6.0])
    monkeypatch.setattr(harness.BusyCores, "_seconds", staticmethod(lambda: next(seconds)))
    clock = iter([0.0, 3.0, 0.0, 1.0])
    monkeypatch.setattr(harness, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert harness.BusyCores().others() == 0.5
    assert harness.BusyCores().others() == 0.0  # hundredths of a second that do not add up
    monkeypatch.setattr(harness.BusyCores, "_seconds", staticmethod(lambda: None))
    clock = iter([0.0, 1.0])
    assert harness.BusyCores().others() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_busy_seconds_of_the_machine_are_read():
    assert harness.BusyCores._seconds() is not None


def test_results_are_no_difference_to_the_commit(monkeypatch):
    asked = []

    def fake(command, **_):
        asked.append(command)
        return harness.subprocess.CompletedProcess(command, 0, stdout="abc\n")

    monkeypatch.setattr(harness.subprocess, "run", fake)
    assert harness.commit() == "abc+"
    assert {":!benchmarks/results", ":!benchmarks/RESULTS.md"} <= set(asked[1])
