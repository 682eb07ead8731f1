"""Log-probs of given ids, entropies and log-sum-exps of rows, with gradients: what the op is whoever calls it.

With π the softmax of a row's logits z, H its entropy, and g_k, g_l, g_H the gradients of a loss in the log-prob of id
y_k, in the log-sum-exp and in H:

    d loss/dz_v = π_v·(α + β·log π_v) + Σ_k g_k·[v = y_k],    α = g_l − Σ_k g_k − g_H·H,    β = −g_H.

So two numbers a row and one an id are all that a backward pass over the vocabulary needs, besides the log-sum-exp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Size, Tensor
from torch.autograd.function import once_differentiable

from . import operators, reference
from .arguments import IGNORED, Head, LogitGradients, Logprobs, is_ignored, to_device


class LinearLogprob(NamedTuple):
    """Log-probs and what is known of the distributions that they are of.

    Attributes:
        logprob: log π of each id, [...] or [..., K].
        entropy: −Σ π·log π of each row, nats, [...]; None where it was not asked for.
        lse: log Σ exp(logit) of each row, the logits after soft cap and temperature, [...]; None likewise.
    """

    logprob: Tensor
    entropy: Tensor | None
    lse: Tensor | None


def token_logprobs(hidden: Tensor, target_ids: Tensor, head: Head, with_entropy: bool, impl: str) -> Logprobs:
    """Of hidden states [N, D] and ids [N, K]; differentiable in hidden and the head's weight and bias."""
    if impl == "reference":
        return reference.linear_logprob(hidden, to_device(target_ids, hidden.device), head)
    if impl == "triton" and (live := _live(target_ids)) is not None:  # the chunked op packs rows itself
        rows = to_device(live, hidden.device)
        packed = token_logprobs(hidden[rows], target_ids[live], head.of_rows(rows), with_entropy, impl)
        spread = (x if x is None else x.new_zeros(len(hidden), *x.shape[1:]).index_copy(0, rows, x) for x in packed)
        return Logprobs(*spread)  # type: ignore[arg-type]
    target_ids = to_device(target_ids, hidden.device)
    made = _LinearLogprob.apply(hidden, head.weight, head.bias, target_ids, head[2:], with_entropy, impl)
    return Logprobs(*made)


def _live(target_ids: Tensor) -> Tensor | None:
    """Rows that have an id, [n]; None if all have one, or if asking would cost a wait for a GPU."""
    if target_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    ignored = is_ignored(target_ids)
    return (~ignored).nonzero()[:, 0] if bool(ignored.any()) else None


def as_asked(
    results: Logprobs, ids: Size, return_entropy: bool, return_lse: bool, leading: Size
) -> LinearLogprob | Tensor:
    """Results in the shape of the ids given, without what nobody asked for."""
    logprob = results.logprob.reshape(ids)
    if not (return_entropy or return_lse):
        return logprob
    entropy = results.entropy.reshape(leading) if return_entropy and results.entropy is not None else None
    return LinearLogprob(logprob, entropy, results.lse.reshape(leading).to(logprob) if return_lse else None)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, settings, with_entropy, impl):
        results = operators.linear_logprob(hidden, target_ids, Head(weight, bias, *settings), with_entropy, impl)
        ctx.save_for_backward(hidden, weight, bias, target_ids, *results)
        ctx.settings = settings, impl
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        hidden, weight, bias, target_ids, *made = ctx.saved_tensors
        (settings, impl), wants = ctx.settings, ctx.needs_input_grad[:3]
        head, results = Head(weight, bias, *settings), Logprobs(*made)
        given = _logit_gradients(target_ids, head, results, *upstream)
        gradients = operators.linear_logprob_backward(hidden, target_ids, head, results, given, wants, impl)
        return *gradients, *[None] * 4


def _logit_gradients(
    target_ids: Tensor, head: Head, results: Logprobs, g: Tensor | None, g_lse: Tensor | None, g_entropy: Tensor | None
) -> LogitGradients:
    """From gradients of log-probs [N, K], log-sum-exps and entropies [N], where there are any; see above."""
    at_target, alpha, beta = torch.zeros_like(results.logprob), results.logprob.new_zeros(len(results.lse)), None
    if g is not None:  # an id outside the vocabulary made its log-prob NaN, and so it makes its row's gradient
        at_target = torch.where(results.logprob.isnan(), torch.nan, g).masked_fill(target_ids == IGNORED, 0.0)
        alpha = -at_target.sum(1)
    ignored = is_ignored(target_ids)
    if g_lse is not None:
        alpha = alpha + g_lse.masked_fill(ignored, 0.0).to(alpha)
    if g_entropy is not None and results.entropy is not None:
        g_entropy = g_entropy.masked_fill(ignored, 0.0)
        alpha, beta = alpha - g_entropy * results.entropy, -g_entropy
    temperature = head.temperature if head.row_temperature is None else head.row_temperature
    per_id = temperature if head.row_temperature is None else head.row_temperature[:, None]
    return LogitGradients(at_target / per_id, alpha / temperature, None if beta is None else beta / temperature)
