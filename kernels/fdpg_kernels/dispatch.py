"""Which implementation runs an op."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .compiled import Nodes

IMPLEMENTATIONS = ("auto", "triton", "chunked", "reference")


def choose_impl(impl: str, tensor: Tensor, *, multiplies: bool = False) -> str:
    """`impl`, with "auto" resolved for an op on this tensor: Triton where it can run, else chunked PyTorch.

    multiplies: the op is a product with the head, which on a GPU takes bfloat16: float32 is left to cuBLAS.

    Raises:
        ValueError: there is no such implementation, or it cannot run here.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}; choose {', '.join(IMPLEMENTATIONS[:-1])} or reference")
    if impl not in ("auto", "triton"):
        return impl
    obstacle = _obstacle(tensor, multiplies)
    if impl == "triton" and obstacle:
        raise ValueError(f"impl='triton' {obstacle}; impl='chunked' runs everywhere")
    return "chunked" if obstacle or tensor.device.type == "cpu" and impl == "auto" else "triton"


def _obstacle(tensor: Tensor, multiplies: bool) -> str | None:
    """Why Triton cannot take this tensor."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return f"takes bfloat16 or float32, not {tensor.dtype}" if multiplies and tensor.itemsize > 4 else None
    if tensor.device.type != "cuda" or torch.version.cuda is None:
        return f"needs an NVIDIA GPU, not {tensor.device}"
    if torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if multiplies and tensor.dtype != torch.bfloat16:
        return f"takes bfloat16, not {tensor.dtype}"
    return None


def implementation(name: str) -> Any:
    """What holds the functions of an implementation; while torch.compile traces, each of them is one node."""
    if torch.compiler.is_compiling():
        return Nodes(name)
    return load(name)


def load(name: str) -> ModuleType:
    """The module of an implementation, imported when it is first used."""
    return importlib.import_module(".triton.launch" if name == "triton" else ".chunked", __package__)


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Under torch.autocast the tensors in its dtype, as torch's own matrix products take them."""
    device_type = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Inside an implementation every product has the dtype that it was written with."""
    return torch.autocast(tensor.device.type, enabled=False)
