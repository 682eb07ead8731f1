"""The partition function Z_c = E_q[P/q] and the baseline: all that is known before the learner's forward pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdpg_kernels import Divergence

KINDS = ("running", "batch", "oracle")
BASELINES = ("leave_one_out", "running", "none")


class PartitionFunction:
    """Z of every context from importance weights P/q, which have mean Z whatever q is.

    Args:
        num_contexts: contexts of the data set; one slot each.
        kind: "running" uses all samples so far, "batch" those of the last update, "oracle" those of the first
            (a frozen sample of the base model).
        per_context: False pools all contexts in one Z.
    """

    def __init__(self, num_contexts: int, *, kind: str = "running", per_context: bool = True):
        self.kind, self.per_context = kind, per_context
        slots = num_contexts if per_context else 1
        self._log_sum = torch.full((slots,), -math.inf, dtype=torch.float64)  # log Σw
        self._log_sum_squares = self._log_sum.clone()  # log Σw²
        self._count = torch.zeros(slots, dtype=torch.float64)

    def update(self, log_weights: Tensor, contexts: Tensor) -> None:
        """Add samples: log P/q [B] float64 and the data set's index of each one's context [B]."""
        if self.kind == "oracle" and bool(self._count.any()):
            return
        if self.kind == "batch":
            self._log_sum.fill_(-math.inf)
            self._log_sum_squares.fill_(-math.inf)
            self._count.zero_()
        slots = contexts if self.per_context else torch.zeros_like(contexts)
        self._count.index_add_(0, slots, torch.ones_like(log_weights))
        self._log_sum = _log_add(self._log_sum, log_weights, slots)
        self._log_sum_squares = _log_add(self._log_sum_squares, 2 * log_weights, slots)

    def log_z(self, contexts: Tensor) -> Tensor:
        """log Z of each sequence's context, [B] float64; −inf while nothing with P > 0 has been seen."""
        estimate = self._log_sum - self._count.clamp(min=1).log()
        return estimate[contexts if self.per_context else torch.zeros_like(contexts)]

    def summary(self) -> dict[str, float]:
        """Mean log Z over the contexts seen, its standard error, and effective samples a context."""
        seen = self._log_sum > -math.inf
        at_zero = float(((self._count > 0) & ~seen).sum())
        if not bool(seen.any()):
            return {"log_z": -math.inf, "log_z_se": math.nan, "ess": 0.0, "contexts_at_zero": at_zero}
        ess = (2 * self._log_sum - self._log_sum_squares)[seen].exp()
        relative_variance = (1 / ess - 1 / self._count[seen]).clamp(min=0)  # of each Z_c
        log_z = self._log_sum[seen] - self._count[seen].log()
        return {
            "log_z": float(log_z.mean()),
            "log_z_se": float(relative_variance.sum().sqrt() / len(ess)),
            "ess": float(ess.mean()),
            "contexts_at_zero": at_zero,
        }

    def state(self) -> dict[str, Tensor]:
        """A copy of what `load_state` takes."""
        tensors = {"log_sum": self._log_sum, "log_sum_squares": self._log_sum_squares, "count": self._count}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._log_sum, self._log_sum_squares, self._count = (
            state[name].clone() for name in ("log_sum", "log_sum_squares", "count")
        )


class Baseline:
    """What is subtracted from a pseudo-reward; never depends on the sequence that it is subtracted for.

    Args:
        kind: "leave_one_out": mean of the other samples of the context; "running": mean of all earlier rounds;
            "none": 0.
    """

    def __init__(self, kind: str = "leave_one_out"):
        self.kind = kind
        self._sum = torch.zeros((), dtype=torch.float64)
        self._count = torch.zeros((), dtype=torch.float64)

    def __call__(self, rewards: Tensor, context_index: Tensor) -> Tensor:
        """Baselines [B] for pseudo-rewards [B] float64, estimated under the sampler; then remembers these."""
        if self.kind == "leave_one_out":
            num_contexts = int(context_index.max()) + 1
            totals = torch.zeros(num_contexts, dtype=torch.float64).index_add(0, context_index, rewards)
            counts = torch.bincount(context_index, minlength=num_contexts)
            others = (counts[context_index] - 1).clamp(min=1)
            return (totals[context_index] - rewards) / others
        baseline = self._sum / self._count.clamp(min=1) if self.kind == "running" else torch.zeros(())
        self._sum, self._count = self._sum + rewards.sum(), self._count + len(rewards)
        return baseline.double().expand(len(rewards))

    def state(self) -> dict[str, Tensor]:
        return {"sum": self._sum, "count": self._count}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._sum, self._count = state["sum"].clone(), state["count"].clone()


def pseudo_rewards(
    behavior_logprob: Tensor,
    target_log_score: Tensor,
    log_z: Tensor,
    divergence: Divergence,
    reward_cap: float | None,
) -> Tensor:
    """−f'(t) with the sampler in the policy's place, [B] float64: equal on-policy, known before the forward."""
    log_t = behavior_logprob - target_log_score + log_z
    rewards = -divergence.f_prime(torch.where(torch.isneginf(log_z), 0.0, log_t))
    return rewards if reward_cap is None else rewards.clamp(-reward_cap, reward_cap)


def _log_add(totals: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """log(exp(totals) + Σ exp(values) by slot), exact for −inf."""
    largest = totals.scatter_reduce(0, slots, values, "amax")
    shift = torch.where(torch.isneginf(largest), 0.0, largest)
    sums = (totals - shift).exp().index_add(0, slots, (values - shift[slots]).exp())
    return sums.log() + shift
