"""varlen_attention against float64 softmax attention with an explicit [T, T] mask."""

import pytest
import torch

from pyrl.packing.attention import VarlenPlan, pyrl_varlen_forward, varlen_attention

LENGTHS = [5, 1, 0, 17, 17, 3]
# Reordered float32 sums of up to 17 products; bfloat16's unit roundoff is 2^-9, twice for the
# rounding of inputs' gradients at the two casts.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3}


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def oracle(q, k, v, lengths, scale, window=None, softcap=None):
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    t = torch.arange(len(ids))
    seen = (ids[:, None] == ids) & (t[:, None] >= t)
    if window is not None:
        seen &= t[:, None] - t < window
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def inputs(heads, kv_heads, lengths, dtype=torch.float32, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, sum(lengths), h, dim, generator=generator).to(dtype).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads, heads)
    ]


def close(a, b, tolerance, size=0.0):
    """Relative error; `size` is that of the terms where b is a difference that may vanish."""
    assert (a.double() - b.double()).norm() <= tolerance * b.double().norm().clamp_min(size)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (9, 3)])
@pytest.mark.parametrize("window", [None, 1, 4, 17])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_values_and_gradients(dtype, heads, window, softcap):
    *qkv, grad = inputs(*heads, LENGTHS, dtype)
    grad = grad.transpose(1, 2)
    plan = VarlenPlan.build(bounds(LENGTHS), sum(LENGTHS))
    ours = [x.clone().requires_grad_() for x in qkv]
    exact = [x.double().requires_grad_() for x in qkv]
    out = varlen_attention(*ours, plan, scale=0.7, sliding_window=window, softcap=softcap)
    reference = oracle(*exact, LENGTHS, 0.7, window, softcap)
    assert out.dtype == dtype and out.shape == (1, sum(LENGTHS), heads[0], 8)
    close(out, reference, TOLERANCE[dtype])
    for a, b in zip(
        torch.autograd.grad(out, ours, grad),
        torch.autograd.grad(reference, exact, grad.double()),
        strict=True,
    ):
        assert a.dtype == dtype
        close(a, b, TOLERANCE[dtype], float(grad.double().norm()))


def test_other_sequences_change_nothing():
    q, k, v, _ = inputs(4, 2, LENGTHS)
    plan = VarlenPlan.build(bounds(LENGTHS), sum(LENGTHS))
    before = varlen_attention(q, k, v, plan)
    k, v = k.clone(), v.clone()
    k[:, :, :6], v[:, :, :6] = torch.nan, torch.inf
    after = varlen_attention(q, k, v, plan)
    assert after[:, 6:].equal(before[:, 6:]) and not after[:, :6].equal(before[:, :6])


def test_no_tokens():
    q, k, v, _ = inputs(4, 2, [0])
    out = varlen_attention(q.requires_grad_(), k, v, VarlenPlan.build(bounds([0, 0]), 0))
    assert out.shape == (1, 0, 4, 8) and torch.autograd.grad(out.sum(), q)[0].shape == q.shape


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([1, 4], r"cu_seqlens\[0\]=1"),
        ([0, 3], r"cu_seqlens\[-1\]=3: expected 4"),
        ([0, 3, 2, 4], r"cu_seqlens\[2\]=2 is below 3"),
        ([[0, 4]], r"shape \[1, 2\]"),
        ([], r"shape \[0\]"),
    ],
)
def test_bad_boundaries(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        VarlenPlan.build(torch.tensor(cu_seqlens), 4)


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


def test_the_transformers_protocol():
    q, k, v, _ = inputs(4, 2, LENGTHS)
    cu = bounds(LENGTHS)
    plan = VarlenPlan.build(cu, sum(LENGTHS))
    expected = varlen_attention(q, k, v, plan, scale=0.3)
    for given in ({"cu_seq_lens_q": cu}, {"varlen_plan": plan}):
        out, weights = pyrl_varlen_forward(Layer(), q, k, v, None, scaling=0.3, **given)
        assert weights is None and out.equal(expected)
    whole, _ = pyrl_varlen_forward(Layer(), q, k, v, None, scaling=0.3)
    close(whole, oracle(q, k, v, [sum(LENGTHS)], 0.3), 2e-6)
    capped, _ = pyrl_varlen_forward(Layer(), q, k, v, None, scaling=0.3, softcap=1.5)
    close(capped, oracle(q, k, v, [sum(LENGTHS)], 0.3, softcap=1.5), 2e-6)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"dropout": 0.1}, NotImplementedError, "dropout"),
        ({"s_aux": torch.zeros(4)}, NotImplementedError, "s_aux"),
        ({"position_bias": torch.zeros(4)}, NotImplementedError, "position_bias"),
        ({"is_causal": False}, NotImplementedError, "causal only"),
        ({"batch": 2}, ValueError, "one row without a cache"),
    ],
)
def test_what_it_cannot_do_is_refused(kwargs, error, message):
    q, k, v, _ = inputs(4, 2, LENGTHS)
    batch = kwargs.pop("batch", 1)
    q, k, v = (x.repeat(batch, 1, 1, 1) for x in (q, k, v))
    with pytest.raises(error, match=message):
        pyrl_varlen_forward(Layer(), q, k, v, None, cu_seq_lens_q=bounds(LENGTHS), **kwargs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 4])
def test_flash_attention_on_cuda(window):
    *qkv, grad = inputs(6, 2, LENGTHS, torch.bfloat16, dim=64)
    plan = VarlenPlan.build(bounds(LENGTHS).cuda(), sum(LENGTHS))
    ours = [x.cuda().requires_grad_() for x in qkv]
    exact = [x.double().requires_grad_() for x in qkv]
    out = varlen_attention(*ours, plan, sliding_window=window)
    reference = oracle(*exact, LENGTHS, 64**-0.5, window)
    close(out.cpu(), reference, 8e-3)  # flash rounds the probabilities to bfloat16 too
    grad = grad.transpose(1, 2)
    for a, b in zip(
        torch.autograd.grad(out, ours, grad.cuda()),
        torch.autograd.grad(reference, exact, grad.double()),
        strict=True,
    ):
        close(a.cpu(), b, 1.6e-2, float(grad.double().norm()))
