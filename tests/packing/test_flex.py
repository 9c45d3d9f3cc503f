"""FlexAttention's block mask against the dense mask; its CPU forward against the oracle."""

import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from pyrl.packing.flex import BLOCK, attend_flex, block_mask, mask_function, touched_blocks
from pyrl.packing.tree_attention import (
    TreePlan,
    tree_attention,
    tree_attention_dense,
    tree_mask,
)
from pyrl.parity import MARGIN, relative


def plan_of(*segments):
    """(length, parent) each -> TreePlan."""
    starts = [0, *itertools.accumulate(length for length, _ in segments)]
    return TreePlan.build(starts, [parent for _, parent in segments])


LONG = {
    "two levels": [(70, -1), (40, 0), (600, 0), (130, 0)],
    "block edges": [(128, -1), (128, 0), (128, 0), (1, 0), (127, -1), (128, -1), (256, 5)],
    "one block": [(4, -1), (3, 0), (2, 1), (5, 1), (6, 0), (1, 4), (2, 4), (3, -1), (2, 7)],
    "ragged": [(300, -1), (37, 0), (129, 1), (5, 1), (200, 0), (77, -1), (40, 5), (41, 5)],
}


def tiles(mask):
    """Dense [T, T] -> (any pair, every existing pair) of each block pair."""
    blocks = -(-len(mask) // BLOCK)
    cut = [slice(b * BLOCK, (b + 1) * BLOCK) for b in range(blocks)]
    some = torch.tensor([[bool(mask[i, j].any()) for j in cut] for i in cut])
    return some, torch.tensor([[bool(mask[i, j].all()) for j in cut] for i in cut])


@pytest.mark.parametrize("name", LONG)
def test_blocks_are_exact(name):
    plan = plan_of(*LONG[name])
    some, every = tiles(tree_mask(plan))
    every.fill_diagonal_(False)
    partial, full = touched_blocks(plan)
    assert full.equal(every) and partial.equal(some & ~every)


@pytest.mark.parametrize("window", [1, 40, 200])
@pytest.mark.parametrize("name", LONG)
def test_blocks_under_a_window_miss_nothing(name, window):
    plan = plan_of(*LONG[name])
    some, every = tiles(tree_mask(plan, window))
    partial, full = touched_blocks(plan, window)
    assert not (partial & full).any() and not (some & ~partial & ~full).any()
    assert not (full & ~every).any()
    if name == "ragged":  # it does leave blocks out
        assert int((partial | full).sum()) < int(sum(x.sum() for x in touched_blocks(plan)))


@pytest.mark.parametrize("window", [None, 40])
def test_the_block_mask_that_flex_attention_gets(window):
    plan = plan_of(*LONG["ragged"])
    mask = block_mask(plan, window)
    assert mask is block_mask(plan, window) and mask is not block_mask(plan, 41)
    assert mask.seq_lengths == (plan.num_tokens, plan.num_tokens)
    partial, full = touched_blocks(plan, window)
    for counts, columns, expected in (
        (mask.kv_num_blocks, mask.kv_indices, partial),
        (mask.full_kv_num_blocks, mask.full_kv_indices, full),
        (mask.q_num_blocks, mask.q_indices, partial.T),
        (mask.full_q_num_blocks, mask.full_q_indices, full.T),
    ):
        assert counts.dtype == columns.dtype == torch.int32
        for row, n, blocks in zip(expected, counts[0, 0], columns[0, 0], strict=True):
            assert blocks[:n].tolist() == row.nonzero().flatten().tolist()
    t = torch.arange(plan.num_tokens)
    evaluated = mask_function(plan, window)(None, None, t[:, None], t)
    assert evaluated.equal(tree_mask(plan, window))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("options", [(None, None), (7, None), (None, 1.5), (7, 1.5)])
def test_flex_attention_forward(options):
    """Uncompiled on the CPU: the mask and score functions, shapes and head groups."""
    plan = plan_of(*LONG["one block"])
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, plan.num_tokens, 16, generator=draw) for h in (6, 2, 2))
    window, softcap = options
    out = attend_flex(q, k, v, plan, 0.3, window, softcap, kernel=flex_attention)
    exact = tree_attention_dense(
        q.double(), k.double(), v.double(), plan, scale=0.3, sliding_window=window, softcap=softcap
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 40}, {"softcap": 1.5}])
@pytest.mark.parametrize("name", LONG)
def test_flex_attention_on_cuda(name, options, dtype):
    plan = plan_of(*LONG[name])
    device = TreePlan.build(plan.starts, plan.parents, device="cuda")
    draw = torch.Generator().manual_seed(0)
    *qkv, grad = (
        torch.randn(1, plan.num_tokens, h, 64, generator=draw).to(dtype) for h in (6, 2, 2, 6)
    )
    qkv = [x.transpose(1, 2) for x in qkv]

    def run(attention, place, dtype, plan):
        inputs = [x.to(place, dtype).requires_grad_() for x in qkv]
        out = attention(*inputs, plan, **options)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(place, dtype))]

    exact = run(tree_attention_dense, "cpu", torch.float64, plan)
    plain = run(tree_attention_dense, "cuda", dtype, device)
    ours = run(tree_attention, "cuda", dtype, device)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        size = grad.double().norm() if truth is not exact[0] else 0.0
        bound = relative(b.cpu(), truth, size) + MARGIN[dtype]
        assert relative(a.cpu(), truth, size) <= bound
