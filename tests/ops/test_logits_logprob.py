"""logits_logprob: where rows lie, what the ops declare, and the entropy and lse gradients."""

import pytest
import torch

import pyrl
from pyrl.ops.logits_logprob import _gradient, _gradient_, _logits_logprob, matrix
from pyrl.parity import DEVICE, MARGIN, relative, serving
from pyrl.testing import random_support

T, V = 21, 130


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    leaf = (2 * torch.randn(T, V, generator=g)).to(DEVICE).requires_grad_()
    target = torch.randint(0, V, (T,), generator=g).to(DEVICE)
    mask = (torch.rand(T, generator=g) > 0.3).to(DEVICE)
    return leaf, target, mask, random_support(target, V, mask), torch.randn(3, T).to(DEVICE)


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("replay", [False, True])
def test_all_three_outputs_have_their_gradient(backend, replay):
    leaf, target, mask, support, coefficients = inputs()
    options = {
        "temperature": torch.linspace(0.5, 2.0, T).to(DEVICE),
        "softcap": 15.0,
        "logit_scale": -0.5,
        "mask": mask,
        "support": support if replay else None,
    }

    def run(backend, **inplace):
        out = pyrl.logits_logprob(leaf * 1, target, backend=backend, **options, **inplace)
        total = sum((c * v).sum() for c, v in zip(coefficients, out, strict=True))
        return [*out, *torch.autograd.grad(total, leaf)]

    exact = run("reference")
    for inplace in (False, True):
        for ours, expected in zip(run(backend, inplace_backward=inplace), exact, strict=True):
            assert relative(ours, expected) <= MARGIN[torch.float32]


def test_matrix():
    z = torch.arange(240.0).view(4, 6, 10)
    for view, rows in (
        (z, list(range(24))),
        (z[:, 1:], [b * 6 + t for b in range(4) for t in range(5)]),
        (z[::2, ::3], [b * 4 + t for b in range(2) for t in range(2)]),
        (z.transpose(0, 1), [t + 6 * b for t in range(6) for b in range(4)]),
        (z[1, 2:3], [0]),
        (z[:, 2:3, 1:], [0, 1, 2, 3]),
        (z[:0], []),
    ):
        found, index = matrix(view)
        assert index.tolist() == rows
        assert torch.equal(found[index], view.reshape(-1, view.shape[-1]))
        assert found.data_ptr() == view.data_ptr() or not rows
    assert matrix(z.transpose(1, 2)) is None
    assert matrix(torch.empty(1, 10).expand(3, 10)) is None
    assert matrix(torch.empty(100).as_strided((3, 3, 10), (5, 10, 1))) is None  # rows overlap


@pytest.mark.parametrize(
    "backend", [b for b in serving() if b != "triton" or DEVICE.type == "cuda"]
)
def test_rows_beyond_two_to_the_31(backend):
    """Reserved, not used: of 4.3 GB only the rows that are kept are ever touched."""
    v = 32001
    rows = 2**31 // v + 2
    logits = torch.empty(rows, v, dtype=torch.bfloat16, device=DEVICE)
    ends = torch.tensor([0, rows - 2, rows - 1], device=DEVICE)
    values = torch.randn(3, v, device=DEVICE).to(torch.bfloat16)
    logits[ends] = values
    target = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    target[ends] = torch.tensor([7, 32000, 12345], device=DEVICE)
    mask = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    mask[ends] = True
    out = pyrl.logits_logprob(logits, target, mask=mask, backend=backend)
    few = pyrl.logits_logprob(values, target[ends], backend=backend)
    for ours, expected in zip(out, few, strict=True):
        assert torch.equal(ours[ends], expected)


@pytest.mark.parametrize("backend", serving())
def test_opcheck(backend):
    leaf, target, mask, support, (c, h, g) = inputs()
    inv = torch.ones(T, device=DEVICE)
    logits = leaf.detach()
    for given in ((None, None), tuple(support)):
        vectors = (target, inv, mask, *given)
        options = (0.0, 1.0, backend)
        torch.library.opcheck(_logits_logprob, (leaf, *vectors, *options, False))
        _, entropy, lse = _logits_logprob(logits, *vectors, *options, False)
        rest = (*vectors, entropy, lse, c, h, g, *options)
        torch.library.opcheck(_gradient, (logits, *rest))
        torch.library.opcheck(_gradient_, (logits.clone(), None, *rest))
        torch.library.opcheck(_gradient_, (torch.empty_like(logits), logits, *rest))
