"""What precedes the first round, from samples of the policy as it starts: λ, the oracle's Z, exact samples of p.

It is the base, or what it samples is reweighted to the base by a/q.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import ranks
from .clock import Clock
from .contexts import Context
from .errors import UserError, one_line
from .measure.estimators import Estimate
from .measure.target_samples import TargetSamples, accepted
from .moments import REMEDY, TooFewSamples
from .progress import activity
from .rollouts import Rollouts
from .runs.folder import TARGET_SAMPLES
from .runs.tables import DOUBT, doubtful, text_of, with_error
from .runs.tensors import keep
from .session import Session
from .targets import Target

log = logging.getLogger(__name__)

ORACLE_SAMPLES = 64  # for each context
FIT_SAMPLES = 32  # for each context at first
FIT_CONTEXTS = 8  # at least, where there are as many
MOST_ERRORS = 4.0  # that a moment of the second sample may be off

Draw = Callable[[Sequence[int], int, str], tuple[Tensor, ...]]
"""Indices of contexts, samples of each, what for → what `Target.fit` takes: values of the target's features [S, F],
places in the list [S], and log a and log q [S] if the base may be another."""


def prepare(session: Session) -> None:
    """Fit λ and measure the oracle's Z where the config asks for it; the policy is as it starts.

    Raises:
        UserError: λ cannot be had from so many samples.
    """
    config, state, scorer, total = session.config, session.state, session.scorer, len(session.contexts)
    source = "the base" if config.starts_from_base else "the model, reweighted to the base,"

    def draw(indices: Sequence[int], each: int, purpose: str) -> tuple[Tensor, ...]:
        with activity(f"{purpose} on samples of {source.strip(',')}", each * len(indices)):
            seed = session.seed(purpose, len(indices))
            samples = session.sample([session.contexts[i] for i in indices], each, seed)
            known = scorer.read(samples, Clock(), config.starts_from_base)
            return known.values, samples.context_index, known.base_logprob, known.behavior_logprob

    if scorer.target.needs_fit:
        order = random.Random(session.seed("fit", 0)).sample(range(total), total)
        scorer.target = target = fit_moments(scorer.target, draw, order, config.target_fit_samples, source)
        state.exponents = (target.exponents or (), target.exponent_errors)
    if config.partition.kind == "oracle":
        values, context_index, log_a, log_q = draw(range(total), ORACLE_SAMPLES, "measuring Z")
        state.estimates.partition.update(scorer.target.log_phi(values, log_a) + log_a - log_q, context_index)
        found = state.estimates.partition.summary()
        log_z = Estimate(found["log_z"], found["log_z_se"], math.nan, found["ess"])
        log.info(
            f"oracle: log Z = {text_of(log_z)} on average, from {ORACLE_SAMPLES} samples of {source} for each context"
        )
        if doubtful(log_z):
            log.warning("oracle: log Z: %s", DOUBT)
        if found["contexts_at_zero"]:
            at_zero = f"in {found['contexts_at_zero']:,.0f} of {total:,} contexts none of these meets the target"
            log.warning(f"oracle: {at_zero}: nothing is learned there; choose partition.kind: running")


def find_target_samples(session: Session) -> None:
    """Give the session the run's exact samples of the target, for evaluations.

    They are drawn and kept before the first round, while the policy is the base. There are none where φ is not 0 or 1,
    or the base is another, or moves, or nothing asks for them.

    Raises:
        UserError: their file is damaged.
    """
    config, target, contexts = session.config, session.scorer.target, session.eval_contexts
    each, path = config.evaluation.base_samples, Path(config.run_dir) / TARGET_SAMPLES
    is_base = config.starts_from_base and not config.base.refresh_every
    if not (each and is_base and all(term.can_be_zero for term in target.terms)):
        return
    if session.checkpoint is not None:
        session.target_samples = _read(path, contexts)
        return
    with activity("sampling the base for exact samples of the target", each * len(contexts)):
        base = session.sample(contexts, each, session.seed("target samples", 0))
    known = session.scorer.read(base, Clock(), is_of_base=True)
    found = accepted(base, target.log_phi(known.values, known.base_logprob), session.scorer)
    if found is None:
        log.info("target: none of %s samples of the base is an exact sample of it, to measure on", f"{len(base):,}")
        return
    without = len(contexts) - len(found.rollouts.contexts)
    log.info(
        f"target: {len(found.rollouts):,} of {len(base):,} samples of the base meet it, to measure on; "
        f"in {without:,} of {len(contexts):,} contexts none does"
    )
    session.target_samples, tensors = found, found.rollouts.tensors()
    tensors["dataset_index"] = torch.tensor([context.index for context in found.rollouts.contexts], dtype=torch.long)
    if ranks.is_first():
        keep(path, tensors | {"draws": torch.tensor(found.draws)})


def _read(path: Path, contexts: Sequence[Context]) -> TargetSamples | None:
    """The samples in a run's folder, if it has some."""
    try:
        tensors = load_file(path)
        draws, chosen = int(tensors.pop("draws")), tensors.pop("dataset_index").tolist()
        return TargetSamples(Rollouts(contexts=tuple(contexts[index] for index in chosen), **tensors), draws)
    except FileNotFoundError:
        return None
    except (SafetensorError, LookupError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); delete it to evaluate without") from error


def fit_moments(target: Target, draw: Draw, order: Sequence[int], budget: int, source: str = "the base") -> Target:
    """λ from `budget` samples of contexts in random order; and says how it holds on a second sample, half as large.

    Contexts differ, so the more of them the better, as long as the weights within each rest on enough samples: until
    they do, half of the contexts are sampled again. `source`: what is sampled, in words.
    """
    contexts, least = len(order), min(len(order), FIT_CONTEXTS)
    count, each = max(least, min(contexts, budget // FIT_SAMPLES)), 0
    sample: list[Tensor] = []
    while True:
        more = max(1, budget // count) - each
        drawn = draw(order[:count], more, "fitting λ")
        kept = [column[sample[1] < count] for column in sample] or [column[:0] for column in drawn]
        sample = [torch.cat(pair) for pair in zip(kept, drawn, strict=True)]
        each += more
        try:
            target = target.fit(*sample, contexts=contexts)
            break
        except TooFewSamples:
            if count == least:
                raise
            count = max(least, count // 2)
    fitted = target.moments_found(*sample, contexts=contexts)
    others = [*order[count:], *order[:count]][: max(least, count // 2)]
    found = target.moments_found(*draw(others, max(1, budget // (2 * len(others))), "checking λ"), contexts=contexts)
    variances = found.covariance.diagonal(), (fitted.covariance + found.covariance).diagonal()
    columns = (target.exponents or (), target.exponent_errors, found.mean, *(x.sqrt() for x in variances))
    for (name, moment), exponent, exponent_error, off, error, both in zip(target.moments, *columns, strict=True):
        log.info(
            f"target: λ of {name} = {with_error(exponent, 1.96 * exponent_error)}, from {len(sample[0]):,} samples of "
            f"{source} in {len(fitted.ess):,} of {contexts:,} contexts; on a second sample E_p[{name}] = "
            f"{with_error(moment + float(off), 1.96 * float(error))} (wanted {moment:g})"
        )
        if abs(off) > MOST_ERRORS * both:
            log.warning("target: λ of %s does not hold on the second sample; %s", name, REMEDY)
    return target
