"""Causal attention in a packed row by PyTorch's flash attention for CPUs, in two parts that are merged exactly.

Every text sees itself: texts of similar lengths are padded to one call. A completion sees its prompt too, and all
completions of a prompt are together one long query of its keys: none is copied. With lse the log-sum-exp of a query's
scores, lse = log Σ exp lse_p over its parts and out = Σ exp(lse_p − lse)·out_p. A flash backward pass computes its
weights exp(score − lse) and the product of out and its gradient itself, so that with the merged out and lse it gives
each part's exact gradients.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import Kind
from .rows import Row, Text

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


TOGETHER = 2048  # tokens of texts that are padded to one call


class Group(NamedTuple):
    """S texts that are padded to T tokens each, which see nothing but themselves."""

    shape: tuple[int, int]  # S, T
    padded: Tensor  # where in the row each token is, [S·T]; padding is its text's last token
    real: Tensor  # those that are no padding: where in the row, [n]
    places: Tensor  # and where among the S·T

    def pad(self, packed: Tensor) -> Tensor:
        """[M, H, …] → [S, H, T, …]."""
        return packed.index_select(0, self.padded).unflatten(0, self.shape).transpose(1, 2)

    def pad_with_zeros(self, packed: Tensor) -> Tensor:
        """The same, with zeros for padding."""
        zeros = packed.new_zeros(len(self.padded), *packed.shape[1:])
        zeros.index_copy_(0, self.places, packed.index_select(0, self.real))
        return zeros.unflatten(0, self.shape).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """[S, H, T, …] → [n, H, …]."""
        return padded.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


class Plan(NamedTuple):
    groups: list[Group]
    shared: list[tuple[slice, slice]]  # the tokens of all completions of a prompt, and of the prompt


def attend(row: Row, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
    """[H, M, d] and [K, M, d] twice → [H, M, d]; of the kind only the scale is used."""
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # as models have them in memory
    return _Parts.apply(query, key, value, row.plan(_plan), kind.scale).transpose(0, 1)  # type: ignore[no-any-return]


def _plan(row: Row) -> Plan:
    texts = sorted((text for text in row.texts if text.length), key=lambda text: -text.length)
    groups: list[list[Text]] = []
    for text in texts:
        longest = groups[-1][0].length if groups else 0
        # padding costs work, as a call of its own does; together they stay few, for they are copied
        is_alike = longest - text.length <= max(32, longest // 4)
        if groups and is_alike and (len(groups[-1]) + 1) * longest <= TOGETHER:
            groups[-1].append(text)
        else:
            groups.append([text])
    completions = (text for text in row.texts if text.before and text.length)
    runs = [list(run) for _, run in itertools.groupby(completions, lambda text: text.prompt)]
    return Plan(
        [_group(texts) for texts in groups], [(slice(run[0].start, run[-1].stop), run[0].prompt) for run in runs]
    )


def _group(texts: list[Text]) -> Group:
    starts, lengths = (
        torch.tensor(column)[:, None] for column in zip(*((t.start, t.length) for t in texts), strict=True)
    )
    shape = (len(texts), texts[0].length)
    column = torch.arange(shape[1])
    padded = (starts + torch.minimum(column, lengths - 1)).flatten()
    places = (column < lengths).flatten().nonzero()[:, 0]
    return Group(shape, padded, padded[places], places)


class _Parts(torch.autograd.Function):
    """[M, H, d] and [M, K, d] twice → [M, H, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        out = query.new_empty(query.shape)
        lse = query.new_empty(query.shape[:2], dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
        for group in plan.groups:
            q, k, v = group.pad(query), *(_repeat(group.pad(x), repeats) for x in (key, value))
            own, own_lse = _forward(q, k, v, 0.0, True, scale=scale)
            out.index_copy_(0, group.real, group.unpad(own))
            lse.index_copy_(0, group.real, group.unpad(own_lse))
        for tokens, prompt in plan.shared:
            q, k, v = _of_prompt(query, key, value, tokens, prompt)
            shared, shared_lse = (_packed(x) for x in _forward(q, k, v, 0.0, False, scale=scale))
            own, own_lse = out[tokens], lse[tokens]
            share = torch.sigmoid(shared_lse - own_lse)[..., None]
            out[tokens] = torch.lerp(own.to(lse.dtype), shared.to(lse.dtype), share).to(out.dtype)
            lse[tokens] = torch.logaddexp(own_lse, shared_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        key_heads = key.shape[1]
        repeats = query.shape[1] // key_heads
        grads = [x.new_empty(x.shape) for x in (query, key, value)]
        for group in ctx.plan.groups:
            upstream = group.pad_with_zeros(gradient)  # nothing comes from padding
            q, k, v = group.pad(query), *(_repeat(group.pad(x), repeats) for x in (key, value))
            log_sum = group.pad(lse).contiguous()
            own = _backward(upstream, q, k, v, group.pad(out), log_sum, 0.0, True, scale=ctx.scale)
            for grad, part in zip(grads, own, strict=True):
                heads = part if part.shape[1] == grad.shape[1] else part.unflatten(1, (key_heads, repeats)).sum(2)
                grad.index_copy_(0, group.real, group.unpad(heads))
        for tokens, prompt in ctx.plan.shared:
            q, k, v = _of_prompt(query, key, value, tokens, prompt)
            upstream, o, log_sum = (_by_key_head(x[tokens], key_heads) for x in (gradient, out, lse))
            shared = _backward(upstream, q, k, v, o, log_sum.contiguous(), 0.0, False, scale=ctx.scale)
            grads[0][tokens] += _packed(shared[0])
            grads[1][prompt] += shared[1].sum(1).transpose(0, 1)
            grads[2][prompt] += shared[2].sum(1).transpose(0, 1)
        return (*grads, None, None)


def _repeat(keys: Tensor, repeats: int) -> Tensor:
    """[S, K, T, d] → [S, H, T, d], a key head for each query head."""
    return keys if repeats == 1 else keys.repeat_interleave(repeats, dim=1)


def _by_key_head(packed: Tensor, key_heads: int) -> Tensor:
    """[n, H, …] → [K, H/K, n, …]."""
    return packed.unflatten(1, (key_heads, -1)).movedim(0, 2)


def _packed(by_key_head: Tensor) -> Tensor:
    """[K, H/K, n, …] → [n, H, …]."""
    return by_key_head.movedim(2, 0).flatten(1, 2)


def _of_prompt(query: Tensor, key: Tensor, value: Tensor, tokens: slice, prompt: slice) -> tuple[Tensor, ...]:
    """Completions' queries and their prompt's keys: [K, H/K, n, d], [K, H/K, P, d] twice, of which none is a copy."""
    q = _by_key_head(query[tokens], key.shape[1])
    k, v = (x[prompt].transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for x in (key, value))
    return q, k, v
