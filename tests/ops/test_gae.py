"""gae: the oracle against sums written out, every backend against the oracle."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrl
from pyrl.ops.gae import _gae
from pyrl.parity import DEVICE, MARGIN, relative, serving

NAN = float("nan")


def batch(lengths, seed=0, kept=0.7):
    g = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    rewards, values = torch.randn(2, tokens, generator=g).to(DEVICE).unbind()
    return (
        rewards,
        values,
        {
            "mask": (torch.rand(tokens, generator=g) < kept).to(DEVICE),
            "cu_seqlens": torch.tensor([0, *lengths], device=DEVICE).cumsum(0),
            "bootstrap": torch.randn(len(lengths), generator=g).to(DEVICE),
        },
    )


def written_out(rewards, values, gamma, lam, bootstrap):
    """A_t = sum over k of (gamma lam)^k delta_{t+k} of one sequence of Python floats."""
    after = [*values, bootstrap][1:]
    delta = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [
        math.fsum((gamma * lam) ** k * d for k, d in enumerate(delta[t:]))
        for t in range(len(delta))
    ]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    gamma=st.sampled_from([1.0, 0.99, 0.5, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    seed=st.integers(0, 99),
)
def test_the_oracle_is_the_sum_of_discounted_deltas(lengths, gamma, lam, seed):
    rewards, values, fields = batch(lengths, seed)
    out = pyrl.gae(rewards, values, gamma=gamma, lam=lam, backend="reference", **fields)
    bounds = fields["cu_seqlens"].tolist()
    for s, (begin, end) in enumerate(itertools.pairwise(bounds)):
        index = fields["mask"][begin:end].nonzero()[:, 0] + begin  # skipping = not being there
        r, v = rewards[index], values[index]
        expected = written_out(r.tolist(), v.tolist(), gamma, lam, fields["bootstrap"][s].item())
        expected = torch.tensor(expected, dtype=torch.float64, device=DEVICE)
        got, returns = out.advantages[index].double(), out.returns[index].double()
        # One rounding to fp32 of a float64 sum of a dozen terms.
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(returns, expected + v.double(), rtol=1e-7, atol=1e-12)
    assert not out.advantages[~fields["mask"]].any() and not out.returns[~fields["mask"]].any()


@pytest.mark.parametrize("backend", serving())
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=5),
    gamma=st.sampled_from([1.0, 0.99, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    kept=st.sampled_from([0.0, 0.6, 1.0]),
    seed=st.integers(0, 99),
)
def test_property_parity(backend, lengths, gamma, lam, kept, seed):
    rewards, values, fields = batch(lengths, seed, kept)
    exact, plain, ours = (
        pyrl.gae(rewards, values, gamma=gamma, lam=lam, backend=name, **fields)
        for name in ("reference", "torch", backend)
    )
    for mine, torchs, truth in zip(ours, plain, exact, strict=True):
        assert relative(mine, truth) <= relative(torchs, truth) + MARGIN[torch.float32]


@pytest.mark.parametrize("backend", serving())
# A warp of CUDA holds 32 tokens, a block of Triton 256: below, at, one beyond, and several.
@pytest.mark.parametrize("length", (1, 31, 32, 33, 256, 257, 600))
def test_sequences_longer_than_a_block(backend, length):
    rewards, values, fields = batch([3, length, 2], seed=length)
    exact = pyrl.gae(rewards, values, gamma=0.99, backend="reference", **fields)
    ours = pyrl.gae(rewards, values, gamma=0.99, backend=backend, **fields)
    # float64 inside: not even fp32's half spacing apart, but where a value lies on its edge.
    assert relative(ours.advantages, exact.advantages) < 2**-24
    assert relative(ours.returns, exact.returns) < 2**-24


@pytest.mark.parametrize("backend", serving())
def test_undiscounted_gae_is_the_rest_of_the_rewards(backend):
    rewards = torch.tensor([[1.0, 2, 3, 9], [4, 9, 5, 6]], device=DEVICE)
    values = torch.tensor([[0.5, 1.5, -1, 9], [2, 9, 3, 1]], device=DEVICE)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]], device=DEVICE).bool()
    bootstrap = torch.tensor([0.0, 10.0], device=DEVICE)
    out = pyrl.gae(rewards, values, lam=1.0, mask=mask, bootstrap=bootstrap, backend=backend)
    assert out.returns.tolist() == [[6, 5, 3, 0], [25, 0, 21, 16]]
    assert out.advantages.tolist() == [[5.5, 3.5, 4, 0], [23, 0, 18, 15]]


@pytest.mark.parametrize("backend", serving())
def test_as_verl_defines_it(backend):
    """verl's padded loop: the running advantage and next value stay as they are on tokens that are
    not the policy's; its whitening of the result is `whiten`, a step of its own here."""
    rewards, values, fields = batch([17] * 6, seed=4)
    r, v, m = (x.reshape(6, 17) for x in (rewards.double(), values.double(), fields["mask"]))
    gamma, lam, expected = 0.97, 0.9, torch.zeros(6, 17, dtype=torch.float64, device=DEVICE)
    running = upcoming = torch.zeros(6, dtype=torch.float64, device=DEVICE)
    for t in range(16, -1, -1):
        candidate = r[:, t] + gamma * upcoming - v[:, t] + gamma * lam * running
        running = torch.where(m[:, t], candidate, running)
        upcoming = torch.where(m[:, t], v[:, t], upcoming)
        expected[:, t] = torch.where(m[:, t], running, 0.0)
    out = pyrl.gae(r.float(), v.float(), gamma=gamma, lam=lam, mask=m, backend=backend)
    assert relative(out.advantages, expected) < MARGIN[torch.float32]


@pytest.mark.parametrize("backend", serving())
def test_padded_equals_packed_bit_for_bit(backend):
    lengths = torch.tensor([9, 0, 4, 1])
    g = torch.Generator().manual_seed(2)
    rewards, values = torch.randn(2, 4, 9, generator=g).to(DEVICE).unbind()
    mask = (torch.arange(9) < lengths[:, None]).to(DEVICE)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    bootstrap = torch.randn(4, generator=g).to(DEVICE)
    padded = pyrl.gae(rewards, values, mask=mask, bootstrap=bootstrap, backend=backend)
    packed = pyrl.gae(
        rewards[mask], values[mask], cu_seqlens=bounds, bootstrap=bootstrap, backend=backend
    )
    for a, b in zip(padded, packed, strict=True):
        torch.testing.assert_close(a[mask], b, rtol=1e-6, atol=1e-6)
        assert a.shape == (4, 9) and not a[~mask].any()


@pytest.mark.parametrize("backend", serving())
def test_a_sequence_does_not_see_its_neighbours(backend):
    rewards, values, fields = batch([5, 70, 8], seed=1)
    both = pyrl.gae(rewards, values, backend=backend, **fields)
    alone = pyrl.gae(
        rewards[5:75],
        values[5:75],
        mask=fields["mask"][5:75],
        cu_seqlens=torch.tensor([0, 70], device=DEVICE),
        bootstrap=fields["bootstrap"][1:2],
        backend=backend,
    )
    for a, b in zip(both, alone, strict=True):
        assert torch.equal(a[5:75], b)


@pytest.mark.parametrize("backend", serving())
def test_unkept_tokens_may_hold_anything(backend):
    rewards, values, fields = batch([6, 5], seed=3)
    expected = pyrl.gae(rewards, values, backend=backend, **fields)
    rewards[~fields["mask"]], values[~fields["mask"]] = NAN, torch.inf
    out = pyrl.gae(rewards, values, backend=backend, **fields)
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b)
    fields["mask"][:] = False
    out = pyrl.gae(rewards, values, backend=backend, **fields)
    assert not out.advantages.any() and not out.returns.any()


@pytest.mark.parametrize("backend", [b for b in serving() if b != "triton"])
def test_65536_tokens_keep_their_digits(backend):
    """One long sequence of rewards whose sum cancels: fp32 accumulation would lose it. (Triton's
    interpreter takes a second per thousand tokens; its blocks are crossed above.)"""
    n = 65_536
    g = torch.Generator().manual_seed(0)
    rewards = (100 * torch.randn(n, generator=g)).to(DEVICE)
    values = torch.randn(n, generator=g).to(DEVICE)
    bounds = torch.tensor([0, n], device=DEVICE)
    out = pyrl.gae(rewards, values, lam=1.0, cu_seqlens=bounds, backend=backend)
    exact = rewards.double().flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(out.returns.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        out.advantages.double(), exact - values.double(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("backend", serving())
def test_half_precision_inputs_and_no_gradient(backend):
    rewards, values, fields = batch([4, 3])
    values = values.bfloat16().requires_grad_()
    out = pyrl.gae(rewards.half(), values, backend=backend, **fields)
    exact = pyrl.gae(rewards.half().float(), values.detach().float(), backend=backend, **fields)
    assert torch.equal(out.advantages, exact.advantages) and not out.advantages.requires_grad


@pytest.mark.parametrize("backend", serving())
def test_one_graph_under_compile(backend):
    rewards, values, fields = batch([4, 3])

    def call(r, v):
        return pyrl.gae(r, v, backend=backend, **fields)

    expected = call(rewards, values)
    got = torch.compile(call, fullgraph=True, backend="eager")(rewards, values)
    assert torch.equal(got.advantages, expected.advantages)


@pytest.mark.parametrize("backend", [*serving(), "reference"])
def test_opcheck(backend):
    rewards, values, fields = batch([4, 0, 3])
    arguments = (fields["mask"], fields["cu_seqlens"], fields["bootstrap"])
    torch.library.opcheck(_gae, (rewards, values, *arguments, 0.99, 0.95, backend))


def test_the_torch_backend_never_asks_for_a_value():
    """A fake tensor has none: whoever asks raises. (The call itself: one graph, above.)"""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pyrl.ops.backends.torch import gae_terms

    with FakeTensorMode():
        vectors = torch.empty(2, 64).unbind()
        keep, bounds = torch.empty(64, dtype=torch.bool), torch.empty(9, dtype=torch.int64)
        terms = gae_terms(*vectors, keep, bounds, torch.empty(8), 1.0, 0.95)
        assert [t.shape for t in terms] == [(64,), (64,)]


def test_bad_input_names_itself():
    rewards, values, fields = batch([4, 3])

    def refuses(match, r=rewards, v=values, **changes):
        with pytest.raises(ValueError, match=match):
            pyrl.gae(r, v, **{**fields, **changes})

    refuses("gamma=1.5", gamma=1.5)
    refuses("lam=-0.1", lam=-0.1)
    refuses("needs cu_seqlens", cu_seqlens=None)
    refuses("values: expected shape", v=values[:3])
    refuses("bootstrap: expected shape", bootstrap=fields["bootstrap"][:1])
    refuses("rewards: expected a floating dtype", r=rewards.long())
    if DEVICE.type == "cpu":
        rewards[5] = NAN
        refuses(r"rewards\[5\] = nan is not finite", mask=None)
        refuses(r"bootstrap\[1\] = inf", r=values, bootstrap=torch.tensor([0.0, torch.inf]))
