"""The f-DPG loss from hidden states: log-probs, ratios, weights and gradients in one pass over the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import chunked, divergences, reference
from .divergences import Divergence
from .linear_logprob import check_head
from .reference import IGNORED, SequenceWeights
from .sequence_weights import (
    cast,
    check_options,
    check_packing,
    check_support,
    choose_impl,
    result_dtype,
)


class FDPGLoss(NamedTuple):
    """loss: mean over sequences of −weight·log π, []; weights: what it was made of, detached."""

    loss: Tensor
    weights: SequenceWeights


def fdpg_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    cu_seqlens: Tensor,
    behavior_logprob: Tensor,
    target_log_score: Tensor,
    log_z: Tensor | float,
    *,
    divergence: str | Divergence = "jensen_shannon",
    baseline: Tensor | float | None = None,
    ratio: str = "sequence",
    ratio_cap: float | None = None,
    reward_cap: float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    total_sequences: int | None = None,
    weight_grad_out: Tensor | None = None,
    impl: str = "auto",
) -> FDPGLoss:
    """A loss whose gradient is the f-DPG estimate of ∇D_f(π‖p) (Go et al. 2023, theorem 1).

    The gradients of hidden, weight and bias are formed inside the forward pass, chunk by chunk on sequence
    boundaries, so a sequence's weight is known before the head's gradient is; `backward` only scales them.
    Under `torch.no_grad` none is formed.

    Args:
        hidden, weight, target_ids, bias, temperature, softcap: as in `linear_logprob`.
        cu_seqlens, target_log_score, log_z, divergence, baseline, ratio, ratio_cap, reward_cap:
            as in `sequence_weights`.
        behavior_logprob: log q of each token under its sampler, [N]; not read where target_ids is -100.
        total_sequences: of the batch that this one is a part of: what the sum over sequences is divided by, B
            where it is None. Losses of parts then add up to the loss of the whole.
        weight_grad_out: the gradient of this loss in weight is added to it, [V, D] in float32 (float64 for float64
            inputs) or weight's dtype, inside the forward pass; weight itself then gets none, and no second
            [V, D] matrix is made. The loss must be given to `backward` as it is, unscaled.
        impl: "auto" | "chunked" | "reference".

    Returns:
        FDPGLoss(loss [] float32, weights), float64 for float64 inputs and from the reference; the loss is
        differentiable once in hidden, weight and bias.

    Raises:
        ValueError: see `linear_logprob` and `sequence_weights`.
    """
    divergence, log_z = divergences.get(divergence), torch.as_tensor(log_z)
    check_head(hidden, weight, target_ids, bias, temperature, softcap)
    check_packing(target_ids, behavior_logprob, cu_seqlens, target_log_score, log_z, baseline)
    check_options(ratio, ratio_cap, reward_cap)
    check_support(divergence, target_log_score)
    total_sequences = len(cu_seqlens) - 1 if total_sequences is None else total_sequences
    check_accumulation(weight, total_sequences, weight_grad_out)
    options: dict[str, Any] = dict(
        divergence=divergence, baseline=baseline, ratio=ratio, ratio_cap=ratio_cap, reward_cap=reward_cap
    )
    if choose_impl(impl) == "reference":
        settings: dict[str, Any] = dict(
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            total_sequences=total_sequences,
            weight_grad_out=weight_grad_out,
        )
        return FDPGLoss(
            *reference.fdpg_loss(
                hidden, weight, target_ids, cu_seqlens, behavior_logprob, target_log_score, log_z, **settings, **options
            )
        )

    kept = target_ids != IGNORED
    if not bool(kept.all()):
        (rows,) = kept.nonzero(as_tuple=True)
        kept_before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
        cu_seqlens = kept_before[cu_seqlens.long()]
        hidden, target_ids, behavior_logprob = hidden[rows], target_ids[rows], behavior_logprob[rows]
    loss, weights = chunked.fdpg_loss(
        hidden,
        weight,
        target_ids,
        bias,
        temperature,
        softcap,
        cu_seqlens,
        behavior_logprob,
        target_log_score,
        log_z,
        total_sequences,
        weight_grad_out,
        options,
    )
    return FDPGLoss(loss, cast(weights, result_dtype(hidden)))


def check_accumulation(weight: Tensor, total_sequences: int, weight_grad_out: Tensor | None) -> None:
    if total_sequences < 1:
        raise ValueError(f"total_sequences={total_sequences}; it must be a positive number, or None for B")
    if weight_grad_out is None:
        return
    if weight_grad_out.shape != weight.shape or weight_grad_out.device != weight.device:
        raise ValueError(
            f"weight_grad_out must be {tuple(weight.shape)} on {weight.device}, as weight is; "
            f"got {tuple(weight_grad_out.shape)} on {weight_grad_out.device}"
        )
    if weight_grad_out.dtype not in (result_dtype(weight), weight.dtype) or weight_grad_out.requires_grad:
        raise ValueError(
            f"weight_grad_out must be a {result_dtype(weight)} or {weight.dtype} tensor without requires_grad; "
            f"got {weight_grad_out.dtype}"
        )
