"""From token log-probs to f-DPG gradient weights: w = (π/q)·(−f'(π/p) − baseline), one number per sequence.

Go et al. 2023, theorem 1 with the importance ratio of an off-policy sampler:
∇D_f(π‖p) = −E_{x~q}[ w(x)·∇log π(x) ], w detached. All products of exponentials are formed as one exponent.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import divergences, reference
from .dispatch import choose_impl, implementation
from .divergences import Divergence
from .reference import SequenceWeights

RATIOS = ("sequence", "none")


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
            with zeros is combined with a divergence whose f'(∞) is infinite, or a score is NaN or +inf.
    """
    law: Divergence = divergences.get(divergence)
    target_log_score, log_z = target_log_score.detach(), torch.as_tensor(log_z).detach()
    baseline = baseline.detach() if isinstance(baseline, Tensor) else baseline
    check_packing(policy_logprob, behavior_logprob, cu_seqlens, target_log_score, log_z, baseline)
    check_options(ratio, ratio_cap, reward_cap)
    check_support(law, target_log_score)
    options: dict[str, Any] = dict(baseline=baseline, ratio=ratio, ratio_cap=ratio_cap, reward_cap=reward_cap)
    cu_seqlens = cu_seqlens.to(policy_logprob.device, non_blocking=True)
    arguments = (policy_logprob, behavior_logprob, cu_seqlens, target_log_score, log_z)
    impl = choose_impl(impl, policy_logprob)
    # a user's own f is a PyTorch function
    if torch.compiler.is_compiling() or (impl == "triton" and law.kernel_family is not None):
        return implementation(impl).sequence_weights(*arguments, divergence=law, **options)
    if impl == "reference":
        return reference.sequence_weights(*arguments, divergence=law, **options)
    policy, behavior = (sum_by_sequence(x.detach(), cu_seqlens) for x in (policy_logprob, behavior_logprob))
    weights = weights_from_sums(policy, behavior, target_log_score, log_z, divergence=law, **options)
    return cast(weights, result_dtype(policy_logprob))


def weights_from_sums(
    policy: Tensor,
    behavior: Tensor,
    target_log_score: Tensor,
    log_z: Tensor,
    *,
    divergence: Divergence,
    baseline: Tensor | float | None,
    ratio: str,
    ratio_cap: float | None,
    reward_cap: float | None,
) -> SequenceWeights:
    """The weights of sequences whose log-probs are summed already, [B] float64; see `sequence_weights`."""
    log_p = target_log_score.double() - log_z.double()
    log_t = policy - log_p
    no_z = torch.isneginf(log_z.double()).expand_as(policy)
    log_t = torch.where(torch.isneginf(target_log_score), math.inf, log_t).masked_fill(no_z, 0.0)

    log_ratio = torch.zeros_like(policy) if ratio == "none" else policy - behavior
    log_ratio_cap = math.inf if ratio_cap is None else math.log(ratio_cap)
    clipped = log_ratio > log_ratio_cap
    log_ratio = log_ratio.clamp(max=log_ratio_cap)

    reward = -divergence.f_prime(log_t)
    limit = math.inf if reward_cap is None else reward_cap
    capped_reward = reward.clamp(-limit, limit)
    clipped = clipped | (reward != capped_reward)

    offset = baseline.double() if isinstance(baseline, Tensor) else baseline or 0.0
    importance = log_ratio.exp()
    weight = importance * (capped_reward - offset)
    if divergence.power is not None:
        # −f' = c − c·t^κ, and ratio·t^κ is one exponent: for forward KL it is p/q, whatever π underflows to
        exponent, factor = divergence.power
        joined = (log_ratio + exponent * log_t).exp()
        unclipped = importance * (factor - offset) - factor * joined
        weight = torch.where(reward == capped_reward, unclipped, weight)
    weight = weight.masked_fill(no_z, 0.0)
    return SequenceWeights(policy, behavior, log_t, log_ratio, capped_reward, weight, clipped & ~no_z)


def cast(weights: SequenceWeights, dtype: torch.dtype) -> SequenceWeights:
    return SequenceWeights(*(x if x.dtype == torch.bool else x.to(dtype) for x in weights))


def sum_by_sequence(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum [N] values over each sequence, in float64: thousands of tokens must not cost digits of a ratio."""
    positions = torch.arange(len(values), device=values.device)
    owner = torch.searchsorted(cu_seqlens[1:].to(positions.dtype), positions, right=True)
    totals = torch.zeros(len(cu_seqlens) - 1, dtype=torch.float64, device=values.device)
    return totals.index_add_(0, owner, values.double())


def result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_options(ratio: str, ratio_cap: float | None, reward_cap: float | None) -> None:
    if ratio not in RATIOS:
        raise ValueError(f"ratio={ratio!r}; choose one of {', '.join(RATIOS)}")
    for name, cap in (("ratio_cap", ratio_cap), ("reward_cap", reward_cap)):
        if cap is not None and not cap > 0:
            raise ValueError(f"{name}={cap}; a cap must be a positive number, or None for no cap")


def check_support(divergence: Divergence, target_log_score: Tensor) -> None:
    """Refuse scores that no weight can come of, where looking costs no host synchronisation."""
    if target_log_score.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((target_log_score.isnan() | target_log_score.isposinf()).any()):
        raise ValueError("target_log_score has a NaN or +inf; it must be a number, or −inf where the target is zero")
    if not divergence.allows_zeros and bool(target_log_score.isneginf().any()):
        raise ValueError(divergence.refusal)


def check_packing(
    policy_logprob: Tensor,
    behavior_logprob: Tensor,
    cu_seqlens: Tensor,
    target_log_score: Tensor,
    log_z: Tensor,
    baseline: Tensor | float | None,
) -> None:
    num_tokens, num_sequences = len(policy_logprob), len(cu_seqlens) - 1
    if policy_logprob.ndim != 1 or behavior_logprob.shape != policy_logprob.shape:
        raise ValueError(
            f"what there is one of for each token must be [N] tensors of one N; "
            f"got {tuple(policy_logprob.shape)} and {tuple(behavior_logprob.shape)}"
        )
    if cu_seqlens.ndim != 1 or num_sequences < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be a [B+1] int32 tensor with B ≥ 1; got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != num_tokens or any(a > b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"cu_seqlens must rise from 0 to N={num_tokens}; it runs from {ends[0]} to {ends[-1]}")
    if target_log_score.shape != (num_sequences,):
        raise ValueError(f"target_log_score must be [B]=[{num_sequences}]; got {tuple(target_log_score.shape)}")
    devices = {str(x.device) for x in (policy_logprob, behavior_logprob, target_log_score)}
    if len(devices) > 1:
        raise ValueError(f"log-probs and target_log_score must be on one device; got {', '.join(sorted(devices))}")
    for name, value in (("log_z", log_z), ("baseline", baseline)):
        if isinstance(value, Tensor) and value.shape not in ((), (num_sequences,)):
            raise ValueError(f"{name} must be a scalar or [B]=[{num_sequences}]; got {tuple(value.shape)}")
