"""The ops on Triton: from tensors to launches.

Nothing here waits for the GPU, except where cu_seqlens lies there: chunks are cut on its values.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..chunked import sequence_groups
from ..divergences import Divergence
from ..reference import SequenceWeights
from . import weigh
from .head import Head
from .sequences import BLOCK, Law, Packing, to_device


def linear_logprob_forward(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """log-probs [N] and −lse [N] in log₂ units, which the backward anchors with."""
    with _on(hidden):
        head = Head(hidden, weight, target_ids, bias, temperature, softcap)
        target, anchor, top = head.target_logits(None)
        head.statistics(target, anchor, top, slice(0, head.num_tokens))
    return top, anchor


def linear_logprob_backward(
    gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    logprob: Tensor,
    anchor: Tensor,
    temperature: float,
    softcap: float | None,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; logits are formed again in row chunks."""
    with _on(hidden):
        head = Head(hidden, weight, target_ids, bias, temperature, softcap)
        hidden_grad = torch.empty_like(hidden) if wants[0] else None
        _allocate(head, wants[1], wants[2])
        # z_y is needed for the slope of the cap only
        target = head.target_logits(None)[0] if softcap is not None else logprob
        total = torch.ones_like(logprob)
        for chunk in head.chunks(0, head.num_tokens, head.chunk_rows):
            head.anchored(target, anchor, logprob, chunk, guard=False)
            head.gradients(chunk, target, logprob, total, gradient.contiguous(), hidden_grad)
    return hidden_grad, _like(head.weight_grad, weight), _like(head.bias_grad, bias)


def sequence_weights(
    policy: Tensor,
    behavior: Tensor,
    cu_seqlens: Tensor,
    score: Tensor,
    log_z: Tensor,
    *,
    divergence: Divergence,
    baseline: Tensor | float | None,
    ratio: str,
    ratio_cap: float | None,
    reward_cap: float | None,
) -> SequenceWeights:
    """One launch; float32, or float64 where the policy's log-probs are."""
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    law = Law(divergence, len(score), score, log_z, baseline, ratio, ratio_cap, reward_cap, dtype)
    with _on(policy):
        weigh.weigh_sequences[(len(score),)](
            policy.contiguous(),
            behavior.contiguous(),
            cu_seqlens.contiguous(),
            *law.tensors,
            len(score),
            *law.strides,
            BT=BLOCK,
            **law.constants,
        )
        return law.result(0, len(score))


def fdpg_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    cu_seqlens: Tensor,
    behavior: Tensor,
    score: Tensor,
    log_z: Tensor,
    total_sequences: int,
    weight_grad_out: Tensor | None,
    wants: tuple[bool, bool, bool],
    options: dict[str, Any],
) -> tuple[Tensor, SequenceWeights, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """loss, weights (float64), recomputed [B], and the gradients of hidden, weight and bias.

    Where no gradient is wanted the online kernel alone runs and nothing [C, V] is allocated. A sequence longer than a
    chunk is passed over twice: its weight is known when its logits are formed again.
    """
    ends = cu_seqlens.tolist()
    num_sequences, device = len(ends) - 1, hidden.device
    with _on(hidden):
        head = Head(hidden, weight, target_ids, bias, temperature, softcap)
        law = Law(score=score, log_z=log_z, num_sequences=num_sequences, dtype=torch.float64, **options)
        behavior = behavior.contiguous()
        hidden_grad = torch.empty_like(hidden) if wants[0] else None
        _allocate(head, wants[1], wants[2], weight_grad_out)
        packing = Packing(ends, device)
        training = any(wants)
        target, anchor, top = head.target_logits(behavior if training else None)
        logprob, total = head.per_token(), head.per_token()
        twice = []
        for first, last in sequence_groups(ends, head.chunk_rows):
            span = slice(ends[first], ends[last])
            fits = training and span.stop - span.start <= head.chunk_rows
            sums = None
            if fits and span.stop > span.start:
                sums = head.anchored(target, anchor, top, span, guard=True)
            elif span.stop > span.start:
                head.statistics(target, anchor, top, span)
            twice += [training and not fits] * (last - first)
            packing.finish(head, law, first, last, sums, span, top, behavior, logprob, total)
            if not training:
                continue
            law.overwrite_with_users(first, last)
            for chunk in head.chunks(span.start, span.stop, head.chunk_rows):
                if not fits:
                    head.anchored(target, anchor, top, chunk, guard=False)
                weight_of = law.results[5]
                head.gradients(chunk, target, top, total, weight_of, hidden_grad, packing.owner, total_sequences)
        if not training:
            law.overwrite_with_users(0, num_sequences)
        found = law.result(0, num_sequences)
        loss = (-(found.weight * found.policy_logprob).sum() / total_sequences).float()
    if weight_grad_out is not None:
        if head.weight_grad is not None and head.weight_grad is not weight_grad_out:
            weight_grad_out += head.weight_grad
        head.weight_grad = None
    recomputed = to_device(torch.tensor(twice, dtype=torch.bool), device)
    return loss, found, recomputed, hidden_grad, _like(head.weight_grad, weight), _like(head.bias_grad, bias)


def _allocate(head: Head, weight: bool, bias: bool, weight_grad_out: Tensor | None = None) -> None:
    if weight:
        head.weight_grad_is_empty = weight_grad_out is None or weight_grad_out.dtype != torch.float32
        head.weight_grad = weight_grad_out
        if head.weight_grad_is_empty:
            head.weight_grad = torch.empty(head.weight.shape, dtype=torch.float32, device=head.weight.device)
            if not head.num_tokens:
                head.weight_grad.zero_()
    if bias and head.bias is not None:
        head.bias_grad = torch.zeros(head.vocabulary, dtype=torch.float32, device=head.weight.device)


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch where the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
