"""Targets p(x|c) ∝ a(x|c)·φ(x,c): what the policy is trained towards, as a product of terms.

pointwise(f)                     φ = f(x), a constraint where f is 0 or 1 (GDC)
rlhf(r, beta)                    φ = exp(r/β): the target of RLHF with a KL penalty
distributional([f], [moment])    φ = exp(λ·(f − moment)), λ such that E_p[f] = moment
pointwise(f) * distributional(…) hybrid: f stays hard, λ is fitted under it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import by_context
from .errors import RunError, UserError
from .features import Feature

MIN_FIT_ESS = 50.0  # below it the moments of the reweighted sample are not known to one digit


@dataclass(frozen=True)
class Term:
    """One factor of φ. A kind with exponents λ to fit is a class of its own that can do what `MomentTerm` can.

    Attributes:
        features: the F features that it reads.
        log_phi: feature values [B, F] float64 (NaN where a feature does not apply) → log φ [B].
        can_be_zero: whether log φ may be −inf.
    """

    features: tuple[Feature, ...]
    log_phi: Callable[[Tensor], Tensor]
    can_be_zero: bool
    num_exponents = 0

    def log_phi_at(self, values: Tensor, exponents: Tensor) -> Tensor:
        """log φ [B] at λ = exponents [num_exponents], float64."""
        return self.log_phi(values)


@dataclass(frozen=True)
class MomentTerm:
    """φ = exp(λ·(f − moments)), λ such that E_p[f] = moments; f − moment counts 0 where f does not apply."""

    features: tuple[Feature, ...]
    moments: tuple[float, ...]
    can_be_zero = False

    @property
    def num_exponents(self) -> int:
        return len(self.moments)

    def log_phi_at(self, values: Tensor, exponents: Tensor) -> Tensor:
        return self._centred(values) @ exponents

    def _centred(self, values: Tensor) -> Tensor:
        return (values - torch.tensor(self.moments, dtype=torch.float64)).nan_to_num(0.0)

    @staticmethod
    def fit(
        terms: Sequence[tuple[MomentTerm, Tensor]], fixed_log_weights: Tensor, context_index: Tensor
    ) -> Sequence[float]:
        """λ of all terms of this kind in order, fitted together: every moment is to hold under all of them.

        Args:
            terms: each with the values of its features on samples of the base, [S, F] float64.
            fixed_log_weights: log φ of the other terms, [S] float64; a hard term stays hard.
            context_index: which context each sample continues, [S].
        """
        possible = fixed_log_weights > -torch.inf
        if int(possible.sum()) < MIN_FIT_ESS:
            raise UserError(
                f"target: only {int(possible.sum())} of {len(possible)} samples of the base meet the hard terms; "
                "raise target_fit_samples"
            )
        centred = torch.cat([term._centred(values) for term, values in terms], dim=1)[possible]
        moments = [moment for term, _ in terms for moment in term.moments]
        names = [feature.name for term, _ in terms for feature in term.features]
        for name, moment, column in zip(names, moments, centred.T, strict=True):
            if not (column.min() < 0 < column.max()):
                raise UserError(
                    f"target: feature {name!r} lies in [{float(column.min()) + moment:g}, "
                    f"{float(column.max()) + moment:g}] on {len(column)} samples of the base, so no reweighting of "
                    f"them has mean {moment:g}; raise target_fit_samples, choose another moment, or start nearer"
                )
        exponents, ess = solve_exponents(centred, fixed_log_weights[possible], context_index[possible])
        if ess < MIN_FIT_ESS:
            raise UserError(
                f"target: the moments {moments} of {names} rest on {ess:.1f} effective samples out of "
                f"{len(possible)} (at least {MIN_FIT_ESS:g} are needed); raise target_fit_samples"
            )
        return exponents.tolist()


@dataclass(frozen=True)
class Target:
    """A product of terms; make your own with `Target((Term(...),))`, combine with `*`.

    Attributes:
        terms: the factors of φ; those with exponents are of one kind.
        exponents: λ of all terms in order, once fitted.
    """

    terms: tuple[Term | MomentTerm, ...]
    exponents: tuple[float, ...] | None = None

    def __mul__(self, other: Target) -> Target:
        return Target(self.terms + other.terms)

    @property
    def features(self) -> tuple[Feature, ...]:
        return tuple(feature for term in self.terms for feature in term.features)

    @property
    def can_be_zero(self) -> bool:
        return any(term.can_be_zero for term in self.terms)

    @property
    def is_distributional(self) -> bool:
        return any(term.num_exponents for term in self.terms)

    @property
    def needs_fit(self) -> bool:
        return self.exponents is None and self.is_distributional

    @property
    def exponent_by_feature(self) -> dict[str, float]:
        """λ of each feature with a prescribed mean, once fitted."""
        names = [feature.name for term in self.terms if term.num_exponents for feature in term.features]
        return dict(zip(names, self.exponents, strict=True)) if self.exponents is not None else {}

    def with_exponents(self, exponents: Sequence[float]) -> Target:
        return replace(self, exponents=tuple(exponents))

    def log_phi(self, values: Tensor) -> Tensor:
        """log φ of each sequence, [B] float64, from the values of `features`, [B, F] float64."""
        if self.needs_fit:
            raise ValueError("a distributional target has no λ before fit()")
        exponents = torch.tensor(self.exponents or (), dtype=torch.float64)
        own = exponents.split([term.num_exponents for term in self.terms])
        total = values.new_zeros(len(values))
        for (term, columns), x in zip(self._split(values), own, strict=True):
            total = total + term.log_phi_at(columns, x)
        return total

    def fit(self, values: Tensor, context_index: Tensor) -> Target:
        """λ chosen on samples of the base: values [S, F] of `features`, and which context each continues, [S].

        Raises:
            UserError: a feature hardly occurs, a moment is out of reach, or too few samples carry the weight.
        """
        fixed, free = values.new_zeros(len(values)), []
        for term, own in self._split(values):
            if term.num_exponents:
                free.append((term, own))
            else:
                fixed = fixed + term.log_phi(own)
        return self.with_exponents(free[0][0].fit(free, fixed, context_index))

    def _split(self, values: Tensor) -> list[tuple[Any, Tensor]]:
        """Each term with the values of its features."""
        ends = list(accumulate(len(term.features) for term in self.terms))
        return list(zip(self.terms, values.tensor_split(ends, dim=1), strict=False))


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
    """λ with Σ_c E_c[centred] = 0 under weights ∝ exp(log_weights + centred·λ): damped Newton on the convex dual.

    Args:
        centred: features minus wanted moments, [S, F] float64.
        log_weights: [S] float64, finite; weights are normalised within a context.

    Returns:
        λ [F], and the effective sample size of the reweighted sample.
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
        ridge = 1e-12 * float(hessian.diagonal().max()) + 1e-300
        step = torch.linalg.solve(hessian + ridge * torch.eye(len(gradient), dtype=torch.float64), gradient)
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
