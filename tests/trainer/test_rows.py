"""Micro-batches: rows, packing and preflight change no number."""

import json

import pytest
import torch

from pyrl.models import Policy
from pyrl.trainer import preflight
from pyrl.trainer.loop import train, train_step
from pyrl.trainer.metrics import STEP_PHASES
from pyrl.trainer.session import Session

pytestmark = pytest.mark.usefixtures("without_report")

#: What a step takes, not what it computes.
MEASURED = {"seconds", "tokens_per_second", "peak_rss_mib"} | {f"seconds_{p}" for p in STEP_PHASES}


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize(
    "loss",
    [
        {"loss__preset": "grpo"},
        {"loss__preset": "dapo"},
        {"loss__preset": "dr_grpo"},
        {"loss__preset": "reinforce", "advantage__method": "raw"},
        {"loss__kl_coef": 0.1, "loss__entropy_coef": 0.01},
    ],
)
def test_gradients_do_not_depend_on_the_micro_batches(make_config, tmp_path, console, loss):
    def gradients(tokens_per_row):
        config = make_config(train__tokens_per_row=tokens_per_row, **loss)
        path = tmp_path / str(tokens_per_row)
        with Session.open(config, path, resume=False, console=console) as open_session:
            seen = []

            def step(lr):
                masters = open_session.optimizer.masters.values()
                seen.extend(m.grad.clone().flatten() for m in masters)
                return 1.0

            open_session.optimizer.step = step
            train_step(open_session)
            return torch.cat(seen), console.steps[-1]

    whole, first = gradients(10_000)
    for budget in (1, 40):
        parts, m = gradients(budget)
        # fp32: the same sums in another order.
        assert (parts - whole).norm() <= 5e-6 * whole.norm(), budget
        assert m["loss"] == pytest.approx(first["loss"], abs=1e-6)
        assert m["entropy"] == pytest.approx(first["entropy"], rel=1e-6)
        assert m["tokens"] + m["shared_tokens"] == first["tokens"] + first["shared_tokens"]


@pytest.mark.parametrize(
    "loss", [{"loss__preset": "dapo"}, {"loss__preset": "gspo", "loss__kl_coef": 0.1}]
)
def test_packing_changes_no_number(make_config, tmp_path, console, toy, loss):
    """fp32: two steps of two updates, packing off, plain and shared, to rounding.

    eps = 0.1: AdamW's own, 1e-8, would turn the rounding of a gradient near 0 into a whole step.
    """
    found = {}
    for packing in ("off", "plain", "shared"):
        config = make_config(
            train__packing=packing,
            train__steps=2,
            train__updates_per_step=2,
            optimizer__eps=0.1,
            task__name=toy("SomeLost"),
            **loss,
        )
        train(config, tmp_path / packing, console=console)
        found[packing] = rows(tmp_path / packing, "metrics.jsonl")
    for packing in ("plain", "shared"):
        for ours, theirs in zip(found[packing], found["off"], strict=True):
            for key, value in theirs.items():
                if key in MEASURED or key in ("tokens", "shared_tokens"):
                    continue
                # fp32 sums in another order, and what two updates make of the difference.
                if value is not None:
                    value = pytest.approx(value, rel=2e-5, abs=2e-6, nan_ok=True)
                assert ours[key] == value, (packing, key)
            assert ours["tokens"] + ours["shared_tokens"] == theirs["tokens"]
    assert all(m["shared_tokens"] > 0 for m in found["shared"])
    assert all(m["shared_tokens"] == 0 for m in found["plain"] + found["off"])


def test_preflight_is_the_largest_row_and_leaves_no_trace(
    make_config, tmp_path, console, monkeypatch
):
    config = make_config(train__preflight="on", train__tokens_per_row=100)
    plain = make_config(train__tokens_per_row=100)
    seen, real = [], Policy.hidden
    monkeypatch.setattr(
        Policy, "hidden", lambda self, t, *a: seen.append(len(t)) or real(self, t, *a)
    )
    train(config, tmp_path / "checked", console=console)
    train(plain, tmp_path / "plain", console=console)
    assert seen.count(100) == 1 and max(seen) == 100
    checked, unchecked = (rows(tmp_path / name, "metrics.jsonl") for name in ("checked", "plain"))
    for a, b in zip(checked, unchecked, strict=True):
        assert all(a[key] == b[key] for key in a if key not in MEASURED)


@pytest.mark.parametrize("packing", ["shared", "plain", "off"])
@pytest.mark.parametrize(("budget", "longest"), [(512, 256), (200, 100), (7, 3), (1, 5), (9, 1)])
def test_preflight_fills_the_budget(make_config, packing, budget, longest):
    config = make_config(
        train__packing=packing, train__tokens_per_row=budget, rollout__max_new_tokens=longest
    )
    row = preflight._largest_row(config, vocab=320)
    if packing == "off":
        assert row.num_sequences == 1 and row.num_tokens == min(longest + 1, max(budget, 2))
    else:
        assert row.num_tokens == max(budget, 2)
        prompts = 1 if packing == "shared" else row.num_sequences
        assert int(row.loss_mask.sum()) == row.num_tokens - prompts
        assert row.plan.is_flat == (packing == "plain" or row.num_sequences == 1)


def test_preflight_names_the_setting(make_config, tmp_path, console, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(preflight, "policy_loss", full)
    config = make_config(train__preflight="on", train__tokens_per_row=100)
    with pytest.raises(
        ValueError, match=r"train\.tokens_per_row = 100: a micro-batch of .* does not fit"
    ):
        train(config, tmp_path / "run", console=console)
