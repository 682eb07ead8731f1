"""The three ops: their arguments checked and handed to the implementation that suits them, with gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import divergences, operators, reference
from .arguments import (
    Head,
    Number,
    Options,
    Sequences,
    as_local,
    as_tensor,
    check_memory,
    check_sequences,
    check_targets,
    make_head,
)
from .arguments import result_dtype as result_dtype
from .divergences import Divergence
from .logprob import LinearLogprob, as_asked, token_logprobs
from .operators import as_schema, choose_impl
from .reference import SequenceWeights

if TYPE_CHECKING:
    from typing import Unpack  # of Python 3.11


class FDPGLoss(NamedTuple):
    """A loss and what it was made of.

    Attributes:
        loss: mean over sequences of −weight·log π, [].
        weights: of each sequence, detached.
    """

    loss: Tensor
    weights: SequenceWeights


class HeadOptions(TypedDict, total=False):
    """What `linear_logprob` may be told of a head, for its overloads."""

    bias: Tensor | None
    temperature: Number
    softcap: float | None
    impl: str


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    return_entropy: Literal[False] = False,
    return_lse: Literal[False] = False,
    **options: Unpack[HeadOptions],
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    return_entropy: Literal[True],
    return_lse: bool = False,
    **options: Unpack[HeadOptions],
) -> LinearLogprob: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    return_entropy: bool = False,
    return_lse: Literal[True],
    **options: Unpack[HeadOptions],
) -> LinearLogprob: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | LinearLogprob:
    """log softmax(head(hidden)) at given ids, and the entropy of each row; differentiable in hidden, weight and bias.

    Args:
        hidden: final hidden states, [N, D], [B, T, D] or any [..., D], floating point.
        weight: LM head, [V, D], same dtype as hidden; frozen (requires_grad False) it gets no gradient. A DTensor
            is taken if it is replicated, as its `to_local()`.
        target_ids: one id a row, [...], or K of them, [..., K], signed integers; -100 marks an ignored one, whose
            log-prob is 0. Of a row that has no other id nothing counts: entropy and lse are 0.
        bias: [V] or None.
        temperature: logits are divided by it, > 0, after the soft cap; a number, or a tensor [] or [...], which gets no
            gradient and is not read in ignored rows.
        softcap: c in c·tanh(logit/c), > 0, or None.
        return_entropy, return_lse: give a `LinearLogprob` with these. The entropy costs another pass over logits
            that are at hand, and the same again where it is trained on.
        impl: "auto" | "triton" (no logits in memory; bfloat16 on an NVIDIA GPU) | "chunked" (at most a [chunk, V] block
            of logits alive) | "reference" (float64, plain).

    Returns:
        log-probs in the shape of target_ids, or a `LinearLogprob`; float32 (float64 for float64 inputs, and from the
        reference), accumulated in float32 or better.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit.
    """
    rows, ids, head = make_head(hidden, target_ids, weight, bias, temperature, softcap)
    check_targets(ids, len(head.weight))
    impl = choose_impl(impl, rows, multiplies=True)
    results = token_logprobs(rows, ids, head, return_entropy, impl)
    return as_asked(results, target_ids.shape, return_entropy, return_lse, hidden.shape[:-1])


def sequence_weights(
    policy_logprob: Tensor,
    behavior_logprob: Tensor,
    cu_seqlens: Tensor,
    target_log_score: Tensor,
    log_z: Tensor | float,
    *,
    divergence: str | Divergence = "jensen_shannon",
    baseline: Tensor | float | None = None,
    ratio: str = "sequence",
    ratio_cap: float | None = None,
    reward_cap: float | None = None,
    impl: str = "auto",
) -> SequenceWeights:
    """Importance ratios, pseudo-rewards and f-DPG weights of B packed sequences.

    Args:
        policy_logprob: log π of each sampled token under the learner, [N].
        behavior_logprob: log q of each sampled token under whoever sampled it, [N].
        cu_seqlens: sequence i owns tokens cu_seqlens[i]:cu_seqlens[i+1], [B+1] int32 or int64.
        target_log_score: log P(x|c) = log a + log φ, [B]; −inf where a constraint fails.
        log_z: log Z of the target, [] or [B]; −inf (nothing satisfying seen yet) gives weight 0.
        divergence: a name or a `Divergence`.
        baseline: subtracted from the pseudo-reward, [], [B] or a float; must not depend on its own sequence.
        ratio: "sequence" for the exact π/q of the whole sequence, "none" for 1.
        ratio_cap: upper limit of π/q, > 0.
        reward_cap: limit of |pseudo-reward|, > 0.
        impl: "auto" | "triton" (one launch) | "chunked" | "reference" (float64, plain).

    Returns:
        SequenceWeights in float32 (float64 where policy_logprob is float64, and from the reference).

    Raises:
        ValueError: shapes or options do not fit, or (CPU tensors only, a GPU is not asked to wait) a target
            with zeros is combined with a divergence whose f'(∞) is infinite, or a score, log Z or baseline is NaN or
            +inf. A GPU gives NaN weights for a NaN.
        RuntimeError: a CUDA graph is being captured, which would keep the tables of this call.
    """
    sequences = _sequences(cu_seqlens, behavior_logprob, target_log_score, log_z)
    offset = as_tensor(baseline, policy_logprob.device)
    options = Options(divergences.get(divergence), offset, ratio, ratio_cap, reward_cap)
    check_sequences(policy_logprob, sequences, options)
    sequences = sequences._replace(cu_seqlens=cu_seqlens.to(policy_logprob.device, non_blocking=True))
    return operators.sequence_weights(policy_logprob.detach(), sequences, options, choose_impl(impl, policy_logprob))


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
        hidden, weight, target_ids, bias, temperature, softcap: as in `linear_logprob`.
        cu_seqlens, target_log_score, log_z, divergence, baseline, ratio, ratio_cap, reward_cap:
            as in `sequence_weights`; chunks are cut on cu_seqlens, so leave it on the CPU: a GPU would be waited for.
            target_ids may stay there as well: ignored rows are then left out of all products, which Triton otherwise
            does on CPU tensors only.
        behavior_logprob: log q of each token under its sampler, [N]; not read where target_ids is -100.
        total_sequences: of the batch that this one is a part of: what the sum over sequences is divided by, B
            where it is None. Losses of parts then add up to the loss of the whole.
        weight_grad_out: `backward` adds the gradient in weight to it, [V, D] in float32 (float64 for float64 inputs)
            or weight's dtype; weight itself then gets none.
        chunk_bytes: of the block [chunk, V] of logits or their exponentials, more or less by a sequence, and one row at
            least; None for 32 MiB on a CPU, and on a GPU a fiftieth of its memory, at least 1 GiB.
        impl: "auto" | "triton" | "chunked" | "reference".

    Returns:
        FDPGLoss(loss [] float32, weights), float64 for float64 inputs and from the reference; the loss is
        differentiable once in hidden, weight and bias.

    Raises:
        ValueError: see `linear_logprob` and `sequence_weights`.
    """
    if target_ids.ndim != 1:
        raise ValueError(f"target_ids must be [N], sequences end to end; got {tuple(target_ids.shape)}")
    hidden, ids, head = make_head(hidden, target_ids, weight, bias, temperature, softcap, ids_on_cpu=True)
    check_targets(ids, len(head.weight))
    into = as_local("weight_grad_out", weight_grad_out)
    check_memory(chunk_bytes, into, head.weight)
    head = head._replace(chunk_bytes=chunk_bytes)
    total = len(cu_seqlens) - 1 if total_sequences is None else total_sequences
    sequences = _sequences(cu_seqlens, behavior_logprob, target_log_score, log_z, total)
    options = Options(divergences.get(divergence), as_tensor(baseline, hidden.device), ratio, ratio_cap, reward_cap)
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


def _sequences(cu_seqlens: Tensor, behavior: Tensor, score: Tensor, log_z: Tensor | float, total: int = 1) -> Sequences:
    return Sequences(cu_seqlens, behavior.detach(), score.detach(), as_tensor(log_z, score.device), total)
