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
    """Z of every context of the data set from importance weights P/q, which have mean Z whatever q is.

    `kind`: "running" uses all samples so far, "batch" those of the last update, "oracle" those of the first (a frozen
    sample of the base model). With per_context=False all contexts are pooled in one Z.
    """

    def __init__(self, num_contexts: int, *, kind: str = "running", per_context: bool = True):
        self.kind, self.per_context = kind, per_context
        count = torch.zeros(num_contexts if per_context else 1, dtype=torch.float64)
        self._empty = {"count": count, "log_sum": count.log(), "log_sum_squares": count.log()}  # n, log Σw, log Σw²
        self.state = self._empty  # replaced by every update, never changed in place

    def update(self, log_weights: Tensor, dataset_index: Tensor) -> None:
        """Add samples: log P/q [B] float64 and the data set's index of each one's context [B]."""
        if self.kind == "oracle" and bool(self.state["count"].any()):
            return
        before = self._empty if self.kind == "batch" else self.state
        slots = dataset_index * self.per_context  # 0 for all where they are pooled
        self.state = {
            "count": before["count"] + slots.bincount(minlength=len(before["count"])),
            "log_sum": by_context.log_add(before["log_sum"], log_weights, slots),
            "log_sum_squares": by_context.log_add(before["log_sum_squares"], 2 * log_weights, slots),
        }

    def forget(self) -> None:
        """Begin again: what was seen is of another base."""
        self.state = self._empty

    def log_z(self, dataset_index: Tensor) -> Tensor:
        """log Z of each sequence's context, [B] float64; −inf while nothing with P > 0 has been seen."""
        log_z = self.state["log_sum"] - self.state["count"].clamp(min=1).log()
        return log_z[dataset_index * self.per_context]

    def summary(self) -> dict[str, float]:
        """Mean log Z over the contexts seen, its standard error, and effective samples of a typical one of them."""
        count, log_sum, log_sum_squares = (self.state[name] for name in ("count", "log_sum", "log_sum_squares"))
        seen = log_sum > -math.inf
        at_zero = float(((count > 0) & ~seen).sum())
        if not bool(seen.any()):
            return {"log_z": -math.inf, "log_z_se": math.nan, "ess": 0.0, "contexts_at_zero": at_zero}
        ess = (2 * log_sum - log_sum_squares)[seen].exp()
        relative_variance = (1 / ess - 1 / count[seen]).clamp(min=0)  # of each Z_c
        return {
            "log_z": float((log_sum - count.log())[seen].mean()),
            "log_z_se": float(relative_variance.sum().sqrt() / len(ess)),
            "ess": by_context.harmonic_mean(ess),
            "contexts_at_zero": at_zero,
        }


class Baseline:
    """What is subtracted from a pseudo-reward; never depends on the sequence that it is subtracted for.

    `kind`: "leave_one_out": mean of the other samples of the context; "running": mean of all earlier rounds; "none": 0.
    """

    def __init__(self, kind: str = "leave_one_out"):
        self.kind = kind
        # replaced, never changed in place
        self.state = {name: torch.zeros((), dtype=torch.float64) for name in ("reward_sum", "reward_count")}

    def __call__(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Baselines [B] for pseudo-rewards [B] float64, estimated under the sampler; then remembers these.

        groups: [B] int64, the context of each, or what a context's samples are divided into.
        """
        if self.kind == "leave_one_out":
            counts = groups.bincount()
            totals = by_context.sums(rewards, groups, len(counts))
            return (totals[groups] - rewards) / (counts[groups] - 1).clamp(min=1)
        total, count = self.state["reward_sum"], self.state["reward_count"]
        self.state = {"reward_sum": total + rewards.sum(), "reward_count": count + len(rewards)}
        baseline = total / count.clamp(min=1) if self.kind == "running" else torch.zeros_like(total)
        return baseline.expand(len(rewards))


@dataclass(frozen=True)
class Estimates:
    """log Z and the baseline of every round of a run."""

    partition: PartitionFunction
    baseline: Baseline
    reward_cap: float | None = None  # limit of |pseudo-reward|

    def update(
        self, rollouts: Rollouts, scores: Scores, divergence: Divergence, groups: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log Z and baseline of each of B sequences, [B] float64 each, the round's own samples included.

        groups: [B] int64, of a context and an update; a sequence is left out of its own. None: the contexts.
        """
        self.partition.update(scores.log_score - scores.behavior_logprob, rollouts.dataset_index)
        log_z = self.partition.log_z(rollouts.dataset_index)
        rewards = pseudo_rewards(scores.behavior_logprob, scores.log_score, log_z, divergence, self.reward_cap)
        return log_z, self.baseline(rewards, rollouts.context_index if groups is None else groups)

    def state(self) -> dict[str, Tensor]:
        """What `load_state` takes."""
        return self.partition.state | self.baseline.state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave.

        Raises:
            ValueError: it is of another number of contexts.
        """
        if len(state["count"]) != len(self.partition.state["count"]):
            raise ValueError(f"it has Z of {len(state['count'])} contexts, not {len(self.partition.state['count'])}")
        for owner in (self.partition, self.baseline):
            owner.state = {name: state[name] for name in owner.state}


def pseudo_rewards(
    behavior_logprob: Tensor, target_log_score: Tensor, log_z: Tensor, divergence: Divergence, reward_cap: float | None
) -> Tensor:
    """−f'(t) with the sampler in the policy's place, [B] float64: equal on-policy, known before the forward."""
    log_t = behavior_logprob - target_log_score + log_z
    rewards = -divergence.f_prime(torch.where(torch.isneginf(log_z), 0.0, log_t))
    return rewards if reward_cap is None else rewards.clamp(-reward_cap, reward_cap)
