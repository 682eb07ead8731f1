"""What is done with a run that has a checkpoint: measure it, and sample from it."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from torch import Tensor

from ..clock import Clock
from ..contexts import Context, make_context
from ..measure import quasi_rejection
from ..measure.estimators import log_partition
from ..measure.evaluate import Evaluation
from ..rollouts import Rollouts
from ..trainer import Trainer


def evaluate_checkpoint(
    trainer: Trainer, samples_per_context: int | None, seed: int, base: Rollouts | None = None
) -> Evaluation:
    """Measure the newest checkpoint on a sample of its own seed.

    Args:
        samples_per_context: left out, the config's.
        base: samples of the base for the evaluation contexts: Z, and λ of a distributional target, are then theirs.
    """
    trainer.restore()
    known, scorer = None, trainer.scorer
    if base is not None:
        log_phi = scorer.log_phi(base, fit=scorer.target.is_distributional)
        known = log_partition(torch.zeros_like(log_phi), log_phi, base.context_index)  # P/a is φ
    samples = samples_per_context or trainer.config.evaluation.samples_per_context
    with contextlib.closing(trainer.engine):
        return trainer.measure(samples, trainer.seed("fresh evaluation", seed), 0, known)[0]


def sample_base(trainer: Trainer, samples_per_context: int, seed: int) -> Rollouts:
    """Samples of the base for the evaluation contexts; the run need not have begun."""
    with trainer.base.as_base() as model, contextlib.closing(trainer.start_engine(model, 0)) as engine:
        return engine.sample(trainer.eval_contexts, samples_per_context, seed)


def sample_checkpoint(trainer: Trainer, prompt: str | None, count: int, seed: int) -> list[dict[str, Any]]:
    """Completions of the newest checkpoint, of one prompt or of the evaluation contexts in turn."""
    contexts = _contexts_to_continue(trainer, prompt, count)
    with contextlib.closing(trainer.engine) as engine:
        rollouts = engine.sample(contexts, -(-count // len(contexts)), trainer.seed("samples", seed))
    return trainer.scorer.rows(trainer.scorer(rollouts, Clock()), count)


def quasi_rejection_sample(
    trainer: Trainer, prompt: str | None, count: int, seed: int, beta: float, max_draws: int
) -> quasi_rejection.Kept:
    """As `sample_checkpoint`, of p_β ∝ min(p, β·π) instead of the policy π; see `quasi_rejection`."""
    contexts = _contexts_to_continue(trainer, prompt, count)
    batches = itertools.count()

    def draw(indices: list[int], samples_per_context: int) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
        batch_seed = trainer.seed(f"quasi-rejection {seed}", next(batches))
        rollouts = trainer.engine.sample([contexts[i] for i in indices], samples_per_context, batch_seed)
        scores = trainer.scorer(rollouts, Clock())
        rows = trainer.scorer.rows(scores, len(rollouts))
        return rows, scores.log_score - scores.behavior_logprob, torch.tensor(indices)[rollouts.context_index]

    with contextlib.closing(trainer.engine):
        return quasi_rejection.sample(
            draw, contexts=len(contexts), count=count, beta=beta, max_draws=max_draws, seed=seed
        )


def _contexts_to_continue(trainer: Trainer, prompt: str | None, count: int) -> list[Context]:
    trainer.restore()
    if prompt is not None:
        trainer.eval_contexts = [make_context(0, prompt, {}, trainer.tokenizer, trainer.room, "--prompt")]
    return trainer.eval_contexts[:count]
