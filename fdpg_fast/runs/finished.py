"""Runs that have a checkpoint: sampled from, measured, and measured alike, so that they can be compared.

The Z that a run's own evaluation takes from its own sample differs from run to run and biases divergences (see
`estimators.divergence_matrix`). In a comparison every run of one base and one target is held against one Z, from one
large sample of the base.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..clock import Clock
from ..config.schema import TrainConfig
from ..contexts import Context, make_context
from ..errors import UserError
from ..measure import quasi_rejection
from ..measure.estimators import log_partition
from ..measure.evaluate import Evaluation
from ..progress import activity
from ..rollouts import Rollouts
from ..session import Session
from .checkpoint import checkpoints
from .folder import read_config

log = logging.getLogger(__name__)


def read_finished(run_dir: str | Path) -> TrainConfig:
    """The config of a run that has a checkpoint.

    Raises:
        UserError: it has none, or there is no run.
    """
    config = read_config(run_dir)
    if not checkpoints(run_dir):
        raise UserError(f"{str(run_dir)!r} has no checkpoint yet; train it first: fdpg-fast train --resume {run_dir}")
    return config


def evaluate_checkpoint(
    session: Session, samples_per_context: int | None, seed: int, base: Rollouts | None = None
) -> Evaluation:
    """Measure the newest checkpoint on a sample of its own seed.

    Args:
        samples_per_context: left out, the config's.
        base: samples of the base for the evaluation contexts: Z, and λ of a distributional target, are then theirs.
    """
    session.restore()
    log_z, scorer = None, session.scorer
    if base is not None:
        log_phi = scorer.log_phi(base, fit=bool(scorer.target.moments))
        log_z = log_partition(torch.zeros_like(log_phi), log_phi, base.context_index)  # P/a is φ
    samples = samples_per_context or session.config.evaluation.samples_per_context
    with contextlib.closing(session):
        return session.measure(samples, session.seed("fresh evaluation", seed), 0, log_z)[0]


def sample_checkpoint(session: Session, prompt: str | None, count: int, seed: int) -> list[dict[str, Any]]:
    """Completions of the newest checkpoint, of one prompt or of the evaluation contexts in turn."""
    contexts = _contexts_to_continue(session, prompt, count)
    with contextlib.closing(session), activity(f"sampling {count} completions"):
        rollouts = session.engine.sample(contexts, -(-count // len(contexts)), session.seed("samples", seed))
        return session.scorer.rows(session.scorer(rollouts, Clock()), count)


def quasi_rejection_sample(
    session: Session, prompt: str | None, count: int, seed: int, beta: float, max_draws: int
) -> quasi_rejection.Kept:
    """Completions of p_β ∝ min(p, β·π) instead of the policy π; see `quasi_rejection`, else `sample_checkpoint`."""
    contexts = _contexts_to_continue(session, prompt, count)
    batches = itertools.count()

    def draw(indices: list[int], samples_per_context: int) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
        batch_seed = session.seed(f"quasi-rejection {seed}", next(batches))
        rollouts = session.engine.sample([contexts[i] for i in indices], samples_per_context, batch_seed)
        scores = session.scorer(rollouts, Clock())
        rows = session.scorer.rows(scores, len(rollouts))
        return rows, scores.log_score - scores.behavior_logprob, torch.tensor(indices)[rollouts.context_index]

    settings: dict[str, Any] = dict(contexts=len(contexts), count=count, beta=beta, max_draws=max_draws, seed=seed)
    with contextlib.closing(session), activity(f"sampling until {count} completions are accepted"):
        return quasi_rejection.sample(draw, **settings)


def measure_runs(run_dirs: Sequence[str | Path], samples: int, base_samples: int, seed: int) -> list[Evaluation]:
    """Evaluate the newest checkpoint of each run on the evaluation contexts of the first.

    Args:
        samples: completions a context from each policy.
        base_samples: completions a context from the base, kept in the first run's folder.

    Raises:
        UserError: a run has no checkpoint, or completions of another length than the first.
    """
    configs = [read_finished(run_dir) for run_dir in run_dirs]
    first = configs[0]
    for config in configs:
        if config.engine.max_new_tokens != first.engine.max_new_tokens:
            raise UserError(
                f"compare: completions of {config.run_dir!r} end after {config.engine.max_new_tokens} tokens and those "
                f"of {first.run_dir!r} after {first.engine.max_new_tokens}: distributions over different texts"
            )
    evaluations = []
    for number, config in enumerate(configs, start=1):
        log.info("measuring %d/%d: %s", number, len(configs), config.run_dir)
        alike = config.model_copy(update={"contexts": first.contexts, "evaluation": first.evaluation})
        evaluations.append(measure(alike, samples, base_samples, seed, Path(first.run_dir)))
    return evaluations


def measure(config: TrainConfig, samples: int, base_samples: int, seed: int, folder: Path) -> Evaluation:
    """Evaluate a run's newest checkpoint; the base's sample comes from `folder`, or is drawn and kept there."""
    session = Session(config, resume=True)
    return evaluate_checkpoint(session, samples, seed, frozen_base_sample(session, base_samples, seed, folder))


def frozen_base_sample(session: Session, samples: int, seed: int, folder: Path) -> Rollouts:
    """The sample of a run's base for its evaluation contexts; drawn once for all runs that share both."""
    config, contexts = session.config, tuple(session.eval_contexts)
    same = [config.model, config.dtype, [c.token_ids for c in contexts], config.engine.max_new_tokens, samples, seed]
    key = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:12]
    path = folder / f"base-sample-{key}.safetensors"
    if path.exists():
        return Rollouts(contexts=contexts, **load_file(path))
    what = f"drawing {samples} completions of the base for each of {len(contexts)} contexts, for Z"
    with session.base.as_base() as base, activity(what, samples * len(contexts)):
        engine = session.start_engine(base, 0)
        try:
            rollouts = engine.sample(contexts, samples, seed)
        finally:
            engine.close()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # of two runs side by side the later one wins
    save_file(rollouts.tensors(), temporary)
    temporary.rename(path)
    return rollouts


def _contexts_to_continue(session: Session, prompt: str | None, count: int) -> list[Context]:
    session.restore()
    if prompt is not None:
        session.eval_contexts = [make_context(0, prompt, {}, session.tokenizer, session.room, "--prompt")]
    return session.eval_contexts[:count]
