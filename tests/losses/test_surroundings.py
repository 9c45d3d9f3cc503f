"""What callers have set or masked with must not show: torch's default dtype, activation
checkpoints, negative logit scales, vocabularies masked by a large negative number. Every backend,
both losses."""

import pytest
import torch
import torch.utils.checkpoint

import pyrl
from pyrl import LossSpec
from pyrl.ops.backend import reads_once
from pyrl.parity import DEVICE, relative, serving

T, D = 9, 20
BACKENDS = [*serving(), "reference"]
COUPLED = LossSpec.preset("gspo", kl_coef=0.1)
FREE = LossSpec(kl_coef=0.1, entropy_coef=0.05)


def tensors(v, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, logits, ref, advantages = (
        torch.randn(*shape, generator=g, dtype=torch.float32).to(DEVICE)
        for shape in ((T, D), (v, D), (T, v), (T,), (T,))
    )
    target = torch.randint(v, (T,), generator=g).to(DEVICE)
    fields = {"ref_logprob": ref - 3, "cu_seqlens": torch.tensor([0, 4, T], device=DEVICE)}
    return hidden, weight / 3, 2 * logits, target, advantages, fields


def results(backend, spec, v=53, bias=None, **options):
    """Loss, log-probs, entropies and gradients of both losses; those formed in the forward too."""
    hidden, weight, logits, target, advantages, fields = tensors(v)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    out = pyrl.linear_policy_loss(
        *leaves, target, advantages, spec, bias=bias, backend=backend, **fields, **options
    )
    out.loss.backward()
    found = [out.loss, out.logprob, out.entropy, *(t.grad for t in leaves)]
    once = reads_once(backend) and not spec.couples_tokens
    for forward in (False, True) if once else (False,):
        leaf = logits.clone().requires_grad_()
        z = leaf if bias is None else leaf + bias
        out = pyrl.logits_policy_loss(
            z, target, advantages, spec, backend=backend, gradient_in_forward=forward, **fields,
            **options,
        )  # fmt: skip
        out.loss.backward()
        found += [out.loss, out.logprob, out.entropy, leaf.grad]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", [FREE, COUPLED], ids=["free", "coupled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_show(backend, spec, dtype):
    expected = results(backend, spec)
    torch.set_default_dtype(dtype)
    try:
        found = results(backend, spec)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("spec", [FREE, COUPLED], ids=["free", "coupled"])
@pytest.mark.parametrize("inplace", [False, True])
def test_inside_a_checkpoint(backend, spec, inplace):
    hidden, weight, _, target, advantages, fields = tensors(53)
    once = reads_once(backend) and not spec.couples_tokens

    def both(hidden, weight):
        args = (target, advantages, spec)
        head = pyrl.linear_policy_loss(hidden, weight, *args, backend=backend, **fields)
        given = pyrl.logits_policy_loss(
            hidden @ weight.T, *args, backend=backend, inplace_backward=inplace,
            gradient_in_forward=once, **fields,
        )  # fmt: skip
        return head.loss + 2 * given.loss

    plain, kept = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    both(*plain).backward()
    torch.utils.checkpoint.checkpoint(both, *kept, use_reentrant=False).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, kept, strict=True))


def agree(backend, spec, **options):
    """With the oracle: linear_policy_loss's five, then logits_policy_loss's four, twice if so."""
    exact, found = results("reference", spec, **options), results(backend, spec, **options)
    for i, ours in enumerate(found):
        assert relative(ours, exact[i if i < 9 else i - 4]) <= 5e-6, i


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("v", [1, 7, 33, 128, 1030])
@pytest.mark.parametrize("softcap", [None, 300.0])
def test_a_negative_logit_scale(backend, v, softcap):
    """Of vocabularies that end within a vector: what is past their end has no probability."""
    agree(backend, LossSpec(entropy_coef=0.05, logit_scale=-0.7, softcap=softcap), v=v)


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e9])
def test_tokens_masked_by_a_finite_number(backend, value):
    """As models mask what pads a vocabulary; sums that begin with such tokens go on."""
    v = 3000
    target = tensors(v)[3]
    bias = torch.full((v,), value, device=DEVICE)
    bias[target], bias[-500:] = 0.0, 0.0
    for temperature in (0.7, 2.0):
        agree(backend, FREE, v=v, bias=bias, temperature=temperature)
