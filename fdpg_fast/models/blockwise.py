"""Attention in a packed row in plain PyTorch, of any kind: a block of queries at a time, and the keys that it can see.

Weights are computed again in the backward pass, so that memory is linear in tokens. Half precision is computed in
float32: scores of bfloat16 would be off by tenths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Kind
from .rows import Row

BLOCK = 128  # queries


class Block(NamedTuple):
    queries: slice
    keys: list[slice]  # stretches of the row, from the first key that one of the queries sees to the last
    hidden: list[tuple[slice, Tensor]]  # columns, of all those keys, that not all see, and which do not; [n, columns]


def attend(row: Row, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
    """[H, M, d], [K, M, d], [K, M, e] → [H, M, e]."""
    plan = row.plan(_blocks, kind.window, query.device)
    return _Blockwise.apply(query, key, value, kind.sinks, plan, kind)  # type: ignore[no-any-return]


def _blocks(row: Row, window: int | None, device: torch.device) -> list[Block]:
    """Blocks of queries that cover the row, and do not mix long texts, nor texts of different long prompts."""
    edges, prompt = {0, row.num_tokens}, slice(0, 0)
    for text in row.texts:
        if text.length >= BLOCK:
            edges |= {text.start, text.stop}
        elif text.prompt != prompt and text.before >= BLOCK:
            edges.add(text.start)
        prompt = text.prompt
    bounds = sorted(edges)
    cuts = [place for start, stop in zip(bounds, bounds[1:], strict=False) for place in range(start, stop, BLOCK)]
    first, last = row.ranges(window)
    return [
        _block(slice(start, stop), first, last, device)
        for start, stop in zip(cuts, [*cuts[1:], row.num_tokens], strict=True)
    ]


def _block(queries: slice, first: Tensor, last: Tensor, device: torch.device) -> Block:
    keys: list[slice] = []
    hidden: list[tuple[slice, Tensor]] = []
    column = 0
    for lows, highs in zip(first[:, queries], last[:, queries], strict=True):  # of prompts, of the texts themselves
        if not (sees := lows < highs).any():
            continue
        stretch = slice(int(lows[sees].min()), int(highs[sees].max()))
        start, stop = (int(lows.max()), int(highs.min())) if sees.all() else (0, 0)  # of what all see
        parts = [(stretch.start, start), (stop, stretch.stop)] if start < stop else [(stretch.start, stretch.stop)]
        for low, high in parts:
            if low < high:
                place = torch.arange(low, high)
                is_hidden = (place < lows[:, None]) | (place >= highs[:, None])
                shift = column - stretch.start
                hidden.append((slice(low + shift, high + shift), is_hidden.to(device)))
        keys.append(stretch)
        column += stretch.stop - stretch.start
    return Block(queries, keys, hidden)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, plan: Any, kind: Kind
    ) -> Any:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.plan, ctx.kind = plan, kind._replace(sinks=None)  # they are an input
        out = query.new_empty(*query.shape[:2], value.shape[2])
        query, key, value, sinks = _exact(query, key, value, sinks)
        for block in plan:
            q, keys, values = _of_block(block, query * kind.scale, key, value)
            weights, _ = _weights(block, q, keys, sinks, kind.softcap)
            out[:, block.queries] = (weights[..., : keys.shape[1]] @ values).view(len(out), -1, out.shape[2])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # read once: a block that runs again has them for one reading
        query, key, value, sinks = _exact(*inputs)
        query_grad, key_grad, value_grad = (torch.zeros_like(x) for x in (query, key, value))
        sinks_grad = None if sinks is None else torch.zeros_like(sinks)
        query, gradient = query * ctx.kind.scale, gradient.to(query.dtype)
        for block in ctx.plan:
            q, keys, values = _of_block(block, query, key, value)
            weights, slope = _weights(block, q, keys, sinks, ctx.kind.softcap)
            upstream = gradient[:, block.queries].reshape(len(key), -1, gradient.shape[2])
            of_weights = upstream @ values.transpose(1, 2)
            if sinks_grad is not None:
                of_weights = F.pad(of_weights, (0, 1))  # the value of a sink is 0
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, 2, weights.dtype)
            if sinks_grad is not None:
                sinks_grad += of_scores[..., -1].reshape(len(sinks_grad), -1).sum(1)
                of_scores, weights = of_scores[..., :-1], weights[..., :-1]
            if slope is not None:
                of_scores = of_scores * slope
            query_grad[:, block.queries] = (of_scores @ keys).view(len(query), -1, query.shape[2]) * ctx.kind.scale
            columns = [stretch.stop - stretch.start for stretch in block.keys]
            for stretch, scores, seen in zip(
                block.keys, *(x.split(columns, 2) for x in (of_scores, weights)), strict=True
            ):
                key_grad[:, stretch].baddbmm_(scores.transpose(1, 2), q)
                value_grad[:, stretch].baddbmm_(seen.transpose(1, 2), upstream)
        grads = (query_grad, key_grad, value_grad, sinks_grad)
        return (*(x if x is None else x.to(y.dtype) for x, y in zip(grads, inputs, strict=True)), None, None)


def _exact(*tensors: Tensor | None) -> Any:
    return (x if x is None or x.dtype in (torch.float32, torch.float64) else x.float() for x in tensors)


def _of_block(block: Block, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [K, H/K·n, d] and the keys and values that they may see, [K, c, …]."""
    keys, values = (torch.cat([x[:, stretch] for stretch in block.keys], dim=1) for x in (key, value))
    return query[:, block.queries].reshape(len(key), -1, query.shape[2]), keys, values


def _weights(
    block: Block, query: Tensor, keys: Tensor, sinks: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Weights of the keys, and of the sinks behind them, [K, H/K·n, c (+ 1)]; the slope of the cap at each score."""
    scores, slope = query @ keys.transpose(1, 2), None
    if softcap is not None:
        capped = scores.div_(softcap).tanh_()
        slope = 1 - capped * capped
        scores = capped * softcap
    by_query = scores.view(len(keys), -1, block.queries.stop - block.queries.start, scores.shape[2])
    for columns, is_hidden in block.hidden:
        by_query[..., columns].masked_fill_(is_hidden, float("-inf"))
    if sinks is not None:
        of_sinks = sinks.view(len(keys), -1, 1).expand(-1, -1, by_query.shape[2]).reshape(len(keys), -1, 1)
        scores = torch.cat([scores, of_sinks], dim=2)
    return scores.softmax(2), slope
