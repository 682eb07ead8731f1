"""Which of a run's evaluations was the best, and what follows: checkpoints that stay, and a run that ends early.

An evaluation is better than another if its metric is larger, or smaller where that was asked for. A value that is not
finite, or that the evaluation lacks, is never better than another; a doubtful one (`?`), whose bias may flatter it,
never better than one that is not. Of equals the earlier one is the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..config.schema import TrainConfig
from ..errors import UserError
from ..measure.estimators import Estimate
from ..measure.evaluate import Evaluation
from .checkpoint import checkpoints, refuse_damaged, round_of
from .folder import Json, estimates_of, read_jsonl
from .tables import UNKNOWN, doubtful, label_of, text_of

ByRound = Mapping[int, Mapping[str, Estimate]]
"""Metrics of evaluations, by the rounds that were done."""


def read_evaluations(run_dir: Path) -> dict[int, Evaluation]:
    """All that a run has measured so far, by the rounds that were done."""

    def parse(row: Json) -> tuple[int, Evaluation]:
        return int(row["round"]), Evaluation(estimates_of(row), row.get("num_samples", 0), row.get("num_contexts", 0))

    return dict(read_jsonl(run_dir / "evaluation.jsonl", parse))


def best_rounds(metric: str, evaluations: ByRound) -> list[int]:
    """The rounds whose metric is a number, from the best one on.

    metric: as the config has it, max NAME or min NAME.
    """
    direction, name = metric.split(" ", 1)
    ranks = {}
    for done in sorted(evaluations):
        estimate = evaluations[done].get(name, UNKNOWN)
        if math.isfinite(estimate.value):
            ranks[done] = not doubtful(estimate, name), estimate.value if direction == "max" else -estimate.value
    return sorted(ranks, key=lambda done: ranks[done], reverse=True)  # which leaves equals in their order


def early_end(early_stop: Json | None, evaluations: ByRound, rounds: int) -> str | None:
    """Why a run ends after its last evaluation, in a sentence; None where it goes on, or has reached its last round.

    The first evaluation, of the policy before any training, is one to be better than.

    early_stop: the section of the config.
    """
    if not early_stop or not evaluations or (last := max(evaluations)) >= rounds:
        return None
    metric, patience = early_stop["metric"], early_stop["patience"]
    best = next(iter(best_rounds(metric, evaluations)), min(evaluations))
    name = metric.split(" ", 1)[1]
    if sum(done > best for done in evaluations) < patience:
        return None
    value = text_of(evaluations[best].get(name, UNKNOWN), name)
    return (
        f"stopped early, after {last} of {rounds} rounds: {label_of(name)} was {value} after {best} rounds, and no "
        f"better in {patience} evaluations since"
    )


def best_checkpoint(config: TrainConfig) -> Path:
    """The best of the checkpoints that a run has, by its own `checkpoint.best`.

    Raises:
        UserError: it has none such, or it is damaged.
    """
    metric, run_dir = config.checkpoint.best, Path(config.run_dir)
    if metric is None:
        raise UserError(f"--checkpoint best: {config.run_dir!r} has no checkpoint.best that says which one that is")
    there = {round_of(path): path for path in checkpoints(run_dir)}
    found = {done: evaluation.metrics for done, evaluation in read_evaluations(run_dir).items() if done in there}
    if not (rounds := best_rounds(metric, found)):
        raise UserError(f"--checkpoint best: {config.run_dir!r} has no checkpoint yet whose {metric[4:]} is known")
    path = there[rounds[0]]
    refuse_damaged(path, "take the next best one")
    return path


def refuse_unknown(config: TrainConfig, names: Callable[[], Iterable[str]]) -> None:
    """Raises UserError where the config goes by a metric that is none of those of evaluations."""
    asked = {} if config.early_stop is None else {"early_stop.metric": config.early_stop.metric}
    if config.checkpoint.best is not None:
        asked["checkpoint.best"] = config.checkpoint.best
    for key, metric in asked.items():
        if (name := metric.split(" ", 1)[1]) not in (there := list(names())):
            raise UserError(f"{key}: no evaluation measures {name!r}; there are {', '.join(there)}")
