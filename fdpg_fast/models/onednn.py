"""Float32 products on AMD processors with AVX-512, which the MKL inside PyTorch does not use there: oneDNN does.

PyTorch brings oneDNN along and calls it for bfloat16 only; the private op used here is that of torch 2.13, and where it
is missing everything is plain PyTorch. Who deletes this file deletes two lines of load.py and takes `linear` from
torch.nn.functional in head.py.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def _is_faster_here() -> bool:
    cpu: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has_product = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_product and "AMD" in cpu.get("cpu_name", "") and cpu.get("avx512_f", False)


IS_FASTER = _is_faster_here()
SMALLEST = 2**22  # multiplications of a product that is worth it: MKL starts sooner


def speed_up(model: PreTrainedModel) -> None:
    """Change how a model's linear layers on a CPU multiply, in place; nothing else about them."""
    for module in model.modules() if IS_FASTER and model.device.type == "cpu" else ():
        if type(module) in (nn.Linear, Conv1D):
            module.forward = MethodType(_layer, module)  # type: ignore[method-assign]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`: [..., K], [N, K] and [N] → [..., N], with gradients."""
    is_plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in (x, weight))
    if IS_FASTER and is_plain and x.numel() * len(weight) >= SMALLEST and not torch.is_autocast_enabled("cpu"):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _layer(module: Any, x: Tensor) -> Tensor:
    return linear(x, module.weight.T if isinstance(module, Conv1D) else module.weight, module.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(_padded(x), weight, bias)[: x[..., 0].numel()].view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, (wants_x, wants_weight, wants_bias) = _padded(gradient), ctx.needs_input_grad
        return (
            _product(rows, weight.T)[: x[..., 0].numel()].view_as(x) if wants_x else None,
            _product(rows.T, _padded(x).T) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def _padded(x: Tensor) -> Tensor:
    """[..., K] → [M, K] and up to an eighth more rows: oneDNN keeps code for every M that it ever saw, 1 MB each."""
    rows = x.flatten(0, -2)
    step = max(16, 2 ** (len(rows).bit_length() - 1) // 8)
    return F.pad(rows, (0, 0, 0, -len(rows) % step)) if len(rows) % step else rows


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
