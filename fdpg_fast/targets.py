"""Targets p(x|c) ∝ a(x|c)·φ(x,c): what the policy is trained towards, as a product of terms.

pointwise(f)                     φ = f(x), a constraint where f is 0 or 1 (GDC)
rlhf(r, beta)                    φ = exp(r/β): the target of RLHF with a KL penalty
distributional([f], [moment])    φ = exp(λ·(f − moment)), λ such that E_p[f] = moment
pointwise(f) * distributional(…) hybrid: f stays hard, λ is fitted under it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import RunError, UserError
from .features import Feature

MIN_FIT_ESS = 50.0  # below it the moments of the reweighted sample are not known to one digit


@dataclass(frozen=True)
class Term:
    """One factor of φ.

    Attributes:
        features: the F features that it reads.
        log_phi: feature values [B, F] float64 (NaN where a feature does not apply) → log φ [B].
        can_be_zero: whether log φ may be −inf.
        moments: for a distributional term whose λ is not fitted yet, the wanted means of its features.
    """

    features: tuple[Feature, ...]
    log_phi: Callable[[Tensor], Tensor]
    can_be_zero: bool
    moments: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Target:
    """A product of terms; make your own with `Target((Term(...),))`, combine with `*`.

    Attributes:
        terms: the factors of φ.
        exponents: λ of all distributional terms in order, once fitted.
    """

    terms: tuple[Term, ...]
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
        return any(term.moments is not None for term in self.terms)

    @property
    def needs_fit(self) -> bool:
        return self.exponents is None and self.is_distributional

    @property
    def exponent_by_feature(self) -> dict[str, float]:
        """λ of each feature with a prescribed mean, once fitted."""
        names = [feature.name for term in self.terms if term.moments is not None for feature in term.features]
        return dict(zip(names, self.exponents, strict=True)) if self.exponents is not None else {}

    def log_phi(self, values: Tensor) -> Tensor:
        """log φ of each sequence, [B] float64, from the values of `features`, [B, F] float64."""
        total = values.new_zeros(len(values))
        used, fitted = 0, 0
        for term in self.terms:
            own = values[:, used : used + len(term.features)]
            used += len(term.features)
            if term.moments is None:
                total = total + term.log_phi(own)
            else:
                if self.exponents is None:
                    raise ValueError("a distributional target has no λ before fit()")
                exponents = torch.tensor(self.exponents[fitted : fitted + len(term.moments)], dtype=torch.float64)
                total = total + _centred(own, term.moments) @ exponents
                fitted += len(term.moments)
        return total

    def with_exponents(self, exponents: Sequence[float]) -> Target:
        return replace(self, exponents=tuple(exponents))

    def fit(self, values: Tensor, context_index: Tensor) -> Target:
        """Choose λ on a sample of the base model, so that the wanted moments hold under p.

        The moments are averages over contexts of self-normalised importance estimates. λ minimises the convex
        dual Σ_c log E_{a·b}[exp(λ·(f − moment))], b being the other terms: a hard term stays hard.

        Args:
            values: of `features` on samples of the base, [B, F] float64.
            context_index: which context each sample continues, [B].

        Raises:
            UserError: a feature hardly occurs, a moment is out of reach, or too few samples carry the weight.
        """
        fixed, columns = values.new_zeros(len(values)), []
        moments: list[float] = []
        names: list[str] = []
        used = 0
        for term in self.terms:
            own = values[:, used : used + len(term.features)]
            used += len(term.features)
            if term.moments is None:
                fixed = fixed + term.log_phi(own)
            else:
                columns.append(_centred(own, term.moments))
                moments += term.moments
                names += [feature.name for feature in term.features]
        possible = fixed > -math.inf
        if int(possible.sum()) < MIN_FIT_ESS:
            raise UserError(
                f"target: only {int(possible.sum())} of {len(fixed)} samples of the base meet the hard terms; "
                "raise target_fit_samples"
            )
        centred = torch.cat(columns, dim=1)[possible]
        for name, moment, column in zip(names, moments, centred.T, strict=True):
            if not (column.min() < 0 < column.max()):
                raise UserError(
                    f"target: feature {name!r} lies in [{float(column.min()) + moment:g}, "
                    f"{float(column.max()) + moment:g}] on {len(column)} samples of the base, so no reweighting of "
                    f"them has mean {moment:g}; raise target_fit_samples, choose another moment, or start nearer"
                )
        exponents, ess = solve_exponents(centred, fixed[possible], context_index[possible])
        if ess < MIN_FIT_ESS:
            raise UserError(
                f"target: the moments {moments} of {names} rest on {ess:.1f} effective samples out of "
                f"{len(fixed)} (at least {MIN_FIT_ESS:g} are needed); raise target_fit_samples"
            )
        return self.with_exponents(exponents.tolist())


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
    return Target((Term(tuple(features), _unfitted, can_be_zero=False, moments=tuple(map(float, moments))),))


def solve_exponents(centred: Tensor, log_weights: Tensor, context_index: Tensor) -> tuple[Tensor, float]:
    """λ with Σ_c E_c[centred] = 0 under weights ∝ exp(log_weights + centred·λ), by damped Newton.

    Args:
        centred: features minus wanted moments, [S, F] float64.
        log_weights: [S] float64, finite.
        context_index: [S]; weights are normalised within a context.

    Returns:
        λ [F], and the effective sample size of the reweighted sample.
    """
    _, owner = context_index.unique(return_inverse=True)
    num_contexts = int(owner.max()) + 1
    unit = centred.abs().amax(0)  # λ is found per unit of each feature: tolerances must not depend on it
    centred = centred / unit

    def dual(exponents: Tensor) -> tuple[Tensor, Tensor]:
        scores = log_weights + centred @ exponents  # [S]
        largest = torch.full((num_contexts,), -math.inf, dtype=torch.float64)
        largest = largest.scatter_reduce(0, owner, scores, "amax")
        unnormalised = (scores - largest[owner]).exp()
        totals = torch.zeros(num_contexts, dtype=torch.float64).index_add(0, owner, unnormalised)
        return (totals.log() + largest).sum(), unnormalised / totals[owner]

    exponents = centred.new_zeros(centred.shape[1])
    value, share = dual(exponents)
    for _ in range(100):
        mean = torch.zeros(num_contexts, centred.shape[1], dtype=torch.float64)
        mean.index_add_(0, owner, share[:, None] * centred)
        gradient = mean.sum(0)
        if float(gradient.abs().max()) < 1e-9 * num_contexts:
            return exponents / unit, float(share.sum() ** 2 / share.square().sum())
        spread = centred - mean[owner]
        hessian = (share[:, None] * spread).T @ spread
        ridge = 1e-12 * float(hessian.diagonal().max()) + 1e-300
        step = torch.linalg.solve(hessian + ridge * torch.eye(len(gradient), dtype=torch.float64), gradient)
        length = 1.0
        while length > 1e-8:
            trial, trial_share = dual(exponents - length * step)
            rounding = 1e-13 * num_contexts * (1 + float(value.abs()))  # near the minimum the decrease drowns in it
            if trial <= value - 1e-4 * length * float(gradient @ step) + rounding:
                break
            length /= 2
        else:
            break
        exponents, value, share = exponents - length * step, trial, trial_share
        if float(exponents.abs().max()) > 1e3:
            break
    raise UserError(
        "target: no λ gives the wanted moments together on this sample of the base (they contradict each other or "
        "lie at the edge of what it contains); raise target_fit_samples or choose other moments"
    )


def _centred(values: Tensor, moments: Sequence[float]) -> Tensor:
    """f − moment, 0 where the feature does not apply: such a sequence is neither favoured nor disfavoured."""
    return (values - torch.tensor(moments, dtype=torch.float64)).nan_to_num(0.0)


def _unfitted(values: Tensor) -> Tensor:
    raise AssertionError("a distributional term is evaluated by its Target, which knows λ")
