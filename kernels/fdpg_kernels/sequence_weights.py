"""From token log-probs to f-DPG gradient weights: w = (π/q)·(−f'(π/p) − baseline), one number per sequence.

Go et al. 2023, theorem 1 with the importance ratio of an off-policy sampler:
∇D_f(π‖p) = −E_{x~q}[ w(x)·∇log π(x) ], w detached. All products of exponentials are formed as one exponent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import Options, Sequences
from .reference import SequenceWeights


def sequence_weights(policy_logprob: Tensor, sequences: Sequences, options: Options) -> SequenceWeights:
    """The weights of B sequences from the log π of each token [N], in float64."""
    policy, behavior = (sum_by_sequence(x, sequences.cu_seqlens) for x in (policy_logprob, sequences.behavior_logprob))
    return weights_from_sums(policy, behavior, sequences.target_log_score, sequences.log_z, options)


def weights_from_sums(
    policy: Tensor, behavior: Tensor, target_log_score: Tensor, log_z: Tensor, options: Options
) -> SequenceWeights:
    """The weights of sequences whose log-probs are summed already, [B] float64; see `sequence_weights`."""
    divergence, baseline, ratio, ratio_cap, ratio_drop, reward_cap = options
    no_z = torch.isneginf(log_z).expand_as(policy)
    log_t = policy - (target_log_score.double() - log_z.double())  # +inf where the target is zero
    log_t = log_t.masked_fill(no_z, 0.0)

    uncapped = torch.zeros_like(policy) if ratio == "none" else policy - behavior
    log_ratio = uncapped.clamp(max=math.inf if ratio_cap is None else math.log(ratio_cap))
    dropped = uncapped > (math.inf if ratio_drop is None else math.log(ratio_drop))

    reward = -divergence.f_prime(log_t)
    limit = math.inf if reward_cap is None else reward_cap
    capped_reward = reward.clamp(-limit, limit)
    clipped = (log_ratio != uncapped) | (reward != capped_reward)

    offset = 0.0 if baseline is None else baseline.double()
    importance = log_ratio.exp()
    weight = importance * (capped_reward - offset)
    if divergence.power is not None:
        # −f' = c − c·t^κ, and ratio·t^κ is one exponent: for forward KL it is p/q, whatever π underflows to
        exponent, factor = divergence.power
        joined = (log_ratio + exponent * log_t).exp()
        unclipped = importance * (factor - offset) - factor * joined
        weight = torch.where(reward == capped_reward, unclipped, weight)
    weight, log_ratio = weight.masked_fill(no_z | dropped, 0.0), log_ratio.masked_fill(dropped, -math.inf)
    return SequenceWeights(policy, behavior, log_t, log_ratio, capped_reward, weight, clipped & ~(no_z | dropped))


def sum_by_sequence(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum [N] values over each sequence in float64: thousands of tokens must not cost digits of a ratio."""
    positions = torch.arange(len(values), device=values.device)
    sequence_index = torch.searchsorted(cu_seqlens[1:].to(positions), positions, right=True)
    totals = torch.zeros(len(cu_seqlens) - 1, dtype=torch.float64, device=values.device)
    return totals.index_add_(0, sequence_index, values.double())
