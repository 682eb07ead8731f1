"""f-DPG on language models that can be enumerated: sampled training and sampled gradients, measured exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdpg_kernels import divergences

from ..measure.estimators import Estimate
from ..partition import Baseline, PartitionFunction, pseudo_rewards
from .enumerable import (
    D_F,
    Bed,
    ExactTarget,
    Policy,
    Tabular,
    Transformer,
    constant_baseline_variance,
    exact_gradient,
    hard_target,
    leave_one_out_variance,
    make_bed,
    packed_loss,
    soft_target,
    uniform_sampler,
)
from .exact_case import ExactCase, parse_case
from .rows import Row

CURVE_POINTS = 20
RARE_BIAS = -5.0  # on the logits of token 2: one text in 40 to 500 contains it
REACHED = 0.9  # of the way from E_a[φ] to E_p[φ]


def run_case(settings: dict[str, Any], seed: int, folder: Path) -> Row:
    """Train a policy of the enumerable bed and measure what came out, without any sampling error.

    Args:
        settings: fields of `ExactCase`.
        seed: of the base, the policy and the samples.
        folder: not used: a case has nothing to keep but its row.

    Returns:
        A row with, in nats a sequence where they are nats, all exact unless named `sampled`:
        divergence/NAME for every D_f that is finite, and jensen_shannon_half; kl_to_base; entropy_per_sequence and
        entropy_of_target; entropy_gap, H(π) − H(p); entropy_dip, how far the lowest entropy of all rounds lies below
        both the first and the target's; feature/word, E_π[φ], and feature_of_target; rounds_to_moment, the first
        round with E_π[φ] 90 % of the way from where it began to the target (`rounds` if none); pseudo_reward_std,
        its root mean square over the rounds; and with gradient_batches those of `_gradient_metrics`, at the last
        policy.

    Raises:
        UserError: names the setting, its value and what would be valid.
    """
    case = parse_case(settings)
    bed = make_bed(case.vocab, case.max_length)
    base = _make_policy(case, bed, seed)
    policy = _make_policy(case, bed, seed if case.start == "base" else seed + 10_000)
    target = soft_target(bed, base, case.beta) if case.target == "soft" else hard_target(bed, base)
    rng = torch.Generator().manual_seed(seed)
    curve = _train(case, bed, base, policy, target, rng)
    values = _measure(case, bed, base, policy, target)
    entropies, entropy_of_target = [point["entropy_per_sequence"] for point in curve], values["entropy_of_target"]
    before, wanted = curve[0]["feature/word"], values["feature_of_target"]
    reached = [point["round"] for point in curve if (point["feature/word"] - before) >= REACHED * (wanted - before)]
    values |= {
        "entropy_gap": entropies[-1] - entropy_of_target,
        "entropy_dip": max(0.0, min(entropies[0], entropy_of_target) - min(entropies)),
        "rounds_to_moment": reached[0] if reached else float(case.rounds),
        "pseudo_reward_std": math.sqrt(sum(point["pseudo_reward_std"] ** 2 for point in curve) / len(curve)),
    }
    metrics = {name: Estimate(float(value), 0.0, float(len(bed.length))) for name, value in values.items()}
    if case.gradient_batches:
        metrics |= _gradient_metrics(case, bed, policy, target, rng)
    step = max(1, case.rounds // CURVE_POINTS)
    return Row({}, seed, metrics, curve[::step])


def _make_policy(case: ExactCase, bed: Bed, seed: int) -> Policy:
    if case.policy == "transformer":
        policy: Policy = Transformer(bed, seed)
    else:
        policy = Tabular(bed, seed, width=1 if case.policy == "low_rank" else 6)
    if case.target == "rare":
        policy.bias = torch.zeros(bed.vocab, dtype=torch.float64)
        policy.bias[2] = RARE_BIAS
    return policy


def _train(
    case: ExactCase, bed: Bed, base: Policy, policy: Policy, target: ExactTarget, rng: torch.Generator
) -> list[dict[str, float]]:
    """The trainer's round, with exact numbers of the policy before every step and after the last."""
    texts = len(bed.length)
    partition, baseline = PartitionFunction(1, kind=case.partition), _baseline(case)
    if case.partition == "oracle":
        partition.update(target.log_z[None], torch.zeros(1, dtype=torch.long))
    optimizer = torch.optim.Adam(policy.parameters(), lr=case.learning_rate)
    curve = []
    for index in range(case.rounds):
        with torch.no_grad():
            behavior, log_q = policy.logprob(bed)
        curve.append({"round": index} | _point(case, bed, log_q, target))
        if case.samples is None:
            behavior, picks = uniform_sampler(bed), torch.arange(texts)
            log_q = bed.sum_tokens(behavior)
        else:
            picks = torch.multinomial(log_q.exp(), case.samples, replacement=True, generator=rng)
        context = torch.zeros_like(picks)
        partition.update((target.log_score - log_q)[picks], context)
        log_z = partition.log_z(context)
        if bool(log_z.isneginf().any()):
            continue  # nothing that the target allows has been seen: the trainer skips such a round too
        log_z = log_z + math.log(case.z_scale)
        rewards = pseudo_rewards(
            log_q[picks], target.log_score[picks], log_z, divergences.get(case.divergence), reward_cap=None
        )
        options = dict(log_z=log_z, baseline=baseline(rewards, context))
        optimizer.zero_grad()
        packed_loss(bed, policy, picks, behavior, target, case.divergence, **options).loss.backward()
        optimizer.param_groups[0]["lr"] = case.learning_rate * (1 - index / case.rounds)
        optimizer.step()
    with torch.no_grad():
        curve.append({"round": case.rounds} | _point(case, bed, policy.logprob(bed)[1], target))
    return curve


def _baseline(case: ExactCase) -> Callable[[Tensor, Tensor], Tensor]:
    return _constant(case.baseline) if isinstance(case.baseline, float) else Baseline(case.baseline)


def _constant(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda rewards, context: torch.full_like(rewards, value)


def _rewards(case: ExactCase, log_pi: Tensor, target: ExactTarget) -> Tensor:
    """Pseudo-reward of every text, [B], with the true Z times z_scale."""
    log_z = (target.log_z + math.log(case.z_scale)).expand_as(log_pi)
    return pseudo_rewards(log_pi, target.log_score, log_z, divergences.get(case.divergence), reward_cap=None)


def _feature(case: ExactCase, bed: Bed) -> Tensor:
    """φ of every text, [B]: how often token 2 appears in it, or whether it does."""
    return bed.sum_tokens((bed.tokens == 2).double()) if case.target == "soft" else bed.contains(2).double()


def _entropy(probabilities: Tensor) -> float:
    return float(torch.special.entr(probabilities).sum())


def _point(case: ExactCase, bed: Bed, log_pi: Tensor, target: ExactTarget) -> dict[str, float]:
    """What is followed over the rounds."""
    pi, rewards = log_pi.exp(), _rewards(case, log_pi, target)
    return {
        f"divergence/{case.divergence}": float(D_F[case.divergence](pi, target.p)),
        "entropy_per_sequence": _entropy(pi),
        "feature/word": float(pi @ _feature(case, bed)),
        "pseudo_reward_std": float((pi @ (rewards - pi @ rewards) ** 2).sqrt()),
    }


@torch.no_grad()
def _measure(case: ExactCase, bed: Bed, base: Policy, policy: Policy, target: ExactTarget) -> dict[str, float]:
    """Exact numbers of the policy as it is."""
    log_pi, log_a = (model.logprob(bed)[1] for model in (policy, base))
    pi, feature = log_pi.exp(), _feature(case, bed)
    distances = {name: float(measure(pi, target.p)) for name, measure in D_F.items()}
    values = {f"divergence/{name}": value for name, value in distances.items() if math.isfinite(value)}
    return values | {
        "divergence/jensen_shannon_half": distances["jensen_shannon"] / 2,
        "kl_to_base": float(pi @ (log_pi - log_a)),
        "entropy_per_sequence": _entropy(pi),
        "entropy_of_target": _entropy(target.p),
        "feature/word": float(pi @ feature),
        "feature_of_target": float(target.p @ feature),
    }


def _gradient_metrics(
    case: ExactCase, bed: Bed, policy: Policy, target: ExactTarget, rng: torch.Generator
) -> dict[str, Estimate]:
    """Bias and variance of the gradient of `samples` texts, enumerated, and sampled through fdpg_loss.

    Z is the true one times z_scale, and a running baseline the mean pseudo-reward that it tends to.

    Returns:
        gradient/variance: trace of the covariance; gradient/relative_variance: over |∇D_f|²;
        gradient/bias: |E[g] − ∇D_f| over |∇D_f|; gradient/direction_error: 1 − their cosine;
        gradient/variance_sampled: over gradient_batches batches, and gradient/variance_ratio: it over the exact one;
        gradient/bias_sampled: |mean of the batches − E[g]|², over what its expectation is, so about 1.
    """
    assert case.samples is not None
    with torch.no_grad():
        behavior, log_pi = policy.logprob(bed)
    pi, rewards = log_pi.exp(), _rewards(case, log_pi, target)
    baseline = _constant(float(pi @ rewards)) if case.baseline == "running" else _baseline(case)
    log_z = target.log_z + math.log(case.z_scale)

    def gradient(picks: Tensor, token_logprob: Tensor, offset: Tensor) -> Tensor:
        options = dict(log_z=log_z, baseline=offset)
        return policy.flat_grad(packed_loss(bed, policy, picks, token_logprob, target, case.divergence, **options).loss)

    batches = []
    for _ in range(case.gradient_batches):
        picks = torch.multinomial(pi, case.samples, replacement=True, generator=rng)
        batches.append(gradient(picks, behavior, baseline(rewards[picks], torch.zeros_like(picks))))
    sampled = torch.stack(batches)  # [K, parameters]
    expected = gradient(torch.arange(len(pi)), uniform_sampler(bed), torch.zeros(()))
    true = exact_gradient(bed, policy, target, D_F[case.divergence])

    scores = policy.scores(bed).detach()
    if case.baseline == "leave_one_out":
        variance = leave_one_out_variance(scores, pi, rewards, case.samples)
    else:
        offset = baseline(rewards, torch.zeros(len(pi), dtype=torch.long))
        variance = constant_baseline_variance(scores, pi, rewards - offset, case.samples)
    centred = (sampled - sampled.mean(0)) * math.sqrt(len(sampled) / (len(sampled) - 1))
    distances = centred.square().sum(1)
    spread, error = float(distances.mean()), float(distances.std()) / math.sqrt(len(sampled))
    # |mean − E[g]|² of a normal mean varies by 2·tr C²/(tr C)²; C from the batches makes it a little too large
    off_error = math.sqrt(2) * float((centred @ centred.T).norm() / distances.sum())
    off = float((sampled.mean(0) - expected).square().sum()) * len(sampled) / variance

    def exact(value: Tensor | float) -> Estimate:
        return Estimate(float(value), 0.0, float(len(pi)))

    return {
        "gradient/variance": exact(variance),
        "gradient/relative_variance": exact(variance / true.square().sum()),
        "gradient/bias": exact((expected - true).norm() / true.norm()),
        "gradient/direction_error": exact(1 - torch.cosine_similarity(expected, true, dim=0)),
        "gradient/variance_sampled": Estimate(spread, error, float(len(sampled))),
        "gradient/variance_ratio": Estimate(spread / variance, error / variance, float(len(sampled))),
        "gradient/bias_sampled": Estimate(off, off_error, float(len(sampled))),
    }
