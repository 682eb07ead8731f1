"""Targets p(x|c) ∝ a(x|c)·φ(x,c): what the policy is trained towards, as a product of terms.

pointwise(f)                     φ = f(x), a constraint where f is 0 or 1 (GDC)
rlhf(r, beta)                    φ = exp(r/β): the target of RLHF with a KL penalty
distributional([f], [moment])    φ = exp(λ·(f − moment)), λ such that E_p[f] = moment
base_power(kappa)                φ = a^(κ−1): with what else there is, p ∝ a^κ·φ
pointwise(f) * distributional(…) hybrid: f stays hard, λ is fitted under it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import by_context
from .by_context import LEAST_ESS, LEAST_PER_CONTEXT
from .errors import RunError, UserError, one_line
from .features import Feature
from .moments import REMEDY, BaseSample, Moments, TooFewSamples, moments_under, solve_exponents

LEAST_MET = 8  # samples of a context that meet the hard terms; with fewer it says nothing of λ
LEAST_CONTEXTS = 4  # that stand for more


@dataclass(frozen=True)
class Term:
    """One fixed factor of φ."""

    features: tuple[Feature, ...]  # the F that it reads
    log_phi: Callable[..., Tensor]  # their values [B, F] float64, NaN where one does not apply → log φ [B]
    can_be_zero: bool  # whether log φ may be −inf
    reads_base: bool = False  # log_phi gets log a [B] float64 too, behind the values

    def evaluate(self, values: Tensor, base_logprob: Tensor | None) -> Tensor:
        """What `log_phi` makes of them."""
        if not self.reads_base:
            return self.log_phi(values)
        if base_logprob is None:
            raise ValueError("this term reads log a, which is not given")
        return self.log_phi(values, base_logprob.clone())


@dataclass(frozen=True)
class MomentTerm:
    """φ = exp(λ·(f − moments)), λ such that E_p[f] = moments; f − moment counts 0 where f does not apply."""

    features: tuple[Feature, ...]
    moments: tuple[float, ...]
    can_be_zero = False


@dataclass(frozen=True)
class Target:
    """A product of terms; make your own with `Target((Term(...),))`, combine with `*`."""

    terms: tuple[Term | MomentTerm, ...]
    exponents: tuple[float, ...] | None = None  # λ of all moments in order, once fitted
    exponent_errors: tuple[float, ...] = ()  # the standard errors of a fit

    def __post_init__(self) -> None:
        for term in self.terms:
            if not (isinstance(term, Term | MomentTerm) and all(isinstance(x, Feature) for x in term.features)):
                raise UserError(f"target: {one_line(repr(term))} is no term; write Target((Term((feature, …), …), …))")

    def __mul__(self, other: Target) -> Target:
        return Target(self.terms + other.terms)

    @property
    def features(self) -> tuple[Feature, ...]:
        return tuple(feature for term in self.terms for feature in term.features)

    @property
    def can_be_zero(self) -> bool:
        return any(term.can_be_zero for term in self.terms)

    @property
    def moments(self) -> list[tuple[str, float]]:
        """Names and wanted means of the features that λ belongs to, in its order."""
        terms = [term for term in self.terms if isinstance(term, MomentTerm)]
        return [(x.name, moment) for term in terms for x, moment in zip(term.features, term.moments, strict=True)]

    @property
    def needs_fit(self) -> bool:
        return bool(self.moments) and self.exponents is None

    def log_phi(self, values: Tensor, base_logprob: Tensor | None = None) -> Tensor:
        """log φ of each sequence, [B] float64, from the values of `features`, [B, F], and log a, [B] float64.

        log a may be left out where no term reads it.
        """
        if self.needs_fit:
            raise ValueError("a distributional target has no λ before fit()")
        fixed, centred = self._factors(values, base_logprob)
        exponents = torch.tensor(self.exponents or (), dtype=torch.float64)
        return _checked(self, values, lambda _: fixed + centred @ exponents)

    def fit(self, *sample: Tensor, contexts: int | None = None) -> Target:
        """λ such that all moments hold together.

        Args:
            sample: values [S, F] of `features` and each one's context [S]; then log a and log q [S] where they were
                sampled from another model than the base, or log a alone where a term reads it.
            contexts: how many there are, of which those of the sample were drawn at random; None: these are all.

        Raises:
            UserError: a feature hardly occurs, or a moment is out of reach.
            TooFewSamples: too few samples carry the weight, in all or within a context.
        """
        usable = self._usable(sample, contexts, LEAST_CONTEXTS)
        for (name, moment), column in zip(self.moments, usable.centred.T, strict=True):
            low, high = float(column.min()), float(column.max())
            if not low < 0 < high:
                raise UserError(
                    f"target: feature {name!r} lies in [{low + moment:g}, {high + moment:g}] on {len(column)} "
                    f"samples, so no reweighting of them has mean {moment:g}; {REMEDY}, choose another moment, or "
                    "start nearer"
                )
        exponents, covariance, each = solve_exponents(usable)
        ess, count = each * len(usable.context_index.unique()), len(sample[0])
        if ess < LEAST_ESS or each < LEAST_PER_CONTEXT:
            names, moments = map(list, zip(*self.moments, strict=True))
            raise TooFewSamples(
                f"target: the moments {moments} of {names} rest on {ess:.1f} effective samples out of {count}, "
                f"{each:.1f} a context (at least {LEAST_ESS:g}, and {LEAST_PER_CONTEXT:g} a context, are needed); "
                f"{REMEDY}"
            )
        errors = covariance.diagonal().sqrt()
        return replace(self, exponents=tuple(exponents.tolist()), exponent_errors=tuple(errors.tolist()))

    def moments_found(self, *sample: Tensor, contexts: int | None = None) -> Moments:
        """What the moments are under the fitted λ on another sample; arguments and errors as of `fit`."""
        exponents = torch.tensor(self.exponents, dtype=torch.float64)
        return moments_under(exponents, self._usable(sample, contexts, 2))

    def _usable(self, sample: Sequence[Tensor], contexts: int | None, least: int) -> BaseSample:
        """The samples that λ may rest on: without contexts in which fewer than LEAST_MET meet the hard terms.

        `least` contexts must be left where they stand for others.
        """
        values, context_index, *logprobs = sample
        fixed, centred = self._factors(values, logprobs[0] if logprobs else None)
        if len(logprobs) > 1:
            fixed = fixed + logprobs[0] - logprobs[1]
        context_index, drawn = by_context.renumber(context_index)
        possible = fixed > -torch.inf
        usable = context_index[possible].bincount(minlength=len(drawn)) >= LEAST_MET
        used, fraction = possible & usable[context_index], len(drawn) / (contexts or len(drawn))
        needed = least if fraction < 1 else 1
        if int(used.sum()) < LEAST_ESS or int(usable.sum()) < needed:
            raise TooFewSamples(
                f"target: {int(possible.sum())} of {len(possible)} samples are of use (hard terms met), "
                f"{LEAST_MET} or more in {int(usable.sum())} of {len(drawn)} contexts; λ needs {LEAST_ESS:g}, and "
                f"{needed} such contexts; {REMEDY}"
            )
        return BaseSample(centred[used], fixed[used], by_context.renumber(context_index[used])[0], fraction)

    def _factors(self, values: Tensor, base_logprob: Tensor | None) -> tuple[Tensor, Tensor]:
        """log φ of all fixed terms together, [B], and what λ multiplies, [B, number of moments]."""
        fixed, centred = values.new_zeros(len(values)), [values[:, :0]]
        for term in self.terms:
            own, values = values.tensor_split([len(term.features)], dim=1)
            if isinstance(term, MomentTerm):
                centred.append((own - torch.tensor(term.moments, dtype=torch.float64)).nan_to_num(0.0))
            else:
                fixed = fixed + _checked(term, own, partial(term.evaluate, base_logprob=base_logprob))
        return fixed, torch.cat(centred, dim=1)


def _checked(term: Term | Target, values: Tensor, function: Callable[[Tensor], Any]) -> Tensor:
    """log φ of a term or of all, [B] float64: what a function makes of the features' values, [B, F].

    Raises:
        RunError: it failed, or returned something else than B logarithms of factors as the term declares them.
    """
    name = f"target: log φ of {', '.join(feature.name for feature in term.features) or 'no feature'}"
    try:
        log_phi = function(values.clone())
    except RunError:  # says all already
        raise
    except Exception as error:  # the user's code
        raise RunError(f"{name} raised {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(log_phi, Tensor) or log_phi.shape != values.shape[:1] or not log_phi.is_floating_point():
        found = f"{list(log_phi.shape)} of {log_phi.dtype}" if isinstance(log_phi, Tensor) else type(log_phi).__name__
        raise RunError(f"{name} is {found}, not a tensor [{len(values)}] of torch.float64")
    log_phi = log_phi.detach().to("cpu", torch.float64)
    valid = log_phi.isfinite() | (log_phi.isneginf() & term.can_be_zero)
    if not bool(valid.all()):
        row = int(valid.long().argmin())
        right = "a finite number" if term.can_be_zero else "a finite number, or −inf with can_be_zero=True"
        raise RunError(f"{name} is {float(log_phi[row]):g}, not {right}, where the features are {values[row].tolist()}")
    return log_phi


def pointwise(feature: Feature) -> Target:
    """φ = the feature itself, ≥ 0; for a 0/1 feature the base model conditioned on it."""

    def log_phi(values: Tensor) -> Tensor:
        if bool((values < 0).any()):
            raise RunError(
                f"feature {feature.name!r} returned {float(values[values < 0][0]):g}; a pointwise target needs "
                "values ≥ 0 (for a reward of any sign use the rlhf target)"
            )
        return torch.where(values.isnan(), 0.0, values.log())[:, 0]

    return Target((Term((feature,), log_phi, can_be_zero=True),))


def rlhf(reward: Feature, beta: float) -> Target:
    """φ = exp(reward/β): reverse KL to it is reinforcement learning with a KL penalty of weight β."""
    if not 0 < beta < torch.inf:
        raise UserError(f"target: beta={beta:g}; it must be a positive number")
    return Target((Term((reward,), lambda values: values.nan_to_num(0.0)[:, 0] / beta, can_be_zero=False),))


def distributional(features: Sequence[Feature], moments: Sequence[float]) -> Target:
    """φ = exp(λ·(f − moments)): of all p with these means, the one nearest to the base (Khalifa et al. 2021)."""
    if len(features) != len(moments) or not features:
        raise UserError(f"target: {len(features)} features but {len(moments)} moments; give one moment a feature")
    return Target((MomentTerm(tuple(features), tuple(map(float, moments))),))


def base_power(kappa: float) -> Target:
    """φ = a^(κ−1): the base sharpened (κ > 1), itself (1), flattened, or 0: all that other terms allow alike."""
    if not 0 <= kappa < torch.inf:
        raise UserError(f"target: kappa={kappa:g}; it must be 0 or a positive number")
    return Target((Term((), lambda _, log_a: (kappa - 1) * log_a, can_be_zero=False, reads_base=True),))
