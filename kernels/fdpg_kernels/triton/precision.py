"""What the products multiply in place of each dtype, and the gradients' products themselves.

float16 is multiplied as it is by `gemm`, whose E has no room in float16's range: E and the gradients' products are
bfloat16. A float32 is the sum of two bfloat16, right to 2^-17 of itself, and x·w is multiplied as
x₀·w₀ + x₀·w₁ + x₁·w₀: three products on tensor cores, what is left out is 2^-17 of x·w (docs/kernels.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SPLIT_FLOAT32 = not INTERPRETED  # the interpreter multiplies float32 as it is
Summands = Tensor | Sequence[Tensor]  # one matrix or two
PAIRS = (0, 0), (0, 1), (1, 0)  # which summands are multiplied


def stored_as(dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """The dtype of E and of what it is multiplied with, and how many summands of it stand for one number."""
    if dtype == torch.float32 and SPLIT_FLOAT32:
        return torch.bfloat16, 2
    return (torch.bfloat16 if dtype == torch.float16 else dtype), 1


def summands(x: Tensor, stored: torch.dtype, count: int, width: int = 0) -> Tensor:
    """x [n, D] as [n, count, D or width], zeros where that is wider; x itself where it is stored as it is."""
    if stored == x.dtype:
        return x[:, None]
    made = torch.zeros(len(x), count, max(width, x.shape[1]), dtype=stored, device=x.device)
    high = made[:, 0, : x.shape[1]].copy_(x)
    if count == 2:
        torch.sub(x, high, out=made[:, 1, : x.shape[1]])
    return made


def as_two(summands: Tensor) -> tuple[Tensor | None, ...]:
    """One or two, for a kernel that takes two."""
    return (*summands, None)[:2]


class Operand:
    """A matrix [n, D] of the head's products, and as what it is multiplied.

    stored: see `stored_as`. width: of a summand where there are two.
    """

    def __init__(self, x: Tensor, stored: tuple[torch.dtype, int], width: int):
        self.x, self.stored, self.width = x, stored, width

    @cached_property
    def _summands(self) -> Tensor:  # made when they are first asked for, and kept
        return summands(self.x, *self.stored, self.width)

    @property
    def rows(self) -> Tensor:
        """What `gemm` multiplies, [n, D]; of float32 [n, 2·width]."""
        return self.x if self.stored[1] == 1 else self._summands.flatten(1)

    def matrices(self, rows: slice = slice(None)) -> Summands:
        """What the gradients' products multiply, [rows, D] each."""
        return self._summands[rows, :, : self.x.shape[1]].unbind(1)


def product(a: Summands, b: Summands) -> Tensor:
    """a·b of matrices given as summands, with float32 accumulation and result."""
    total: Tensor | None = None
    for left, right in _pairs(a, b):
        if total is None:
            total = _mm(left, right)
        else:
            accumulate(total, [left], [right], first=False)
    assert total is not None
    return total


def accumulate(into: Tensor, a: Summands, b: Summands, *, first: bool) -> None:
    """into += a·b, accumulated in float32; the first one writes."""
    for left, right in _pairs(a, b):
        if not left.is_cuda or into.dtype not in (left.dtype, torch.float32):
            made = _mm(left, right)
            into.copy_(made) if first else into.add_(made)
        elif first and into.dtype == left.dtype:
            _mm_into(into, left, right)
        elif first:
            torch.mm(left, right, out_dtype=torch.float32, out=into)
        else:
            torch.addmm(into, left, right, out_dtype=torch.float32, out=into)
        first = False


def _pairs(a: Summands, b: Summands) -> list[tuple[Tensor, Tensor]]:
    return [(a[i], b[j]) for i, j in PAIRS if i < len(a) and j < len(b)]


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _mm_into(into: Tensor, a: Tensor, b: Tensor) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False  # what a product is split into is summed in float32, too
    try:
        torch.mm(a, b, out=into)
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
