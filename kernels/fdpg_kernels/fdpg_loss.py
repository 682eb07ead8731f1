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
    options: dict[str, Any] = dict(
        divergence=divergence, baseline=baseline, ratio=ratio, ratio_cap=ratio_cap, reward_cap=reward_cap
    )
    if choose_impl(impl) == "reference":
        head: dict[str, Any] = dict(bias=bias, temperature=temperature, softcap=softcap)
        return FDPGLoss(
            *reference.fdpg_loss(
                hidden, weight, target_ids, cu_seqlens, behavior_logprob, target_log_score, log_z, **head, **options
            )
        )

    kept = target_ids != IGNORED
    if not bool(kept.all()):
        (rows,) = kept.nonzero(as_tuple=True)
        kept_before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
        cu_seqlens = kept_before[cu_seqlens.long()]
        hidden, target_ids, behavior_logprob = hidden[rows], target_ids[rows], behavior_logprob[rows]
    sequences = (cu_seqlens, behavior_logprob, target_log_score, log_z)
    loss, weights = chunked.fdpg_loss(hidden, weight, target_ids, bias, temperature, softcap, *sequences, options)
    return FDPGLoss(loss, cast(weights, result_dtype(hidden)))
