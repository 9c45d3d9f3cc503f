"""`linear_policy_loss`, forward and backward, by every implementation it is compared with.

All compute the same thing from the same inputs: the PPO clip loss with bounds 0.2 / 0.2, averaged
over the kept tokens (`token_mean`), and the gradients of `hidden` and `weight`:

    logp = log_softmax(hidden @ weight.T)[t, target_t];  r = exp(logp - old)
    loss = sum_kept -min(r A, clamp(r, 0.8, 1.2) A) / N_kept
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = 0.2
#: Rows of logits held at once by the bare products where N is larger.
GEMM_ROWS = 8192
#: From here on `draw` has the log-sum-exp in closed form, within 1.3 / sqrt(V) <= 0.011 of it.
CLOSED_FORM_VOCAB = 16_384


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """N rows over a vocabulary of V, and the share of them with loss."""

    tokens: int
    vocab: int
    dtype: str = "float32"
    kept_share: float = 1.0
    device: str = "cpu"
    length: int = 128
    """Tokens a sequence, for those that want [B, L]; N itself when it does not divide N."""

    @property
    def sequence_length(self) -> int:
        return self.length if self.tokens % self.length == 0 else self.tokens

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def kept_tokens(self) -> int:
        return max(1, round(self.tokens * self.kept_share))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(Rows):
    """One shape of the grid: N rows of D against a weight [V, D]."""

    hidden: int

    @property
    def flops(self) -> float:
        """6NDV over the kept rows: what the loss cannot be computed without."""
        return 6.0 * self.kept_tokens * self.hidden * self.vocab

    @property
    def shape(self) -> list[int]:
        return [self.tokens, self.hidden, self.vocab]


@dataclasses.dataclass
class Inputs:
    """hidden[N, D] and weight[V, D] are leaves; the rest are fp32 [N] vectors, target int64 [N],
    keep bool [N]; advantage is constant inside a sequence."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    advantage: Tensor
    old: Tensor
    keep: Tensor
    case: Case

    def clear(self) -> None:
        self.hidden.grad = None
        self.weight.grad = None


@dataclasses.dataclass(frozen=True)
class Output:
    loss: Tensor
    grad_hidden: Tensor | None
    grad_weight: Tensor | None


def draw_labels(case: Rows, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """target int64 [N], advantage fp32 [N], keep bool [N] with exactly `kept_tokens` set."""
    n, length, device = case.tokens, case.sequence_length, case.device
    target = torch.randint(case.vocab, (n,), generator=rng, device=device)
    each = torch.randn(n // length, generator=rng, device=device)
    keep = torch.zeros(n, dtype=torch.bool, device=device)
    keep[torch.randperm(n, generator=rng, device=device)[: case.kept_tokens]] = True
    return target, each.repeat_interleave(length), keep


def draw(case: Case, seed: int) -> Inputs:
    """New inputs: standard normal hidden states, logits of unit variance, old log-probs within
    0.1 of the policy's so that no token is clipped and every kept row costs its full work."""
    rng = torch.Generator(device=case.device).manual_seed(seed)
    dtype, device = case.torch_dtype, case.device
    hidden = torch.randn(case.tokens, case.hidden, generator=rng, device=device).to(dtype)
    weight = torch.randn(case.vocab, case.hidden, generator=rng, device=device)
    weight = weight.mul_(case.hidden**-0.5).to(dtype)
    target, advantage, keep = draw_labels(case, rng)
    noise = torch.randn(case.tokens, generator=rng, device=device).clamp(-3, 3)
    old = near_logprob(hidden, weight, target) + 0.02 * noise
    return Inputs(
        hidden.requires_grad_(), weight.requires_grad_(), target, advantage, old, keep, case
    )


def near_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """log_softmax(hidden @ weight.T)[t, target_t] for a weight of independent normals of variance
    1 / D: h . w is then normal of variance |h|^2 / D and sum_v exp(h . w_v) is near its mean,
    V exp(|h|^2 / 2D), with a relative error of 1.3 / sqrt(V). A third of the limit's work less a
    draw. Small vocabularies are computed."""
    vocab, d = weight.shape
    if vocab < CLOSED_FORM_VOCAB:
        return logprob(hidden, weight, target)
    h = hidden.float()
    lse = math.log(vocab) + h.square().sum(1) / (2 * d)
    return (h * weight[target].float()).sum(1) - lse


@torch.no_grad()
def logprob(hidden: Tensor, weight: Tensor, target: Tensor, rows: int = 128) -> Tensor:
    """log_softmax(hidden @ weight.T)[t, target_t] in fp32, `rows` at a time."""
    pieces = [
        -F.cross_entropy((h @ weight.T).float(), y, reduction="none")
        for h, y in zip(hidden.split(rows), target.split(rows), strict=True)
    ]
    return torch.cat(pieces)


def clip_loss(logp: Tensor, inputs: Any, rows: slice | Tensor = slice(None)) -> Tensor:
    """sum_kept -min(r A, clamp(r, 1 - CLIP, 1 + CLIP) A) / N_kept, over `rows` of the batch."""
    advantage = inputs.advantage[rows].to(logp.dtype)
    ratio = (logp - inputs.old[rows].to(logp.dtype)).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return torch.where(inputs.keep[rows], loss, 0.0).sum() / inputs.case.kept_tokens


def reference(inputs: Inputs, rows: int = 256) -> Output:
    """The same in float64 by autograd, `rows` of the kept ones at a time: what the others are
    checked against. A row without loss has no gradient."""
    kept = inputs.keep.nonzero()[:, 0]
    hidden = inputs.hidden.detach().double().requires_grad_()
    weight = inputs.weight.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for part in kept.split(rows):
        logits = hidden[part] @ weight.T
        loss = clip_loss(
            -F.cross_entropy(logits, inputs.target[part], reduction="none"), inputs, part
        )
        loss.backward()
        total += loss.detach()
    return Output(total, hidden.grad, weight.grad)


def output_of(loss: Tensor, inputs: Inputs) -> Output:
    return Output(loss.detach(), inputs.hidden.grad, inputs.weight.grad)


def make_gemm(case: Case) -> Callable[[Inputs], Output]:
    """logits = X W^T, dX = Z W, dW = Z^T X in the inputs' dtype over the kept rows; no softmax, no
    allocation. Not an implementation of the loss: what 6NDV takes here."""
    n, dtype, device = case.kept_tokens, case.torch_dtype, case.device
    chunk = min(n, GEMM_ROWS)
    # Written once, so that no call pays for the first touch of a page.
    logits, grad_hidden, grad_weight = (
        torch.empty(shape, dtype=dtype, device=device).fill_(0)
        for shape in ((chunk, case.vocab), (n, case.hidden), (case.vocab, case.hidden))
    )

    @torch.no_grad()
    def call(inputs: Inputs) -> Output:
        for start in range(0, n, chunk):
            x = inputs.hidden[start : min(start + chunk, n)]
            z = torch.mm(x, inputs.weight.T, out=logits[: x.shape[0]])
            torch.mm(z, inputs.weight, out=grad_hidden[start : start + x.shape[0]])
            if start == 0:
                torch.mm(z.T, x, out=grad_weight)
            else:
                grad_weight.addmm_(z.T, x)
        return Output(logits[0, 0], None, None)

    return call


def _naive_loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    logits = (hidden @ weight.T).float()
    return clip_loss(-F.cross_entropy(logits, inputs.target, reduction="none"), inputs)


def make_naive(case: Case) -> Callable[[Inputs], Output]:
    def call(inputs: Inputs) -> Output:
        loss = _naive_loss(inputs.hidden, inputs.weight, inputs)
        loss.backward()
        return output_of(loss, inputs)

    return call


def make_compiled(case: Case) -> Callable[[Inputs], Output]:
    compiled = torch.compile(_naive_loss, fullgraph=True, dynamic=False)

    def call(inputs: Inputs) -> Output:
        loss = compiled(inputs.hidden, inputs.weight, inputs)
        loss.backward()
        return output_of(loss, inputs)

    return call


def pyrl_maker(op: str, backend: str) -> Callable[[Case], Callable[[Inputs], Output]]:
    def make(case: Case) -> Callable[[Inputs], Output]:
        import pyrl

        spec = pyrl.LossSpec(
            objective="clip", clip_low=CLIP, clip_high=CLIP, aggregation="token_mean"
        )

        def call(inputs: Inputs) -> Output:
            out: Any = pyrl.linear_policy_loss(
                inputs.hidden, inputs.weight, inputs.target, inputs.advantage, spec,
                old_logprob=inputs.old, mask=inputs.keep, backend=backend,
            )  # fmt: skip
            out.loss.backward()
            return output_of(out.loss, inputs)

        return call

    return make
