"""Attention in a packed row by FlexAttention, for CUDA: one compiled kernel for every layout and kind.

It has been tested by its eager form on a CPU, forward and backward, and has not met a GPU yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .attention import Kind
from .rows import Row

BLOCK = 128  # tokens; rows are padded to a multiple, else every length would be compiled


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


def attend(
    row: Row, query: Tensor, key: Tensor, value: Tensor, kind: Kind, kernel: Callable[..., Tensor] | None = None
) -> Tensor:
    """[1, H, M, d], [1, K, M, d], [1, K, M, e] → [1, H, M, e]."""
    kernel = kernel or _compiled()
    block_mask = row.plan(_block_mask, kind.window, query.device)
    cap = None if kind.softcap is None else _capped(kind.softcap)
    out, aux = kernel(
        query,
        key,
        value,
        score_mod=cap,
        block_mask=block_mask,
        scale=kind.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if kind.sinks is None:
        return out
    # exp(lse) of exp(lse) + exp(sink) is the keys' share
    return out * torch.sigmoid(aux.lse - kind.sinks[:, None])[..., None].to(out.dtype)


@functools.cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    return lambda score, batch, head, query, key: softcap * torch.tanh(score / softcap)


def _block_mask(row: Row, window: int | None, device: torch.device) -> BlockMask:
    """Which blocks of keys a block of queries sees, in part or all; found from the ranges, without an [M, M] mask."""
    first, last = row.ranges(window)
    rows, size = torch.arange(row.num_tokens) // BLOCK, -(-row.num_tokens // BLOCK)
    # the blocks of keys that a query's ranges touch, and those that they cover
    touched = _count(rows, first // BLOCK, (last + BLOCK - 1) // BLOCK, first < last, size)
    inner = (first + BLOCK - 1) // BLOCK, last // BLOCK
    covered = _count(rows, *inner, inner[0] < inner[1], size)
    is_full = covered == BLOCK
    parts = [_listed(mask.to(device)) for mask in ((touched > 0) & ~is_full, is_full)]
    (prompt, own), (prompt_end, own_end) = first.to(device), last.to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_prompt = (key >= prompt[query]) & (key < prompt_end[query])
        return of_prompt | ((key >= own[query]) & (key < own_end[query]))

    length = (row.num_tokens, row.num_tokens)
    return BlockMask.from_kv_blocks(*parts[0], *parts[1], BLOCK, sees, seq_lengths=length)


def _count(rows: Tensor, begin: Tensor, end: Tensor, is_real: Tensor, size: int) -> Tensor:
    """How many tokens of each block have each block among their blocks begin … end, [size, size]."""
    steps = torch.zeros(size, size + 1, dtype=torch.int32)
    for starts, stops, real in zip(begin, end, is_real, strict=True):
        one = torch.ones(int(real.sum()), dtype=torch.int32)
        steps.index_put_((rows[real], starts[real]), one, accumulate=True)
        steps.index_put_((rows[real], stops[real]), -one, accumulate=True)
    return steps.cumsum(1)[:, :-1]


def _listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row how many columns are set, [1, 1, n], and which, before those that are not, [1, 1, n, n]; int32."""
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    return mask.sum(1).int()[None, None], order.int()[None, None]
