"""Sums, means, log-sum-exp and effective sample sizes by context.

`context_index` [B] int64 says which of the contexts 0..C−1 each of B samples belongs to; `num_contexts` is C. All else
is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

# what an estimate of a target needs, in effective samples; with less it is refused or marked (docs/method.md has the
# bias of all, as measured)
LEAST_ESS = 50.0  # in all
LEAST_PER_CONTEXT = 16.0  # of a context within which weights are normalised: that costs a bias of O(1/ess), towards π


def renumber(context_index: Tensor) -> tuple[Tensor, Tensor]:
    """Indices 0..C−1 among the contexts that occur, [B], from any integers; and how many samples each has, [C]."""
    _, renumbered, counts = context_index.unique(return_inverse=True, return_counts=True)
    return renumbered, counts


def sums(values: Tensor, context_index: Tensor, num_contexts: int) -> Tensor:
    """Σ values, [B, …] → [C, …]; 0 for a context without samples."""
    return values.new_zeros(num_contexts, *values.shape[1:]).index_add(0, context_index, values)


def means(values: Tensor, context_index: Tensor, counts: Tensor) -> Tensor:
    """Mean values, [B] → [C], given the number of samples of each context, [C]."""
    return sums(values / counts[context_index], context_index, len(counts))  # divided first: the sum may overflow


def scaled_exp(log_values: Tensor, context_index: Tensor, num_contexts: int) -> tuple[Tensor, Tensor]:
    """exp(log_values − log_scale), which neither overflows nor vanishes, [B]; and log_scale, [C].

    log_scale is the largest value of the context, or 0 where all are −inf.
    """
    largest = log_values.new_full((num_contexts,), -torch.inf).scatter_reduce(0, context_index, log_values, "amax")
    log_scale = largest.masked_fill(largest.isneginf(), 0.0)
    return (log_values - log_scale[context_index]).exp(), log_scale


def log_sum_exp(log_values: Tensor, context_index: Tensor, num_contexts: int, factors: Tensor | float = 1.0) -> Tensor:
    """log Σ factors·exp(log_values), [B] → [C]; −inf for a context without samples, or with −inf only."""
    scaled, log_scale = scaled_exp(log_values, context_index, num_contexts)
    return sums(factors * scaled, context_index, num_contexts).log() + log_scale


def log_add(log_totals: Tensor, log_values: Tensor, context_index: Tensor) -> Tensor:
    """log(exp(log_totals) + Σ exp(log_values)), [C] and [B] → [C]."""
    contexts = torch.arange(len(log_totals))
    every_index = torch.cat([contexts, context_index])
    return log_sum_exp(torch.cat([log_totals, log_values]), every_index, len(contexts))


def effective_samples(weights: Tensor, context_index: Tensor, num_contexts: int) -> Tensor:
    """(Σw)²/Σw², [B] → [C]; NaN where all weights are 0."""
    squares = sums(weights.square(), context_index, num_contexts)
    return sums(weights, context_index, num_contexts).square() / squares


def harmonic_mean(ess: Tensor) -> float:
    """Effective samples of a typical context, [C]: errors go as 1/ess, and it is their average that counts."""
    return float(1 / (1 / ess).mean())
