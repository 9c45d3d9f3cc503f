"""tree_attention against softmax attention under the dense tree mask, in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from pyrl.packing import tree_attention as module
from pyrl.packing.attention import no_mask, pyrl_varlen_forward, varlen_attention
from pyrl.packing.tree_attention import (
    TreePlan,
    pyrl_tree_forward,
    tree_attention,
    tree_attention_dense,
)
from pyrl.parity import MARGIN, relative


def plan_of(*segments):
    """(length, parent) each -> TreePlan."""
    starts = [0, *itertools.accumulate(length for length, _ in segments)]
    return TreePlan.build(starts, [parent for _, parent in segments])


FORESTS = {
    "two levels, three trees": [(5, -1), (3, 0), (1, 0), (7, 0), (1, -1), (4, 4), (6, 4), (9, -1)],
    "three levels": [(4, -1), (3, 0), (2, 1), (5, 1), (6, 0), (1, 4), (2, 4), (3, -1), (2, 7)],
    "deep chain": [(3, -1), (2, 0), (4, 1), (1, 2), (5, 3)],
    "deep comb": [(2, -1), (1, 0), (3, 0), (1, 2), (2, 2), (1, 4), (4, 4)],
    "one-token segments": [(1, -1), (1, 0), (1, 0), (1, 2), (1, 2), (1, -1), (1, -1)],
    "empty segments": [(0, -1), (3, 0), (2, 0), (0, 0), (4, -1), (0, 4), (2, 5), (3, 5), (0, -1)],
    "one token": [(1, -1)],
    "past one flash block": [(70, -1), (40, 0), (600, 0), (33, 0)],
}
THREE = FORESTS["three levels"]
# float64's own rounding through sums of up to 743 products, backward included.
EXACT = 1e-13


def inputs(plan, heads=(6, 2), dim=8, value_dim=None, dtype=torch.float64, seed=0):
    """q, k, v [1, h, T, d] as a projection leaves them (transposed); a gradient [1, T, H, e]."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [dim, dim, value_dim or dim, value_dim or dim]
    q, k, v, grad = (
        torch.randn(1, plan.num_tokens, h, d, generator=draw, dtype=torch.float64).to(dtype)
        for h, d in zip((heads[0], heads[1], heads[1], heads[0]), sizes, strict=True)
    )
    return [x.transpose(1, 2).requires_grad_() for x in (q, k, v)], grad


def run(attention, qkv, grad, plan, **options):
    """[out, dq, dk, dv] in the dtype of qkv."""
    qkv = [x.detach().to(grad.dtype).requires_grad_() for x in qkv]
    out = attention(*qkv, plan, **options)
    assert out.dtype == grad.dtype and out.shape == grad.shape
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def check(plan, dtype, heads=(6, 2), dim=8, value_dim=None, **options):
    """error <= same-dtype dense torch error + MARGIN; gradients relative to what they sum."""
    qkv, grad = inputs(plan, heads, dim, value_dim, dtype)
    ours = run(tree_attention, qkv, grad, plan, **options)
    exact = run(tree_attention_dense, qkv, grad.double(), plan, **options)
    plain = run(tree_attention_dense, qkv, grad, plan, **options)
    size = grad.double().norm()
    names = ["out", "dq", "dk", "dv"]
    for name, value, truth, rival in zip(names, ours, exact, plain, strict=True):
        floor = 0.0 if name == "out" else size  # dq, dk are differences that may vanish
        bound = EXACT if dtype == torch.float64 else MARGIN[dtype] + relative(rival, truth, floor)
        assert relative(value, truth, floor) <= bound, name


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORESTS)
def test_values_and_gradients(name, dtype):
    check(plan_of(*FORESTS[name]), dtype, scale=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 4, 7, 10, 11, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_windows_and_softcaps(dtype, window, softcap):
    """The window counts along the path: it spans segments, and ends inside any of them."""
    check(plan_of(*THREE), dtype, sliding_window=window, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {"heads": (4, 4)},
        {"heads": (9, 3), "dim": 64},
        {"heads": (5, 1), "dim": 1},
        {"dim": 7},
        {"dim": 12, "value_dim": 8},
        {"dim": 4, "value_dim": 6},
    ],
)
def test_heads_and_dimensions(dtype, shape):
    check(plan_of(*THREE), dtype, **shape)


@st.composite
def forests(draw, segments=8, length=5):
    """Up to `segments` (length, parent) pairs in preorder, empty ones included."""
    built, path = [], [-1]
    for g in range(draw(st.integers(0, segments))):
        path = path[: draw(st.integers(1, len(path)))]
        built.append((draw(st.integers(0, length)), path[-1]))
        path.append(g)
    return built


@given(forests(), st.sampled_from([None, 1, 3, 6]), st.sampled_from([None, 2.0]))
@settings(max_examples=100, deadline=None)
def test_random_forests(forest, window, softcap):
    check(plan_of(*forest), torch.float64, sliding_window=window, softcap=softcap)


@pytest.mark.parametrize("forest", [[], [(0, -1), (0, 0)]])
@pytest.mark.parametrize("softcap", [None, 1.0])
def test_no_tokens(forest, softcap):
    (q, k, v), _ = inputs(plan_of(*forest))
    out = tree_attention(q, k, v, plan_of(*forest), softcap=softcap)
    assert out.shape == (1, 0, 6, 8) and out.dtype == torch.float64


def test_one_sequence_a_path():
    """What sharing is for: each path alone, through plain causal attention, gives the same."""
    plan = plan_of(*THREE)
    (q, k, v), _ = inputs(plan)
    shared = tree_attention(q, k, v, plan)
    leaves = set(range(len(plan.parents))) - set(plan.parents)
    assert len(leaves) == 5
    for leaf in leaves:
        path, g = [], leaf
        while g >= 0:
            path[:0] = range(plan.starts[g], plan.starts[g + 1])
            g = plan.parents[g]
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, path] for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(shared[:, path], alone.transpose(1, 2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"softcap": 1.5}])
@pytest.mark.parametrize("segments", [[(5, -1), (1, -1), (9, -1)], FORESTS["deep chain"]])
def test_nothing_shared_is_varlen(segments, options):
    plan = plan_of(*segments)
    assert plan.is_flat
    (q, k, v), _ = inputs(plan, dtype=torch.float32)
    expected = varlen_attention(q, k, v, plan.varlen, **options)
    assert tree_attention(q, k, v, plan, **options).equal(expected)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"softcap": 1.5}])
def test_other_branches_change_nothing(options):
    """Not a bit, in values or gradients: garbage in segment 1 and below, seen by no one else."""
    plan = plan_of(*THREE)
    (q, k, v), grad = inputs(plan, dtype=torch.float32)
    inside = slice(plan.starts[1], plan.ends[1])
    outside = [t for t in range(plan.num_tokens) if not plan.starts[1] <= t < plan.ends[1]]
    before = run(tree_attention, (q, k, v), grad, plan, **options)
    for x in (q, k, v):
        x.data[:, :, inside] = torch.nan
    after = run(tree_attention, (q, k, v), grad, plan, **options)
    assert after[0][:, outside].equal(before[0][:, outside])
    assert after[0][:, inside].isnan().all()
    assert after[1][:, :, outside].equal(before[1][:, :, outside])  # dq
    below = plan.starts[4], plan.num_tokens  # siblings; segment 0 sums gradients of segment 1 too
    for a, b in zip(after[2:], before[2:], strict=True):
        assert a[:, :, slice(*below)].equal(b[:, :, slice(*below)])


def test_checkpointing_and_double_use():
    """Recomputed, and called twice with one plan: the same bits."""
    plan = plan_of(*THREE)
    (q, k, v), grad = inputs(plan, dtype=torch.float32)

    def twice(q, k, v):
        first = tree_attention(q, k, v, plan)
        return tree_attention(first.transpose(1, 2), k, v, plan)

    def saved(q, k, v):
        return checkpoint(twice, q, k, v, use_reentrant=False)

    results = []
    for function in (twice, saved):
        out = function(q, k, v)
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), grad)])
    for a, b in zip(*results, strict=True):
        assert a.equal(b)


def test_strides_the_kernel_cannot_read():
    """Expanded and transposed tensors, and the constant gradient of a sum."""
    plan = plan_of(*THREE)
    T = plan.num_tokens
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, 8, T, generator=draw).mT
    k = torch.randn(1, 2, 1, 8, generator=draw).expand(1, 2, T, 8)
    v = torch.randn(1, 2, T, 1, generator=draw).expand(1, 2, T, 8)
    grad = torch.ones(()).expand(1, T, 6, 8)
    ours = run(tree_attention, (q, k, v), grad, plan)
    exact = run(tree_attention_dense, (q, k, v), grad.double(), plan)
    for a, b in zip(ours, exact, strict=True):
        assert relative(a, b, grad.double().norm()) <= MARGIN[torch.float32]


@pytest.mark.parametrize("name", FORESTS)
def test_cost_is_the_attended_area(name, monkeypatch):
    """Pairs given to the kernels, forward and backward each, count every attended pair once."""
    pairs = {"forward": 0, "backward": 0}

    def count(q, k, causal):
        lengths = q.shape[2], k.shape[2]
        return lengths[0] * (lengths[0] + 1) // 2 if causal else lengths[0] * lengths[1]

    flash, flash_backward = module._flash, module._flash_backward

    def forward(q, k, v, causal, scale):
        assert (
            k.shape[1] == 2 and k.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
        )
        pairs["forward"] += count(q, k, causal)
        return flash(q, k, v, causal, scale)

    def backward(grad, q, k, v, out, lse, causal, scale):
        pairs["backward"] += count(q, k, causal)
        return flash_backward(grad, q, k, v, out, lse, causal, scale)

    monkeypatch.setattr(module, "_flash", forward)
    monkeypatch.setattr(module, "_flash_backward", backward)
    plan = plan_of(*FORESTS[name])
    (q, key, v), grad = inputs(plan)
    tree_attention(q, key, v, plan).backward(grad)
    expected = 0 if plan.is_flat else plan.area
    assert pairs == {"forward": expected, "backward": expected}


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_window_gathers_what_is_in_reach(softcap):
    """NaN times a masked probability is NaN: branches at 10 and 12 never touch tokens below 7."""
    plan = plan_of((10, -1), (2, 0), (3, 1), (1, 1), (4, 0))
    (q, k, v), _ = inputs(plan)
    before = tree_attention(q, k, v, plan, sliding_window=4, softcap=softcap)
    k.data[:, :, :7] = v.data[:, :, :7] = torch.nan
    after = tree_attention(q, k, v, plan, sliding_window=4, softcap=softcap)
    assert after[:, 10:].equal(before[:, 10:]) and not after[:, :10].equal(before[:, :10])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:, :5], k, v), r"5 heads are no multiple of 2"),
        (lambda q, k, v: (q[:, :1], k, v), r"1 heads are no multiple of 2"),
        (lambda q, k, v: (q[:, :, 1:], k, v), r"query \[1, 6, 27, 8\].*plan has 28 tokens"),
        (lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]), r"the plan has 28 tokens"),
        (lambda q, k, v: (q.repeat(2, 1, 1, 1), k, v), r"query \[2, 6, 28, 8\].*expected \[1, H"),
        (lambda q, k, v: (q, k[..., 1:], v), r"key \[1, 2, 28, 7\]"),
        (lambda q, k, v: (q, k, v[:, :1]), r"value \[1, 1, 28, 8\]"),
        (lambda q, k, v: (q[0], k, v), r"query \[6, 28, 8\]"),
        (lambda q, k, v: (q, k, v.float()), r"dtypes torch.float64, torch.float64, torch.float32"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v), r"query \[1, 6, 28, 0\].*expected d, e >= 1"),
        (lambda q, k, v: (q, k, v[..., :0]), r"value \[1, 2, 28, 0\]: expected d, e >= 1"),
        (lambda *x: [y.bool() for y in x], r"dtype torch.bool: expected one of \['torch.float16'"),
        (lambda *x: [y.long() for y in x], r"dtype torch.int64: expected"),
        (lambda *x: [y.to(torch.float8_e4m3fn) for y in x], r"dtype torch.float8_e4m3fn: expected"),
    ],
)
def test_bad_shapes(change, message):
    plan = plan_of(*THREE)
    with pytest.raises(ValueError, match=message):
        tree_attention(*change(*inputs(plan)[0]), plan)


BAD_OPTIONS = [
    *(({"scale": x}, f"scale={x}: expected a finite") for x in (0.0, -1.0, math.nan, math.inf)),
    ({"scale": "a"}, "scale='a': expected a finite"),
    *(({"softcap": x}, f"softcap={x}: expected a finite") for x in (0.0, -2.0, math.nan, math.inf)),
    *(({"sliding_window": x}, f"sliding_window={x}: expected a whole") for x in (0, -1, 2.5, True)),
]


@pytest.mark.parametrize("attend", [tree_attention, tree_attention_dense, varlen_attention])
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(attend, options, message):
    plan = plan_of(*THREE)
    with pytest.raises(ValueError, match=message):
        attend(*inputs(plan)[0], plan.varlen if attend is varlen_attention else plan, **options)


@pytest.mark.parametrize("attend", [tree_attention, tree_attention_dense])
def test_a_plan_of_another_kind(attend):
    plan = plan_of(*THREE)
    qkv, _ = inputs(plan)
    for wrong in (None, plan.varlen):
        with pytest.raises(ValueError, match=r"plan=(None|VarlenPlan.*): expected a TreePlan"):
            attend(*qkv, wrong)
    with pytest.raises(ValueError, match=r"plan='x': expected a TreePlan"):
        pyrl_tree_forward(Layer(), *qkv, None, tree_plan="x")


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 3


def test_the_transformers_protocol():
    plan = plan_of(*THREE)
    (q, k, v), _ = inputs(plan)
    nothing = no_mask(q.device)
    out, weights = pyrl_tree_forward(
        Layer(), q, k, v, nothing, scaling=0.3, sliding_window=5, softcap=2.0, tree_plan=plan
    )
    expected = tree_attention(q, k, v, plan, scale=0.3, sliding_window=5, softcap=2.0)
    assert weights is None and out.equal(expected)
    bounds = torch.tensor([0, 10, 28], dtype=torch.int32)
    for given_ in ({"cu_seq_lens_q": bounds}, {}, {"softcap": 1.5}):
        mask = nothing if "cu_seq_lens_q" in given_ else None
        ours, _ = pyrl_tree_forward(Layer(), q, k, v, mask, scaling=0.3, **given_)
        assert ours.equal(pyrl_varlen_forward(Layer(), q, k, v, mask, scaling=0.3, **given_)[0])
    with pytest.raises(ValueError, match=r"packed positions without boundaries.*drops keyword arg"):
        pyrl_tree_forward(Layer(), q, k, v, nothing)


@pytest.mark.parametrize("boundaries", ["tree", "varlen"])
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"dropout": 0.1}, NotImplementedError, r"pyrl_tree attention has no dropout \(got 0.1\)"),
        ({"s_aux": torch.zeros(4)}, NotImplementedError, "pyrl_tree attention has no s_aux"),
        ({"position_bias": torch.zeros(4)}, NotImplementedError, "pyrl_tree .* position_bias"),
        ({"is_causal": False}, NotImplementedError, "pyrl_tree attention is causal only"),
        ({"batch": 2}, ValueError, "one row without a cache"),
        ({"cached": 3}, ValueError, "one row without a cache"),
    ],
)
def test_what_it_cannot_do_is_refused(boundaries, kwargs, error, message):
    kwargs = dict(kwargs)
    plan = plan_of(*THREE)
    batch, cached = kwargs.pop("batch", 1), kwargs.pop("cached", 0)
    q, k, v = (x.repeat(batch, 1, 1, 1) for x in inputs(plan)[0])
    k, v = (torch.cat([x[:, :, :cached], x], 2) for x in (k, v))
    given_ = {"tree_plan": plan} if boundaries == "tree" else {"varlen_plan": plan.varlen}
    with pytest.raises(error, match=message):
        pyrl_tree_forward(Layer(), q, k, v, None, **given_, **kwargs)


def test_two_masks_are_refused():
    plan = plan_of(*THREE)
    (q, k, v), _ = inputs(plan)
    with pytest.raises(ValueError, match="tree_plan beside varlen_plan"):
        pyrl_tree_forward(Layer(), q, k, v, None, tree_plan=plan, varlen_plan=plan.varlen)
    with pytest.raises(ValueError, match=r"attention_mask of shape \[1, 1, 28, 28\] beside"):
        mask = torch.ones(1, 1, 28, 28, dtype=torch.bool)
        pyrl_tree_forward(Layer(), q, k, v, mask, tree_plan=plan)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"softcap": 2.0}])
@pytest.mark.parametrize("boundaries", ["tree", "varlen"])
def test_autocast_casts_the_inputs_and_nothing_else(boundaries, options):
    plan = plan_of(*THREE)
    (q, k, v), grad = inputs(plan, dtype=torch.float32)
    given_ = {"tree_plan": plan} if boundaries == "tree" else {"varlen_plan": plan.varlen}
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    expected, _ = pyrl_tree_forward(Layer(), *half, None, **given_, **options)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = pyrl_tree_forward(Layer(), q, k, v.bfloat16(), None, **given_, **options)
    assert out.dtype == torch.bfloat16 and out.equal(expected)
    grads = [torch.autograd.grad(*x) for x in ((out, (q, k, v), grad.bfloat16()),
                                               (expected, half, grad.bfloat16()))]  # fmt: skip
    assert all(a.dtype == torch.float32 and a.equal(b.float()) for a, b in zip(*grads, strict=True))
