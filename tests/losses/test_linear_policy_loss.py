"""linear_policy_loss: both waists in one pass equal the oracle, and never build [T, V]."""

import math

import pytest
import torch

import pyrl
from pyrl import LossSpec
from pyrl.losses.linear import _linear_policy_loss
from pyrl.parity import DEVICE, MARGIN, relative, serving
from pyrl.testing import random_support

BOUNDS = torch.tensor([0, 9, 9, 10, 25, 40])
T, D, V = 40, 16, 211

SPECS = {
    "reinforce": LossSpec.preset("reinforce"),
    "grpo": LossSpec.preset("grpo", kl_coef=0.1, entropy_coef=0.02),
    "dapo": LossSpec.preset("dapo", dual_clip=3.0, temperature=0.8),
    "dr_grpo": LossSpec.preset("dr_grpo", max_length=12, softcap=20.0, logit_scale=0.7),
    "k1_sum": LossSpec(aggregation="sequence_sum", kl="k1", kl_coef=0.3, entropy_coef=0.1),
}


def inputs(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE)

    hidden = (normal(T, D) / 2).to(dtype).requires_grad_()
    weight = (normal(V, D) / 2).to(dtype).requires_grad_()
    target = torch.randint(0, V, (T,), generator=g).to(DEVICE)
    with torch.no_grad():
        logp = pyrl.linear_logprob(hidden, weight, target, backend="reference").logprob
    fields = {
        "bias": (normal(V) / 2).to(dtype).requires_grad_(),
        "old_logprob": logp + 0.3 * normal(T),
        "ref_logprob": logp + 0.3 * normal(T),
        "mask": torch.rand(T, generator=g).to(DEVICE) > 0.3,
        "cu_seqlens": BOUNDS.to(DEVICE),
    }
    return hidden, weight, target, normal(5), fields


def run(backend, spec, hidden, weight, target, advantages, fields):
    leaves = [hidden, weight, fields["bias"]]
    for leaf in leaves:
        leaf.grad = None
    out = pyrl.linear_policy_loss(
        hidden, weight, target, advantages, spec, backend=backend, **fields
    )
    (2 * out.loss).backward()  # a factor: backward must scale what the forward formed
    return out, [x.grad for x in leaves]


def plain(spec, hidden, weight, target, advantages, fields):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, fields["bias"])]
    z = torch.nn.functional.linear(*leaves).float() * spec.logit_scale
    z = z if spec.softcap is None else spec.softcap * torch.tanh(z / spec.softcap)
    x = z / spec.temperature
    if (support := fields.get("support")) is not None:
        inside = torch.zeros(T, V, dtype=torch.bool, device=DEVICE)
        for t in range(T):
            ids = support.ids[support.indptr[t] : support.indptr[t + 1]].long()
            inside[t, ids if fields["mask"][t] else slice(None)] = True
        x = x.masked_fill(~inside, -torch.inf)
    logp = x.log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    rest = {k: v for k, v in fields.items() if k not in ("bias", "support")}
    chosen = logp.gather(1, target[:, None])[:, 0]
    out = pyrl.policy_objective(chosen, advantages, spec, entropy=entropy, backend="torch", **rest)
    (2 * out.loss).backward()
    kept = torch.where(fields["mask"], chosen.detach(), 0.0)
    return out, [x.grad for x in leaves], kept


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("chunk", [None, 7])
def test_parity(backend, dtype, name, chunk, monkeypatch):
    if chunk is not None:
        size = 4 if DEVICE.type == "cuda" else dtype.itemsize
        limit = dict.fromkeys(("cpu", "cuda"), chunk * V * size)
        monkeypatch.setattr("pyrl.ops.linear_logprob.CHUNK_BYTES", limit)
    args, spec = inputs(dtype), SPECS[name]
    exact, exact_grads = run("reference", spec, *args)
    usual, usual_grads, usual_logprob = plain(spec, *args)
    ours, grads = run(backend, spec, *args)
    margin = MARGIN[dtype]
    assert relative(ours.loss, exact.loss) <= relative(usual.loss, exact.loss) + margin
    for which, a, b, c in zip(
        ("hidden", "weight", "bias"), grads, usual_grads, exact_grads, strict=True
    ):
        assert a.dtype == dtype
        assert relative(a, c) <= relative(b, c) + margin, which
    assert relative(ours.logprob, exact.logprob) <= relative(usual_logprob, exact.logprob) + margin
    assert not ours.logprob.requires_grad and not ours.entropy.requires_grad


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo"])  # gspo: tokens of a sequence coupled
def test_support(backend, dtype, name, monkeypatch):
    limit = dict.fromkeys(("cpu", "cuda"), 7 * V * 4)  # several chunks
    monkeypatch.setattr("pyrl.ops.linear_logprob.CHUNK_BYTES", limit)
    hidden, weight, target, advantages, fields = inputs(dtype)
    fields["support"] = random_support(target, V, fields["mask"], largest=30)
    with torch.no_grad():
        logp = pyrl.linear_logprob(
            hidden, weight, target, bias=fields["bias"], mask=fields["mask"],
            support=fields["support"], backend="reference",
        ).logprob  # fmt: skip
    fields["old_logprob"] = logp + 0.3 * torch.randn(T, device=DEVICE)
    fields["ref_logprob"] = logp + 0.3 * torch.randn(T, device=DEVICE)
    args = (hidden, weight, target, advantages, fields)
    spec = SPECS.get(name) or LossSpec.preset(name, entropy_coef=0.02)
    exact, exact_grads = run("reference", spec, *args)
    usual, usual_grads, _ = plain(spec, *args)
    ours, grads = run(backend, spec, *args)
    margin = MARGIN[dtype]
    assert relative(ours.loss, exact.loss) <= relative(usual.loss, exact.loss) + margin
    for a, b, c in zip(grads, usual_grads, exact_grads, strict=True):
        assert relative(a, c) <= relative(b, c) + margin


@pytest.mark.parametrize("backend", serving())
def test_frozen_head_and_no_grad(backend):
    hidden, weight, target, advantages, fields = inputs()
    spec = SPECS["grpo"]
    _, grads = run(backend, spec, hidden, weight, target, advantages, fields)
    hidden.grad = None
    fields["bias"] = fields["bias"].detach()
    out = pyrl.linear_policy_loss(
        hidden, weight.detach(), target, advantages, spec, backend=backend, **fields
    )
    (2 * out.loss).backward()
    assert relative(hidden.grad, grads[0]) <= 1e-6
    with torch.no_grad():
        quiet = pyrl.linear_policy_loss(
            hidden, weight, target, advantages, spec, backend=backend, **fields
        )
    assert not quiet.loss.requires_grad
    assert relative(quiet.loss, out.loss) <= 1e-6


@pytest.mark.parametrize("backend", serving())
def test_master_weight_of_another_dtype(backend):
    hidden, weight, target, advantages, fields = inputs(torch.bfloat16)
    fields["bias"] = None
    spec = LossSpec(aggregation="token_mean")
    master = weight.detach().float().requires_grad_()
    fields = {k: v for k, v in fields.items() if k in ("mask", "cu_seqlens")}
    out = pyrl.linear_policy_loss(
        hidden, master, target, advantages, spec, backend=backend, **fields
    )
    out.loss.backward()
    assert master.grad.dtype == torch.float32
    pyrl.linear_policy_loss(
        hidden, weight, target, advantages, spec, backend=backend, **fields
    ).loss.backward()
    assert relative(weight.grad, master.grad) <= 2**-8  # bf16 rounding of the result


@pytest.mark.parametrize("backend", serving())
def test_reference_hidden_equals_reference_logprob(backend):
    hidden, weight, target, advantages, fields = inputs()
    spec = SPECS["grpo"]
    ref_hidden = hidden.detach() + 0.1
    bias, mask = fields["bias"], fields["mask"]
    with torch.no_grad():
        ref = pyrl.linear_logprob(ref_hidden, weight, target, bias=bias, mask=mask, backend=backend)
    given = dict(fields, ref_logprob=ref.logprob)
    expected = pyrl.linear_policy_loss(
        hidden, weight, target, advantages, spec, backend=backend, **given
    )
    del fields["ref_logprob"]
    ours = pyrl.linear_policy_loss(
        hidden, weight, target, advantages, spec, ref_hidden=ref_hidden, backend=backend, **fields
    )
    assert torch.equal(ours.loss, expected.loss)


@pytest.mark.parametrize("backend", serving())
def test_reference_hidden_is_normalised_over_the_support_too(backend):
    hidden, weight, target, advantages, fields = inputs()
    del fields["ref_logprob"]
    fields["support"] = random_support(target, V, fields["mask"])
    out = pyrl.linear_policy_loss(
        hidden, weight, target, advantages, SPECS["grpo"], ref_hidden=hidden.detach(),
        backend=backend, **fields,
    )  # fmt: skip
    assert abs(out.metrics["kl_k3_sum"]) <= 1e-9  # an unchanged policy


@pytest.mark.parametrize("backend", [b for b in serving() if b != "torch"])
def test_a_second_backward_raises_instead_of_scaling_twice(backend):
    hidden, weight, target, advantages, fields = inputs()
    out = pyrl.linear_policy_loss(
        hidden, weight, target, advantages, LossSpec(), backend=backend, mask=fields["mask"],
        cu_seqlens=fields["cu_seqlens"],
    )  # fmt: skip
    (3 * out.loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        (3 * out.loss).backward()


@pytest.mark.parametrize("backend", serving())
def test_all_masked_and_empty(backend):
    hidden, weight, target, advantages, fields = inputs()
    fields["mask"] = torch.zeros_like(fields["mask"])
    out, grads = run(backend, SPECS["grpo"], hidden, weight, target, advantages, fields)
    assert out.loss == 0 and not any(g.any() for g in grads)
    none = torch.zeros(0, D, device=DEVICE).requires_grad_()
    out = pyrl.linear_policy_loss(
        none, weight, target[:0], advantages[:0], LossSpec(), backend=backend
    )
    out.loss.backward()
    assert out.loss == 0 and none.grad.shape == (0, D)


@pytest.mark.parametrize("backend", [b for b in serving() if b != "torch"])
def test_opcheck_and_fullgraph(backend):
    hidden, weight, target, advantages, f = inputs()
    spec = SPECS["grpo"]
    one, adv = torch.ones(T, device=DEVICE), torch.randn(T, device=DEVICE)
    for support in ((None, None), tuple(random_support(target, V, f["mask"]))):
        head = (hidden, weight, f["bias"], None, None, target, one, *support)
        fields = (f["old_logprob"], f["ref_logprob"], None, adv, one / T, f["mask"], None)
        needs = [True] * 3 + [False] * 2
        torch.library.opcheck(
            _linear_policy_loss,
            (*head, *fields, spec.to_json(), 1.0, V, backend, needs),
            # In-place scaling of saved gradients is eager's; tracing takes the other branch, and
            # is compared with eager below.
            test_utils=("test_schema", "test_faketensor"),
        )
    eager, grads = run(backend, spec, hidden, weight, target, advantages, f)
    for leaf in (hidden, weight, f["bias"]):
        leaf.grad = None
    compiled = torch.compile(pyrl.linear_policy_loss, fullgraph=True, backend="aot_eager")
    out = compiled(hidden, weight, target, advantages, spec, backend=backend, **f)
    (2 * out.loss).backward()
    assert relative(out.loss, eager.loss) <= 1e-6
    for leaf, expected in zip((hidden, weight, f["bias"]), grads, strict=True):
        assert relative(leaf.grad, expected) <= 1e-6


def test_no_tensor_has_tokens_by_vocabulary():
    t, v, rows = 256, 100_000, 32
    hidden = torch.randn(t, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(v, 4, device=DEVICE, requires_grad=True)
    target = torch.randint(0, v, (t,), device=DEVICE)
    limit = dict.fromkeys(("cpu", "cuda"), rows * v * 4)
    # The profiler sees the operands of every operator, those inside the registered ops too.
    profile = torch.profiler.profile(record_shapes=True)
    with pytest.MonkeyPatch.context() as patch, profile:
        patch.setattr("pyrl.ops.linear_logprob.CHUNK_BYTES", limit)
        advantages = torch.randn(t, device=DEVICE)
        for backend in (b for b in serving() if b != "triton" or DEVICE.type == "cuda"):
            out = pyrl.linear_policy_loss(
                hidden, weight, target, advantages, LossSpec(), backend=backend
            )
            out.loss.backward()
    shapes = [shape for event in profile.events() for shape in event.input_shapes if shape]
    # A chunk of logits, of which some backends speak in bytes.
    assert max(math.prod(shape) for shape in shapes) <= 4 * rows * v < t * v
    assert any(shape == [rows, v] for shape in shapes)


def test_bad_input_names_itself():
    hidden, weight, target, advantages, fields = inputs()
    with pytest.raises(ValueError, match="spec: expected a LossSpec, got str"):
        pyrl.linear_policy_loss(hidden, weight, target, advantages, "grpo")
    with pytest.raises(ValueError, match="give one"):
        pyrl.linear_policy_loss(
            hidden, weight, target, advantages, LossSpec(), ref_hidden=hidden, **fields
        )
    with pytest.raises(ValueError, match=r"expected Support\(indptr, ids\), got object"):
        pyrl.linear_policy_loss(
            hidden, weight, target, advantages, LossSpec(), support=object(), **fields
        )
