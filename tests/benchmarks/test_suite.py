"""The suite times only what computes the right thing, and says why anything is missing."""

import dataclasses
import json
import math

import peers
import pytest
import registry
import row_peers
import small_peers
import suite
import table
import torch
import trainer_step

from pyrl import BackendUnavailableError

CASE = peers.Case(tokens=64, hidden=16, vocab=512, kept_share=0.5, length=16)


def fake(name, make, role="peer"):
    return registry.Implementation(op="linear_policy_loss", name=name, make=make, role=role)


def wrong_gradient(case):
    naive = peers.make_naive(case)

    def call(inputs):
        out = naive(inputs)
        return dataclasses.replace(out, grad_weight=out.grad_weight * 1.01)

    return call


def nan_loss(case):
    naive = peers.make_naive(case)
    return lambda inputs: dataclasses.replace(naive(inputs), loss=torch.tensor(torch.nan))


def breaks_when_timed(case):
    naive, calls = peers.make_naive(case), []

    def call(inputs):
        calls.append(1)
        if len(calls) > 1:
            raise AssertionError("out of luck")
        return naive(inputs)

    return call


def missing(case):
    raise ImportError("No module named 'peerlib'")


@pytest.fixture
def rows(monkeypatch):
    fakes = (
        fake("gemm", peers.make_gemm, role="limit"),
        fake("wrong", wrong_gradient),
        fake("nan", nan_loss),
        fake("missing", missing),
        fake("breaks", breaks_when_timed),
        fake("naive", peers.make_naive),
    )
    monkeypatch.setattr(registry, "REGISTRY", fakes)
    op = suite.op_named("linear_policy_loss")
    found = suite.run_case(op, CASE, rounds=2, memory=False)
    return {row["implementation"]: row for row in found}


def test_only_sound_implementations_are_timed(rows):
    assert rows["naive"]["status"] == rows["gemm"]["status"] == "ok"
    assert rows["naive"]["rounds"] == 2 and rows["naive"]["ratio_to_limit"] > 0
    assert rows["naive"]["within_rule"] is True
    for name in ("wrong", "nan"):
        assert rows[name]["status"] == "wrong" and "ms_p50" not in rows[name]
        assert rows[name]["within_rule"] is False
    assert "grad_weight 1.0e-02" in rows["wrong"]["reason"]
    assert rows["missing"]["status"] == "absent" and "peerlib" in rows["missing"]["reason"]


def test_one_that_breaks_while_it_is_timed_is_a_row_that_says_why(rows):
    assert rows["breaks"]["status"] == "failed" and "ms_p50" not in rows["breaks"]
    assert rows["breaks"]["reason"] == "AssertionError: out of luck"
    assert rows["naive"]["other_cores"] is None or rows["naive"]["other_cores"] >= 0


def test_a_broken_device_ends_the_case_and_who_did_it_can_be_left_out(monkeypatch):
    def broken(case):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    fakes = (fake("gemm", peers.make_gemm, role="limit"), fake("bad", broken))
    monkeypatch.setattr(registry, "REGISTRY", fakes)
    op = suite.op_named("linear_policy_loss")
    with pytest.raises(suite.BrokenDeviceError, match="bad: CUDA error") as caught:
        suite.run_case(op, CASE, rounds=1, memory=False)
    assert caught.value.implementation == "bad"
    found = suite.run_case(op, CASE, rounds=1, memory=False, without=["bad"])
    assert {r["implementation"]: r["status"] for r in found} == {"gemm": "ok", "bad": "failed"}


def test_memory_in_this_process_says_why_where_it_cannot_be_measured(monkeypatch):
    def full(inputs):
        raise RuntimeError("out of memory")

    assert suite._held_or_why("x", full, peers.draw(CASE, 0)) == {
        "error": "RuntimeError: out of memory"
    }


def test_unknown_ops_are_named():
    with pytest.raises(ValueError, match=r"no op 'linear'.*'linear_policy_loss'"):
        suite.op_named("linear")


def test_rows_carry_their_conditions_and_print(rows):
    for row in rows.values():
        assert {"op", "version", "dtype", "shape", "kept_share", "device", "commit"} <= set(row)
        json.dumps(row)
    text = table.markdown(list(rows.values()))
    assert "50% of rows kept" in text and "absent: ImportError" in text and "wrong" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["naive", "pyrl-torch", "pyrl-cpu"])
def test_implementations_agree_with_float64(name, dtype):
    case = dataclasses.replace(CASE, dtype=dtype)
    inputs = peers.draw(case, 1)
    truth = peers.reference(inputs, rows=24)
    call = registry.find("linear_policy_loss", name).make(case)
    try:
        output = call(inputs)
    except BackendUnavailableError as error:  # this build has no compiled backend
        pytest.skip(str(error))
    assert max(suite.errors_of(output, truth).values()) <= suite.GATE[dtype]


def test_old_log_probs_in_closed_form_are_near_the_computed_ones():
    case = peers.Case(tokens=256, hidden=64, vocab=peers.CLOSED_FORM_VOCAB)
    inputs = peers.draw(case, 0)
    exact = peers.logprob(inputs.hidden, inputs.weight, inputs.target)
    # A relative error of sqrt((e - 1) / V) in the sum of exponentials at |h|^2 = D; 5 deviations,
    # and a half more for rows of larger |h|.
    bound = 7.5 * ((math.e - 1) / case.vocab) ** 0.5
    near = peers.near_logprob(inputs.hidden, inputs.weight, inputs.target)
    assert (near - exact).abs().max() < bound
    assert (inputs.old - exact).abs().max() < 0.06 + bound < 0.18  # log(1.2): nothing is clipped


def test_the_float64_answer_of_kept_rows_is_that_of_all_rows():
    inputs = peers.draw(CASE, 4)
    found = peers.reference(inputs, rows=7)
    hidden, weight = (t.detach().double().requires_grad_() for t in (inputs.hidden, inputs.weight))
    logp = (hidden @ weight.T).log_softmax(-1).gather(1, inputs.target[:, None])[:, 0]
    ratio = (logp - inputs.old).exp()
    a = inputs.advantage.double()
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * inputs.keep / inputs.keep.sum()
    loss.sum().backward()
    whole = peers.Output(loss.sum().detach(), hidden.grad, weight.grad)
    assert max(suite.errors_of(found, whole).values()) < 1e-12


def test_nothing_is_clipped_and_the_kept_share_is_exact():
    inputs = peers.draw(dataclasses.replace(CASE, tokens=256), 0)
    ratio = (peers.logprob(inputs.hidden, inputs.weight, inputs.target) - inputs.old).exp()
    assert ((ratio > 0.93) & (ratio < 1.07)).all()
    assert int(inputs.keep.sum()) == 128
    # One advantage a sequence, as the implementations that take [B, L] assume.
    assert inputs.advantage.view(-1, 16).std(1).max() == 0


@pytest.mark.parametrize("op", ["policy_objective", "group_advantage"])
@pytest.mark.parametrize("name", ["naive", "pyrl-torch", "pyrl-cpu"])
def test_small_ops_agree_with_float64(op, name):
    case = small_peers.SmallCase(op=op, tokens=203, group=8, kept_share=0.5)
    inputs = small_peers.draw(case, 2)
    try:
        output = registry.find(op, name).make(case)(inputs)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    errors = suite.errors_of(output, small_peers.reference(inputs))
    assert max(errors.values()) <= suite.GATE["float32"]


@pytest.mark.parametrize("op", row_peers.OPS)
def test_row_primitives_agree_with_float64(op):
    case = row_peers.RowCase(op=op, tokens=37, vocab=301, dtype="float32", device="cpu")
    inputs = row_peers.draw(case, 3)
    truth = row_peers.reference(inputs, rows=8)
    call = row_peers.pyrl_maker(op, "torch")(case)
    for _ in range(2):  # the second call needs what the in-place gradient overwrote
        inputs.clear()
        errors = suite.errors_of(call(inputs), truth)
        assert max(errors.values()) <= suite.GATE["float32"]


def test_unknown_implementations_are_named():
    with pytest.raises(ValueError, match=r"no implementation 'ligar'.*'liger'"):
        registry.select("linear_policy_loss", device="cpu", dtype="float32", names=("ligar",))


def test_steps_are_summed_up_without_the_warm_up():
    steps = [
        {"seconds": 9.0, "seconds_sample": 5.0, "sampled_tokens": 7},
        {"seconds": 3.0, "seconds_sample": 1.0, "sampled_tokens": 10},
        {"seconds": 1.0, "seconds_sample": 0.5, "sampled_tokens": 20},
        {"seconds": 2.0, "sampled_tokens": 30},
    ]
    found = trainer_step.summarize(steps)
    assert (found["seconds"], found["seconds_first"], found["steps"]) == (2.0, 9.0, 3)
    assert (found["seconds_sample"], found["sampled_tokens"]) == (0.5, 20.0)
    assert trainer_step.summarize(steps[:1])["seconds"] == 9.0  # a slow trainer runs one step
    with pytest.raises(ValueError, match="0 steps"):
        trainer_step.summarize([])


def test_a_trainers_recipe_is_a_recipe():
    from pyrl.trainer.config import Config

    config = Config.model_validate(trainer_step.pyrl_recipe(trainer_step.Workload(), "float32"))
    assert config.rollout.prompts_per_step * config.rollout.n == 64
    assert config.loss.spec().aggregation == "token_mean"


def test_watched_process_reports_status_and_memory(tmp_path):
    import sys

    code = "import time; x = bytearray(200 << 20); time.sleep(1.5); raise SystemExit(3)"
    ours = bytearray(300 << 20)  # not the process' own
    done = trainer_step.run_watched([sys.executable, "-c", code], tmp_path / "log")
    assert len(ours) and done["returncode"] == 3
    assert 200 < done["peak_rss_mib"] < 260
    assert 200 < done["peak_tree_mib"] < 260
    late = trainer_step.run_watched(
        [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", deadline=0.2
    )
    assert late["returncode"] != 0


def test_dense_reward_separates_completions():
    import trainer_task

    task = trainer_task.Dense()
    prompt = task.prompts("train")[0]
    texts = ["", "a", "b", "an apple", "strength", "Zürich is a city."]
    assert len({task.score(prompt, text) for text in texts}) == len(texts)
