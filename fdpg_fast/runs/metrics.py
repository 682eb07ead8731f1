"""The numbers of a round, under namespaced keys, and the line that shows them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..by_context import LEAST_PER_CONTEXT
from ..clock import Clock
from ..engines.memory import peak_memory
from ..measure.diagnostics import pareto_k
from ..measure.estimators import mean
from ..rollouts import Rollouts
from ..scoring import Scores
from ..updates import Updates


@dataclass(frozen=True)
class Round:
    """What happened in a round."""

    index: int  # from 0
    rollouts: Rollouts
    scores: Scores
    log_z: dict[str, float]  # known of it after the round, as `PartitionFunction.summary` has it
    updates: Updates
    samples: list[dict[str, Any]]  # a few completions, as samples.jsonl records them
    facts: dict[str, float]  # of engine and proposal, by the names of their metrics
    clock: Clock


def round_metrics(this: Round, feature_names: list[str]) -> dict[str, float]:
    """Everything that metrics.jsonl records of a round; nats, tokens, seconds, bytes."""
    rollouts, scores, updates, weights = this.rollouts, this.scores, this.updates, this.updates.weights
    log_importance = scores.log_score - scores.behavior_logprob  # log P/q
    log_ratio = weights.policy_logprob - weights.behavior_logprob
    satisfied = scores.log_score > -torch.inf
    seconds = this.clock.total
    metrics = {"loss": updates.loss}
    for name, values in zip(feature_names, scores.values.T, strict=True):
        metrics |= _with_error(f"target/{name}", values, rollouts.context_index)
    metrics |= {
        "target/in_support": float(satisfied.double().mean()),
        "target/ess": float(1 / log_importance.softmax(0).square().sum()) if bool(satisfied.any()) else 0.0,
        "target/pareto_k": pareto_k(log_importance),
        **{f"z/{name}": value for name, value in this.log_z.items()},
        **_with_error("policy/kl_to_base", scores.behavior_logprob - scores.base_logprob, rollouts.context_index),
        "policy/entropy_per_token": -float(scores.behavior_logprob.sum()) / rollouts.num_tokens,
        "policy/length": rollouts.num_tokens / len(rollouts),
        "policy/finished": float(rollouts.finished.double().mean()),
        "policy/pseudo_reward_std": float(weights.pseudo_reward.std(correction=0)),
        "policy/clipped": float(weights.clipped.double().mean()),
        "policy/dropped": float(weights.dropped.double().mean()),
        "policy/grad_norm": updates.grad_norm,
        "policy/skipped": float(updates.skipped),
        "policy/learning_rate": updates.learning_rate,
        "policy/log_ratio_max": float(log_ratio.abs().max()),
        "policy/ratio_ess": min(updates.ratio_ess),
        **this.facts,
        **{f"time/{phase}": spent for phase, spent in this.clock.phases.items()},
        "time/round": seconds,
        "time/tokens_per_second": rollouts.num_tokens / seconds,
        "memory/peak_bytes": float(peak_memory()),
    }
    if len(updates.ratio_ess) > 1:
        metrics["policy/updates"] = float(len(updates.made))
        metrics |= {f"policy/ratio_ess/{i}": share for i, share in enumerate(updates.ratio_ess, 1)}
    if torch.cuda.is_available():
        metrics["memory/peak_device_bytes"] = float(torch.cuda.max_memory_allocated())
    return metrics


def progress_line(done: int, rounds: int, metrics: dict[str, float], names: list[str], seconds_left: float) -> str:
    """One line a round: it survives nohup, a pager and a log file."""

    def number(value: float, places: int) -> str:
        return "–" if math.isnan(value) else f"{round(value, places) + 0.0:.{places}f}"  # no "-0.00"

    def known(key: str, places: int) -> str:
        return f"{number(metrics[key], places)} ± {number(1.96 * metrics[f'{key}_se'], places)}"

    minutes, seconds = divmod(round(seconds_left), 60)
    return "  ".join(
        [
            f"round {done:>{len(str(rounds))}}/{rounds}",
            f"loss {round(metrics['loss'], 3) + 0.0:+.3f}",
            *(f"E[{name}] {known(f'target/{name}', 3)}" for name in names),
            f"log Z {known('z/log_z', 2)}" + "?" * (metrics["z/ess"] < LEAST_PER_CONTEXT),
            f"ESS {metrics['target/ess']:.0f}",
            f"KL(π‖a) {number(metrics['policy/kl_to_base'], 2)}",
            *([f"{metrics['policy/updates']:.0f} updates"] if "policy/updates" in metrics else []),
            f"{metrics['time/tokens_per_second']:,.0f} tok/s",
            f"{minutes}:{seconds:02d} left",
        ]
    )


def _with_error(key: str, values: Tensor, context_index: Tensor) -> dict[str, float]:
    estimate = mean(values, context_index)
    return {key: estimate.value, f"{key}_se": estimate.standard_error}
