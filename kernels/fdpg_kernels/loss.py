"""The f-DPG loss: linear_logprob and sequence_weights in one pass, with the gradients formed in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import divergences, operators, reference
from .arguments import IGNORED, Head, Number, Options, Sequences, as_tensor, result_dtype, to_device
from .checks import as_local, check_sequences, check_targets, check_weight_grad_out, make_head
from .divergences import Divergence
from .operators import as_schema, choose_impl
from .ops import linear_logprob, make_sequences
from .reference import SequenceWeights
from .tensor_parallel import local_shard


class FDPGLoss(NamedTuple):
    """A loss and what it was made of.

    Attributes:
        loss: mean over sequences of −weight·log π, [].
        weights: of each sequence, detached.
    """

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
    ratio_drop: float | None = None,
    reward_cap: float | None = None,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: float | None = None,
    total_sequences: int | None = None,
    weight_grad_out: Tensor | None = None,
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> FDPGLoss:
    """A loss whose gradient is the f-DPG estimate of ∇D_f(π‖p) (Go et al. 2023, theorem 1).

    The gradients of hidden, weight and bias are formed inside the forward pass, chunk by chunk on sequence
    boundaries, so a sequence's weight is known before the head's gradient is; `backward` only scales them.
    Under `torch.no_grad` none is formed.

    Args:
        hidden, weight, target_ids, bias, temperature, softcap: as in `linear_logprob`, hidden [N, D], target_ids [N].
            The loss of a head that is split over ranks is made of its log-probs, whose backward forms logits again.
        cu_seqlens, target_log_score, log_z, divergence, baseline, ratio, ratio_cap, ratio_drop, reward_cap:
            as in `sequence_weights`; chunks are cut on cu_seqlens, so leave it on the CPU: a GPU would be waited for.
            target_ids may stay there as well: ignored rows are then left out of all products, which Triton otherwise
            does on CPU tensors only.
        behavior_logprob: log q of each token under its sampler, [N]; not read where target_ids is -100.
        total_sequences: of the batch that this one is a part of: what the sum over sequences is divided by, B
            where it is None. Losses of parts then add up to the loss of the whole.
        weight_grad_out: `backward` adds the gradient in weight to it, [V, D] in float32 (float64 for float64 inputs)
            or weight's dtype; weight itself then gets none.
        chunk_bytes: of the block [chunk, V] of logits or their exponentials, more or less by a sequence, and one row at
            least; None for a fiftieth of a GPU's memory, at least 1 GiB; on a CPU for 32 MiB, or 256 rows where there
            are three times as many. The chunked loss of a 16-bit head needs no block, and four products.
        impl: "auto" | "triton" | "chunked" | "reference".

    Returns:
        FDPGLoss(loss [] float32, weights), float64 for float64 inputs and from the reference; the loss is
        differentiable once in hidden, weight and bias.

    Raises:
        ValueError: see `linear_logprob` and `sequence_weights`.
    """
    if target_ids.ndim != 1:
        raise ValueError(f"target_ids must be [N], sequences end to end; got {tuple(target_ids.shape)}")
    total = len(cu_seqlens) - 1 if total_sequences is None else total_sequences
    sequences = make_sequences(cu_seqlens, behavior_logprob, target_log_score, log_z, total)
    offset = as_tensor(baseline, hidden.device)
    options = Options(divergences.get(divergence), offset, ratio, ratio_cap, ratio_drop, reward_cap)
    if local_shard(hidden, weight, bias) is not None:
        if weight_grad_out is not None:
            raise ValueError("weight_grad_out is for a head that is not split over ranks")
        options_of_head: Any = dict(bias=bias, temperature=temperature, softcap=softcap, chunk_bytes=chunk_bytes)
        logprob = linear_logprob(hidden, weight, target_ids, **options_of_head, impl=impl)
        return _composed(logprob, target_ids == IGNORED, sequences, options, impl)
    hidden, ids, head = make_head(hidden, target_ids, weight, bias, temperature, softcap, chunk_bytes)
    check_targets(ids, len(head.weight))
    into = as_local("weight_grad_out", weight_grad_out)
    check_weight_grad_out(into, head.weight)
    check_sequences(hidden.detach()[:, 0], sequences, options)
    impl = choose_impl(impl, hidden, multiplies=True)
    if into is not None:  # the gradient is wanted even if weight itself wants none
        wanting = head.weight if head.weight.requires_grad else head.weight.detach().requires_grad_()
        head = head._replace(weight=wanting, weight_grad_dtype=into.dtype)
    if impl == "reference":
        if into is not None:
            head = head._replace(weight=head.weight.detach().double().requires_grad_())
            head.weight.register_hook(lambda gradient: (into.add_(gradient), gradient)[1])
        loss, weights = reference.fdpg_loss(hidden, target_ids, head, sequences, options)
        return FDPGLoss(loss, weights)
    loss, columns, clipped = _FDPGLoss.apply(
        hidden, head.weight, head.bias, target_ids, head[2:], into, sequences, as_schema(options), impl,
        torch.is_grad_enabled(),
    )  # fmt: skip
    columns = columns.to(result_dtype(hidden))
    return FDPGLoss(loss, SequenceWeights(*columns.unbind(), clipped))  # type: ignore[call-arg]


def _composed(logprob: Tensor, ignored: Tensor, sequences: Sequences, options: Options, impl: str) -> FDPGLoss:
    """The loss of log-probs [N] that have gradients."""
    policy = logprob.detach()
    check_sequences(policy, sequences, options)
    behavior = sequences.behavior_logprob.masked_fill(ignored, 0.0)
    sequences = sequences._replace(behavior_logprob=behavior, cu_seqlens=to_device(sequences.cu_seqlens, policy.device))
    weights = operators.sequence_weights(policy, sequences, options, choose_impl(impl, policy))
    of_token = weights.weight.repeat_interleave(sequences.cu_seqlens.diff(), output_size=len(policy))
    return FDPGLoss(-(of_token * logprob).sum() / sequences.total, weights)


class _FDPGLoss(torch.autograd.Function):
    """Gradients are formed in the forward pass: the upstream gradient of a loss is one scalar."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, settings, into, sequences, options, impl, with_grad):
        head = Head(weight, bias, *settings)
        wants = ctx.needs_input_grad[:3] if with_grad else (False, False, False)
        loss, columns, clipped, gradients = operators.fdpg_loss(
            hidden, target_ids, head, sequences, options, wants, impl
        )
        ctx.into = into
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*gradients)
        else:
            ctx.gradients = gradients
        ctx.mark_non_differentiable(columns, clipped)
        return loss, columns, clipped

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        compiling = torch.compiler.is_compiling()
        gradients = ctx.saved_tensors if compiling else ctx.gradients
        if gradients is None:
            raise RuntimeError("the gradients of this fdpg_loss were handed out already; call it again")
        ctx.gradients = None
        if ctx.into is not None:
            ctx.into.addcmul_(gradients[1], upstream)
            gradients = gradients[0], None, gradients[2]
        scale = torch.mul if compiling else Tensor.mul_  # in place: a second [V, D] matrix is not needed
        return *(None if g is None else scale(g, upstream) for g in gradients), *[None] * 7
