"""logits_policy_loss: the loss of logits at hand equals the oracle, wherever their rows lie."""

import pytest
import torch

import pyrl
from pyrl import LossSpec
from pyrl.parity import DEVICE, MARGIN, relative, serving
from pyrl.testing import random_support

BOUNDS = torch.tensor([0, 9, 9, 10, 25, 40])
T, V = 40, 211

SPECS = {
    "reinforce": LossSpec.preset("reinforce"),
    "grpo": LossSpec.preset("grpo", kl_coef=0.1, entropy_coef=0.02),
    "dr_grpo": LossSpec.preset("dr_grpo", max_length=12, softcap=20.0, logit_scale=0.7),
    "dapo": LossSpec.preset("dapo", dual_clip=3.0, temperature=0.8),
    "gspo": LossSpec.preset("gspo", entropy_coef=0.02),  # couples the tokens of a sequence
    "gmpo": LossSpec.preset("gmpo"),
}


def inputs(dtype=torch.float32, seed=0, v=V, support=False):
    """Logits computed by somebody else [T, v], requiring grad but no leaf, and the rest."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE)

    leaf = (2 * normal(T, v)).to(dtype).requires_grad_()
    target = torch.randint(0, v, (T,), generator=g).to(DEVICE)
    mask = torch.rand(T, generator=g).to(DEVICE) > 0.3
    given = {"support": random_support(target, v, mask)} if support else {}
    with torch.no_grad():
        logp = pyrl.logits_logprob(leaf, target, mask=mask, backend="reference", **given).logprob
    fields = {
        "old_logprob": logp + 0.3 * normal(T),
        "ref_logprob": logp + 0.3 * normal(T),
        "mask": mask,
        "cu_seqlens": BOUNDS.to(DEVICE),
        **given,
    }
    return leaf, target, normal(5), fields


def run(backend, spec, leaf, target, advantages, fields, *, inplace=False, view=None):
    """Loss and the leaf's gradient through logits = view(leaf * 1)."""
    leaf.grad = None
    logits = leaf * 1  # multiplication by a number needs nothing for its own backward
    logits = logits if view is None else view(logits)
    out = pyrl.logits_policy_loss(
        logits, target, advantages, spec, inplace_backward=inplace, backend=backend, **fields
    )
    (2 * out.loss).backward()
    return out, leaf.grad


def plain(spec, leaf, target, advantages, fields):
    """Plain torch in the logits' dtype, its error the yardstick."""
    logits = leaf.detach().requires_grad_()
    z = logits.float() * spec.logit_scale
    z = z if spec.softcap is None else spec.softcap * torch.tanh(z / spec.softcap)
    x = z / spec.temperature
    if (support := fields.get("support")) is not None:
        inside = torch.zeros(x.shape, dtype=torch.bool, device=DEVICE)
        for t in range(T):
            ids = support.ids[support.indptr[t] : support.indptr[t + 1]].long()
            inside[t, ids if fields["mask"][t] else slice(None)] = True
        x = x.masked_fill(~inside, -torch.inf)
    logp = x.log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    rest = {k: v for k, v in fields.items() if k != "support"}
    chosen = logp.gather(1, target[:, None])[:, 0]
    out = pyrl.policy_objective(chosen, advantages, spec, entropy=entropy, backend="torch", **rest)
    (2 * out.loss).backward()
    return out, logits.grad


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("support", [False, True])
def test_parity(backend, dtype, name, support):
    args, spec = inputs(dtype, support=support), SPECS[name]
    exact, exact_grad = run("reference", spec, *args)
    usual, usual_grad = plain(spec, *args)
    bound = relative(usual.loss, exact.loss) + MARGIN[dtype]
    gradient_bound = relative(usual_grad, exact_grad) + MARGIN[dtype]
    for inplace in (False, True):
        ours, grad = run(backend, spec, *args, inplace=inplace)
        assert grad.dtype == dtype
        assert relative(ours.loss, exact.loss) <= bound
        assert relative(grad, exact_grad) <= gradient_bound
        assert relative(ours.logprob, exact.logprob) <= 2e-6  # fp32 of the same rounded logits
        assert not ours.logprob.requires_grad and not ours.entropy.requires_grad
    if support:
        inside = torch.zeros(T, V, dtype=torch.bool, device=DEVICE)
        s = args[3]["support"]
        for t in args[3]["mask"].nonzero()[:, 0]:
            inside[t, s.ids[s.indptr[t] : s.indptr[t + 1]].long()] = True
        assert (grad[~inside] == 0).all()


# An odd size above one tile of every kernel, a padded vocabulary's, and Qwen's.
@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("v", [1, 32001, 151936])
def test_vocabularies(backend, v):
    g = torch.Generator().manual_seed(v)
    leaf = torch.randn(3, v, generator=g).to(DEVICE).requires_grad_()
    target = torch.tensor([0, v - 1, v // 2], device=DEVICE)
    advantages = torch.tensor([1.0, -0.5, 2.0], device=DEVICE)
    spec = LossSpec(entropy_coef=0.01)
    exact, exact_grad = run("reference", spec, leaf, target, advantages, {})
    for inplace in (False, True):
        ours, grad = run(backend, spec, leaf, target, advantages, {}, inplace=inplace)
        assert relative(ours.loss, exact.loss) <= MARGIN[torch.float32]
        # A single token has a certain distribution: its gradient is 0 up to rounding.
        assert relative(grad, exact_grad) <= MARGIN[torch.float32]


LAYOUTS = {
    "slice of the sequence": ((5, 9, 33), lambda z: z[:, :-1]),
    "padded vocabulary": ((5, 8, 40), lambda z: z[..., :33]),
    "both": ((5, 9, 40), lambda z: z[:, 1:, 3:36]),
    "sequence first": ((8, 5, 33), lambda z: z.transpose(0, 1)),
    "vocabulary not adjacent": ((5, 33, 8), lambda z: z.transpose(1, 2)),
    "one sequence": ((1, 9, 33), lambda z: z[:, 1:]),
    "one token": ((5, 9, 33), lambda z: z[:, 3:4]),
}


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("support", [False, True])
def test_rows_anywhere(backend, name, support):
    shape, view = LAYOUTS[name]
    g = torch.Generator().manual_seed(3)
    leaf = torch.randn(shape, generator=g).to(DEVICE).requires_grad_()
    packed = view(leaf.detach()).reshape(-1, 33).contiguous().requires_grad_()
    b, length, _ = view(leaf).shape
    target = torch.randint(33, (b, length), generator=g).to(DEVICE)
    fields = {"mask": torch.rand(b, length, generator=g).to(DEVICE) > 0.3}
    if support:
        fields["support"] = random_support(target, 33, fields["mask"], largest=9)
    advantages = torch.randn(b, length, generator=g).to(DEVICE)
    spec = LossSpec(entropy_coef=0.05)
    flat = {"mask": fields["mask"].view(-1), "support": fields.get("support")}
    expected, grad = run(backend, spec, packed, target.view(-1), advantages.view(-1), flat)
    for inplace in (False, True):
        if inplace and name == "vocabulary not adjacent":
            with pytest.raises(ValueError, match="adjacent columns and rows of their own"):
                run(backend, spec, leaf, target, advantages, fields, inplace=True, view=view)
            continue
        out, whole = run(
            backend, spec, leaf, target, advantages, fields, inplace=inplace, view=view
        )
        # The same fp32 sums; CUDA's order depends on where a row's 16-byte boundaries are.
        assert relative(out.loss, expected.loss) <= 1e-6
        assert relative(view(whole).reshape(-1, 33), grad) <= 1e-6
        view(whole).zero_()
        assert not whole.any()  # nothing outside the view


@pytest.mark.parametrize("backend", serving())
def test_the_gradient_takes_the_memory_of_the_logits(backend):
    leaf, target, advantages, fields = inputs()
    logits = leaf * 1
    before = logits.data_ptr()
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    out = pyrl.logits_policy_loss(
        logits, target, advantages, SPECS["grpo"], inplace_backward=True, backend=backend, **fields
    )
    out.loss.backward()
    assert seen == [before] and torch.equal(leaf.grad, logits)


@pytest.mark.parametrize("backend", serving())
def test_what_an_inplace_backward_would_destroy_is_refused(backend):
    leaf, target, advantages, fields = inputs()

    def loss(logits):
        return pyrl.logits_policy_loss(
            logits, target, advantages, SPECS["grpo"], inplace_backward=True, backend=backend,
            **fields,
        ).loss  # fmt: skip

    for logits in (leaf, leaf[:, :]):
        with pytest.raises(ValueError, match="logits are a leaf that requires grad"):
            loss(logits)
    with pytest.raises(ValueError, match="rows of their own"):
        loss((leaf[:1] * 1).expand(T, V))
    with torch.no_grad():
        loss(leaf)  # there will be no backward

    twice = loss(leaf * 1)
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        twice.backward()
    # tanh keeps its result for its own backward.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(torch.tanh(leaf)).backward()
    # Somebody else's backward that comes later and needs the logits.
    logits = leaf * 1
    shared = logits.square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss(logits) + shared).backward()


@pytest.mark.parametrize("backend", serving())
def test_a_new_tensor_every_time_by_default(backend):
    leaf, target, advantages, fields = inputs()
    logits = leaf * 1
    kept = logits.detach().clone()
    out = pyrl.logits_policy_loss(
        logits, target, advantages, SPECS["grpo"], backend=backend, **fields
    )
    out.loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    out.loss.backward()
    assert torch.equal(leaf.grad, 2 * once) and torch.equal(logits, kept)


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("inplace", [False, True])
def test_masked_vocabulary(backend, inplace):
    leaf, target, advantages, fields = inputs()
    leaf.data[:, ::3] = -torch.inf
    leaf.data[fields["mask"].nonzero()[0], :] = -torch.inf  # but for its target: a certain token
    leaf.data[torch.arange(T, device=DEVICE), target] = 0.5
    spec = LossSpec(entropy_coef=0.1)
    exact, exact_grad = run("reference", spec, leaf, target, advantages, fields)
    ours, grad = run(backend, spec, leaf, target, advantages, fields, inplace=inplace)
    assert relative(ours.loss, exact.loss) <= 1e-6 and relative(grad, exact_grad) <= 5e-6
    assert (grad[leaf == -torch.inf] == 0).all()


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("inplace", [False, True])
def test_unkept_rows_are_not_read(backend, inplace):
    leaf, target, advantages, fields = inputs()
    _, clean = run(backend, SPECS["grpo"], leaf, target, advantages, fields)
    clean = clean.clone()
    leaf.data[~fields["mask"]] = torch.nan
    target[~fields["mask"]] = -100
    _, grad = run(backend, SPECS["grpo"], leaf, target, advantages, fields, inplace=inplace)
    assert torch.equal(grad, clean) and (grad[~fields["mask"]] == 0).all()


@pytest.mark.parametrize("backend", [*serving(), "reference"])
def test_nothing_kept_and_nothing_there(backend):
    leaf, target, advantages, fields = inputs()
    fields["mask"] = torch.zeros_like(fields["mask"])
    for inplace in (False, True) if backend != "reference" else (False,):
        out, grad = run(backend, SPECS["grpo"], leaf, target, advantages, fields, inplace=inplace)
        assert out.loss == 0 and not grad.any()
        none = torch.zeros(0, 7, device=DEVICE).requires_grad_()
        out, grad = run(backend, LossSpec(), none, target[:0], advantages[:0], {}, inplace=inplace)
        assert out.loss == 0 and grad.shape == (0, 7)


@pytest.mark.parametrize("backend", serving())
def test_many_chunks_equal_one(backend, monkeypatch):
    args = inputs(support=True)
    one, grad = run(backend, SPECS["grpo"], *args)
    limit = dict.fromkeys(("cpu", "cuda"), 7 * V * 4)
    monkeypatch.setattr("pyrl.ops.linear_logprob.CHUNK_BYTES", limit)
    for inplace in (False, True):
        many, again = run(backend, SPECS["grpo"], *args, inplace=inplace)
        assert relative(many.loss, one.loss) <= 1e-6 and relative(again, grad) <= 1e-6


@pytest.mark.parametrize(
    "backend", [b for b in serving() if b != "triton" or DEVICE.type == "cuda"]
)
def test_nothing_else_of_the_logits_size_is_made(backend):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Large(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= size and out.data_ptr() not in own:
                own.add(out.data_ptr())
                self.made += 1
            return out

    rows, v = 64, 30_000
    size = rows * v // 2
    leaf = torch.randn(rows, v, device=DEVICE, requires_grad=True)
    target = torch.randint(v, (rows,), device=DEVICE)
    advantages = torch.randn(rows, device=DEVICE)
    limit = dict.fromkeys(("cpu", "cuda"), 4 * v * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrl.ops.linear_logprob.CHUNK_BYTES", limit)
        for inplace, expected in ((False, 1), (True, 0)):
            logits = leaf * 1
            own = {leaf.data_ptr(), logits.data_ptr()}
            with Large() as seen:
                out = pyrl.logits_policy_loss(
                    logits, target, advantages, LossSpec(), inplace_backward=inplace,
                    backend=backend,
                )  # fmt: skip
                assert seen.made == 0
                (gradient,) = torch.autograd.grad(out.loss, logits)
            assert seen.made == expected and gradient.shape == logits.shape


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_fullgraph(backend, name):
    torch.compiler.reset()  # every case is one more variant of the same code
    leaf, target, advantages, fields = inputs(support=True)
    eager, grad = run(backend, SPECS[name], leaf, target, advantages, fields)

    def call(leaf, inplace, support):
        return pyrl.logits_policy_loss(
            leaf * 1, target, advantages, SPECS[name], inplace_backward=inplace, backend=backend,
            **{**fields, "support": support},
        ).loss  # fmt: skip

    for inplace in (False, True):
        leaf.grad = None
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        loss = compiled(leaf, inplace, fields["support"])
        (2 * loss).backward()
        assert relative(loss, eager.loss) <= 1e-6 and relative(leaf.grad, grad) <= 1e-6


def test_bad_input_names_itself():
    leaf, target, advantages, fields = inputs()
    spec = LossSpec()

    def call(logits=leaf, target=target, spec=spec, **options):
        return pyrl.logits_policy_loss(logits, target, advantages, spec, **{**fields, **options})

    with pytest.raises(ValueError, match="spec: expected a LossSpec, got str"):
        call(spec="grpo")
    with pytest.raises(ValueError, match=r"logits: expected shape \(40, 211\), got \(39, 211\)"):
        call(leaf[1:])
    with pytest.raises(ValueError, match="logits: expected floating"):
        call(leaf.long())
    with pytest.raises(ValueError, match="with V > 0"):
        call(leaf[:, :0])
    with pytest.raises(ValueError, match="float16, got float64"):
        call(leaf.double())
    with pytest.raises(ValueError, match="integer token ids"):
        call(target=target.float())
    bad = target.clone()
    first = int(fields["mask"].nonzero()[0])
    bad[first] = V
    with pytest.raises(ValueError, match=rf"target\[{first}\] = {V} .*\[0, {V}\)"):
        call(target=bad)
    with pytest.raises(NotImplementedError, match=r"inplace_backward.*'reference'"):
        call(inplace_backward=True, backend="reference")
    same = call(target=target.int())
    assert torch.equal(same.loss, call().loss)
