"""logits_policy_loss(gradient_in_forward=True): the same loss and gradient, in one pass."""

import pytest
import torch

import pyrl
from pyrl import LossSpec
from pyrl.losses.one_read import _one_read
from pyrl.ops.backend import reads_once
from pyrl.parity import DEVICE, MARGIN, relative, serving

T, V = 40, 211
BOUNDS = torch.tensor([0, 9, 9, 10, 25, 40])
BACKENDS = [name for name in serving() if reads_once(name)]
BOTH = pytest.mark.parametrize("inplace", [False, True])

SPECS = {
    "reinforce": LossSpec.preset("reinforce"),
    "grpo": LossSpec.preset("grpo", kl_coef=0.1, entropy_coef=0.02),
    "dr_grpo": LossSpec.preset("dr_grpo", max_length=12, softcap=20.0, logit_scale=0.7),
    "dapo": LossSpec.preset("dapo", dual_clip=3.0, temperature=0.8),
    "cispo": LossSpec.preset("cispo", cispo_high=1.2, correction="tis"),
    "sapo": LossSpec.preset("sapo", kl="k3_st", kl_coef=0.1),
    "dppo": LossSpec.preset("dppo", dppo_divergence="kl"),
}


def inputs(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE)

    leaf = (2 * normal(T, V)).to(dtype).requires_grad_()
    target = torch.randint(0, V, (T,), generator=g).to(DEVICE)
    mask = torch.rand(T, generator=g).to(DEVICE) > 0.3
    logp = pyrl.logits_logprob(leaf.detach(), target, mask=mask, backend="reference").logprob
    fields = {
        "old_logprob": logp + 0.3 * normal(T),
        "ref_logprob": logp + 0.3 * normal(T),
        "rollout_logprob": logp + 0.3 * normal(T),
        "mask": mask,
        "cu_seqlens": BOUNDS.to(DEVICE),
    }
    return leaf, target, normal(5), fields


def run(backend, spec, leaf, target, advantages, fields, *, factor=1, **options):
    """Loss and the leaf's gradient; `leaf * 1` is somebody's, and no leaf."""
    leaf.grad = None
    out = pyrl.logits_policy_loss(
        leaf * 1, target, advantages, spec, backend=backend, **fields, **options
    )
    (factor * out.loss).backward()
    return out, leaf.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SPECS)
@BOTH
def test_it_is_the_gradient_of_the_two_passes(backend, dtype, name, inplace):
    args, spec = inputs(dtype), SPECS[name]
    _, exact_grad = run("reference", spec, *args)
    two, two_grad = run(backend, spec, *args)
    ours, grad = run(backend, spec, *args, gradient_in_forward=True, inplace_backward=inplace)
    assert grad.dtype == dtype
    assert relative(ours.loss, two.loss) <= 1e-6 and relative(ours.logprob, two.logprob) <= 2e-6
    assert relative(ours.entropy, two.entropy) <= 2e-6
    assert relative(grad, exact_grad) <= relative(two_grad, exact_grad) + MARGIN[dtype] / 10
    for key, value in two.metrics.items():
        torch.testing.assert_close(ours.metrics[key], value, rtol=1e-5, atol=1e-6)
    assert not any(v.requires_grad for v in (ours.logprob, ours.entropy, *ours.metrics.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [0.0, 3.0, 2.0**16])
@BOTH
def test_an_incoming_gradient_multiplies(backend, factor, inplace):
    """2^16 as of a loss scaler: f16 keeps what tokens of a large batch contribute."""
    leaf, target, advantages, fields = inputs(torch.float16)
    fields["denominator"] = 1e6
    spec = LossSpec(entropy_coef=0.1)
    args = (leaf, target, advantages, fields)
    _, exact = run("reference", spec, *args, factor=factor)
    options = {"gradient_in_forward": True, "inplace_backward": inplace}
    _, grad = run(backend, spec, *args, factor=factor, **options)
    bound = 2**-10 * exact.abs() + 2**-24
    assert ((grad - exact).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
@BOTH
def test_rows_anywhere_and_unkept_rows_are_not_read(backend, inplace):
    g = torch.Generator().manual_seed(1)
    wide = torch.randn(5, 9, 40, generator=g).to(DEVICE).requires_grad_()
    target = torch.randint(33, (5, 8), generator=g).to(DEVICE)
    mask = torch.rand(5, 8, generator=g).to(DEVICE) > 0.4
    advantages = torch.randn(5, 8, generator=g).to(DEVICE)
    spec = LossSpec(entropy_coef=0.05)

    def loss(**options):
        wide.grad = None
        logits = (wide * 1)[:, 1:, 3:36]
        pyrl.logits_policy_loss(
            logits, target, advantages, spec, mask=mask, backend=backend, **options
        ).loss.backward()
        return wide.grad.clone()

    expected = loss()
    with torch.no_grad():
        wide[:, 1:, 3:36][~mask] = torch.nan
    target[~mask] = -100
    grad = loss(gradient_in_forward=True, inplace_backward=inplace)
    assert relative(grad, expected) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_whose_memory(backend):
    leaf, target, advantages, fields = inputs()
    for inplace in (False, True):
        logits, seen = leaf * 1, []
        before, kept = logits.data_ptr(), logits.detach().clone()
        logits.register_hook(lambda g, seen=seen: seen.append(g.data_ptr()))
        out = pyrl.logits_policy_loss(
            logits, target, advantages, SPECS["grpo"], backend=backend, gradient_in_forward=True,
            inplace_backward=inplace, **fields,
        )  # fmt: skip
        assert torch.equal(logits, kept) != inplace  # overwritten by the call, or left alone
        out.loss.backward(retain_graph=True)
        assert (seen == [before]) == inplace
        with pytest.raises(RuntimeError, match="backward ran a second time"):
            out.loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@BOTH
def test_nothing_else_of_the_logits_size_is_made(backend, inplace):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Large(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= size and out.data_ptr() not in own:
                own.add(out.data_ptr())
                self.made += 1
            return out

    rows, v = 16, 30_000
    size = rows * v // 2
    logits = torch.randn(rows, v, device=DEVICE, requires_grad=True) * 1
    own = {logits.data_ptr()}
    target = torch.randint(v, (rows,), device=DEVICE)
    with Large() as seen:
        out = pyrl.logits_policy_loss(
            logits, target, torch.randn(rows, device=DEVICE), LossSpec(), backend=backend,
            gradient_in_forward=True, inplace_backward=inplace,
        )  # fmt: skip
        torch.autograd.grad(out.loss, logits)
    assert seen.made == (0 if inplace else 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_overwriting_would_destroy_is_refused(backend):
    leaf, target, advantages, fields = inputs()

    def loss(logits):
        return pyrl.logits_policy_loss(
            logits, target, advantages, SPECS["grpo"], backend=backend, gradient_in_forward=True,
            inplace_backward=True, **fields,
        ).loss  # fmt: skip

    with pytest.raises(ValueError, match="logits are a leaf that requires grad"):
        loss(leaf)
    with pytest.raises(ValueError, match="rows of their own"):
        loss((leaf[:1] * 1).expand(T, V))
    with torch.no_grad():
        before = leaf.clone()
        loss(leaf)  # there will be no backward: nothing is written
        assert torch.equal(leaf, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(torch.tanh(leaf)).backward()
    logits = leaf * 1
    ours = loss(logits)
    with torch.no_grad():
        logits.add_(1)
    with pytest.raises(RuntimeError, match="was written after it"):
        ours.backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(logits := leaf * 1), logits, create_graph=True)


@pytest.mark.parametrize("backend", [*serving(), "reference"])
@pytest.mark.parametrize("name", ["gspo", "support", "grpo"])
def test_what_cannot_be_had_is_an_error(backend, name):
    from pyrl.testing import random_support

    leaf, target, advantages, fields = inputs()
    spec = LossSpec.preset("gspo") if name == "gspo" else SPECS["grpo"]
    if name == "support":
        fields["support"] = random_support(target, V, fields["mask"])
    if name == "grpo" and backend in BACKENDS:
        return
    what = {"gspo": "couples tokens", "support": "a support", "grpo": "'cpu' and 'cuda' have"}
    match = what[name] if backend in BACKENDS else what["grpo"]
    with pytest.raises(NotImplementedError, match=match):
        run(backend, spec, leaf, target, advantages, fields, gradient_in_forward=True)


def test_the_automatic_backend_is_one_that_reads_once(monkeypatch):
    """On a GPU the best backend, Triton's, is not."""
    from types import SimpleNamespace

    from pyrl.ops import backend as choice

    modules = {
        "triton": SimpleNamespace(unavailable_reason=lambda: None),
        "cuda": SimpleNamespace(unavailable_reason=lambda: None, logits_policy_grad_=None),
        "torch": SimpleNamespace(unavailable_reason=lambda: None),
    }
    monkeypatch.delenv("PYRL_BACKEND", raising=False)
    monkeypatch.setattr(choice, "load", modules.__getitem__)
    choice._best.cache_clear()
    try:
        assert choice.select(None, torch.device("cuda")) == "triton"
        assert choice.select(None, torch.device("cuda"), one_read=True) == "cuda"
        del modules["cuda"].logits_policy_grad_
        choice._best.cache_clear()
        with pytest.raises(pyrl.BackendUnavailableError, match="triton: no gradient_in_forward"):
            choice.select(None, torch.device("cuda"), one_read=True)
    finally:
        choice._best.cache_clear()


class Stop(torch.autograd.Function):
    """x, whose backward wants no gradient of it: None, not zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


@pytest.mark.parametrize("backend", BACKENDS)
@BOTH
def test_no_gradient_comes_in(backend, inplace):
    leaf, target, advantages, fields = inputs()
    loss = pyrl.logits_policy_loss(
        leaf * 1, target, advantages, SPECS["grpo"], backend=backend, gradient_in_forward=True,
        inplace_backward=inplace, **fields,
    ).loss  # fmt: skip
    other = torch.ones((), device=DEVICE, requires_grad=True)
    (Stop.apply(loss) + other).backward()
    assert leaf.grad is None and other.grad == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph_and_opcheck(backend):
    torch.compiler.reset()
    leaf, target, advantages, fields = inputs()
    _, grad = run(backend, SPECS["grpo"], leaf, target, advantages, fields, factor=2)
    grad = grad.clone()

    def call(leaf, inplace):
        return pyrl.logits_policy_loss(
            leaf * 1, target, advantages, SPECS["grpo"], backend=backend, gradient_in_forward=True,
            inplace_backward=inplace, **fields,
        ).loss  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for inplace in (False, True):
        leaf.grad = None
        (2 * compiled(leaf, inplace)).backward()
        assert relative(leaf.grad, grad) <= 1e-6
    vector = torch.rand(T, device=DEVICE)
    arguments = (target, vector + 0.5, -vector, -vector, -vector, vector - 0.5, vector / T)
    torch.library.opcheck(
        _one_read,
        (leaf, *arguments, fields["mask"], SPECS["grpo"].to_json(), backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@BOTH
def test_nothing_kept_and_nothing_there(backend, inplace):
    leaf, target, advantages, fields = inputs()
    fields["mask"] = torch.zeros_like(fields["mask"])
    options = {"gradient_in_forward": True, "inplace_backward": inplace}
    out, grad = run(backend, SPECS["grpo"], leaf, target, advantages, fields, **options)
    assert out.loss == 0 and not grad.any()
    none = torch.zeros(0, 7, device=DEVICE).requires_grad_()
    out, grad = run(backend, LossSpec(), none, target[:0], advantages[:0], {}, **options)
    assert out.loss == 0 and grad.shape == (0, 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_names_itself(backend):
    leaf, target, advantages, fields = inputs()

    def call(logits=leaf, target=target, **options):
        options = {"backend": backend, "gradient_in_forward": True, **fields, **options}
        return pyrl.logits_policy_loss(logits, target, advantages, LossSpec(), **options)

    first = int(fields["mask"].nonzero()[0])
    bad = target.clone()
    bad[first] = V
    with pytest.raises(ValueError, match=rf"target\[{first}\] = {V} .*\[0, {V}\)"):
        call(target=bad)
    with pytest.raises(ValueError, match="float16, got float64"):
        call(leaf.double())
    with pytest.raises(ValueError, match="integer token ids"):
        call(target=target.float())
    with pytest.raises(ValueError, match="logits: expected"):
        call(leaf[1:])
