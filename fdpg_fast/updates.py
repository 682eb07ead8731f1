"""The updates of a round: its sequences in mini-batches, and a step after each as long as the samples are near enough.

The ratio π/q is of the weights as they are when a mini-batch has its turn, so every step follows the exact gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fdpg_kernels import Divergence, SequenceWeights

from .learner import Learner, Update
from .rollouts import Rollouts

LEAST_ESS = 0.5  # of the ratios of a mini-batch, as a share of its sequences; with less its round ends


class MiniBatch(NamedTuple):
    """Sequences of a round that one update learns from."""

    rollouts: Rollouts
    log_score: Tensor  # log P, [b] float64
    log_z: Tensor  # [b] float64
    baseline: Tensor  # [b] float64
    rows: Tensor  # which of the round's they are, [b] int64


@dataclass(frozen=True)
class Updates:
    """What the updates of a round did, one after the other."""

    made: tuple[Update, ...]
    rows: Tensor  # the sequences that they learned from, in the order of `weights`, [b] int64
    ratio_ess: tuple[float, ...]  # of each mini-batch, as a share of it; the last may be one that was too far away

    @property
    def weights(self) -> SequenceWeights:
        """Of the sequences `rows`, each as its own update saw it."""
        return SequenceWeights(*map(torch.cat, zip(*(update.weights for update in self.made), strict=True)))

    @property
    def loss(self) -> float:
        return sum(update.loss for update in self.made) / len(self.made)

    @property
    def grad_norm(self) -> float:
        """The largest; not finite if one is not."""
        return float(torch.tensor([update.grad_norm for update in self.made], dtype=torch.float64).max())

    @property
    def learning_rate(self) -> float:
        return self.made[0].learning_rate

    @property
    def skipped(self) -> bool:
        """Whether nothing was learned."""
        return all(update.skipped for update in self.made)


def division(rollouts: Rollouts, count: int, seed: int) -> Tensor:
    """Which of so many updates each sequence of a round is for, [B] int64 from 0, by a seed.

    Whole contexts, if there are as many: all samples of one count alike in one mean, and its leave-one-out baselines
    (and its Z) come from samples of one update. Else an equal share of each context's samples, and baselines must then
    be of that share: through those of an earlier update the weights that a sample meets would depend on itself.
    Through the Z of its context they do, as little as its own weight does.
    """
    rng, context_index, contexts = torch.Generator().manual_seed(seed), rollouts.context_index, len(rollouts.contexts)
    if contexts >= count:
        return (torch.randperm(contexts, generator=rng) * count // contexts)[context_index]
    shuffled = torch.randperm(len(rollouts), generator=rng)
    order = shuffled[context_index[shuffled].argsort(stable=True)]  # context by context
    samples = context_index.bincount()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - (samples.cumsum(0) - samples)[context_index[order]]
    return place * count // samples[context_index]


def mini_batches(
    rollouts: Rollouts, log_score: Tensor, log_z: Tensor, baseline: Tensor, part: Tensor
) -> list[MiniBatch]:
    """What each update learns from; part: as `division` gives it."""
    made = []
    for index in range(int(part.max()) + 1):
        own = part == index
        made.append(MiniBatch(rollouts.where(own), log_score[own], log_z[own], baseline[own], own.nonzero()[:, 0]))
    return made


def update(
    learner: Learner,
    batches: list[MiniBatch],
    first: tuple[Tensor, SequenceWeights],
    divergence: Divergence,
    round_index: int,
) -> Updates:
    """Step after each mini-batch, of which the first has left its gradient already, with the results `first`.

    The rest is left out as soon as the effective samples of the ratios of the next one are less than LEAST_ESS of it.
    """
    made, ratio_ess = [learner.step(*first, round_index)], [effective_share(first[1])]
    for batch in batches[1:]:
        loss, weights = learner.backward(*batch[:4], divergence)
        ratio_ess.append(effective_share(weights))
        if not ratio_ess[-1] >= LEAST_ESS:
            learner.optimizer.zero_grad(set_to_none=True)
            break
        made.append(learner.step(loss, weights, round_index))
    rows = torch.cat([batch.rows for batch in batches[: len(made)]])
    return Updates(tuple(made), rows, tuple(ratio_ess))


def effective_share(weights: SequenceWeights) -> float:
    """(Σw)²/Σw² of the ratios w = π/q, before any cap, as a share of their number."""
    log_ratio = (weights.policy_logprob - weights.behavior_logprob).double()
    return float(1 / log_ratio.softmax(0).square().sum()) / len(log_ratio)
