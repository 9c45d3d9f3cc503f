"""`linear_policy_loss` by other libraries: each fused op as its own users call it.

Where a library stops at log-probs, the clip loss on them is plain torch (`peers.clip_loss`), which
costs microseconds beside the head. Libraries are imported when called, never before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peers import CLIP, Case, Inputs, Output, clip_loss, output_of
from torch import Tensor

#: What a library's cross-entropy skips.
IGNORED = -100


def from_logprob(prepare: Callable[[Case], Callable[[Inputs], Tensor]]) -> Callable[[Case], Any]:
    """make(case) for a library that supplies the log-probs [N] (anything where not kept)."""

    def make(case: Case) -> Callable[[Inputs], Output]:
        logprob = prepare(case)

        def call(inputs: Inputs) -> Output:
            # Their cross-entropies answer in the inputs' dtype; the loss is formed in fp32.
            loss = clip_loss(logprob(inputs).float(), inputs)
            loss.backward()
            return output_of(loss, inputs)

        return call

    return make


def kept_target(inputs: Any) -> Tensor:
    return torch.where(inputs.keep, inputs.target, IGNORED)


def prepare_torch(case: Case) -> Callable[[Inputs], Tensor]:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions()

    def logprob(inputs: Inputs) -> Tensor:
        return -linear_cross_entropy(
            inputs.hidden, inputs.weight, kept_target(inputs), reduction="none", options=options
        )

    return logprob


def cce_preparer(implementation: str) -> Callable[[Case], Callable[[Inputs], Tensor]]:
    def prepare(case: Case) -> Callable[[Inputs], Tensor]:
        from cut_cross_entropy import linear_cross_entropy

        # filter_eps skips gradients that it takes for rounding: of no use where c_t varies.
        def logprob(inputs: Inputs) -> Tensor:
            return -linear_cross_entropy(
                inputs.hidden, inputs.weight, kept_target(inputs), reduction="none",
                impl=implementation, filter_eps=None,
            )  # fmt: skip

        return logprob

    return prepare


def prepare_liger_ce(case: Case) -> Callable[[Inputs], Tensor]:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def logprob(inputs: Inputs) -> Tensor:
        nll = LigerFusedLinearScaledCrossEntropyFunction.apply(
            inputs.hidden, inputs.weight, kept_target(inputs)
        )
        return -(nll[0] if isinstance(nll, tuple) else nll)

    return logprob


@contextlib.contextmanager
def ray_or_a_stand_in() -> Iterator[None]:
    """verl's modules name ray's classes when they are imported; its kernels use none of them."""
    if importlib.util.find_spec("ray") is not None:
        yield
        return

    class Anything(types.ModuleType):
        __path__ = []  # noqa: RUF012

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    sys.modules["ray"] = Anything("ray")
    try:
        yield
    finally:
        del sys.modules["ray"]


def prepare_verl(case: Case) -> Callable[[Inputs], Tensor]:
    with ray_or_a_stand_in():
        from verl.utils.experimental.torch_functional import FusedLinearForPPO
    module = FusedLinearForPPO()
    return lambda inputs: module(inputs.hidden, inputs.weight, inputs.target)[0]


def prepare_verl_triton(case: Case) -> Callable[[Inputs], Tensor]:
    with ray_or_a_stand_in():
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
    return lambda inputs: linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target)[0]


def prepare_trl_logits(case: Case) -> Callable[[Inputs], Tensor]:
    """As GRPOTrainer does without its fused head: the model's logits, then one kernel."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def logprob(inputs: Inputs) -> Tensor:
        logits = inputs.hidden @ inputs.weight.T
        return selective_log_softmax_and_entropy(
            logits, inputs.target, entropy_requires_grad=False, row_mask=inputs.keep
        )[0]

    return logprob


def prepare_quack(case: Case) -> Callable[[Inputs], Tensor]:
    """Its chunked form only sums; per-token losses go through logits and its in-place kernel."""
    from quack.linear_cross_entropy import linear_cross_entropy_func

    def logprob(inputs: Inputs) -> Tensor:
        return -linear_cross_entropy_func(
            inputs.hidden, inputs.weight, None, kept_target(inputs),
            reduction="none", inplace_backward=True,
        )  # fmt: skip

    return logprob


def make_liger_triton(case: Case) -> Callable[[Inputs], Output]:
    """Its Triton GRPO loss of logits [B, L + 1, V], the last position of each sequence unused: one
    more row a sequence in the GEMM. The gradient takes the logits' memory."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    length = case.sequence_length
    batch = case.tokens // length

    def call(inputs: Inputs) -> Output:
        hidden = torch.nn.functional.pad(inputs.hidden.view(batch, length, -1), (0, 0, 0, 1))
        loss, *_ = triton_grpo_loss(
            hidden @ inputs.weight.T, inputs.old.view(batch, length), None,
            inputs.target.view(batch, length), inputs.advantage.view(batch, length)[:, 0],
            inputs.keep.view(batch, length).int(), temperature=1.0, beta=0.0, eps_low=CLIP,
            eps_high=CLIP, loss_type="dapo", reduce=True,
        )  # fmt: skip
        loss.backward()
        return output_of(loss, inputs)

    return call


def make_liger(chunk_size: int | None) -> Callable[[Case], Callable[[Inputs], Output]]:
    """`chunk_size` counts sequences; None takes the whole batch at once (its own vocabulary
    chunking then bounds the memory)."""

    def make(case: Case) -> Callable[[Inputs], Output]:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        length = case.sequence_length
        batch = case.tokens // length
        module = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, loss_type="dapo", epsilon_low=CLIP, epsilon_high=CLIP,
            chunk_size=chunk_size or batch, compiled=True,
        )  # fmt: skip

        def call(inputs: Inputs) -> Output:
            loss, _ = module(
                inputs.hidden.view(batch, length, -1),
                inputs.weight,
                inputs.target.view(batch, length),
                inputs.keep.view(batch, length).float(),
                inputs.advantage.view(batch, length)[:, 0],
                old_per_token_logps=inputs.old.view(batch, length),
            )
            loss.backward()
            return output_of(loss, inputs)

        return call

    return make


def make_trl(case: Case) -> Callable[[Inputs], Output]:
    """As `add_fused_lm_head` calls it: only the kept rows where Triton runs, all rows elsewhere."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    compact = case.device == "cuda" and case.kept_share < 1

    def call(inputs: Inputs) -> Output:
        rows = inputs.keep if compact else slice(None)
        logp, *_ = ChunkedLogProbFunction.apply(
            inputs.hidden[rows], inputs.weight, None, inputs.target[rows], 1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, (),
        )  # fmt: skip
        if compact:
            logp = torch.zeros_like(inputs.old).masked_scatter(inputs.keep, logp)
        loss = clip_loss(logp, inputs)
        loss.backward()
        return output_of(loss, inputs)

    return call
