"""Signs that the target is out of the sampler's reach, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

MIN_TAIL = 5  # points; fewer say nothing of a tail
ROUNDING = 1e-3  # nats by which equal weights may differ
MAX_PARETO_K = 0.7  # beyond it importance sampling errs by more than its standard error says (Vehtari et al. 2024)
MIN_ESS = 3.0
MAX_LOG_Z_SE = 0.5  # a 95 % interval of a factor of 7
MAX_KL = 3.0  # nats a token from the base, beyond what a hard target costs
PATIENCE = {"away": 1}  # rounds in a row, else 3: one bad round is chance, and Z needs a few
REMEDIES = "take more samples per context, or a softer target (rlhf: a larger beta)"


def pareto_k(log_weights: Tensor) -> float:
    """Shape k of a generalised Pareto law fitted to the largest weights: moments up to 1/k exist (PSIS).

    The tail is the largest min(n/5, 3√n) weights, as excesses over the next smaller one; its shape is drawn towards ½
    by the weight of ten points (Vehtari et al. 2024). NaN where there is no tail: fewer than MIN_TAIL weights in it, or
    all equal, as with weights of 0 and 1. `log_weights` is log P/q up to a constant, [B]; −inf where P = 0.
    """
    size = len(log_weights)
    tail_size = math.ceil(min(size / 5, 3 * math.sqrt(size)))
    tail = log_weights.double().sort().values[-tail_size - 1 :]  # the threshold first
    tail = tail[tail.isneginf().sum().clamp(min=1) - 1 :]  # of a threshold of 0 and more zeros, one
    if len(tail) <= MIN_TAIL or not float(tail[-1] - tail[1]) >= ROUNDING:  # or NaN, which sorts last
        return math.nan
    excess = (tail[1:] - tail[-1]).exp() - (tail[0] - tail[-1]).exp()
    excess = excess[excess > 0]  # not ties with the threshold
    k = fit_generalised_pareto(excess)
    return (k * len(excess) + 0.5 * 10) / (len(excess) + 10)


def fit_generalised_pareto(excess: Tensor) -> float:
    """The k of excesses [n] > 0, ascending, of density (1 + k·x/σ)^(−1/k−1)/σ: Zhang & Stephens (2009), θ = −k/σ."""
    n = len(excess)
    grid = torch.arange(1, 30 + math.isqrt(n) + 1, dtype=torch.float64)
    quartile = excess[int(n / 4 + 0.5) - 1]
    theta = 1 / excess[-1] + (1 - (len(grid) / (grid - 0.5)).sqrt()) / (3 * quartile)  # [G]
    k = torch.log1p(-theta[:, None] * excess).mean(1)  # the likeliest shape at each θ
    log_likelihood = n * ((-theta / k).log() - k - 1)
    best = (log_likelihood.softmax(0) * theta).sum()
    return float(torch.log1p(-best * excess).mean())


def complaints(metrics: Mapping[str, float]) -> dict[str, str]:
    """Sentences for a person on what is wrong with a round, by kind; from `round_metrics`, NaN where unknown."""
    sentences = {}
    keys = ("target/ess", "target/pareto_k", "z/log_z_se", "z/ess")
    ess, k, error, ess_of_z = (metrics.get(key, math.nan) for key in keys)
    if metrics.get("target/in_support") == 0:
        sentences["support"] = (
            "no completion satisfies the target, and where none does nothing is learned: start from an easier "
            "constraint or a softer one (kind: rlhf with the constraint as reward), or sample more completions"
        )
    elif ess <= MIN_ESS:
        sentences["ess"] = (
            f"the target is far from what is sampled: {ess:.1f} effective completions carry the round; {REMEDIES}"
        )
    if k > MAX_PARETO_K:
        sentences["pareto_k"] = (
            f"the importance weights have a heavy tail (Pareto k {k:.2f} > {MAX_PARETO_K}): log Z and the divergences "
            f"may be off by more than their intervals; {REMEDIES}"
        )
    if error > MAX_LOG_Z_SE or ess_of_z <= MIN_ESS:
        sentences["log_z"] = (
            f"log Z is known to ± {1.96 * error:.1f} only, from {ess_of_z:.1f} effective samples of a context, which "
            "bias it, and the pseudo-rewards with it; take more samples per context, fewer contexts, or "
            "partition.per_context: false"
        )
    errors = (key for key in metrics if key.startswith("target/") and key.endswith("_se"))
    if idle := [key[len("target/") : -3] for key in errors if math.isnan(metrics.get(key[:-3], 0.0))]:
        sentences["idle"] = f"{', '.join(idle)}: None for every completion, which the target asks nothing of then"
    kl, length, log_z = (metrics.get(key, math.nan) for key in ("policy/kl_to_base", "policy/length", "z/log_z"))
    if (kl + min(0.0, log_z)) / length > MAX_KL:
        sentences["away"] = (
            f"the policy is {kl / length:.1f} nats a token away from the base: hardly a text of its is one that the "
            "base would write; go back to a checkpoint from before, with a lower optimizer.learning_rate"
        )
    if metrics.get("policy/skipped") and "support" not in sentences:
        finite = math.isfinite(metrics.get("policy/grad_norm", math.nan))
        weightless = "no completion of it had a weight, all being as likely as the target has them, or too unlikely"
        overflow = "the gradient was not finite; lower optimizer.learning_rate or set loss.ratio_cap"
        sentences["skipped"] = f"nothing was learned in the last round: {weightless if finite else overflow}"
    return sentences


class Watch:
    """Complaints as a run goes on: each kind once, when it has lasted for its PATIENCE."""

    def __init__(self) -> None:
        self._lasted: dict[str, int] = {}
        self._said: set[str] = set()

    def __call__(self, metrics: Mapping[str, float]) -> list[str]:
        """The complaints to make after this round."""
        sentences = complaints(metrics)
        self._lasted = {kind: self._lasted.get(kind, 0) + 1 for kind in sentences}
        lasting = [kind for kind, rounds in self._lasted.items() if rounds >= PATIENCE.get(kind, 3)]
        due = [sentences[kind] for kind in lasting if kind not in self._said]
        self._said.update(lasting)
        return due
