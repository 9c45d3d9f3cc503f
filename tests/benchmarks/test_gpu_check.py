"""The GPU check: a part that hangs or breaks its process ends alone, and runs resume."""

import sys
import time

import gpu_check
import gpu_parts
import gpu_sweeps
import harness
import pytest
import registry
import small_peers
import suite
import torch

WORKER = """
import sys, time
for name in sys.argv[1:]:
    if name.startswith("--") or ":" in name:
        continue
    print("@begin", name, flush=True)
    if name == "hangs":
        time.sleep(60)
    if name == "crashes":
        sys.exit(7)
    if name == "breaks":
        print("@at breaks bad", flush=True)
        if "breaks:bad" not in sys.argv:
            print("@broke breaks bad: CUDA error", flush=True)
            sys.exit(1)
    print("some output", flush=True)
    print({"fails": "@failed fails no kernel", "late": "@skip late"}.get(name, "@end " + name),
          flush=True)
"""


def part(name, seconds=30.0):
    return gpu_parts.Part(name=name, kind="grid", seconds=seconds)


def test_parts_have_names_and_known_implementations():
    names = [each.name for each in gpu_parts.PARTS]
    assert len(set(names)) == len(names)
    for each in gpu_parts.PARTS:
        if each.kind == "grid":
            chosen = registry.select(
                each.op, device="cuda", dtype=each.case.dtype, names=each.names
            )
            assert {"limit", "pyrl"} <= {impl.role for impl in chosen}, each.name
        elif each.kind == "tests":
            assert all((harness.HERE.parent / path).is_dir() for path in each.paths)
        else:
            gpu_sweeps.workload(each.name.removeprefix("sweep-"))
    # Ten minutes hold the build and what says most; the rest is for a second run.
    assert sum(each.seconds for each in gpu_parts.PARTS[:8]) < 400


def test_a_part_that_hangs_or_crashes_ends_alone(tmp_path, capsys):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    told = {}
    began = time.monotonic()
    gpu_check.supervise(
        [part("first"), part("hangs", 0.25), part("fails"), part("crashes"), part("late"),
         part("last")],
        time.time() + 100,
        lambda names: [sys.executable, str(script), *names],
        lambda name, status, seconds, reason, at: told.update({name: (status, reason)}),
    )  # fmt: skip
    assert time.monotonic() - began < 30  # the hanging part slept 60
    assert {name: status for name, (status, _) in told.items()} == {
        "first": "ok", "hangs": "timeout", "fails": "failed", "crashes": "failed",
        "late": "skipped", "last": "ok",
    }  # fmt: skip
    assert told["fails"][1] == "no kernel" and "status 7" in told["crashes"][1]
    assert capsys.readouterr().out.count("some output") == 4


def test_a_worker_that_never_begins_costs_one_part(tmp_path):
    told = []
    gpu_check.supervise(
        [part("a"), part("b")], 0.0, lambda names: [sys.executable, "-c", "raise SystemExit(3)"],
        lambda name, status, seconds, reason, at: told.append((name, status)),
    )  # fmt: skip
    assert told == [("a", "failed"), ("b", "failed")]


def test_what_broke_the_device_is_left_out_and_its_part_runs_again(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    told, left_out = [], set()

    def tell(name, status, seconds, reason, at):
        told.append((name, status, at))
        left_out.update({(name, at)} if at else ())
        return status == "broke"

    def command(names):
        real = gpu_check.worker(tmp_path / "rows.jsonl", 0.0, names, left_out)
        return [sys.executable, str(script), *real[4:]]

    gpu_check.supervise([part("breaks"), part("next")], 0.0, command, tell)
    assert told == [("breaks", "broke", "bad"), ("breaks", "ok", ""), ("next", "ok", "")]


def test_whoever_hung_is_left_out_on_the_same_device_and_code(tmp_path):
    for name, status, code, at in (
        ("a", "timeout", "1", "x"), ("b", "broke", "2", "y"), ("c", "failed", "1", ""),
        ("d", "timeout", "1", "z"), ("d", "ok", "1", ""),
    ):  # fmt: skip
        gpu_check.record(tmp_path, name, status, 1.0, device="gpu", code=code, at=at)
    assert gpu_check.culprits(tmp_path, "gpu", "1") == {("a", "x")}
    command = gpu_check.worker(tmp_path / "r", 5.0, ["a", "c"], {("a", "x"), ("b", "y")})
    assert command[-4:] == ["a", "c", "--without", "a:x"]


def test_finished_parts_are_skipped_on_the_same_device_and_code(tmp_path, monkeypatch, capsys):
    device, code = harness.device_name("cpu"), gpu_check.code_stamp()
    old = tmp_path / "old"
    for name, status, stamp in (
        ("sweep-chunk", "ok", code), ("tests-ops", "failed", code), ("tests-losses", "ok", "other"),
    ):  # fmt: skip
        gpu_check.record(old, name, status, 1.0, device=device, code=stamp)
    assert gpu_check.finished(old, device, code) == {"sweep-chunk"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OUT", str(tmp_path / "new"))
    assert gpu_check.main(["--dry-run", "--resume", str(old)]) == 0
    out = capsys.readouterr().out
    assert out.count("done") == 1 and "sweep-chunk" in out and "all that is left" in out
    assert gpu_check.main(["--resume", str(old)]) == 2
    with pytest.raises(SystemExit):
        gpu_check.main(["--resume", str(tmp_path / "none")])


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_part_past_the_time_is_not_begun(tmp_path, capsys):
    name = gpu_parts.PARTS[0].name
    assert gpu_parts.main([str(tmp_path / "rows.jsonl"), str(time.time()), name]) == 0
    assert capsys.readouterr().out.split() == ["@skip", name]


def test_a_sweep_tries_every_candidate_and_puts_the_table_back(monkeypatch):
    class Holder:
        tile = 1

    def make(case):
        naive = small_peers.make_naive("policy_objective")(case)

        def call(inputs):
            if Holder.tile == 13:
                raise RuntimeError("out of resources")
            output = naive(inputs)
            return type(output)(output.loss * (2 if Holder.tile == 9 else 1), output.values)

        return call

    row = registry.Implementation(op="policy_objective", name="pyrl-triton", make=make)
    monkeypatch.setattr(registry, "REGISTRY", (row,))
    values = {"1": 1, "2": 2, "9": 9, "13": 13}
    monkeypatch.setattr(gpu_sweeps, "candidates", lambda sweep: (Holder, "tile", values))
    case = small_peers.SmallCase(op="policy_objective", tokens=256)
    monkeypatch.setattr(gpu_sweeps, "workload", lambda sweep: ("policy_objective", case, 2))
    rows = {r["implementation"]: r for r in gpu_sweeps.run("objective")}
    assert [rows[k]["status"] for k in values] == ["ok", "ok", "wrong", "absent"]
    assert rows["1"]["chosen"] and rows["1"]["ratio_to_chosen"] == 1 and not rows["2"]["chosen"]
    assert rows["2"]["rounds"] == 2 and Holder.tile == 1


@pytest.mark.parametrize("sweep", ["chunk", "stats_tile", "grad_tile", "objective"])
def test_candidates_begin_with_the_tables_own(sweep):
    pytest.importorskip("triton")
    holder, name, values = gpu_sweeps.candidates(sweep)
    own = holder[name] if isinstance(holder, dict) else getattr(holder, name)
    first = next(iter(values.values()))
    if callable(own):
        own, first = own(151936, 2), first(151936, 2)
    assert first == own and len(values) >= 4
    assert suite.op_named(gpu_sweeps.workload(sweep)[0]).limit in ("gemm", "copy")
