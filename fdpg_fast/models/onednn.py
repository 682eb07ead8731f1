"""Float32 products on AMD processors, where the MKL inside PyTorch is slow: it uses AVX2 there and no AVX-512.

oneDNN, which PyTorch brings along and calls for bfloat16 only, is twice as fast on a Zen 5 and an eighth faster where
AVX2 is all there is. On other processors, for small products (MKL starts sooner), and for other dtypes everything
here is plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST = 2**22  # multiplications of a product that is worth it
TILE_BYTES = 8 * 2**20  # of a product on its way to where it is added: oneDNN writes to new memory only


def _is_faster_here(instructions: str) -> bool:
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        "AMD" in found.get("cpu_name", "")
        and found.get(instructions, False)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


AVAILABLE = _is_faster_here("avx2")
SUITS_LAYERS = _is_faster_here("avx512_f")  # an eighth less is spent again on the padding of a small layer's rows


def matmul(rows: Tensor, b: Tensor) -> Tensor:
    """[M, K] @ [K, N]; no gradients."""
    return _product(rows, b.T, None) if _suits(rows, b.T) else torch.mm(rows, b)


def add_matmul(total: Tensor, rows: Tensor, b: Tensor) -> None:
    """Add [M, K] @ [K, N] to `total` [M, N], in place; no gradients."""
    if _suits(rows, b.T):
        total += _product(rows, b.T, None)
    else:
        total.addmm_(rows, b)


def add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the sum over rows of their outer products, [M, N]ᵀ @ [M, K], to `total` [N, K], in place; no gradients."""
    if not _suits(left, right.T):
        total.addmm_(left.T, right)
        return
    size = max(1, TILE_BYTES // (total.element_size() * total.shape[1]))
    right = _padded(right)
    for part, columns in zip(total.split(size), left.split(size, dim=1), strict=True):
        part += _call(_padded(columns).T, right.T, None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`: [..., K], [N, K] and [N] → [..., N], with gradients."""
    if _suits(x, weight) and not torch.is_autocast_enabled("cpu"):
        return _Linear.apply(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def pad_rows(rows: Tensor, weight: Tensor, value: float = 0.0) -> Tensor:
    """[M, …] and up to an eighth more, where products with this weight are oneDNN's.

    It keeps code for every number of rows that it ever saw, 1 MB each. The products above pad by themselves; who
    multiplies the same rows more than once does it before.
    """
    return _padded(rows, value) if AVAILABLE and _is_plain(weight) else rows


def _padded(rows: Tensor, value: float = 0.0) -> Tensor:
    step = max(16, 2 ** (len(rows).bit_length() - 1) // 8)
    missing = -len(rows) % step
    return torch.nn.functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing), value=value) if missing else rows


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _suits(x: Tensor, weight: Tensor) -> bool:
    return AVAILABLE and _is_plain(x) and _is_plain(weight) and x.numel() * len(weight) >= SMALLEST


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _call(_padded(rows), weight, bias)[: len(rows)]


def _call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = _padded(gradient.flatten(0, -2))  # [M, N]
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _call(rows, weight.T, None)[: x[..., 0].numel()].view_as(x) if wants_x else None,
            _call(rows.T, _padded(x.flatten(0, -2)).T, None) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )
