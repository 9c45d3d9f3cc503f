"""linear_logprob on every backend against the float64 oracle, forward and all three gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrl
from pyrl import Support
from pyrl.ops.linear_logprob import _linear_logprob, _linear_logprob_backward
from pyrl.parity import DEVICE, MARGIN, relative, serving
from pyrl.testing import random_support

# V: one token; a prime; a padded vocabulary's odd size past one vector and one tile.
SIZES = [(5, 8, 1), (1, 16, 17), (33, 24, 1031), (3, 8, 32001)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(t, d, v, dtype, *, seed=0, bias=False):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(t, d, generator=g).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(v, d, generator=g).to(DEVICE, dtype).requires_grad_()
    b = torch.randn(v, generator=g).to(DEVICE, dtype).requires_grad_() if bias else None
    target = torch.randint(0, v, (t,), generator=g).to(DEVICE)
    mask = (torch.rand(t, generator=g) > 0.3).to(DEVICE)
    coefficients = torch.randn(3, t, generator=g).to(DEVICE)
    return hidden, weight, b, target, mask, coefficients


def run(backend, hidden, weight, bias, target, mask, coefficients, **options):
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    for leaf in leaves:
        leaf.grad = None
    out = pyrl.linear_logprob(
        hidden, weight, target, bias=bias, mask=mask, backend=backend, **options
    )
    sum((c * v).sum() for c, v in zip(coefficients, out, strict=True)).backward()
    return [*out, *(x.grad for x in leaves)]


def outside(support, mask, shape):
    """bool [T, V]: what no kept token's support holds; False in unkept rows."""
    inside = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
    for i, (a, b) in enumerate(zip(support.indptr[:-1], support.indptr[1:], strict=True)):
        if mask[i]:
            inside[i, support.ids[a:b].long()] = True
    return ~inside & mask[:, None]


def plain(hidden, weight, bias, target, mask, coefficients, *, temperature=1.0, softcap=None,
          logit_scale=1.0, support=None):  # fmt: skip
    """The same by plain torch in the inputs' dtype: its error is the yardstick."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    z = torch.nn.functional.linear(*leaves[:2], *leaves[2:]).float() * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    t = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
    x = z / t
    if support is not None:
        x = x.masked_fill(outside(support, mask, z.shape), -torch.inf)
    logp = x.log_softmax(-1)
    chosen = logp.gather(1, target[:, None])[:, 0]
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    out = [torch.where(mask, v, 0.0) for v in (chosen, entropy, x.logsumexp(-1))]
    sum((c * v).sum() for c, v in zip(coefficients, out, strict=True)).backward()
    return [*out, *(x.grad for x in leaves)]


def assert_parity(backend, dtype, args, sizes=(0.0,) * 6, **options):
    """`sizes`: norms of what each value is a sum of, where that may cancel."""
    truth = run("reference", *args, **options)
    truth64 = [v.double() for v in truth]
    for name, size, ours, theirs, exact in zip(
        ("logprob", "entropy", "lse", "dhidden", "dweight", "dbias"),
        sizes,
        run(backend, *args, **options),
        plain(*args, **options),
        truth64,
        strict=False,
    ):
        bound = relative(theirs, exact, size) + MARGIN[dtype]
        assert relative(ours, exact, size) <= bound, (name, relative(ours, exact, size), bound)


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(backend, dtype, size):
    assert_parity(backend, dtype, inputs(*size, dtype, bias=True))


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_head_options(backend, dtype):
    args = inputs(21, 16, 301, dtype)
    temperature = torch.linspace(0.5, 2.0, 21).to(DEVICE)
    assert_parity(backend, dtype, args, temperature=temperature, softcap=15.0, logit_scale=0.5)


# Supports of one token, of less than a vector, of more than a block of every kernel (1024).
@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "largest"), [((5, 8, 1), 1), ((33, 24, 1031), 7), ((4, 8, 2500), 2500)]
)
def test_support(backend, dtype, size, largest):
    args = inputs(*size, dtype, bias=True)
    ids = torch.int64 if largest == 7 else torch.int32
    support = random_support(args[3], size[2], args[4], largest=largest, dtype=ids)
    assert_parity(backend, dtype, args, support=support)


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_support_with_head_options(backend, dtype):
    args = inputs(21, 16, 301, dtype)
    support = random_support(args[3], 301, args[4])
    temperature = torch.linspace(0.5, 2.0, 21).to(DEVICE)
    options = {"temperature": temperature, "softcap": 15.0, "logit_scale": 0.5}
    assert_parity(backend, dtype, args, support=support, **options)


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_gradient_enters_a_logit_outside_the_support(backend, dtype):
    # The head is the identity: hidden are the logits, and dhidden is dL/dlogits exactly.
    _, _, _, target, mask, coefficients = inputs(12, 1, 90, dtype)
    hidden = torch.randn(12, 90, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.eye(90, device=DEVICE, dtype=dtype).requires_grad_()
    support = random_support(target, 90, mask, largest=9)
    run(backend, hidden, weight, None, target, mask, coefficients, support=support)
    out = outside(support, mask, hidden.shape) | ~mask[:, None]
    assert (hidden.grad[out] == 0).all() and (hidden.grad[~out] != 0).any()


@pytest.mark.parametrize("backend", [*serving(), "reference"])
def test_a_support_of_the_whole_vocabulary_changes_nothing(backend):
    args = inputs(9, 8, 70, torch.float32)
    indptr = torch.arange(10, device=DEVICE) * 70
    ids = torch.cat([torch.randperm(70) for _ in range(9)]).to(DEVICE)
    with_support = run(backend, *args, support=Support(indptr, ids))
    for ours, expected in zip(with_support, run(backend, *args), strict=True):
        assert relative(ours, expected) <= 2e-6  # the same fp32 sums in another order


@pytest.mark.parametrize("backend", serving())
def test_many_chunks_equal_one(backend, monkeypatch):
    args = inputs(50, 16, 97, torch.float32)
    whole = run(backend, *args)
    support = random_support(args[3], 97, args[4])
    of_support = run(backend, *args, support=support)
    monkeypatch.setattr(
        "pyrl.ops.linear_logprob.CHUNK_BYTES", {"cpu": 7 * 97 * 4, "cuda": 7 * 97 * 4}
    )
    for one, many in zip(whole, run(backend, *args), strict=True):
        assert relative(many, one) <= 1e-6  # fp32 sums of the same numbers in another order
    for one, many in zip(of_support, run(backend, *args, support=support), strict=True):
        assert relative(many, one) <= 1e-6


@pytest.mark.parametrize("backend", serving())
def test_infinite_logits_and_nothing_kept(backend):
    hidden, weight, _, target, mask, coefficients = inputs(9, 8, 40, torch.float32)
    bias = torch.zeros(40, device=DEVICE)
    bias[1::2] = -torch.inf
    target = target // 2 * 2
    args = (hidden, weight, bias.requires_grad_(), target, mask, coefficients)
    for ours, exact in zip(run(backend, *args), run("reference", *args), strict=True):
        assert relative(ours, exact) <= 1e-5
    hidden.data[~mask] = torch.nan  # what is masked may hold anything
    out = run(backend, *args)
    assert all(bool(v.isfinite().all()) for v in out)
    nothing = run(backend, hidden, weight, bias, target, torch.zeros_like(mask), coefficients)
    assert all(not v.any() for v in nothing)


@pytest.mark.parametrize("backend", serving())
def test_empty(backend):
    out = run(backend, *inputs(0, 8, 11, torch.float32))
    assert [tuple(v.shape) for v in out] == [(0,), (0,), (0,), (0, 8), (11, 8)]


@pytest.mark.parametrize("backend", serving())
@settings(max_examples=15, deadline=None)
@given(t=st.integers(1, 20), d=st.integers(1, 12), v=st.integers(1, 70), seed=st.integers(0, 99))
def test_property_padded_equals_packed_equals_oracle(backend, t, d, v, seed):
    args = inputs(t, d, v, torch.float32, seed=seed)
    hidden, weight, _, target, mask, coefficients = args
    # Of a few numbers a logit or a gradient may cancel to far less than its terms, and its rounding
    # does not shrink with it.
    logits, c = (hidden @ weight.T).detach()[mask].norm(), coefficients[:, mask].norm()
    terms = (c * weight.detach().norm(dim=1).max(), c * hidden.detach().norm(dim=1).max())
    assert_parity(backend, torch.float32, args, [logits, logits, logits, *terms])
    flat = pyrl.linear_logprob(hidden, weight, target, mask=mask, backend=backend)
    padded = pyrl.linear_logprob(
        hidden[None], weight, target[None], mask=mask[None], backend=backend
    )
    assert torch.equal(flat.logprob, padded.logprob[0])


@pytest.mark.parametrize("backend", serving())
def test_opcheck(backend):
    h, w, b, y, mask, co = inputs(6, 8, 13, torch.float32, bias=True)
    inv = torch.ones(6, device=DEVICE)
    low, up = (torch.randn(*shape, device=DEVICE) for shape in ((2, 8), (13, 2)))
    csr = tuple(random_support(y, 13, mask))
    for adapter, support in (
        ((None, None), (None, None)),
        ((low.requires_grad_(), up.requires_grad_()), csr),
    ):
        args = (h, w, y, b, *adapter, inv, mask, *support)
        rest = (0.5, 0.0, 1.0, 13, backend)
        torch.library.opcheck(_linear_logprob, (*args, *rest))
        _, entropy, lse = _linear_logprob(*args, *rest)
        saved = [v.detach() if v is not None else None for v in (*args, entropy, lse)]
        needs = [True, True, True, *(v is not None for v in adapter)]
        for partial in (False, True):
            torch.library.opcheck(_linear_logprob_backward, (*saved, *co, *rest, needs, partial))


def test_bad_input_names_itself():
    h, w, _, y, mask, _ = inputs(6, 8, 13, torch.float32)
    bad = y.clone()
    bad[4] = 13
    with pytest.raises(ValueError, match=r"target\[4\] = 13 .*\[0, 13\)"):
        pyrl.linear_logprob(h, w, bad)
    pyrl.linear_logprob(h, w, bad, mask=torch.arange(6, device=DEVICE) != 4)  # masked: never read
    with pytest.raises(ValueError, match=r"hidden: expected shape \(6, 7\), got \(6, 8\)"):
        pyrl.linear_logprob(h, w[:, :7], y)
    with pytest.raises(ValueError, match="mask: expected shape"):
        pyrl.linear_logprob(h, w, y, mask=mask[:3])
    with pytest.raises(ValueError, match="integer token ids"):
        pyrl.linear_logprob(h, w, y.float())
    with pytest.raises(ValueError, match="temperature=0"):
        pyrl.linear_logprob(h, w, y, temperature=0.0)
    with pytest.raises(ValueError, match="backend='fast'"):
        pyrl.linear_logprob(h, w, y, backend="fast")


@pytest.mark.parametrize("backend", [*serving(), "reference"])
def test_bad_support_names_itself(backend):
    h, w, _, y, _, _ = inputs(3, 8, 13, torch.float32)
    y[:] = torch.tensor([4, 5, 6])
    good = [4, 9, 5, 1, 12, 6]

    def call(indptr, ids, mask=None, dtype=torch.int64):
        indptr, ids = (torch.tensor(v, dtype=dtype, device=DEVICE) for v in (indptr, ids))
        return pyrl.linear_logprob(
            h, w, y, support=Support(indptr, ids), mask=mask, backend=backend
        )

    call([0, 2, 3, 6], good)
    cases = {
        r"support.indptr: expected shape \(4,\), got \(3,\)": ([0, 2, 6], good),
        r"support.indptr\[0\] = 1: expected 0": ([1, 2, 3, 6], good),
        r"support.indptr falls at 2: 3 → 2": ([0, 3, 2, 6], good),
        r"support.indptr\[3\] = 5: expected 6, the number of ids": ([0, 2, 3, 5], good),
        r"support of token 2: id 13 is outside the vocabulary \[0, 13\)": (
            [0, 2, 3, 6],
            [4, 9, 5, 1, 13, 6],
        ),
        r"support of token 0: id -1 is outside": ([0, 2, 3, 6], [4, -1, 5, 1, 12, 6]),
        r"support of token 2: id 6 is in it more than once": ([0, 2, 3, 6], [4, 9, 5, 6, 1, 6]),
        r"target\[1\] = 5 is outside its support of 1 tokens": ([0, 2, 3, 6], [4, 9, 7, 1, 12, 6]),
        r"target\[0\] = 4 is outside its support of 0 tokens": ([0, 0, 3, 6], [4, 9, 5, 1, 12, 6]),
    }
    for message, (indptr, ids) in cases.items():
        with pytest.raises(ValueError, match=message):
            call(indptr, ids)
    with pytest.raises(
        ValueError, match=r"support\.indptr: expected int32 or int64, got torch\.float"
    ):
        call([0, 2, 3, 6], good, dtype=torch.float32)
    with pytest.raises(ValueError, match="expected Support"):
        pyrl.linear_logprob(h, w, y, support=(1, 2), backend=backend)
    # What is masked is never read.
    mask = torch.tensor([True, False, True], device=DEVICE)
    call([0, 2, 4, 6], [9, 4, 99, 99, 6, 0], mask=mask)


def test_a_support_under_fullgraph():
    h, w, _, y, mask, _ = inputs(6, 8, 13, torch.float32)
    support = random_support(y, 13, mask)
    compiled = torch.compile(pyrl.linear_logprob, fullgraph=True, backend="aot_eager")
    out = compiled(h, w, y, mask=mask, support=support)
    out.logprob.sum().backward()
    ours = h.grad.clone()
    h.grad = None
    expected = pyrl.linear_logprob(h, w, y, mask=mask, support=support)
    expected.logprob.sum().backward()
    assert relative(out.logprob, expected.logprob) <= 1e-6 and relative(ours, h.grad) <= 1e-6


def test_an_explicit_backend_never_falls_back():
    h, w, _, y, _, _ = inputs(6, 8, 13, torch.float32)
    for name, reason in pyrl.backends().items():
        if reason is not None:
            with pytest.raises(pyrl.BackendUnavailableError, match="not usable here"):
                pyrl.linear_logprob(h, w, y, backend=name)


def test_environment_variable_chooses_and_names_itself(monkeypatch):
    h, w, _, y, _, _ = inputs(6, 8, 13, torch.float32)
    monkeypatch.setenv("PYRL_BACKEND", "quick")
    with pytest.raises(ValueError, match="PYRL_BACKEND='quick'"):
        pyrl.linear_logprob(h, w, y)


@pytest.mark.parametrize("backend", [*serving(), "reference"])
def test_what_a_masked_row_holds_reaches_no_gradient(backend):
    h, w, _, y, _, _ = inputs(4, 8, 13, torch.float32)
    h.data[1] = torch.nan
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    pyrl.linear_logprob(h, w, y, mask=mask, backend=backend).logprob.sum().backward()
    assert w.grad.isfinite().all() and h.grad.isfinite().all() and not h.grad[1].any()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"logit_scale": 0.0}, "logit_scale=0.0"),
        ({"logit_scale": float("nan")}, "logit_scale=nan"),
        ({"temperature": 1e-40}, "temperature=1e-40"),
        ({"vocab_size": 5.0}, "vocab_size=5.0"),
        ({"lora": (1, 2)}, "lora: expected a LoRA, got tuple"),
    ],
)
def test_bad_options_name_themselves(option, message):
    h, w, _, y, _, _ = inputs(6, 8, 13, torch.float32)
    with pytest.raises(ValueError, match=message):
        pyrl.linear_logprob(h, w, y, **option)
