"""Activation offloading: what the backbone saves for its backward waits in host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

#: Smaller tensors stay where they are: a copy's latency costs more than they hold.
SMALLEST = 1 << 16
#: A tensor that is there already stays.
HOST = "cpu"


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """Inside, tensors that autograd saves move to pinned host memory, and back for the backward.

    Unlike `torch.autograd.graph.save_on_cpu`: parameters and views of them, which stay on the
    device anyway, are not copied, and a tensor that several ops save is copied once. Copies are in
    the order of the stream, so nothing waits for them on the host. With activation checkpointing
    inside, the layers' inputs are all that is saved.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._to_host, _to_device)
        self._parameters = _storages(model)
        # The weak reference keeps the storage's address from being given to another one.
        self._moved: dict[tuple[Any, ...], tuple[StorageWeakRef, Tensor]] = {}

    def stays(self, tensor: Tensor) -> bool:
        """Whether `tensor` is left on its device: small, a parameter's, or expanded."""
        if tensor.nbytes < SMALLEST or is_traceable_wrapper_subclass(tensor):
            return True
        storage = tensor.untyped_storage()
        return storage.nbytes() < tensor.nbytes or storage.data_ptr() in self._parameters

    def _to_host(self, tensor: Tensor) -> Any:
        if tensor.device.type == HOST or self.stays(tensor):
            return tensor
        ref = StorageWeakRef(tensor.untyped_storage())
        offset, shape, stride = tensor.storage_offset(), tensor.shape, tensor.stride()
        key = (ref.cdata, tensor._version, offset, shape, stride, tensor.dtype)
        if key not in self._moved:
            pin = tensor.is_cuda
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
            self._moved[key] = ref, host.copy_(tensor, non_blocking=pin)
        return tensor.device, self._moved[key][1]


def _to_device(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    device, host = saved
    return host.to(device, non_blocking=True)


def _storages(model: nn.Module) -> set[int]:
    plain = (p for p in model.parameters() if not is_traceable_wrapper_subclass(p))
    return {p.untyped_storage().data_ptr() for p in plain}


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> tuple[int, int]:
    """(bytes that `Offload` would move, bytes that would stay) of what `forward()` saves for its
    backward: each storage once, parameters left out. Measured on any device; nothing is moved."""
    rule, held = Offload(model), _storages(model)
    moved: dict[int, int] = {}
    kept: dict[int, int] = {}

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            (kept if rule.stays(tensor) else moved)[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        result = forward()  # alive until counted: an address must not be used twice
    del result
    return sum(moved.values()), sum(n for ptr, n in kept.items() if ptr not in moved)
