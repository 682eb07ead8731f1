"""Log-probs and weights of sequences: arguments checked and handed to the implementation that suits them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from torch import Tensor

from . import divergences, operators
from .arguments import Number, Options, Sequences, as_tensor
from .checks import check_sequences, check_targets, make_head
from .divergences import Divergence
from .logprob import LinearLogprob, as_asked, token_logprobs
from .operators import choose_impl
from .reference import SequenceWeights
from .tensor_parallel import local_shard, sharded_linear_logprob

if TYPE_CHECKING:
    from typing import Unpack  # of Python 3.11


class HeadOptions(TypedDict, total=False):
    """What `linear_logprob` may be told of a head, for its overloads."""

    bias: Tensor | None
    temperature: Number
    softcap: float | None
    chunk_bytes: int | None
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
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> Tensor | LinearLogprob:
    """log softmax(head(hidden)) at given ids, and the entropy of each row; differentiable in hidden, weight and bias.

    Args:
        hidden: final hidden states, [N, D], [B, T, D] or any [..., D], floating point.
        weight: LM head, [V, D], same dtype as hidden; frozen (requires_grad False) it gets no gradient. A DTensor
            is taken if it is replicated, as its `to_local()`; or split over the vocabulary, Shard(0) on a mesh of one
            dimension, if hidden is a DTensor that is replicated on the same mesh, for `sharded_linear_logprob`.
        target_ids: one id a row, [...], or K of them, [..., K], signed integers; -100 marks an ignored one, whose
            log-prob is 0. Of a row that has no other id nothing counts: entropy and lse are 0. Beside a hidden on a GPU
            they may stay on the CPU: such rows are then left out of all products.
        bias: [V] or None.
        temperature: logits are divided by it, > 0, after the soft cap; a number, or a tensor [] or [...], which gets no
            gradient and is not read in ignored rows.
        softcap: c in c·tanh(logit/c), > 0, or None.
        return_entropy, return_lse: give a `LinearLogprob` with these. The entropy costs another pass over logits
            that are at hand, and the same again where it is trained on.
        chunk_bytes: of the block of logits that is alive at once; None for 2 MiB on a CPU, elsewhere for 256 MiB, and
            with Triton, in the backward pass only, for a fiftieth of the GPU's memory, at least 1 GiB.
        impl: "auto" | "triton" (no logits in memory; bfloat16 on an NVIDIA GPU) | "chunked" (at most a [chunk, V] block
            of logits alive) | "reference" (float64, plain).

    Returns:
        log-probs in the shape of target_ids, or a `LinearLogprob`; float32 (float64 for float64 inputs, and from the
        reference), accumulated in float32 or better.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit.
    """
    if (shard := local_shard(hidden, weight, bias)) is not None:
        options: Any = dict(temperature=temperature, softcap=softcap, chunk_bytes=chunk_bytes, impl=impl)
        options |= dict(return_entropy=return_entropy, return_lse=return_lse)
        return sharded_linear_logprob(hidden, target_ids=target_ids, **shard, **options)
    rows, ids, head = make_head(hidden, target_ids, weight, bias, temperature, softcap, chunk_bytes)
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
    ratio_drop: float | None = None,
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
        ratio_drop: a sequence with π/q above it gets weight 0; larger than ratio_cap.
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
    sequences = make_sequences(cu_seqlens, behavior_logprob, target_log_score, log_z)
    offset = as_tensor(baseline, policy_logprob.device)
    options = Options(divergences.get(divergence), offset, ratio, ratio_cap, ratio_drop, reward_cap)
    check_sequences(policy_logprob, sequences, options)
    sequences = sequences._replace(cu_seqlens=cu_seqlens.to(policy_logprob.device, non_blocking=True))
    return operators.sequence_weights(policy_logprob.detach(), sequences, options, choose_impl(impl, policy_logprob))


def make_sequences(
    cu_seqlens: Tensor, behavior: Tensor, score: Tensor, log_z: Tensor | float, total: int = 1
) -> Sequences:
    """Sequences without gradients."""
    return Sequences(cu_seqlens, behavior.detach(), score.detach(), as_tensor(log_z, score.device), total)
