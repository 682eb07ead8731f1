"""Targets p(x|c) ∝ a(x|c)·φ(x,c): what the policy is trained towards, as a product of terms.

pointwise(f)                     φ = f(x), a constraint where f is 0 or 1 (GDC)
rlhf(r, beta)                    φ = exp(r/β): the target of RLHF with a KL penalty
distributional([f], [moment])    φ = exp(λ·(f − moment)), λ such that E_p[f] = moment
pointwise(f) * distributional(…) hybrid: f stays hard, λ is fitted under it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import by_context
from .errors import RunError, UserError, one_line
from .features import Feature

MIN_FIT_ESS = 50.0  # below it the moments of the reweighted sample are not known to one digit


@dataclass(frozen=True)
class Term:
    """One fixed factor of φ."""

    features: tuple[Feature, ...]  # the F that it reads
    log_phi: Callable[[Tensor], Tensor]  # their values [B, F] float64, NaN where one does not apply → log φ [B]
    can_be_zero: bool  # whether log φ may be −inf


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

    def log_phi(self, values: Tensor) -> Tensor:
        """log φ of each sequence, [B] float64, from the values of `features`, [B, F] float64."""
        if self.needs_fit:
            raise ValueError("a distributional target has no λ before fit()")
        fixed, centred = self._factors(values)
        exponents = torch.tensor(self.exponents or (), dtype=torch.float64)
        return _checked(self, values, lambda _: fixed + centred @ exponents)

    def fit(self, values: Tensor, context_index: Tensor) -> Target:
        """λ such that all moments hold together on samples of the base: values [S, F] of `features`, contexts [S].

        Raises:
            UserError: a feature hardly occurs, a moment is out of reach, or too few samples carry the weight.
        """
        fixed, centred = self._factors(values)
        possible = fixed > -torch.inf
        if int(possible.sum()) < MIN_FIT_ESS:
            raise UserError(
                f"target: only {int(possible.sum())} of {len(possible)} samples of the base meet the hard terms; "
                "raise target_fit_samples"
            )
        centred = centred[possible]
        for (name, moment), column in zip(self.moments, centred.T, strict=True):
            low, high = float(column.min()), float(column.max())
            if not low < 0 < high:
                raise UserError(
                    f"target: feature {name!r} lies in [{low + moment:g}, {high + moment:g}] on {len(column)} samples "
                    f"of the base, so no reweighting of them has mean {moment:g}; raise target_fit_samples, choose "
                    "another moment, or start nearer"
                )
        exponents, ess = solve_exponents(centred, fixed[possible], context_index[possible])
        if ess < MIN_FIT_ESS:
            names, moments = map(list, zip(*self.moments, strict=True))
            raise UserError(
                f"target: the moments {moments} of {names} rest on {ess:.1f} effective samples out of "
                f"{len(possible)} (at least {MIN_FIT_ESS:g} are needed); raise target_fit_samples"
            )
        return replace(self, exponents=tuple(exponents.tolist()))

    def _factors(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """log φ of all fixed terms together, [B], and what λ multiplies, [B, number of moments]."""
        fixed, centred = values.new_zeros(len(values)), [values[:, :0]]
        for term in self.terms:
            own, values = values.tensor_split([len(term.features)], dim=1)
            if isinstance(term, MomentTerm):
                centred.append((own - torch.tensor(term.moments, dtype=torch.float64)).nan_to_num(0.0))
            else:
                fixed = fixed + _checked(term, own, term.log_phi)
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
    if not beta > 0:
        raise UserError(f"target: beta={beta:g}; it must be a positive number")
    return Target((Term((reward,), lambda values: values.nan_to_num(0.0)[:, 0] / beta, can_be_zero=False),))


def distributional(features: Sequence[Feature], moments: Sequence[float]) -> Target:
    """φ = exp(λ·(f − moments)): of all p with these means, the one nearest to the base (Khalifa et al. 2021)."""
    if len(features) != len(moments) or not features:
        raise UserError(f"target: {len(features)} features but {len(moments)} moments; give one moment a feature")
    return Target((MomentTerm(tuple(features), tuple(map(float, moments))),))


def solve_exponents(centred: Tensor, log_weights: Tensor, context_index: Tensor) -> tuple[Tensor, float]:
    """λ [F] with Σ_c E_c[centred] = 0 under weights ∝ exp(log_weights + centred·λ), and their effective sample size.

    Damped Newton on the convex dual. `centred` is f − moment [S, F], `log_weights` [S] finite, float64 both; weights
    are normalised within a context.
    """
    context_index, counts = by_context.renumber(context_index)
    num_contexts = len(counts)
    unit = centred.abs().amax(0)  # λ is found per unit of each feature: tolerances must not depend on it
    centred = centred / unit

    def dual(exponents: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_c log Σ exp(log_weights + centred·λ), and each sample's share of its context's sum, [S]."""
        scaled, log_scale = by_context.scaled_exp(log_weights + centred @ exponents, context_index, num_contexts)
        totals = by_context.sums(scaled, context_index, num_contexts)
        return (totals.log() + log_scale).sum(), scaled / totals[context_index]

    exponents = centred.new_zeros(centred.shape[1])
    value, share = dual(exponents)
    for _ in range(100):
        means = by_context.sums(share[:, None] * centred, context_index, num_contexts)
        gradient = means.sum(0)
        if float(gradient.abs().max()) < 1e-9 * num_contexts:
            return exponents / unit, float(share.sum() ** 2 / share.square().sum())
        spread = centred - means[context_index]
        hessian = (share[:, None] * spread).T @ spread
        hessian.diagonal().add_(1e-12 * float(hessian.diagonal().max()) + 1e-300)
        step = torch.linalg.solve(hessian, gradient)
        rounding = 1e-13 * num_contexts * (1 + float(value.abs()))  # near the minimum the decrease drowns in it
        length, (trial, trial_share) = 1.0, dual(exponents - step)
        while length > 1e-8 and trial > value - 1e-4 * length * float(gradient @ step) + rounding:
            length /= 2
            trial, trial_share = dual(exponents - length * step)
        exponents, value, share = exponents - length * step, trial, trial_share
        if length <= 1e-8 or float(exponents.abs().max()) > 1e3:
            break
    raise UserError(
        "target: no λ gives the wanted moments together on this sample of the base (they contradict each other or "
        "lie at the edge of what it contains); raise target_fit_samples or choose other moments"
    )
