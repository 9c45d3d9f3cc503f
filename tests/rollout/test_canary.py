"""The canary sings when weights are stale, and only then."""

import math

import pytest
import torch

from pyrl.rollout import Canary, CanaryError, make_rollout
from pyrl.rollout.canary import TOLERANCE, Tolerance

PROMPT, COMPLETION = [3, 200, 17, 44], [9, 9, 310, 2, 5, 77]


class Fixed:
    """An engine that answers with numbers it was given."""

    name, dtype, version = "fixed", torch.float32, 7

    def __init__(self, logprobs):
        self.logprobs = logprobs

    def score(self, prompt, completion):
        return self.logprobs


def test_agreement_returns_the_largest_gap(tiny_policy):
    engine = make_rollout(policy=tiny_policy())
    scored = engine.score(PROMPT, COMPLETION)
    nudged = [*scored]
    nudged[3] += 5e-5
    canary = Canary(PROMPT, COMPLETION)
    assert canary.check(engine, scored) == 0.0
    assert canary.check(engine, nudged) == pytest.approx(5e-5, rel=1e-6)


def test_stale_weights_stop_the_run(tiny_policy, tmp_path):
    policy = tiny_policy()
    policy.save(tmp_path / "model")
    engine = make_rollout(model_path=str(tmp_path / "model"))
    trainer = make_rollout(policy=policy)
    canary = Canary(PROMPT, COMPLETION)
    weight = policy.model.model.layers[0].mlp.up_proj.weight
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(1.01)
        with pytest.raises(CanaryError, match=r"version 0 the transformers engine.*stale weights"):
            canary.check(engine, trainer.score(PROMPT, COMPLETION))
        engine.sync(policy.model.named_parameters(), 1)
        assert canary.check(engine, trainer.score(PROMPT, COMPLETION)) <= 1e-5
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def test_the_message_has_numbers_place_tolerance_and_version():
    canary = Canary([1], [2, 3])
    with pytest.raises(CanaryError) as error:
        canary.check(Fixed([-1.0, -2.0]), [-1.0, -2.5])
    text = str(error.value)
    for part in ("version 7", "fixed engine", "0.5 at token 1", "-2.00000", "-2.50000", "0.0001"):
        assert part in text


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_nan_never_passes(bad):
    with pytest.raises(CanaryError):
        Canary([1], [2, 3]).check(Fixed([-1.0, bad]), [-1.0, -2.0], torch.bfloat16)
    with pytest.raises(CanaryError):
        Canary([1], [2, 3]).check(Fixed([-1.0, -2.0]), [bad, -2.0], torch.bfloat16)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_dtype_sets_the_tolerance(dtype):
    limit = TOLERANCE[dtype]
    canary, engine = Canary([1], [2] * 20), Fixed([-1.0] * 20)

    def shifted(one, rest):
        return [-1.0 - one] + [-1.0 - rest] * 19

    assert canary.check(engine, shifted(0.9 * limit.max, 0.5 * limit.mean), dtype) > 0
    with pytest.raises(CanaryError):
        canary.check(engine, shifted(1.1 * limit.max, 0.0), dtype)
    with pytest.raises(CanaryError):
        canary.check(engine, shifted(1.1 * limit.mean, 1.1 * limit.mean), dtype)


def test_the_tolerance_can_be_given():
    tight = Canary([1], [2], tolerance=Tolerance(max=1e-6, mean=1e-6))
    with pytest.raises(CanaryError):
        tight.check(Fixed([-1.0]), [-1.00001], torch.bfloat16)
    with pytest.raises(ValueError, match=r"no tolerance for torch\.float64"):
        Canary([1], [2]).check(Fixed([-1.0]), [-1.0], torch.float64)


def test_bad_canaries_say_so():
    with pytest.raises(ValueError, match="completion of 0"):
        Canary([1], [])
    with pytest.raises(ValueError, match="3 trainer log-probs for 1 tokens"):
        Canary([1], [2]).check(Fixed([-1.0]), [0.0, 0.0, 0.0])
