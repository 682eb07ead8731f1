"""What precedes the first round, from samples of the base: λ of prescribed moments, and the oracle's Z."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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

Draw = Callable[[Sequence[int], int, str], tuple[Tensor, Tensor]]
"""Indices of contexts, samples of each, what for → values of the target's features [S, F], places in the list [S]."""


def prepare(session: Session) -> None:
    """Fit λ and measure the oracle's Z where the config asks for it; the policy still is the base.

    Raises:
        UserError: λ cannot be had from so many samples.
    """
    config, state, scorer, total = session.config, session.state, session.scorer, len(session.contexts)

    def draw(indices: Sequence[int], each: int, purpose: str) -> tuple[Tensor, Tensor]:
        with activity(f"{purpose} on samples of the base", each * len(indices)):
            seed = session.seed(purpose, len(indices))
            samples = session.sample([session.contexts[i] for i in indices], each, seed)
            return scorer.values(samples), samples.context_index

    if scorer.target.needs_fit:
        order = random.Random(session.seed("fit", 0)).sample(range(total), total)
        scorer.target = target = fit_moments(scorer.target, draw, order, config.target_fit_samples)
        state.exponents = (target.exponents or (), target.exponent_errors)
    if config.partition.kind == "oracle":
        values, context_index = draw(range(total), ORACLE_SAMPLES, "measuring Z")
        state.estimates.partition.update(scorer.target.log_phi(values), context_index)  # P/q is φ
        found = state.estimates.partition.summary()
        log_z = Estimate(found["log_z"], found["log_z_se"], math.nan, found["ess"])
        log.info(
            f"oracle: log Z = {text_of(log_z)} on average, from {ORACLE_SAMPLES} samples of the base for each context"
        )
        if doubtful(log_z):
            log.warning("oracle: log Z: %s", DOUBT)
        if found["contexts_at_zero"]:
            at_zero = f"in {found['contexts_at_zero']:,.0f} of {total:,} contexts none of these meets the target"
            log.warning(f"oracle: {at_zero}: nothing is learned there; choose partition.kind: running")


def fit_moments(target: Target, draw: Draw, order: Sequence[int], budget: int) -> Target:
    """λ from `budget` samples of contexts in random order; and says how it holds on a second sample, half as large.

    Contexts differ, so the more of them the better, as long as the weights within each rest on enough samples: until
    they do, half of the contexts are sampled again.
    """
    contexts, least = len(order), min(len(order), FIT_CONTEXTS)
    count, each = max(least, min(contexts, budget // FIT_SAMPLES)), 0
    values, owner = torch.zeros(0, len(target.features), dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    while True:
        more = max(1, budget // count) - each
        kept, (new_values, new_owner) = owner < count, draw(order[:count], more, "fitting λ")
        values, owner = torch.cat([values[kept], new_values]), torch.cat([owner[kept], new_owner])
        each += more
        try:
            target = target.fit(values, owner, contexts)
            break
        except TooFewSamples:
            if count == least:
                raise
            count = max(least, count // 2)
    fitted = target.moments_found(values, owner, contexts)
    others = [*order[count:], *order[:count]][: max(least, count // 2)]
    found = target.moments_found(*draw(others, max(1, budget // (2 * len(others))), "checking λ"), contexts)
    variances = found.covariance.diagonal(), (fitted.covariance + found.covariance).diagonal()
    columns = (target.exponents or (), target.exponent_errors, found.mean, *(x.sqrt() for x in variances))
    for (name, moment), exponent, exponent_error, off, error, both in zip(target.moments, *columns, strict=True):
        log.info(
            f"target: λ of {name} = {with_error(exponent, 1.96 * exponent_error)}, from {len(values):,} samples of the "
            f"base in {len(fitted.ess):,} of {contexts:,} contexts; on a second sample E_p[{name}] = "
            f"{with_error(moment + float(off), 1.96 * float(error))} (wanted {moment:g})"
        )
        if abs(off) > MOST_ERRORS * both:
            log.warning("target: λ of %s does not hold on the second sample; %s", name, REMEDY)
    return target
