"""What precedes the first round: λ of prescribed moments and the oracle's Z, from samples of the policy as it starts.

It is the base, or what it samples is reweighted to the base by a/q.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import is_start
from .clock import Clock
from .measure.estimators import Estimate
from .moments import REMEDY, TooFewSamples
from .progress import activity
from .runs.tables import DOUBT, doubtful, text_of, with_error
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
    source = "the base" if is_start(config) else "the model, reweighted to the base,"

    def draw(indices: Sequence[int], each: int, purpose: str) -> tuple[Tensor, ...]:
        with activity(f"{purpose} on samples of {source.strip(',')}", each * len(indices)):
            seed = session.seed(purpose, len(indices))
            samples = session.sample([session.contexts[i] for i in indices], each, seed)
            known = scorer.read(samples, Clock(), is_start(config))
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
