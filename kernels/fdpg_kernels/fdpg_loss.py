"""The f-DPG loss from hidden states: log-probs, ratios, weights and gradients in one pass over the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import divergences, reference
from .dispatch import cast_for_autocast, choose_impl, implementation, without_autocast
from .divergences import Divergence
from .linear_logprob import check_head
from .reference import SequenceWeights
from .sequence_weights import cast, check_options, check_packing, check_support, result_dtype


class FDPGLoss(NamedTuple):
    """A loss and what it was made of.

    Attributes:
        loss: mean over sequences of −weight·log π, [].
        weights: of each sequence, detached.
        recomputed: whether a sequence's logits were formed twice, because it is longer than a chunk, [B] bool.
    """

    loss: Tensor
    weights: SequenceWeights
    recomputed: Tensor


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
            as in `sequence_weights`; chunks are cut on cu_seqlens, so leave it on the CPU: a GPU would be waited for.
        behavior_logprob: log q of each token under its sampler, [N]; not read where target_ids is -100.
        total_sequences: of the batch that this one is a part of: what the sum over sequences is divided by, B
            where it is None. Losses of parts then add up to the loss of the whole.
        weight_grad_out: the gradient of this loss in weight is added to it, [V, D] in float32 (float64 for float64
            inputs) or weight's dtype, inside the forward pass; weight itself then gets none, and no second
            [V, D] matrix is made. The loss must be given to `backward` as it is, unscaled.
        impl: "auto" | "triton" | "chunked" | "reference". Triton multiplies three times where it can, and four times
            for a sequence longer than 4,096 tokens (fewer for a vocabulary above 131,072), see `recomputed`.

    Returns:
        FDPGLoss(loss [] float32, weights, recomputed), float64 for float64 inputs and from the reference; the loss is
        differentiable once in hidden, weight and bias.

    Raises:
        ValueError: see `linear_logprob` and `sequence_weights`.
    """
    law: Divergence = divergences.get(divergence)
    log_z = torch.as_tensor(log_z)
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    check_head(hidden, weight, target_ids, bias, temperature, softcap)
    check_packing(target_ids, behavior_logprob, cu_seqlens, target_log_score, log_z, baseline)
    check_options(ratio, ratio_cap, reward_cap)
    check_support(law, target_log_score)
    total_sequences = len(cu_seqlens) - 1 if total_sequences is None else total_sequences
    check_accumulation(weight, total_sequences, weight_grad_out)
    options: dict[str, Any] = dict(
        divergence=law, baseline=baseline, ratio=ratio, ratio_cap=ratio_cap, reward_cap=reward_cap
    )
    impl = choose_impl(impl, hidden, multiplies=True)
    if impl == "reference":
        settings: dict[str, Any] = dict(
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            total_sequences=total_sequences,
            weight_grad_out=weight_grad_out,
        )
        loss, weights = reference.fdpg_loss(
            hidden, weight, target_ids, cu_seqlens, behavior_logprob, target_log_score, log_z, **settings, **options
        )
        return FDPGLoss(loss, weights, torch.zeros_like(weights.clipped))
    if weight_grad_out is not None:
        weight = weight.detach()  # its gradient goes to weight_grad_out alone
    sequences = (cu_seqlens, behavior_logprob.detach(), target_log_score.detach(), log_z.detach())
    settings = options | dict(with_grad=torch.is_grad_enabled(), impl=impl)
    loss, recomputed, *weights = _FDPGLoss.apply(
        hidden, weight, bias, target_ids, temperature, softcap, *sequences, total_sequences, weight_grad_out, settings
    )
    return FDPGLoss(loss, cast(SequenceWeights(*weights), result_dtype(hidden)), recomputed)


class _FDPGLoss(torch.autograd.Function):
    """Gradients are formed in the forward pass: the upstream gradient of a loss is one scalar."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, temperature, softcap, *rest):
        *sequences, total_sequences, weight_grad_out, settings = rest
        options = dict(settings)
        with_grad, impl = options.pop("with_grad"), options.pop("impl")
        needs = ctx.needs_input_grad
        wants = tuple(with_grad and need for need in (needs[0], needs[1] or weight_grad_out is not None, needs[2]))
        with without_autocast(hidden):
            loss, weights, recomputed, *gradients = implementation(impl).fdpg_loss(
                hidden,
                weight,
                target_ids,
                bias,
                temperature,
                softcap,
                *sequences,
                total_sequences,
                weight_grad_out,
                wants,
                options,
            )
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*gradients)
        else:
            ctx.gradients = gradients
        ctx.mark_non_differentiable(recomputed, *weights)
        return loss, recomputed, *weights

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        if torch.compiler.is_compiling():
            return *(None if g is None else g * upstream for g in ctx.saved_tensors), *[None] * 10
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this fdpg_loss were handed out already; call it again")
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: a second [V, D] matrix is not needed
        return *(None if g is None else g.mul_(upstream) for g in gradients), *[None] * 10


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
