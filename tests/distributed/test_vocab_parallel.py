"""The vocabulary-parallel head on 2 and 4 gloo ranks: the float64 oracle of the whole head."""

import pytest
import torch

import pyrl
from pyrl import LoRA, LossSpec, Support
from pyrl.ops.parallel import combine
from pyrl.parity import MARGIN, relative, serving
from pyrl.testing import random_support

# V: a prime that no number of ranks divides. T: every shard owns some targets and lacks others.
T, D, V, R = 23, 8, 31, 3
BOUNDS = torch.tensor([0, 5, 5, 11, 23])  # sequences, one of them empty

#: Bounds of the shards: even but for the last, very uneven, with empty shards.
SHARDS = {
    "even": (0, 16, 31),
    "uneven": (0, 3, 31),
    "empty": (0, 0, 31),
    "four": (0, 8, 16, 24, 31),
    "four, two empty": (0, 0, 19, 19, 31),
}

SPECS = {
    "reinforce": LossSpec.preset("reinforce", entropy_coef=0.1),
    "clip": LossSpec(kl_coef=0.1, entropy_coef=0.05, dual_clip=3.0, temperature=0.8),
    "gspo": LossSpec.preset("gspo", clip_low=0.2, clip_high=0.2, kl_coef=0.1, entropy_coef=0.05),
    "gspo_token": LossSpec.preset("gspo_token", clip_low=0.2, clip_high=0.2),
    "cispo": LossSpec.preset("cispo", softcap=15.0, logit_scale=0.7),
    "sapo": LossSpec.preset("sapo", kl="k2", kl_coef=0.2),
    "gmpo": LossSpec.preset("gmpo", entropy_coef=0.05),
    "vespo": LossSpec.preset("vespo", correction="tis"),
    "dppo": LossSpec.preset("dppo", correction="mis", correction_level="sequence"),
}


def inputs(dtype=torch.float32):
    """The whole head and its batch, the same on every rank."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g).to(dtype)

    leaves = {
        "hidden": normal(T, D),
        "weight": normal(V, D),
        "bias": normal(V),
        "a": normal(R, D),
        "b": normal(V, R) / 2,
    }
    rest = {
        "target": torch.randint(0, V - 2, (T,), generator=g),  # the last two ids are padding
        "mask": torch.rand(T, generator=g) > 0.3,
        "coefficients": normal(3, T, dtype=torch.float32),
        "advantages": normal(4, dtype=torch.float32),
        "noise": 0.3 * normal(3, T, dtype=torch.float32),
        "temperature": torch.linspace(0.5, 2.0, T),
    }
    return leaves, rest


def shard(leaves, start, stop, used, frozen=()):
    """This rank's part of the leaves in `used`, None for the others."""
    parts = dict.fromkeys(leaves)
    for key in used:
        rows = slice(start, stop) if key in ("weight", "bias", "b") else slice(None)
        parts[key] = leaves[key][rows].clone().requires_grad_(key not in frozen)
    return parts


def head_of(parts):
    lora = None if parts["a"] is None else LoRA(parts["a"], parts["b"], 0.5)
    return {"bias": parts["bias"], "lora": lora}


def logprob(rank, bounds, dtype, backend, used, options, frozen=(), damage=None):
    """Outputs and gradients of one rank; without bounds, of one process with the whole head."""
    leaves, rest = inputs(dtype)
    if damage is not None:
        leaves["bias"][damage[0] : damage[1]] = -torch.inf
        rest["target"] = rest["target"] % damage[0]
    whole = bounds is None
    start, stop = (0, V) if whole else bounds[rank : rank + 2]
    parts = shard(leaves, start, stop, used, frozen)
    function = pyrl.linear_logprob if whole else pyrl.vocab_parallel_logprob
    if "support" in options:
        csr = random_support(rest["target"], V - 2, rest["mask"], largest=options["support"])
        options = {**options, "support": csr}
    if "temperature" in options:
        options = {**options, "temperature": rest["temperature"]}
    out = function(
        parts["hidden"], parts["weight"], rest["target"], mask=rest["mask"], backend=backend,
        **head_of(parts), **options, **({} if whole else {"vocab_start": start}),
    )  # fmt: skip
    sum((c * v).sum() for c, v in zip(rest["coefficients"], out, strict=True)).backward()
    out = {k: v.detach() for k, v in out._asdict().items()}
    return {**out, **{k: v.grad for k, v in parts.items() if v is not None and k not in frozen}}


def policy_loss(rank, bounds, backend, name):
    """The same for a policy loss, with ref_hidden in place of ref_logprob."""
    leaves, rest = inputs()
    spec, whole = SPECS[name], bounds is None
    start, stop = (0, V) if whole else bounds[rank : rank + 2]
    parts = shard(leaves, start, stop, ("hidden", "weight", "bias", "a", "b"))
    with torch.no_grad():
        now = pyrl.linear_logprob(
            leaves["hidden"], leaves["weight"], rest["target"], backend="torch"
        ).logprob
    fields = {
        "old_logprob": now + rest["noise"][0],
        "rollout_logprob": now + rest["noise"][1],
        "ref_hidden": leaves["hidden"] + 0.1,
        "mask": rest["mask"],
        "cu_seqlens": BOUNDS,
    }
    function = pyrl.linear_policy_loss if whole else pyrl.vocab_parallel_policy_loss
    out = function(
        parts["hidden"], parts["weight"], rest["target"], rest["advantages"], spec,
        backend=backend, **head_of(parts), **fields, **({} if whole else {"vocab_start": start}),
    )  # fmt: skip
    (2 * out.loss).backward()
    grads = {k: v.grad for k, v in parts.items()}
    return {"loss": out.loss.detach(), "logprob": out.logprob, "metrics": out.metrics, **grads}


def joined(results):
    """One result from all ranks': shards side by side, what every rank has equal on all of them."""
    out = {}
    for key, first in results[0].items():
        if key in ("weight", "bias", "b"):
            out[key] = torch.cat([r[key] for r in results])
        elif key == "metrics":
            assert all(r[key].keys() == first.keys() for r in results)
            out[key] = first
        else:
            assert all(torch.equal(r[key], first) for r in results), key
            out[key] = first
    return out


def assert_parity(ours, usual, exact, dtype=torch.float32):
    for key, truth in exact.items():
        if key == "metrics":
            assert_parity(ours[key], usual[key], truth)
        elif truth.numel() == 1 and truth.isinf():  # the extreme of nothing
            assert ours[key] == truth, key
        else:
            bound = relative(usual[key], truth) + MARGIN[dtype]
            assert relative(ours[key], truth) <= bound, (key, relative(ours[key], truth), bound)


def check(ranks, bounds, dtype, backend, used=("hidden", "weight"), options=None, **rest):
    args = (used, options or {}, *(rest.get(k, d) for k, d in (("frozen", ()), ("damage", None))))
    ours = joined(ranks(len(bounds) - 1).run(logprob, bounds, dtype, backend, *args))
    usual = logprob(0, None, dtype, "torch", *args)
    exact = logprob(0, None, dtype, "reference", *args)
    assert_parity(ours, usual, exact, dtype)
    return ours


@pytest.mark.parametrize("backend", serving(torch.device("cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHARDS)
def test_logprob_parity(ranks, backend, dtype, name):
    check(ranks, SHARDS[name], dtype, backend)


@pytest.mark.parametrize("backend", serving(torch.device("cpu")))
def test_every_option_of_the_head(ranks, backend):
    ours = check(
        ranks, SHARDS["uneven"], torch.float32, backend, ("hidden", "weight", "bias", "a", "b"),
        {"temperature": None, "softcap": 12.0, "logit_scale": 0.6, "vocab_size": V - 2},
    )  # fmt: skip
    for key in ("weight", "bias", "b"):
        assert not ours[key][V - 2 :].any()  # padding


# 2: most tokens have no part of their support on most ranks.
@pytest.mark.parametrize("backend", serving(torch.device("cpu")))
@pytest.mark.parametrize("name", ["uneven", "four, two empty"])
@pytest.mark.parametrize("largest", [2, 20])
def test_support(ranks, backend, name, largest):
    check(
        ranks, SHARDS[name], torch.float32, backend, ("hidden", "weight", "a", "b"),
        {"support": largest, "temperature": None, "vocab_size": V - 2},
    )  # fmt: skip


def test_padding_that_fills_a_shard(ranks):
    check(ranks, (0, V - 2, V), torch.float32, "torch", options={"vocab_size": V - 2})


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("hidden", "weight", "b")])
def test_frozen_parts(ranks, frozen):
    used = ("hidden", "weight", "a", "b")
    ours = check(ranks, SHARDS["empty"], torch.float32, "torch", used, frozen=frozen)
    assert not set(frozen) & set(ours)


@pytest.mark.parametrize("backend", serving(torch.device("cpu")))
def test_a_shard_of_infinite_logits(ranks, backend):
    # All of rank 1 is -inf: its own log-sum-exp is -inf, and nothing may become nan.
    check(
        ranks, (0, 13, V), torch.float32, backend, ("hidden", "weight", "bias"), damage=(13, V)
    )  # fmt: skip


def test_partial_hidden_is_this_ranks_part(ranks):
    args, options = (torch.float32, "torch", ("hidden", "weight")), {"partial_hidden": True}
    parts = ranks(2).run(logprob, SHARDS["even"], *args, options)
    whole = logprob(0, None, torch.float32, "reference", ("hidden", "weight"), {})
    assert relative(sum(p["hidden"].double() for p in parts), whole["hidden"]) <= 5e-6
    assert relative(parts[0]["hidden"], whole["hidden"]) > 1e-2


@pytest.mark.parametrize("backend", [b for b in serving(torch.device("cpu")) if b != "triton"])
@pytest.mark.parametrize("name", SPECS)
def test_policy_loss_parity(ranks, backend, name):
    bounds = SHARDS["uneven"] if name != "clip" else SHARDS["four, two empty"]
    ours = joined(ranks(len(bounds) - 1).run(policy_loss, bounds, backend, name))
    usual, exact = (policy_loss(0, None, b, name) for b in ("torch", "reference"))
    assert_parity(ours, usual, exact)


def mistakes(rank):
    """What each rank is told about wrong shards; nothing may hang."""
    leaves, rest = inputs()
    hidden, target = leaves["hidden"], rest["target"]
    said = []

    def attempt(kind, start, stop, **options):
        weight = leaves["weight"][start:stop]
        given = {"vocab_start": start, **options}
        try:
            pyrl.vocab_parallel_logprob(hidden, weight, given.pop("target", target), **given)
        except kind as error:
            said.append(str(error))

    bad = target.clone()
    bad[4] = V
    attempt(ValueError, 16 * rank, V if rank else 16, target=bad)
    attempt(ValueError, 0, V)  # both ranks hold all rows
    attempt(ValueError, 16 * rank, V if rank else 16, vocab_start=-1)
    attempt(ValueError, 16 * rank, V if rank else 16, vocab_size=0)
    bounds = torch.arange(T + 1)
    halves = (16 * rank, V if rank else 16)
    attempt(ValueError, *halves, support=Support(bounds, (target + 1) % V))
    wide = torch.stack([target, torch.full_like(target, V)], dim=1).flatten()
    attempt(ValueError, *halves, support=Support(2 * bounds, wide))
    attempt(NotImplementedError, 16 * rank, V if rank else 16, backend="reference")
    return said


def test_mistakes_are_named_on_every_rank(ranks):
    first, second = ranks(2).run(mistakes)
    assert first == second
    assert len(first) == 7
    assert first[0].startswith(f"target[4] = {V} lies in 0 of the group's shards")
    assert "lies in 2 of the group's shards" in first[1]
    assert first[2] == "vocab_start=-1: expected an index >= 0"
    assert first[3] == "vocab_size=0: expected >= 1"
    assert "target[0]" in first[4] and "outside its support of 1 tokens" in first[4]
    assert first[5].startswith("support of token 0: its 2 ids were found 1 times")
    assert "backend='reference'" in first[6]


def test_combine_reads_like_its_formula():
    z = torch.randn(5, 12, dtype=torch.float64)
    z[2, 4:] = -torch.inf
    parts = [z[:, :4], z[:, 4:6], z[:, 6:]]
    lse_r = torch.stack([p.logsumexp(1) for p in parts])
    logp = [p.log_softmax(1).nan_to_num(nan=0.0) for p in parts]
    entropy_r = torch.stack([-torch.xlogy(p.exp(), p.exp()).sum(1) for p in logp])
    entropy_r[1:, 2] = 0
    logprob_r = torch.full_like(lse_r, torch.inf)
    logprob_r[0] = logp[0][:, 1]
    logprob, entropy, lse = combine(lse_r, entropy_r, logprob_r)
    whole = z.log_softmax(1)
    assert torch.allclose(lse, z.logsumexp(1))
    assert torch.allclose(logprob, whole[:, 1])
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=z).entropy())
