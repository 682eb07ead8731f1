"""The numbers of a round, under namespaced keys, and the line that shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..clock import Clock
from ..engines.memory import peak_memory
from ..learner import Update
from ..measure.diagnostics import pareto_k
from ..measure.estimators import mean
from ..rollouts import Rollouts
from ..scoring import Scores

RESERVED = ("in_support", "ess", "pareto_k")  # keys under target/ that no feature may take


@dataclass(frozen=True)
class Round:
    """What happened in a round.

    Attributes:
        index: counted from 0.
        log_z: what is known of log Z after it, as `PartitionFunction.summary` has it.
        samples: a few completions, as samples.jsonl records them.
        facts: of engine and proposal, by the names of their metrics.
    """

    index: int
    rollouts: Rollouts
    scores: Scores
    log_z: dict[str, float]
    update: Update
    samples: list[dict[str, Any]]
    facts: dict[str, float]
    clock: Clock


def round_metrics(this: Round, feature_names: list[str]) -> dict[str, float]:
    """Everything that metrics.jsonl records of a round; nats, tokens, seconds, bytes."""
    rollouts, scores, update = this.rollouts, this.scores, this.update
    context_index, weights = rollouts.context_index, update.weights
    log_importance = scores.log_score - scores.behavior_logprob  # log P/q
    metrics = {"loss": update.loss}
    for name, values in zip(feature_names, scores.values.T, strict=True):
        metrics |= _with_error(f"target/{name}", values, context_index)
    importance, satisfied = log_importance.softmax(0), scores.log_score > -torch.inf
    metrics["target/in_support"] = float(satisfied.double().mean())
    metrics["target/ess"] = float(1 / importance.square().sum()) if bool(satisfied.any()) else 0.0
    metrics["target/pareto_k"] = pareto_k(log_importance)
    metrics |= {f"z/{name}": value for name, value in this.log_z.items()}
    metrics |= _with_error("policy/kl_to_base", scores.behavior_logprob - scores.base_logprob, context_index)
    log_ratio = weights.policy_logprob - weights.behavior_logprob
    metrics |= {
        "policy/entropy_per_token": -float(scores.behavior_logprob.sum()) / rollouts.num_tokens,
        "policy/length": rollouts.num_tokens / len(rollouts),
        "policy/finished": float(rollouts.finished.double().mean()),
        "policy/pseudo_reward_std": float(weights.pseudo_reward.std(correction=0)),
        "policy/clipped": float(weights.clipped.double().mean()),
        "policy/grad_norm": update.grad_norm,
        "policy/skipped": float(update.skipped),
        "policy/learning_rate": update.learning_rate,
        "policy/log_ratio_max": float(log_ratio.abs().max()),
        "policy/ratio_ess": float(1 / log_ratio.double().softmax(0).square().sum()) / len(rollouts),
    }
    metrics |= this.facts
    total = this.clock.total
    metrics |= {f"time/{phase}": seconds for phase, seconds in this.clock.phases.items()}
    metrics["time/round"] = total
    metrics["time/tokens_per_second"] = rollouts.num_tokens / total
    metrics["memory/peak_bytes"] = float(peak_memory())
    if torch.cuda.is_available():
        metrics["memory/peak_device_bytes"] = float(torch.cuda.max_memory_allocated())
    return metrics


def progress_line(
    round_index: int, rounds: int, metrics: dict[str, float], feature_names: list[str], seconds_left: float
) -> str:
    """One line a round: it survives nohup, a pager and a log file."""
    features = "  ".join(
        f"E[{name}] {metrics[f'target/{name}']:.3f} ± {1.96 * metrics[f'target/{name}_se']:.3f}"
        for name in feature_names
    )
    minutes, seconds = divmod(round(seconds_left), 60)
    return (
        f"round {round_index + 1:>{len(str(rounds))}}/{rounds}  loss {metrics['loss']:+.3f}  {features}  "
        f"log Z {metrics['z/log_z']:.2f} ± {1.96 * metrics['z/log_z_se']:.2f}  ESS {metrics['target/ess']:.0f}  "
        f"KL(π‖a) {metrics['policy/kl_to_base']:.2f}  {metrics['time/tokens_per_second']:,.0f} tok/s  "
        f"{minutes}:{seconds:02d} left"
    )


def _with_error(key: str, values: Tensor, context_index: Tensor) -> dict[str, float]:
    estimate = mean(values, context_index)
    return {key: estimate.value, f"{key}_se": estimate.standard_error}
