"""Float32 products on AMD processors with AVX-512, which the MKL inside PyTorch does not use there.

oneDNN, which PyTorch brings along and calls for bfloat16 only, does: on a Zen 5 it is twice as fast. On other
processors, for small products (MKL starts sooner), and for other dtypes everything here is plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST = 2**22  # multiplications of a product that is worth it
TILE_BYTES = 8 * 2**20  # of a product on its way to where it is added: oneDNN writes to new memory only


def _is_faster_here() -> bool:
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        "AMD" in found.get("cpu_name", "")
        and found.get("avx512_f", False)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


AVAILABLE = _is_faster_here()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """[M, K] @ [K, N]; no gradients."""
    return _product(a, b.T, None) if _suits(a, b.T) else torch.mm(a, b)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add [M, K] @ [K, N] to `total` [M, N], in place; no gradients."""
    if not _suits(a, b.T):
        total.addmm_(a, b)
        return
    rows = max(1, TILE_BYTES // (total.element_size() * total.shape[1]))
    for part, factor in zip(total.split(rows), a.split(rows), strict=True):
        part += _product(factor, b.T, None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`: [..., K], [N, K] and [N] → [..., N], with gradients."""
    if _suits(x, weight) and not torch.is_autocast_enabled("cpu"):
        return _Linear.apply(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        AVAILABLE
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= SMALLEST
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # [M, N]
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            matmul(rows, weight).view_as(x) if wants_x else None,
            matmul(rows.T, x.flatten(0, -2)) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )
