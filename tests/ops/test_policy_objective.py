"""policy_objective: every objective by its hand-written formula, its derivative by finite
differences, and every backend against the float64 oracle.

Edges and errors are in test_policy_objective_edges.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrl
from pyrl import LossSpec
from pyrl.certify.batches import Shape, numbers
from pyrl.certify.cases import OBJECTIVES, OPTIONS, spec
from pyrl.ops import spec as known
from pyrl.ops.objective import policy_objective_terms
from pyrl.ops.policy_objective import _policy_objective
from pyrl.parity import DEVICE, MARGIN, relative, serving

BACKENDS = serving()
backends = pytest.mark.parametrize("backend", BACKENDS)


class Token(NamedTuple):
    """A kept token; `held` is its log-prob where a formula stops the gradient."""

    logp: float
    held: float
    old: float
    A: float


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def ratio(t: Token) -> float:
    return math.exp(t.logp - t.old)


def sequence_ratio(s: list[Token]) -> float:
    return math.exp(sum(u.logp - u.old for u in s) / len(s))


def clip(r: float, A: float, low: float = 0.8, high: float = 1.2, delta: float = math.inf) -> float:
    return -min(min(r, delta) * A, clamp(r, low, high) * A)


def dual_clip(t: Token) -> float:
    loss = clip(ratio(t), t.A, delta=1.4)
    return min(loss, -1.5 * t.A) if t.A < 0 else loss


def sapo(r: float, A: float) -> float:
    tau = 1.0 if A > 0 else 1.05
    return -A * (4 / tau) / (1 + math.exp(-tau * (r - 1)))


def gmpo(t: Token, s: list[Token]) -> float:
    deltas = [
        min(u.logp - u.old, 0.4) if u.A > 0 else max(u.logp - u.old, -0.4) if u.A < 0 else
        u.logp - u.old for u in s
    ]  # fmt: skip
    return -t.A * math.exp(sum(deltas) / len(s))


def vespo(t: Token, s: list[Token]) -> float:
    w = math.exp(sum(u.held - u.old for u in s))  # far from its clamps here
    k, rate = (2.0, 3.0) if t.A >= 0 else (3.0, 2.0)
    return -math.exp(rate + k * math.log(w) - rate * w) * t.A * t.logp


def dppo(t: Token, divergence: str, bound: float) -> float:
    p, q = math.exp(t.held), math.exp(t.old)
    d = abs(p - q)
    if divergence == "kl":
        d = q * math.log(q / p) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
    outward = p > q if t.A > 0 else p < q
    return 0.0 if outward and d > bound else -ratio(t) * t.A


#: The row of each objective: its loss at token t of the kept tokens s of a sequence.
FORMULAS: dict[str, Callable[[Token, list[Token]], float]] = {
    "reinforce": lambda t, s: -t.A * t.logp,
    "clip": lambda t, s: clip(ratio(t), t.A, high=1.28),
    "clip, dual clip, delta": lambda t, s: dual_clip(t),
    "clip, sequence": lambda t, s: clip(sequence_ratio(s), t.A, low=0.98),
    "clip, sequence_token": lambda t, s: clip(
        sequence_ratio([u._replace(logp=u.held) for u in s]) * math.exp(t.logp - t.held), t.A
    ),
    "cispo": lambda t, s: -clamp(math.exp(t.held - t.old), 0.7, 1.4) * t.A * t.logp,
    "cispo, sequence": lambda t, s: (
        -clamp(sequence_ratio([u._replace(logp=u.held) for u in s]), 0, 5) * t.A * t.logp
    ),
    "sapo": lambda t, s: sapo(ratio(t), t.A),
    "sapo, sequence": lambda t, s: sapo(sequence_ratio(s), t.A),
    "gmpo": gmpo,
    "vespo": vespo,
    "dppo, tv": lambda t, s: dppo(t, "tv", 0.05),
    "dppo, kl": lambda t, s: dppo(t, "kl", 0.02),
}


def test_every_objective_has_its_rows():
    assert set(FORMULAS) == set(OBJECTIVES)
    assert {o["objective"] for o in OBJECTIVES.values()} == set(known.OBJECTIVES)


def by_hand(name: str, batch: dict) -> tuple[float, list[float]]:
    """Mean of the row's formula over kept tokens; its central differences by each log-prob."""
    columns = [batch[key].tolist() for key in ("logprob", "logprob", "old_logprob", "advantages")]
    tokens, keep = [Token(*row) for row in zip(*columns, strict=True)], batch["mask"].tolist()
    sequences = [
        [i for i in range(a, b) if keep[i]] for a, b in pairwise(batch["cu_seqlens"].tolist())
    ]

    def total(ids: list[int], moved: int = -1, by: float = 0.0) -> float:
        s = [tokens[i]._replace(logp=tokens[i].logp + by * (i == moved)) for i in ids]
        return math.fsum(FORMULAS[name](t, s) for t in s) / sum(keep)

    slopes, step = [0.0] * len(tokens), 1e-5
    for ids in sequences:
        for i in ids:
            slopes[i] = (total(ids, i, step) - total(ids, i, -step)) / (2 * step)
    return math.fsum(total(ids) for ids in sequences), slopes


@pytest.mark.parametrize("name", FORMULAS)
def test_by_hand(name):
    batch = numbers(Shape(name="ragged"), seed=1)
    # One per token, a few of them 0: sequences then mix both signs.
    g = torch.Generator().manual_seed(1)
    batch["advantages"] = torch.randn(batch["logprob"].shape, generator=g).to(DEVICE)
    batch["advantages"][::6] = 0
    loss, slopes = by_hand(name, batch)
    logprob, advantages = batch.pop("logprob").requires_grad_(), batch.pop("advantages")
    for backend in ("reference", *BACKENDS):
        out = pyrl.policy_objective(
            logprob, advantages, spec(OBJECTIVES[name]), backend=backend, **batch
        )
        (found,) = torch.autograd.grad(out.loss, logprob)
        assert out.loss.item() == pytest.approx(loss, rel=1e-6)
        # 1e-9: the central differences of float64 numbers; the rest is the rounding to fp32.
        torch.testing.assert_close(
            found.double().cpu(), torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-9
        )


#: Objectives and options whose gradient is the derivative of their value: nothing is stopped.
SMOOTH = [
    name
    for name, o in OBJECTIVES.items()
    if o["objective"] not in ("cispo", "vespo") and o.get("ratio_level") != "sequence_token"
]
SMOOTH_OPTIONS = [name for name in OPTIONS if name != "kl k3_st"]


@pytest.mark.parametrize("name", SMOOTH)
def test_the_oracles_gradient_is_its_derivative(name):
    batch = {
        k: v.double() if v.is_floating_point() else v
        for k, v in numbers(
            Shape(name="small", lengths=(4, 0, 1, 3)), 2, torch.device("cpu")
        ).items()
    }
    advantage = batch["advantages"].repeat_interleave(batch["cu_seqlens"].diff())
    fixed = [batch[k] for k in ("old_logprob", "ref_logprob", "rollout_logprob")]
    fixed += [advantage, batch["weights"], batch["mask"], batch["cu_seqlens"]]
    leaves = [batch[k].requires_grad_() for k in ("logprob", "entropy")]
    for option in SMOOTH_OPTIONS:
        loss_spec = spec(OBJECTIVES[name], OPTIONS[option])

        def loss(logprob, entropy, loss_spec=loss_spec):
            return policy_objective_terms(logprob, entropy, *fixed, loss_spec)[0]

        assert torch.autograd.gradcheck(loss, leaves, fast_mode=True), option


def run(backend, batch, loss_spec):
    leaves = [batch[k].clone().requires_grad_() for k in ("logprob", "entropy")]
    rest = {k: v for k, v in batch.items() if k not in ("logprob", "entropy", "advantages")}
    out = pyrl.policy_objective(
        leaves[0], batch["advantages"], loss_spec, entropy=leaves[1], backend=backend, **rest
    )
    out.loss.backward()
    return out, [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def assert_parity(names, batch, loss_spec):
    """The rule for the loss and both gradients; metrics to fp32 rounding of each term."""
    exact, exact_grads = run("reference", batch, loss_spec)
    plain, plain_grads = run("torch", batch, loss_spec)
    margin = MARGIN[torch.float32]
    for backend in names:
        ours, grads = run(backend, batch, loss_spec)
        note = f"{backend}: {loss_spec}"
        assert relative(ours.loss, exact.loss) <= relative(plain.loss, exact.loss) + margin, note
        for a, b, c in zip(grads, plain_grads, exact_grads, strict=True):
            assert relative(a, c) <= relative(b, c) + margin, note
        assert set(ours.metrics) == set(exact.metrics)
        for name, value in exact.metrics.items():
            text = f"{note}: {name}: {{}}".format
            torch.testing.assert_close(ours.metrics[name], value, rtol=2e-5, atol=2e-6, msg=text)


def options_for(backend: str, name: str) -> list[str]:
    """All of them; interpreted kernels take a share, of which every option meets some objective."""
    if backend != "triton" or DEVICE.type == "cuda":
        return list(OPTIONS)
    i = list(OBJECTIVES).index(name)
    return ["all at once", *list(OPTIONS)[i % 11 :: 11]]


@backends
@pytest.mark.parametrize("name", OBJECTIVES)
def test_parity(backend, name):
    batch = numbers(Shape(name="ragged"))
    for option in options_for(backend, name):
        if (loss_spec := spec(OBJECTIVES[name], OPTIONS[option])) is not None:
            assert_parity([backend], batch, loss_spec)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 9999),
    lengths=st.lists(st.integers(0, 6), max_size=4),
    kept=st.sampled_from([0.0, 0.3, 1.0]),
    missing=st.sampled_from([0.0, 0.4, 1.0]),
    padded=st.booleans(),
    name=st.sampled_from(list(OBJECTIVES)),
    option=st.sampled_from(list(OPTIONS)),
)
def test_any_batch(seed, lengths, kept, missing, padded, name, option):
    """Ragged, empty, all masked; old, ref and rollout missing at any tokens; packed and padded."""
    loss_spec = spec(OBJECTIVES[name], OPTIONS[option])
    if loss_spec is None:  # a refused combination
        return
    padded = padded and len(lengths) > 0
    shape = Shape(name="any", lengths=tuple(lengths), kept=kept, missing=missing, padded=padded)
    batch = numbers(shape, seed)
    assert_parity(BACKENDS, batch, loss_spec)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(backend, everything):
    """With every vector, sequences among them, and with those alone that no loss does without."""
    batch = numbers(Shape(name="small", lengths=(3, 0, 2)))
    loss_spec = spec(OBJECTIVES["gmpo"], OPTIONS["all at once"]) if everything else LossSpec()
    advantage = batch["advantages"].repeat_interleave(batch["cu_seqlens"].diff())
    optional = ("entropy", "old_logprob", "ref_logprob", "rollout_logprob", "cu_seqlens")
    *vectors, bounds = (batch[k] if everything else None for k in optional)
    leaf = batch["logprob"].clone().requires_grad_()
    rest = (advantage, batch["weights"], batch["mask"], bounds, loss_spec.to_json(), backend)
    torch.library.opcheck(_policy_objective, (leaf, *vectors, *rest))
