"""Runs that have a checkpoint, sampled from and measured."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chats import ContextsConfig, is_chat
from ..clock import Clock
from ..config.schema import TrainConfig
from ..contexts import Context, make_contexts
from ..errors import UserError
from ..measure import quasi_rejection
from ..measure.estimators import log_partition
from ..measure.evaluate import Evaluation
from ..measure.target_samples import accepted
from ..preparation import find_target_samples
from ..progress import activity
from ..rollouts import Rollouts
from ..session import Session
from .checkpoint import checkpoints
from .folder import read_config

log = logging.getLogger(__name__)


def read_finished(run_dir: str | Path) -> TrainConfig:
    """The config of a run; raises UserError where there is none, or it has no checkpoint."""
    config = read_config(run_dir)
    if not checkpoints(run_dir):
        raise UserError(f"{str(run_dir)!r} has no checkpoint yet; train it first: fdpg-fast train --resume {run_dir}")
    return config


def evaluate_checkpoint(session: Session, samples: int | None, seed: int, base: Rollouts | None = None) -> Evaluation:
    """Measure the newest checkpoint on a sample of its own seed.

    Args:
        samples: completions a context; None: as many as the config says.
        base: samples of the base for the evaluation contexts: Z, λ of a distributional target, and exact samples of a
            hard constraint are then theirs; None: the exact samples are the run's.
    """
    session.restore()
    log_z, scorer = None, session.scorer
    if base is None:
        find_target_samples(session)
    else:
        known = scorer.read(base, Clock(), is_of_base=True)
        if scorer.target.moments:
            scorer.target = scorer.target.fit(known.values, base.context_index, known.base_logprob)
        log_phi = scorer.target.log_phi(known.values, known.base_logprob)
        log_z = log_partition(torch.zeros_like(log_phi), log_phi, base.context_index)  # P/a is φ
        session.target_samples = accepted(base, log_phi, scorer)
    samples = samples or session.config.evaluation.samples_per_context
    with contextlib.closing(session):
        return session.measure(samples, session.seed("fresh evaluation", seed), 0, log_z)[0]


def sample_checkpoint(session: Session, prompt: str | None, count: int, seed: int) -> list[dict[str, Any]]:
    """Completions of the newest checkpoint, of one prompt or of the evaluation contexts in turn."""
    contexts = _contexts_to_continue(session, prompt, count)
    with contextlib.closing(session), activity(f"sampling {count} completions"):
        rollouts = session.sample(contexts, -(-count // len(contexts)), session.seed("samples", seed))
        return session.scorer.rows(session.scorer(rollouts, Clock()), count)


def quasi_rejection_sample(
    session: Session, prompt: str | None, count: int, seed: int, beta: float, max_draws: int
) -> quasi_rejection.Kept:
    """Completions of p_β ∝ min(p, β·π) instead of the policy π; see `quasi_rejection`, else `sample_checkpoint`."""
    contexts = _contexts_to_continue(session, prompt, count)
    batches = itertools.count()

    def draw(indices: list[int], samples_per_context: int) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
        batch_seed = session.seed(f"quasi-rejection {seed}", next(batches))
        rollouts = session.sample([contexts[i] for i in indices], samples_per_context, batch_seed)
        scores = session.scorer(rollouts, Clock())
        rows = session.scorer.rows(scores, len(rollouts))
        return rows, scores.log_score - scores.behavior_logprob, torch.tensor(indices)[rollouts.context_index]

    settings: dict[str, Any] = dict(contexts=len(contexts), count=count, beta=beta, max_draws=max_draws)
    settings["seed"] = session.seed("acceptance", seed)
    with contextlib.closing(session), activity(f"sampling until {count} completions are accepted"):
        return quasi_rejection.sample(draw, **settings)


def _contexts_to_continue(session: Session, prompt: str | None, count: int) -> list[Context]:
    session.restore()
    if prompt is not None:
        row = {**dict.fromkeys(session.contexts[0].columns), "prompt": prompt}  # features may ask for any column
        prompting = session.prompting
        with contextlib.suppress(ValueError, RecursionError):  # it is no JSON
            row["prompt"] = messages if is_chat(messages := json.loads(prompt)) else prompt
        if row["prompt"] is prompt:
            prompting = replace(prompting, settings=ContextsConfig())
            if session.contexts[0].messages is not None:
                log.info("--prompt is continued as it stands, without the chat template; a chat is a list of messages")
        session.eval_contexts = make_contexts([("--prompt", row)], prompting)
    return session.eval_contexts[:count]
