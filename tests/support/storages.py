"""Exact memory of a computation on the CPU: every storage that an operation makes is watched until it is freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdpg_kernels import operators


class Watch(TorchDispatchMode):
    """A dispatch mode that sees inside our operators, each of which is one call to a mode."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fdpg_kernels":
            with self:
                return operators.KERNELS[func.overloadpacket.__name__](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.see(func, args, result)
        return result

    def see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """An operation of PyTorch that has run."""


class Storages(Watch):
    """When which storage was made and freed, and its bytes. What an operation allocates inside itself is not seen."""

    def __init__(self, *callers: torch.Tensor):
        super().__init__()
        self._callers = {x.untyped_storage()._cdata for x in callers}
        self._alive: dict[int, int] = {}  # address: index of its birth
        self._watches: list[weakref.ref] = []
        self.sizes: list[int] = []
        self.events: list[tuple[int, int]] = []  # index, +1 made or -1 freed

    def see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._watch(x.untyped_storage())

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address, index = storage._cdata, len(self.sizes)
        if address in self._callers or address in self._alive:
            return

        def freed(_: Any) -> None:
            self.events.append((index, -1))
            del self._alive[address]

        self._alive[address] = index
        self._watches.append(weakref.ref(storage, freed))
        self.sizes.append(storage.nbytes())
        self.events.append((index, 1))

    @property
    def alive(self) -> int:
        """Bytes alive now."""
        return sum(sign * self.sizes[index] for index, sign in self.events)

    def peak(self, *without: torch.Tensor) -> int:
        """Most bytes alive at once, the storages of these tensors left out."""
        left_out = {self._alive.get(x.untyped_storage()._cdata) for x in without}
        alive = peak = 0
        for index, sign in self.events:
            alive += 0 if index in left_out else sign * self.sizes[index]
            peak = max(peak, alive)
        return peak


class MultiplyAdds(Watch):
    """Multiply-adds of the matrix products run under it."""

    count = 0

    def see(self, func, args, result):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.matmul, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.count += left.numel() * right.shape[1]


def extra_memory(step: Callable[[], tuple[torch.Tensor, ...]], inputs: list[torch.Tensor]) -> dict[str, int]:
    """Peak bytes beyond the inputs and what the step returns, and the bytes of the largest single tensor."""
    with Storages(*inputs) as seen:
        returned = step()
    return dict(peak_extra_bytes=seen.peak(*returned), largest_tensor_bytes=max(seen.sizes))
