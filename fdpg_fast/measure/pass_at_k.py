"""What k samples of a context find (pass@k) and what most of them say (majority@k), from n ≥ k of them, without bias.

`values` [B] float64 are those of a 0/1 feature, NaN where it does not apply: such samples count as not drawn.
`context_index` [B] int64. k is every power of two up to n, and n: the samples of a context, or of the one with the
fewest, so that a curve over k is of the same contexts everywhere. Contexts weigh alike, and errors are as in
`estimators.mean`. In one context the interval reaches as far as the one of a share does (Agresti & Coull 1998), which
is neither empty where all samples are alike nor narrow where k is near n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import by_context
from .estimators import Estimate, mean

SUBSETS = 256  # of a context's samples, at least, that vote


def is_binary(values: Tensor) -> bool:
    """Whether a feature has the values 0 and 1 only, as far as this sample, [B], tells.

    A reward of any value is taken for such if it happened to have no other: its curve, of how often it is 1, is right,
    and gone in the next evaluation.
    """
    values = values[~values.isnan()]
    return len(values) > 0 and bool(((values == 0) | (values == 1)).all())


def pass_at_k(values: Tensor, context_index: Tensor) -> dict[int, Estimate]:
    """The probability that one of k samples has the feature, by k: 1 − C(n−c, k)/C(n, k) where c of n have it.

    Chen et al. 2021, equation 1.
    """
    applies = ~values.isnan()
    context_index, counts = by_context.renumber(context_index[applies])
    failures = by_context.sums(1 - values[applies], context_index, len(counts))  # n − c
    drawn = torch.arange(int(counts.min()))
    none_of_first = ((failures[:, None] - drawn).clamp(min=0) / (counts[:, None] - drawn)).cumprod(1)  # [C, n]
    found = {}
    for k in _sizes(len(drawn)):
        of_one = 1 - float(failures[0] / counts[0]), int(counts[0])
        found[k] = _estimate(1 - none_of_first[:, k - 1], len(context_index), of_one, k)
    return found


def majority_at_k(values: Tensor, answers: Sequence[str | None], context_index: Tensor) -> dict[int, Estimate]:
    """The probability that the answer which most of k samples name is right, by k.

    None is no vote. Of several answers with the most votes each wins alike: the value is the expected one. Where nobody
    votes nothing is right. What is right is the mean value of the samples that name an answer.

    A context's samples are put in a random order, the same for all contexts and evaluations, and cut into sets of k,
    again and again until there are SUBSETS: each is a sample of k, so there is no bias. k = 1 and k = n are exact.
    """
    applies = ~values.isnan()
    context_index, counts = by_context.renumber(context_index[applies])
    values, fewest = values[applies], int(counts.min())
    answers = [answer for answer, used in zip(answers, applies.tolist(), strict=True) if used]
    votes = [_votes(values, answers, rows) for rows in context_index.argsort(stable=True).split(counts.tolist())]
    found = {}
    for k in _sizes(fewest):
        shares = torch.stack([_right(*vote, k) for vote in votes])
        found[k] = _estimate(shares, len(values), (float(shares[0]), int(counts[0]) // k), 1)
    return found


def _sizes(n: int) -> list[int]:
    return sorted({n, *(2**power for power in range(n.bit_length()))})


def _votes(values: Tensor, answers: Sequence[str | None], rows: Tensor) -> tuple[Tensor, Tensor]:
    """The number of the answer that each sample of a context names, [n], the last for None; and what is right, [A]."""
    named = [answers[row] for row in rows.tolist()]
    numbers = {answer: number for number, answer in enumerate(dict.fromkeys(x for x in named if x is not None))}
    chosen = torch.tensor([numbers.get(answer, len(numbers)) for answer in named])
    right = torch.zeros(len(numbers) + 1, dtype=torch.float64).index_add(0, chosen, values[rows])
    return chosen, (right / chosen.bincount(minlength=len(right)))[:-1]


def _right(chosen: Tensor, right: Tensor, k: int) -> Tensor:
    """How often the winner of k votes is right, a scalar."""
    n, generator = len(chosen), torch.Generator().manual_seed(k)
    orders = [torch.randperm(n, generator=generator) for _ in range(-(-SUBSETS // (n // k)) if k < n else 1)]
    found = []
    for sets in torch.cat([order[: n - n % k].view(-1, k) for order in orders]).split(SUBSETS):  # [S, k]
        votes = torch.zeros(len(sets), len(right) + 1).scatter_add(1, chosen[sets], torch.ones(sets.shape))
        votes[:, -1] = 0.5  # of no answer: what wins without any vote is nothing
        wins = (votes == votes.amax(1, keepdim=True))[:, :-1].double()
        found.append((wins * right).sum(1) / wins.sum(1).clamp(min=1))
    return torch.cat(found).mean()


def _estimate(shares: Tensor, samples: int, of_one: tuple[float, int], k: int) -> Estimate:
    """The mean of shares by context, [C]; a single one is 1 − (1 − s)^k where s is known as a share of so many."""
    estimate = replace(mean(shares, torch.arange(len(shares))), ess=float(samples))
    if len(shares) > 1:
        return estimate
    share, n = of_one
    centre = (share * n + 2) / (n + 4)
    half_width = 1.96 * math.sqrt(centre * (1 - centre) / (n + 4))
    ends = (min(max(centre + side * half_width, 0.0), 1.0) for side in (-1, 1))
    reach = max(abs(1 - (1 - end) ** k - estimate.value) for end in ends)
    return replace(estimate, standard_error=reach / 1.96)
