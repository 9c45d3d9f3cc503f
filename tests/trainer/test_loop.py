import errno
import json
import math
import sys

import pytest
import torch
from safetensors import SafetensorError

from pyrl.algorithms import credit
from pyrl.models import Policy
from pyrl.rollout import CanaryError
from pyrl.trainer import loop, report, session, tracking
from pyrl.trainer.data import permutation
from pyrl.trainer.loop import train, train_step
from pyrl.trainer.recipe import ConfigError
from pyrl.trainer.session import Session

pytestmark = pytest.mark.usefixtures("without_report")


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_two_steps_end_to_end(make_config, tmp_path, console, monkeypatch):
    monkeypatch.setattr(session, "write_report", report.write_report)
    config = make_config(eval__prompts=4, eval__samples=2, train__save_model="true")
    summary = train(config, tmp_path / "run", console=console)

    metrics = rows(tmp_path / "run", "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2]
    for m in metrics:
        assert m["groups"] == 4 and m["sampled_tokens"] > 0 and m["grad_norm"] > 0
        # The batch was sampled by the very weights that compute the ratio.
        assert m["ratio_min"] == m["ratio_max"] == 1 and m["rollout_gap_max"] < 1e-4
        assert m["canary_max_diff"] < 1e-4
        assert m["seconds"] >= m["seconds_sample"] + m["seconds_update"]
    samples = rows(tmp_path / "run", "samples.jsonl")
    trained = [s["prompt_id"] for s in samples if s["phase"] == "train"]
    assert len(trained) == len(set(trained)) == 8  # two steps of four: an epoch repeats nothing
    assert {s["phase"] for s in samples} == {"before", "train", "after"}

    written = json.loads((tmp_path / "run/summary.json").read_text())
    assert written["steps"] == 2 and written["seed"] == 0
    for key in ("heldout_before", "heldout_after"):
        result = written[key]
        assert (result["prompts"], result["samples"]) == (4, 8)
        assert result["low"] <= result["mean"] <= result["high"]
    packing = json.loads((tmp_path / "run/packing.json").read_text())
    assert [packing[k]["tokens"] for k in ("first", "latest")] == [m["tokens"] for m in metrics]
    assert (tmp_path / "run/report.html").exists() and (tmp_path / "run/curves.png").exists()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(summary["model_path"])
    trained = AutoModelForCausalLM.from_pretrained(summary["model_path"]).state_dict()
    start = AutoModelForCausalLM.from_pretrained(config.model.name).state_dict()
    assert any(not torch.equal(trained[k], start[k]) for k in start)


def test_it_learns(make_config, tmp_path, console):
    config = make_config(train__steps=25, optimizer__lr=0.02, rollout__n=8, eval__prompts=16)
    summary = train(config, tmp_path / "run", console=console)
    before, after = summary["heldout_before"], summary["heldout_after"]
    assert after["low"] > before["high"] + 0.1


@pytest.mark.parametrize(
    ("overrides", "forwards"),
    [
        ({}, 0),  # on-policy: the sampler's weights are the trainer's
        ({"train__updates_per_step": 2}, 2),
        ({"train__passes": 2}, 1),
        ({"loss__kl_coef": 0.1}, 1),  # the reference only
        ({"loss__kl_coef": 0.1, "train__reference": "step"}, 1),
        ({"loss__kl_coef": 0.1, "train__updates_per_step": 2}, 4),
        ({"loss__kl_coef": 0.1, "train__reference": "step", "train__passes": 2}, 1),
    ],
)
def test_log_prob_forwards_only_where_needed(
    make_config, tmp_path, console, monkeypatch, overrides, forwards
):
    config = make_config(train__steps=1, rollout__canary="false", **overrides)
    calls, real = [], loop.logprobs
    monkeypatch.setattr(loop, "logprobs", lambda *args: calls.append(args) or real(*args))
    train(config, tmp_path / "run", console=console)
    assert len(calls) == forwards
    m = console.steps[0]
    assert (m["kl"] is not None) == ("loss__kl_coef" in overrides)


def test_several_updates_leave_the_policy_that_sampled(make_config, tmp_path, console):
    config = make_config(train__steps=1, train__updates_per_step=4, train__passes=2)
    train(config, tmp_path / "run", console=console)
    m = console.steps[0]
    assert m["ratio_min"] < 1 < m["ratio_max"] and m["old_kl"] > 0
    assert m["rollout_gap_max"] < 1e-4  # of the first update only


def test_reference_is_the_initial_policy(make_config, tmp_path, console):
    config = make_config(train__steps=3, loss__kl_coef=0.01)
    train(config, tmp_path / "run", console=console)
    kl = [m["kl"] for m in console.steps]
    assert kl[0] == pytest.approx(0, abs=1e-9) and 0 < kl[1] < kl[2]


def test_reference_and_old_policy_are_two_things(make_config, tmp_path, console):
    config = make_config(train__updates_per_step=2, loss__kl_coef=0.01)
    train(config, tmp_path / "run", console=console)
    first, second = console.steps
    assert first["kl"] == pytest.approx(first["old_kl"], rel=1e-5)  # both the initial policy
    assert second["kl"] > 1.2 * second["old_kl"] > 0


def test_lost_rewards_are_left_out_and_counted(make_config, tmp_path, console, toy):
    config = make_config(task__name=toy("SomeLost"))
    train(config, tmp_path / "run", console=console)
    for m in console.steps:
        assert 0 < m["nan_rewards"] < 16
        assert math.isfinite(m["loss"]) and math.isfinite(m["grad_norm"])
        assert math.isfinite(m["reward_mean"])


def test_a_reward_function_that_always_raises_loses_no_run(make_config, tmp_path, console, toy):
    config = make_config(task__name=toy("Raises"), eval__prompts=2)
    summary = train(config, tmp_path / "run", console=console)
    assert summary["steps"] == 2
    assert [m["nan_rewards"] for m in console.steps] == [16, 16]
    assert any("the verifier is broken" in text for text in console.messages)
    assert all(m["grad_norm"] == 0 and m["loss"] is None for m in console.steps)


def test_equal_rewards_skip_the_update_and_say_so(make_config, tmp_path, console, toy):
    config = make_config(task__name=toy("Equal"), train__steps=1)
    train(config, tmp_path / "run", console=console)
    assert any("all rewards are equal inside every group" in text for text in console.messages)
    (m,) = console.steps
    assert m["zero_variance_groups"] == m["groups"] == 4 and m["tokens"] == 0
    assert m["skipped_tokens"] > m["sampled_tokens"]
    assert rows(tmp_path / "run", "metrics.jsonl")[0]["reward_mean"] == 1


def test_all_truncated_and_masked(make_config, tmp_path, console):
    config = make_config(train__steps=1, rollout__max_new_tokens=1, train__mask_truncated="true")
    train(config, tmp_path / "run", console=console)
    assert any("every completion was truncated" in text for text in console.messages)
    assert console.steps[0]["truncated_share"] == 1


@pytest.mark.parametrize("method", ["grpo", "rloo", "raw"])
def test_group_of_one(make_config, tmp_path, console, method):
    config = make_config(rollout__n=1, advantage__method=method)
    train(config, tmp_path / "run", console=console)
    assert any("group of one" in text for text in console.messages) == (method != "raw")
    for m in console.steps:
        assert m["zero_variance_groups"] == 0
        assert (m["grad_norm"] > 0) == (method != "rloo")


def test_dynamic_sampling_replaces_flat_groups(make_config, tmp_path, console, toy):
    name = toy("HalfFlat")
    train(make_config(task__name=name, train__steps=1), tmp_path / "a", console=console)
    config = make_config(task__name=name, train__steps=1, rollout__refill_rounds=10)
    train(config, tmp_path / "b", console=console)
    plain, refilled = console.steps
    assert plain["groups"] == 4 and 0 < plain["zero_variance_groups"] < 4
    # Four groups that differ were found, and everything that was drawn is reported.
    assert refilled["groups"] - refilled["zero_variance_groups"] == 4
    assert refilled["groups"] > 4 and refilled["sampled_tokens"] > plain["sampled_tokens"]
    assert refilled["skipped_tokens"] == 0


def test_dynamic_sampling_gives_up(make_config, tmp_path, console, toy):
    config = make_config(task__name=toy("Equal"), train__steps=1, rollout__refill_rounds=2)
    train(config, tmp_path / "run", console=console)
    assert console.steps[0]["groups"] == 12 and console.steps[0]["tokens"] == 0


def test_stale_weights_stop_the_run(make_config, tmp_path, console, monkeypatch):
    from pyrl.rollout.transformers_engine import TransformersEngine

    first = []

    def score(self, prompt, completion):
        first.append([-1.0] * len(completion))
        return first[0]

    monkeypatch.setattr(TransformersEngine, "score", score)
    with pytest.raises(CanaryError, match="stale weights"):
        train(make_config(), tmp_path / "run", console=console)


def test_bfloat16_with_masters(make_config, tmp_path, console):
    config = make_config(model__dtype="bfloat16")
    train(config, tmp_path / "run", console=console)
    assert all(m["grad_norm"] > 0 for m in console.steps)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"model__name": "./no/such/folder"}, ["model.name", "./no/such/folder"]),
        ({"task__name": "instrutions"}, ["instrutions"]),
        ({"rollout__max_new_tokens": 512}, ["rollout.max_new_tokens = 512", "context of 512"]),
        ({"train__backend": "cuda"}, ["cuda"]),
        ({"model__device": "cuda"}, ["model.device = 'cuda'"]),
        ({"model__device": "tpu9"}, ["model.device = 'tpu9'"]),
        ({"model__device": "meta"}, ["model.device = 'meta'", "auto, cpu, cuda or cuda:N"]),
        ({"model__attention": "foo"}, ["model.attention = 'foo'", "'sdpa'"]),
        ({"rollout__options__foo": 3}, ["no option 'foo'", "max_rows=256"]),
        ({"task__options__mode": "nan"}, ["task.options", "mode = nan"]),
    ],
)
def test_what_cannot_work_stops_before_the_first_step(
    make_config, tmp_path, console, overrides, parts
):
    with pytest.raises((ValueError, RuntimeError)) as error:
        train(make_config(**overrides), tmp_path / "run", console=console)
    for part in parts:
        assert part in str(error.value)
    assert not console.steps and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("Long", {}, r"prompt 'train-0' has \d+ tokens; .* room for 506"),
        ("Empty", {}, "training split is empty"),
        ("NoHeldout", {"eval__prompts": 2}, r"no held-out prompts .* eval\.prompts = 0"),
    ],
)
def test_bad_data_stops_before_the_first_step(
    make_config, tmp_path, console, toy, name, overrides, message
):
    with pytest.raises(ValueError, match=message):
        train(make_config(task__name=toy(name), **overrides), tmp_path / "run", console=console)


def test_a_prompt_that_only_dynamic_sampling_may_draw_is_checked(
    make_config, tmp_path, console, toy
):
    """One prompt a step, and the long one of four not first: only refilling can come to it."""
    few = {"task__name": toy("Long"), "train__steps": 1, "rollout__prompts_per_step": 1}
    seed = next(s for s in range(9) if permutation(s, 0, "data order", 4)[0] != 0)
    train(make_config(**few, train__seed=seed), tmp_path / "a", console=console)
    with pytest.raises(ValueError, match=r"prompt 'train-0' has \d+ tokens"):
        config = make_config(**few, train__seed=seed, rollout__refill_rounds=3)
        train(config, tmp_path / "b", console=console)
    assert not (tmp_path / "b").exists()  # before the first step, and not in it


def test_a_sink_that_is_not_installed_stops_before_the_first_step(
    make_config, tmp_path, console, monkeypatch
):
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = make_config(tracking__sinks='["trackio"]')
    with pytest.raises(ConfigError, match=r"tracking\.sinks: .*pip install 'pyrl\[trackio\]'"):
        train(config, tmp_path / "run", console=console)
    assert not (tmp_path / "run").exists()


def test_advantages_are_computed_where_the_policy_is(make_config, tmp_path, console, monkeypatch):
    seen, real = [], credit.assign_advantages

    def recorded(groups, **options):
        seen.append(options["device"])
        return real(groups, **options)

    monkeypatch.setattr(credit, "assign_advantages", recorded)
    with Session.open(
        make_config(), tmp_path / "run", resume=False, console=console
    ) as open_session:
        train_step(open_session)
        assert seen == [str(open_session.parts.policy.device)]


def test_samples_per_step_are_that_many(make_config, tmp_path, console):
    config = make_config(train__steps=1, rollout__prompts_per_step=2, tracking__samples_per_step=3)
    train(config, tmp_path / "run", console=console)
    ids = [s["prompt_id"] for s in rows(tmp_path / "run", "samples.jsonl")]
    assert len(ids) == 3 and ids[0] == ids[2] != ids[1]


def test_a_task_that_never_scores_ends_the_run_with_a_checkpoint(
    make_config, tmp_path, console, toy
):
    config = make_config(task__name=toy("Raises"), train__steps=9, train__checkpoint_every=0)
    for last in (3, 6):  # resumed without a mended task, it tries again
        with pytest.raises(session.UnscoredError) as error:
            train(config, tmp_path / "run", resume=last > 3, console=console)
        for part in ("last 3 steps", "the verifier is broken", "--resume", f"after step {last}"):
            assert part in str(error.value)
        assert (tmp_path / f"run/checkpoints/step-0000000{last}/state.pt").exists()
        assert len(rows(tmp_path / "run", "metrics.jsonl")) == last


def test_a_full_disk_for_everything_costs_files_and_not_the_run(
    make_config, tmp_path, console, monkeypatch
):
    """Full from the second step on: step 2's rows come when there is room, in the third."""
    real, full = tracking._append, []

    def append(path, lines):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, lines)

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    log = Session.log

    def logged(self, metrics, *rest):
        full[:] = [True] * (metrics["step"] == 2)
        log(self, metrics, *rest)

    monkeypatch.setattr(tracking, "_append", append)
    monkeypatch.setattr(Session, "log", logged)
    monkeypatch.setattr(tracking.RunFolder, "write_summary", refuse)
    monkeypatch.setattr(session, "write_report", refuse)
    config = make_config(train__steps=3, tracking__samples_per_step=1)
    summary = train(config, tmp_path / "run", console=console)
    assert summary["steps"] == 3 and "report" not in summary
    assert [m["step"] for m in rows(tmp_path / "run", "metrics.jsonl")] == [1, 2, 3]
    assert [s["step"] for s in rows(tmp_path / "run", "samples.jsonl")] == [1, 2, 3]
    text = "\n".join(console.messages)
    for what in ("metrics.jsonl", "samples.jsonl", "summary.json", "the report"):
        assert text.count(f"warning: {what} could not be written") == 1


def test_a_model_that_finds_no_room_is_a_warning(make_config, tmp_path, console, monkeypatch):
    """safetensors has an error of its own for a full disk."""

    def refuse(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Policy, "save", refuse)
    config = make_config(train__steps=1, train__save_model="true")
    assert "model_path" not in train(config, tmp_path / "run", console=console)
    assert any("the final model could not be written" in text for text in console.messages)


def test_a_used_folder_is_not_overwritten(make_config, tmp_path, console):
    train(make_config(train__steps=0), tmp_path / "run", console=console)
    with pytest.raises(ConfigError, match="already holds a run: add --resume"):
        train(make_config(train__steps=0), tmp_path / "run", console=console)
