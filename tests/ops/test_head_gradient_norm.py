"""Norms of the head's gradient for every sequence, against a float64 autograd pass for each."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pyrl
from pyrl.ops import head_gradient_norm as module
from pyrl.ops.head_gradient_norm import head_gradient_norms
from pyrl.parity import DEVICE, MARGIN, relative, serving

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: T, D, V and bounds: one of a token, none, fewer and more tokens than D (both ways to the square);
#: an odd V past one vector.
CASES = [
    (40, 16, 301, [0, 1, 1, 9, 33, 40]),
    (24, 8, 17, [0, 0, 24, 24]),
    (5, 32, 1, [0, 2, 5]),
    (30, 4, 4099, [0, 3, 30]),  # past one slab of the vocabulary
]


def inputs(t, d, v, bounds, dtype, *, seed=0, bias=False):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(t, d, generator=g).to(DEVICE, dtype)
    weight = torch.randn(v, d, generator=g).to(DEVICE, dtype)
    b = torch.randn(v, generator=g).to(DEVICE, dtype) if bias else None
    target = torch.randint(0, v, (t,), generator=g).to(DEVICE)
    mask = (torch.rand(t, generator=g) > 0.3).to(DEVICE)
    return (hidden, weight, target, torch.tensor(bounds, device=DEVICE)), {"bias": b, "mask": mask}


def plain(hidden, weight, target, bounds, *, bias=None, mask=None, temperature=1.0, softcap=None,
          logit_scale=1.0, dtype=None):  # fmt: skip
    """One autograd pass a sequence in `dtype` (float64), or as plain torch has it in the inputs'.

    Also, for each, the norm of what it is a sum of. A token's dL/dz is p - e_y, two terms that
    cancel where the token is certain: the root of the sum over tokens of |∇(e_y·z)|² is that size.
    """
    hidden, weight, bias = (
        v if v is None or dtype is None else v.to(dtype) for v in (hidden, weight, bias)
    )
    mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    weight = weight.detach().requires_grad_()

    def gradient(index, normalised=True):
        z = torch.nn.functional.linear(hidden[index], weight, bias)
        z = (z if dtype else z.float()) * logit_scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        t = temperature[index, None] if isinstance(temperature, torch.Tensor) else temperature
        z = (z / t).log_softmax(-1) if normalised else z / t
        chosen = z.gather(1, target[index, None])
        return torch.autograd.grad(-chosen.sum(), weight)[0].double()

    norms = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        index = torch.arange(begin, end, device=target.device)
        index = index[mask[index]]
        terms = [gradient(i[None], normalised=False).norm() for i in index]
        parts = torch.stack(terms or [torch.zeros(())])
        norms.append((gradient(index).norm(), parts.norm()))
    norm, size = (torch.stack(v) for v in zip(*norms, strict=True))
    return norm, size


def assert_parity(backend, dtype, args, options):
    truth, sizes = plain(*args, **options, dtype=torch.float64)
    theirs, _ = plain(*args, **options)
    ours = head_gradient_norms(*args, **options, backend=backend)
    assert ours.dtype == torch.float32 and ours.shape == truth.shape
    for s, size in enumerate(sizes):
        bound = relative(theirs[s], truth[s], size) + MARGIN[dtype]
        assert relative(ours[s], truth[s], size) <= bound, (s, relative(ours[s], truth[s], size))
        if size == 0:  # no kept token
            assert ours[s] == 0


@pytest.mark.parametrize("backend", [*serving(), "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(backend, dtype, case):
    assert_parity(backend, dtype, *inputs(*case, dtype, bias=True))


@pytest.mark.parametrize("backend", [*serving(), "reference"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_head_options(backend, dtype):
    args, options = inputs(*CASES[0], dtype)
    temperature = torch.linspace(0.5, 2.0, 40, device=DEVICE)
    options |= {"temperature": temperature, "softcap": 15.0, "logit_scale": 0.5}
    assert_parity(backend, dtype, args, options)


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 20])
def test_a_sequence_of_several_chunks_goes_by_slices(backend, dtype, rows, monkeypatch):
    """Both ways to the square: 24 and 7 tokens beside D = 16."""
    monkeypatch.setattr(module, "chunk_rows", lambda *_: rows)
    args, options = inputs(*CASES[0], dtype, bias=True)
    options |= {"softcap": 15.0, "temperature": 0.7}
    assert_parity(backend, dtype, args, options)


@pytest.mark.parametrize("backend", serving())
def test_deterministic_mode_agrees(backend, monkeypatch):
    args, options = inputs(300, 16, 50, [0, 200, 300], torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert_parity(backend, torch.float32, args, options)
    finally:
        torch.use_deterministic_algorithms(False)


@settings(max_examples=25, deadline=None)
@example(lengths=[4], d=7, v=1, rows=1, seed=0)  # one word: nothing but rounding
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    d=st.integers(1, 9),
    v=st.integers(1, 40),
    rows=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_any_shape(lengths, d, v, rows, seed):
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    args, options = inputs(bounds[-1], d, v, bounds, torch.float32, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "chunk_rows", lambda *_: rows)
        assert_parity(None, torch.float32, args, options)


def test_padded_input_and_a_known_lse_change_nothing():
    args, options = inputs(24, 8, 90, [0, 6, 12, 18, 24], torch.float32)
    hidden, weight, target, _ = args
    truth = head_gradient_norms(*args, **options)
    mask = options["mask"].view(4, 6)
    padded = (hidden.view(4, 6, 8), weight, target.view(4, 6))
    assert head_gradient_norms(*padded, mask=mask).equal(truth)
    lse = pyrl.linear_logprob(*padded, mask=mask).lse
    assert (head_gradient_norms(*padded, mask=mask, lse=lse) - truth).abs().max() <= 1e-6


def test_the_sum_over_tokens_may_vanish():
    """Each of two tokens once, p = 1/2 each: the gradients are opposite, and the norm is 0."""
    hidden = torch.ones(2, 3)
    norms = head_gradient_norms(
        hidden, torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 2])
    )
    assert norms.tolist() == [0.0]


def test_unkept_tokens_may_hold_anything():
    args, options = inputs(*CASES[0], torch.float32)
    truth = head_gradient_norms(*args, **options)
    hidden, weight, target, bounds = args
    gone = ~options["mask"]
    hidden = hidden.masked_fill(gone[:, None], torch.nan)
    target = target.masked_fill(gone, -100)
    assert head_gradient_norms(hidden, weight, target, bounds, **options).equal(truth)


def test_no_sequences_and_no_tokens():
    weight, none = torch.zeros(5, 3), torch.zeros(0, dtype=torch.long)
    for backend in (None, "reference"):
        empty = (torch.zeros(0, 3), weight, none)
        out = head_gradient_norms(*empty, torch.tensor([0]), backend=backend)
        assert out.shape == (0,) and out.dtype == torch.float32
        out = head_gradient_norms(*empty, torch.tensor([0, 0, 0]), backend=backend)
        assert out.tolist() == [0.0, 0.0]


def test_nothing_is_differentiated():
    args, options = inputs(*CASES[0], torch.float32)
    args[0].requires_grad_()
    args[1].requires_grad_()
    assert not head_gradient_norms(*args, **options).requires_grad
    assert not head_gradient_norms(*args, **options, backend="reference").requires_grad


def test_bad_input():
    args, _ = inputs(*CASES[0], torch.float32)
    hidden, weight, target, bounds = args
    with pytest.raises(ValueError, match="needs cu_seqlens: one norm is computed a sequence"):
        head_gradient_norms(hidden, weight, target)
    with pytest.raises(ValueError, match=r"cu_seqlens must run from 0 to T=40, got 0 … 9"):
        head_gradient_norms(hidden, weight, target, bounds[:4])
    with pytest.raises(ValueError, match=r"target\[3\] = 301 is outside the vocabulary \[0, 301\)"):
        bad = target.clone()
        bad[3] = 301
        head_gradient_norms(hidden, weight, bad, bounds)
    with pytest.raises(ValueError, match=r"lse: expected shape \(40,\), got \(39,\)"):
        head_gradient_norms(*args, lse=torch.zeros(39, device=DEVICE))
    with pytest.raises(ValueError, match=r"temperature=0: expected a finite number"):
        head_gradient_norms(*args, temperature=0)
    with pytest.raises(ValueError, match=r"softcap=-1: expected None"):
        head_gradient_norms(*args, softcap=-1)
