"""Means, log Z and the table of D_f(π_c‖p_c), from one sample x_i ~ π(·|c_i), each with its standard error.

Every argument is a tensor on the CPU, one entry a sequence: `policy_logprob` log π(x|c), `target_log_score` log P =
log a + log φ (−inf where P = 0), [B] float64 in nats, and `context_index` [B] int64, which holds each of 0..C−1 where
results are by context. Contexts weigh alike, however many samples each has. What π never samples is not seen: forward
KL and χ²(p‖π) come out too small where π misses a part of p, and the ESS shows it only if a little of that part is
sampled. The others are right even so where Z is known from elsewhere, and too small where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fdpg_kernels import Divergence, divergences

from .. import by_context

MATRIX = (*divergences.NAMES, "alpha:0.5")
RIDGE = 10.0  # samples that f(0) weighs as much as, see `_control`
LARGEST_WEIGHT = 1e12  # of such, as only a wrong Z makes them, the difference h − c·w would be rounding errors
LARGEST_EXPONENT = 709.0  # exp() of more is infinite in float64


@dataclass(frozen=True)
class Estimate:
    """A number measured on a sample.

    `ess` is the effective number of samples behind it: (Σw)²/Σw² within each context, summed over contexts, where
    samples carry importance weights w; otherwise their number. `per_context` is that of a typical context (harmonic
    mean) where weights are normalised within contexts: below by_context.LEAST_PER_CONTEXT the value is biased by more
    than a few hundredths, which the standard error does not hold.
    """

    value: float  # NaN where nothing could be measured
    standard_error: float  # NaN where it cannot be estimated, as from one sample, or is not finite
    ess: float
    per_context: float = math.nan  # NaN where nothing is normalised within contexts

    @property
    def interval(self) -> tuple[float, float]:
        """The normal 95 % confidence interval."""
        return self.value - 1.96 * self.standard_error, self.value + 1.96 * self.standard_error

    def exp(self) -> Estimate:
        """e to this; its error by the delta method."""
        value = float(torch.tensor(self.value, dtype=torch.float64).exp())  # infinite where math.exp raises
        return replace(self, value=value, standard_error=value * self.standard_error)


@dataclass(frozen=True)
class LogPartition:
    """log Z_c of each context, [C] float64 each."""

    log_z: Tensor  # −inf where no sample has P > 0
    relative_standard_error: Tensor  # of Z_c, in units of it, so that of log Z_c too; NaN where Z_c = 0 or n_c = 1
    ess: Tensor  # (Σw)²/Σw² of w = P/π; 0 where Z_c = 0

    @property
    def per_context(self) -> float:
        """Effective samples of a typical context among those with Z_c > 0."""
        return by_context.harmonic_mean(self.ess[self.log_z.isfinite()])


@dataclass(frozen=True)
class DivergenceMatrix:
    """D_f(π_c‖p_c) by name, averaged over the contexts with a usable Z_c: those left out are the hard ones."""

    estimates: dict[str, Estimate]
    contexts: int
    contexts_left_out: int


def mean(values: Tensor, context_index: Tensor) -> Estimate:
    """Average over contexts of the mean within each; NaN means "does not apply" and is ignored.

    Contexts count as a random sample wherever there are two or more: the spread of their means over √C is then the
    standard error, and it holds both sources of chance, which contexts were drawn and which samples in each. (Were the
    contexts all there are, it would be too wide.) With one context only the samples are random: sd/√n.
    """
    applies = ~values.isnan()
    values = values[applies].double()
    context_index, counts = by_context.renumber(context_index[applies])
    return _estimate(by_context.means(values, context_index, counts), values, len(values))


def ratio(numerator: Tensor, denominator: Tensor, context_index: Tensor) -> Estimate:
    """Σ numerator / Σ denominator over the whole sample; by the delta method its error is that of the residuals.

    Contexts are the units of the error where there are two or more, otherwise samples, as in `mean`.
    """
    context_index, counts = by_context.renumber(context_index)
    value = numerator.sum() / denominator.sum()
    residuals = numerator - value * denominator
    if len(counts) > 1:
        residuals = by_context.sums(residuals, context_index, len(counts))
    error = _standard_error(residuals * len(residuals) / denominator.sum())
    return Estimate(float(value), error, float(len(numerator)))


def mean_under_target(
    values: Tensor, policy_logprob: Tensor, target_log_score: Tensor, context_index: Tensor
) -> Estimate:
    """`mean`, but E_p of values instead of E_π, by self-normalised importance sampling with weights P/π.

    Contexts without a sample that the target allows are left out. In one context the standard error is that of a ratio
    of means, by the delta method. The bias is of order 1/ess.
    """
    used = ~values.isnan() & ~target_log_score.isneginf()
    values, log_weight = values[used].double(), (target_log_score - policy_logprob)[used].double()
    context_index, counts = by_context.renumber(context_index[used])
    partition = log_partition(torch.zeros_like(log_weight), log_weight, context_index)
    share = (log_weight - partition.log_z[context_index]).exp() / counts[context_index]  # sums to 1 in each context
    context_means = by_context.sums(share * values, context_index, len(counts))
    influences = share * (values - context_means.mean()) * len(values)
    return _estimate(context_means, influences, float(partition.ess.sum()), partition.per_context)


def log_partition(policy_logprob: Tensor, target_log_score: Tensor, context_index: Tensor) -> LogPartition:
    """log Z_c = log mean of P/π over the samples of each context: E_π[P/π] = Z_c wherever π covers P.

    Raises:
        ValueError: P/π is infinite or NaN for some sample, which would pass for a context without samples.
    """
    counts = context_index.bincount().double()  # [C]
    log_weight = target_log_score.double() - policy_logprob.double()
    if not bool((possible := log_weight < math.inf).all()):
        bad = int((~possible).nonzero()[0])
        score, logprob = float(target_log_score[bad]), float(policy_logprob[bad])
        raise ValueError(f"sample {bad}: log P {score}, log π {logprob}; log P must be below inf and log π finite")
    scaled, log_scale = by_context.scaled_exp(log_weight, context_index, len(counts))
    means = by_context.sums(scaled, context_index, len(counts)) / counts
    ess = by_context.effective_samples(scaled, context_index, len(counts))
    # sd/√n of w over its mean; (Σw²/n − mean²) in units of mean² is n/ess − 1
    relative_variance = (counts / ess - 1).clamp(min=0) / (counts - 1)
    return LogPartition(log_scale + means.log(), relative_variance.sqrt(), ess.nan_to_num(nan=0.0))


def divergence_matrix(
    policy_logprob: Tensor,
    target_log_score: Tensor,
    context_index: Tensor,
    known: LogPartition | None = None,
    names: Sequence[str | Divergence] = MATRIX,
) -> DivergenceMatrix:
    """D_f(π_c‖p_c) for every f in `names`, Jensen–Shannon and its half, averaged over contexts, from samples of π.

    D_c = E_π[h(t)] with t = πZ_c/P, h(t) = f(t)/t where P > 0 and f'(∞) where P = 0 (Go et al. 2023).

    With `known`, Z_c from a larger or another sample, w = p/π is known to have mean 1, and the multiple of w − 1 that
    leaves the least variance is taken off h (a regression estimator). Far from p, where h grows like w and few samples
    carry nearly all of w, values without it would exceed the bounds of D_f. Where f(0) is finite what is missing of w
    is worth f(0) each, so that parts of p which π never samples are counted, and the ESS is the number of samples.

    Without `known`, Z_c is the mean of P/π over the same samples. That biases D_c by O(1/n_c), mostly towards 0 (p/π
    cannot exceed n_c), and no standard error shows it: `per_context` does (docs/method.md has measured biases).

    The standard error over contexts is as in `mean`. In one context it is that of each sample's influence, h_i − D, and
    where Z is estimated along with it, ∂D/∂log Z·(w_i − 1) = E_π[f'(t) − f(t)/t]·(w_i − 1) more: t ∝ Z. A Z from
    another sample adds its own error, times that slope.

    Left out are contexts whose Z_c is zero, and without `known` those of a single sample: its t is 1 whatever π is. A
    value is infinite where f'(∞) is and P = 0 on some sample.
    """
    partition = log_partition(policy_logprob, target_log_score, context_index)
    log_z = (known or partition).log_z
    usable = log_z.isfinite()
    if known is None:
        usable &= context_index.bincount() > 1
    per_context = by_context.harmonic_mean((known or partition).ess[usable])
    used = usable[context_index]
    log_t = (policy_logprob.double() - target_log_score.double() + log_z.double()[context_index])[used]
    context_index, counts = by_context.renumber(context_index[used])
    weight = (-log_t).exp()  # p/π
    too_far = log_t < -LARGEST_EXPONENT  # it is infinite in float64, and h grows at least as fast here

    estimates = {}
    for name, divergence in {x.name: x for x in map(divergences.get, (*names, "jensen_shannon"))}.items():
        price = divergence.f_over_t(log_t.masked_fill(too_far, 0.0)).masked_fill(too_far, math.inf)  # h
        bracket = (divergence.f_prime(log_t) - price).masked_fill(log_t.isposinf(), 0.0)
        slope = (bracket / len(log_t)).sum()  # ∂D/∂log Z = E_π[f'(t) − f(t)/t], 0 off the support
        ess, error_of_z = float(partition.ess[usable].sum()), 0.0
        if known is not None:
            if control := _control(divergence, price, weight, context_index, counts):
                price, slope = price - control * (weight - 1), slope + control * weight.mean()
            if math.isfinite(divergence.f_at_zero):  # the control knows the sum of what is rare under π
                ess = float(len(log_t))
            if len(counts) == 1:
                error_of_z = float(slope * known.relative_standard_error[usable][0])
        context_values = by_context.means(price, context_index, counts)  # D_c
        influences = price - context_values.mean() + (slope * (weight - 1) if known is None else 0.0)
        estimate = _estimate(context_values, influences, ess, per_context)
        estimates[name] = replace(estimate, standard_error=math.hypot(estimate.standard_error, error_of_z))
    whole = estimates["jensen_shannon"]
    half = replace(whole, value=whole.value / 2, standard_error=whole.standard_error / 2)
    estimates["jensen_shannon_half"] = half
    return DivergenceMatrix(estimates, contexts=len(counts), contexts_left_out=len(usable) - len(counts))


def _estimate(context_values: Tensor, influences: Tensor, ess: float, per_context: float = math.nan) -> Estimate:
    """The average over contexts, [C]; its error is their spread, or in one context that of the samples' influences."""
    units = context_values if len(context_values) > 1 else influences
    return Estimate(float(context_values.mean()), _standard_error(units), float(ess), per_context)


def _standard_error(units: Tensor) -> float:
    """sd/√n of independent units; NaN for fewer than two, or where one is not finite."""
    if len(units) < 2 or not bool(units.isfinite().all()):
        return math.nan
    scale = float(units.abs().max()) or 1.0  # squares of e^500 would overflow
    return float((units / scale).std()) * scale / math.sqrt(len(units))


def _control(divergence: Divergence, price: Tensor, weight: Tensor, context_index: Tensor, counts: Tensor) -> float:
    """How much of h = `price` goes with w = `weight`: least squares within contexts, drawn towards f(0).

    h/w goes to f(0) as w grows, so f(0) is the slope of what is not in the sample; it weighs as much as RIDGE samples
    at a distance of 1, which decides only where the sample says next to nothing. 0 where nothing tells.
    """
    if len(price) == 0 or not bool((price.isfinite() & (weight < LARGEST_WEIGHT)).all()):
        return 0.0
    highest = float(price.abs().max()) or 1.0  # a sum of e^709 would overflow
    spread = weight - (by_context.sums(weight, context_index, len(counts)) / counts)[context_index]
    covariance, variance = float((spread * (price / highest)).sum()), float(spread.square().sum())
    tail = divergence.f_at_zero
    if math.isfinite(tail):
        covariance, variance = covariance + RIDGE * tail / highest, variance + RIDGE
    elif variance < 1e-24 * len(weight):  # all alike, to rounding
        return 0.0
    return covariance / variance * highest
