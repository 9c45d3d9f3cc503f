"""AdamW on fp32 masters of a model that lives in its compute dtype."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyrl.trainer.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """lr * warm-up * shape at `step` in 1 … `steps`; a pure function, so resuming needs no state.

    Warm-up: step / (warmup_steps + 1) up to warmup_steps. Then, with t in [0, 1) over the rest:
    constant 1; linear 1 - t; cosine (1 + cos(pi t)) / 2; both towards `final_lr_share`.
    """
    if step <= config.warmup_steps:
        return config.lr * step / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    t = (step - 1 - config.warmup_steps) / max(1, steps - config.warmup_steps)
    shape = 1 - t if config.schedule == "linear" else (1 + math.cos(math.pi * t)) / 2
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * shape)


class MasterAdamW:
    """p32 <- AdamW(p32, sum over micro-batches of grad.float()), p <- p32.to(p.dtype).

    A parameter in fp32 is its own master. Any other has an fp32 copy; its gradient is added to
    the copy's as soon as autograd has finished it, and freed, so low-precision gradients never
    live side by side, and those of different backward passes add up in fp32. Parameters that share
    storage (a tied head) are one parameter here, as in `model.named_parameters()`; the two parts
    of its gradient are added by autograd, within a pass and in the parameter's dtype.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.max_grad_norm = config.max_grad_norm
        self._model = model
        self._params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        for name, param in self._params.items():
            if param.dtype == torch.float32:
                self.masters[name] = param
            else:
                self.masters[name] = param.detach().float()
                param.register_post_accumulate_grad_hook(_moved_to(self.masters[name]))
        decayed = [m for m in self.masters.values() if m.ndim >= 2]
        others = [m for m in self.masters.values() if m.ndim < 2]  # norms and biases
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(master.numel() for master in self.masters.values())

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clips, updates, frees the gradients. Returns the gradient norm before clipping.

        Where the norm is not finite nothing is updated: one bad batch would ruin the moments.
        """
        grads = [m.grad for m in self.masters.values() if m.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
        if grads and math.isfinite(norm):
            if 0 < self.max_grad_norm < norm:
                torch._foreach_mul_(grads, self.max_grad_norm / norm)
            for group in self._adam.param_groups:
                group["lr"] = lr
            self._adam.step()
            self._publish()
        del grads
        self.discard_gradients()
        return norm

    def discard_gradients(self) -> None:
        """Frees them."""
        self._adam.zero_grad(set_to_none=True)

    def reset(self) -> None:
        """Forgets the moments; the masters stay."""
        self._adam.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Masters by name and AdamW's state; references, not copies."""
        masters = {name: master.detach() for name, master in self.masters.items()}
        return {"masters": masters, "adam": self._adam.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bit-exact restoration. ValueError names a parameter that differs in name or shape."""
        for name in self.masters.keys() ^ state["masters"].keys():
            raise ValueError(f"checkpoint and model disagree about the parameter {name!r}")
        for name, master in self.masters.items():
            saved = state["masters"][name]
            if saved.shape != master.shape:
                shapes = f"{tuple(saved.shape)}, the model {tuple(master.shape)}"
                raise ValueError(f"{name}: the checkpoint has {shapes}")
            master.copy_(saved)
        self._adam.load_state_dict(state["adam"])
        self._publish()

    @contextlib.contextmanager
    def exact(self, wanted: bool = True) -> Iterator[None]:
        """While it lasts (and if `wanted`) the model's parameters are the fp32 masters."""
        stand_ins = {
            id(param): nn.Parameter(self.masters[name].detach(), requires_grad=False)
            for name, param in self._params.items()
            if wanted and self.masters[name] is not param
        }
        swapped = [
            (module, key, param)
            for module in self._model.modules()
            for key, param in module._parameters.items()  # a tied parameter in every place
            if id(param) in stand_ins
        ]
        for module, key, param in swapped:
            module._parameters[key] = stand_ins[id(param)]
        try:
            yield
        finally:
            for module, key, param in swapped:
                module._parameters[key] = param

    def _publish(self) -> None:
        for name, param in self._params.items():
            if self.masters[name] is not param:
                param.detach().copy_(self.masters[name])


def _moved_to(master: Tensor) -> Any:
    def move(param: Tensor) -> None:
        assert param.grad is not None
        if master.grad is None:
            master.grad = param.grad.float()
        else:
            master.grad.add_(param.grad)
        param.grad = None

    return move
