"""λ of prescribed moments from samples of the base, with its error; and what the moments are on another sample.

The target of context c is p_c ∝ a·exp(log_weight + centred·λ), centred = f − moment, and λ makes the mean over contexts
of E_{p_c}[centred] vanish (Khalifa et al. 2021, eq. 4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import by_context
from .errors import UserError

REMEDY = "raise target_fit_samples (of compare: --base-samples)"


class TooFewSamples(UserError):
    """λ rests on too little, and may not with more samples of each context."""


@dataclass(frozen=True)
class BaseSample:
    """Samples of the base that the target allows, S of C contexts."""

    centred: Tensor  # f − moment [S, F] float64
    log_weights: Tensor  # log φ without λ, plus log a/q where q is another sampler [S] float64, finite
    context_index: Tensor  # 0..C−1 [S]
    fraction: float  # of all contexts that samples were drawn of, at random


@dataclass(frozen=True)
class Moments:
    """E_p[centred], averaged over contexts."""

    mean: Tensor  # [F]
    covariance: Tensor  # of `mean`, [F, F]
    slope: Tensor  # ∂mean/∂λ, [F, F]
    ess: Tensor  # effective samples of each context, [C]


def moments_under(exponents: Tensor, sample: BaseSample) -> Moments:
    """E_p[centred] for λ = `exponents` [F].

    Weights are normalised within a context, which biases its mean by O(1/n); the jackknife takes that off (Quenouille
    1956). The covariance is that of two-stage sampling (Cochran 1977, §10.3): contexts differ, which counts as far as
    they are not all in the sample, and within each the samples do.
    """
    centred, owner = sample.centred, sample.context_index
    counts = owner.bincount().double()[:, None]  # [C, 1]
    contexts = len(counts)
    scaled, _ = by_context.scaled_exp(sample.log_weights + centred @ exponents, owner, contexts)
    share = (scaled / by_context.sums(scaled, owner, contexts)[owner])[:, None]  # [S, 1]
    means = by_context.sums(share * centred, owner, contexts)  # [C, F]
    deviation = centred - means[owner]
    influence = share * deviation / (1 - share).clamp(min=1e-9)  # what the mean would lose without this sample [S, F]
    average = by_context.sums(influence, owner, contexts) / counts
    means = means + (counts - 1) * average
    between, within = means - means.mean(0), ((counts - 1) / counts).sqrt()[owner] * (influence - average[owner])
    covariance = (1 - sample.fraction) * between.T @ between / max(1, contexts - 1)
    covariance = (covariance + sample.fraction * within.T @ within / contexts) / contexts
    slope = (share * deviation).T @ deviation / contexts
    return Moments(means.mean(0), covariance, slope, 1 / by_context.sums(share[:, 0].square(), owner, contexts))


def solve_exponents(sample: BaseSample) -> tuple[Tensor, Tensor, float]:
    """λ [F] at which the moments hold, its covariance [F, F], and the effective samples of a typical context.

    Newton steps, halved until the moments come nearer. The covariance is the sandwich slope⁻¹·cov·slope⁻¹ (Huber 1967).

    Raises:
        TooFewSamples: there is none.
    """
    unit = sample.centred.abs().amax(0)  # λ is found per unit of each feature: tolerances must not depend on it
    sample = replace(sample, centred=sample.centred / unit)
    exponents = torch.zeros_like(unit)
    found = moments_under(exponents, sample)
    for _ in range(100):
        inverse = torch.linalg.pinv(found.slope, rtol=1e-12, hermitian=True)
        if float(found.mean.abs().max()) < 1e-9:
            covariance = inverse @ found.covariance @ inverse / (unit[:, None] * unit)
            return exponents / unit, covariance, by_context.harmonic_mean(found.ess)
        length, step, distance = 1.0, inverse @ found.mean, float(found.mean.norm())
        trial = moments_under(exponents - step, sample)
        while length > 1e-8 and float(trial.mean.norm()) > (1 - 1e-4 * length) * distance:
            length /= 2
            trial = moments_under(exponents - length * step, sample)
        exponents, found = exponents - length * step, trial
        if length <= 1e-8 or float(exponents.abs().max()) > 1e3:
            break
    raise TooFewSamples(
        "target: no λ gives the wanted moments together on this sample of the base (they contradict each other or "
        f"lie at the edge of what it contains); {REMEDY} or choose other moments"
    )
