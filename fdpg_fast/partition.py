"""The partition function Z_c = E_q[P/q] and the baseline: all that is known before the learner's forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fdpg_kernels import Divergence

from . import by_context
from .rollouts import Rollouts
from .scoring import Scores


class PartitionFunction:
    """Z of every context from importance weights P/q, which have mean Z whatever q is.

    Args:
        num_contexts: contexts of the data set.
        kind: "running" uses all samples so far, "batch" those of the last update, "oracle" those of the first
            (a frozen sample of the base model).
        per_context: False pools all contexts in one Z.
    """

    def __init__(self, num_contexts: int, *, kind: str = "running", per_context: bool = True):
        self.kind, self.per_context = kind, per_context
        self._count = torch.zeros(num_contexts if per_context else 1, dtype=torch.float64)
        self._log_sum, self._log_sum_squares = self._count.log(), self._count.log()  # log Σw, log Σw²
        self._empty = self.state()

    def update(self, log_weights: Tensor, dataset_index: Tensor) -> None:
        """Add samples: log P/q [B] float64 and the data set's index of each one's context [B]."""
        if self.kind == "oracle" and bool(self._count.any()):
            return
        if self.kind == "batch":
            self.load_state(self._empty)
        slots = dataset_index * self.per_context  # 0 for all where they are pooled
        self._log_sum = by_context.log_add(self._log_sum, log_weights, slots)
        self._log_sum_squares = by_context.log_add(self._log_sum_squares, 2 * log_weights, slots)
        self._count = self._count + slots.bincount(minlength=len(self._count))

    def log_z(self, dataset_index: Tensor) -> Tensor:
        """log Z of each sequence's context, [B] float64; −inf while nothing with P > 0 has been seen."""
        return (self._log_sum - self._count.clamp(min=1).log())[dataset_index * self.per_context]

    def summary(self) -> dict[str, float]:
        """Mean log Z over the contexts seen, its standard error, and effective samples a context."""
        seen = self._log_sum > -math.inf
        at_zero = float(((self._count > 0) & ~seen).sum())
        if not bool(seen.any()):
            return {"log_z": -math.inf, "log_z_se": math.nan, "ess": 0.0, "contexts_at_zero": at_zero}
        ess = (2 * self._log_sum - self._log_sum_squares)[seen].exp()
        relative_variance = (1 / ess - 1 / self._count[seen]).clamp(min=0)  # of each Z_c
        return {
            "log_z": float((self._log_sum - self._count.log())[seen].mean()),
            "log_z_se": float(relative_variance.sum().sqrt() / len(ess)),
            "ess": float(ess.mean()),
            "contexts_at_zero": at_zero,
        }

    def state(self) -> dict[str, Tensor]:
        """What `load_state` takes; later updates leave it as it is."""
        return {"log_sum": self._log_sum, "log_sum_squares": self._log_sum_squares, "count": self._count}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._count = state["count"]
        self._log_sum, self._log_sum_squares = state["log_sum"], state["log_sum_squares"]


class Baseline:
    """What is subtracted from a pseudo-reward; never depends on the sequence that it is subtracted for.

    Args:
        kind: "leave_one_out": mean of the other samples of the context; "running": mean of all earlier rounds;
            "none": 0.
    """

    def __init__(self, kind: str = "leave_one_out"):
        self.kind = kind
        self._sum, self._count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def __call__(self, rewards: Tensor, context_index: Tensor) -> Tensor:
        """Baselines [B] for pseudo-rewards [B] float64, estimated under the sampler; then remembers these."""
        if self.kind == "leave_one_out":
            counts = context_index.bincount()
            totals = by_context.sums(rewards, context_index, len(counts))
            return (totals[context_index] - rewards) / (counts[context_index] - 1).clamp(min=1)
        baseline = self._sum / self._count.clamp(min=1) if self.kind == "running" else torch.zeros_like(self._sum)
        self._sum, self._count = self._sum + rewards.sum(), self._count + len(rewards)
        return baseline.expand(len(rewards))

    def state(self) -> dict[str, Tensor]:
        return {"reward_sum": self._sum, "reward_count": self._count}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._sum, self._count = state["reward_sum"], state["reward_count"]


@dataclass(frozen=True)
class Estimates:
    """log Z and the baseline of a round: all that is known before the learner's forward pass.

    Attributes:
        reward_cap: limit of |pseudo-reward|; None: there is none.
    """

    partition: PartitionFunction
    baseline: Baseline
    reward_cap: float | None = None

    def update(self, rollouts: Rollouts, scores: Scores, divergence: Divergence) -> tuple[Tensor, Tensor]:
        """log Z and baseline of each of B sequences, [B] float64 each, the round's own samples included."""
        self.partition.update(scores.log_score - scores.behavior_logprob, rollouts.dataset_index)
        log_z = self.partition.log_z(rollouts.dataset_index)
        rewards = pseudo_rewards(scores.behavior_logprob, scores.log_score, log_z, divergence, self.reward_cap)
        return log_z, self.baseline(rewards, rollouts.context_index)

    def state(self) -> dict[str, Tensor]:
        """What `load_state` takes."""
        return self.partition.state() | self.baseline.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.partition.load_state(state)
        self.baseline.load_state(state)


def pseudo_rewards(
    behavior_logprob: Tensor, target_log_score: Tensor, log_z: Tensor, divergence: Divergence, reward_cap: float | None
) -> Tensor:
    """−f'(t) with the sampler in the policy's place, [B] float64: equal on-policy, known before the forward."""
    log_t = behavior_logprob - target_log_score + log_z
    rewards = -divergence.f_prime(torch.where(torch.isneginf(log_z), 0.0, log_t))
    return rewards if reward_cap is None else rewards.clamp(-reward_cap, reward_cap)
