"""A truncating sampler's own log-probs: the on-policy ratio is 1 with its support replayed, biased
without. The sampler is Hugging Face's `generate`."""

import pytest
import torch

import pyrl
from pyrl import LossSpec, Support
from pyrl.parity import DEVICE, serving
from pyrl.testing import tiny_config

PROMPTS, LENGTH, NEW = 24, 6, 20  # 480 tokens: a mean ratio known to well under a percent
SAMPLERS = {
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 20, "temperature": 1.2},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 60, "top_p": 0.9, "min_p": 0.02, "temperature": 0.9},
}


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config())
    return model.float().to(DEVICE).eval()


@pytest.fixture(scope="module", params=SAMPLERS)
def rollout(request, model):
    """hidden [T, D], target [T], the sampler's log-probs [T], its support, and its temperature."""
    options = {"top_k": 0, **SAMPLERS[request.param]}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        prompts = torch.randint(3, 320, (PROMPTS, LENGTH), device=DEVICE)
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=NEW,
            min_new_tokens=NEW, output_scores=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        target = out.sequences[:, LENGTH:]
        # Each step's truncated scores are what the token was drawn from.
        logp = torch.stack([s.log_softmax(-1) for s in out.scores], dim=1)
        sampled = logp.gather(2, target[..., None])[..., 0]
        support = Support.stack([Support.from_masks(s > -torch.inf) for s in out.scores])
        hidden = model.model(out.sequences).last_hidden_state[:, LENGTH - 1 : -1]
    return hidden, target, sampled, support, options.get("temperature", 1.0)


@pytest.mark.parametrize("backend", [*serving(), "reference"])
def test_ratio_of_an_unchanged_policy(backend, model, rollout):
    hidden, target, sampled, support, temperature = rollout
    if (
        backend == "triton" and DEVICE.type == "cpu"
    ):  # as many tokens as show it: its rows take milliseconds each
        rows = slice(0, 2)
        hidden, target, sampled = hidden[rows], target[rows], sampled[rows]
        support = support.take(torch.arange(target.numel()))
    spec = LossSpec(objective="clip", temperature=temperature)
    weight = model.lm_head.weight.detach()
    advantages = torch.ones(len(target), device=DEVICE)

    def mean_ratio(**options):
        with torch.no_grad():
            logp = pyrl.linear_logprob(
                hidden, weight, target, temperature=temperature, backend=backend, **options
            ).logprob
            out = pyrl.linear_policy_loss(
                hidden, weight, target, advantages, spec, old_logprob=sampled, backend=backend,
                **options,
            )  # fmt: skip
        ratio = (logp - sampled).exp()
        mean = out.metrics["ratio_sum"] / out.metrics["tokens"]
        assert mean.item() == pytest.approx(ratio.mean().item(), abs=1e-6)
        return ratio

    replayed = mean_ratio(support=support)
    # One decoding step against one forward of the whole sequence: fp32 sums in another order.
    assert (replayed - 1).abs().max() < 1e-4 and abs(replayed.mean() - 1) < 1e-5
    biased = mean_ratio()
    assert biased.mean() < 0.97 and biased.max() < 1 + 1e-4
    sizes = support.indptr.diff()
    assert sizes.min() >= 1 and sizes.max() < 320


def test_the_support_of_the_logits_is_the_sampler_s(model, rollout, request):
    hidden, target, _, support, _ = rollout
    options = SAMPLERS[request.node.callspec.params["rollout"]]
    logits = torch.nn.functional.linear(hidden, model.lm_head.weight)
    logits[..., model.generation_config.eos_token_id] = -torch.inf  # `min_new_tokens` bans it
    recomputed = Support.from_logits(logits, **options)
    # The same logits up to rounding: only a token at the very edge of a set could differ.
    same = recomputed.indptr.diff() == support.indptr.diff()
    assert same.float().mean() > 0.99
    if bool(same.all()):
        ours = pyrl.linear_logprob(hidden, model.lm_head.weight, target, support=recomputed)
        theirs = pyrl.linear_logprob(hidden, model.lm_head.weight, target, support=support)
        torch.testing.assert_close(ours.logprob, theirs.logprob, rtol=0, atol=1e-5)
