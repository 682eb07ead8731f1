"""Everything that is measured of a policy, from one fresh sample of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fdpg_kernels import Divergence

from ..contexts import Context
from ..features import Completions
from ..rollouts import Rollouts, pack
from ..scoring import Scores
from ..targets import Target
from . import target_samples
from .diversity import distinct_n, self_bleu
from .estimators import MATRIX, Estimate, LogPartition, divergence_matrix, log_partition, mean, mean_under_target, ratio
from .pass_at_k import is_binary, majority_at_k, pass_at_k
from .target_samples import TargetSamples


@dataclass(frozen=True)
class Evaluation:
    """Measured values by name, and the size of the sample that they come from.

    feature_of_target/… is what a feature would be if the policy were the target, by reweighting its samples, and so
    kl_of_target_to_base, the least that the preference costs in KL to the base. `contexts_left_out` counts contexts
    without a sample that the target allows: log Z and divergences are averages over the others, the easier ones.
    pass@k/… is of features that are 0 or 1 in this sample, majority@k/… of those among them that read answers.
    target_samples/… comes from exact samples of the target, see `target_samples`, all else from those of the policy.
    """

    metrics: dict[str, Estimate]
    num_samples: int
    num_contexts: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    rollouts: Rollouts,
    scores: Scores,
    target: Target,
    divergence: str | Divergence,
    known: LogPartition | None = None,
    exact: tuple[TargetSamples, Tensor] | None = None,
) -> Evaluation:
    """Measure a policy on B on-policy rollouts and their scores; entropies and KL in nats, lengths in tokens.

    Divergences, the trained one among them, are between policy and target and use `known`, the Z of each context, or
    without it the Z of this very sample (see `divergence_matrix`).

    `exact`: samples of the target for the same contexts, and the policy's log-prob of each, [S] float64.
    """
    context_index, lengths, texts = rollouts.context_index, rollouts.lengths.double(), scores.texts.completions
    log_pi, log_a, log_score = scores.behavior_logprob, scores.base_logprob, scores.log_score
    metrics = {}
    for feature, values in zip(target.features, scores.values.T, strict=True):
        metrics[f"feature/{feature.name}"] = mean(values, context_index)
        if is_binary(values):
            found = {"pass": pass_at_k(values, context_index)}
            if feature.answers is not None:
                found["majority"] = majority_at_k(values, feature.read_answers(scores.texts), context_index)
            for what, curve in found.items():
                metrics |= {f"{what}@{k}/{feature.name}": estimate for k, estimate in curve.items()}
        metrics[f"feature_of_target/{feature.name}"] = mean_under_target(values, log_pi, log_score, context_index)
    errors = itertools.chain(target.exponent_errors, itertools.repeat(math.nan))
    for (name, _), exponent, error in zip(target.moments, target.exponents or (), errors, strict=False):
        metrics[f"exponent/{name}"] = Estimate(exponent, error, math.nan)
    metrics |= {
        "kl_to_base": mean(log_pi - log_a, context_index),
        "entropy_per_sequence": mean(-log_pi, context_index),
        "entropy_per_token": ratio(-log_pi, lengths, context_index),
        "length": mean(lengths, context_index),
        "perplexity_under_base": ratio(-log_a, lengths, context_index).exp(),
    }
    varied = {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)} | {"self_bleu_5": self_bleu(texts, 5)}
    metrics |= {name: Estimate(value, math.nan, len(texts)) for name, value in varied.items()}

    partition = known or log_partition(log_pi, log_score, context_index)
    seen = partition.log_z.isfinite()
    error = float(partition.relative_standard_error[seen].square().sum().sqrt()) / max(1, int(seen.sum()))
    metrics["log_z"] = Estimate(
        float(partition.log_z[seen].mean()), error, float(partition.ess.sum()), partition.per_context
    )
    gain = log_score - log_a - partition.log_z[context_index]  # log p/a
    cost = mean_under_target(gain.masked_fill(~gain.isfinite(), math.nan), log_pi, log_score, context_index)
    metrics["kl_of_target_to_base"] = replace(cost, standard_error=math.hypot(cost.standard_error, error))
    matrix = divergence_matrix(log_pi, log_score, context_index, known, (*MATRIX, divergence))
    metrics["contexts_left_out"] = Estimate(matrix.contexts_left_out, math.nan, len(rollouts.contexts))
    metrics |= {f"divergence/{name}": estimate for name, estimate in matrix.estimates.items()}
    if exact is not None:
        distances = target_samples.measure(*exact, log_pi, log_score, context_index)
        metrics |= {f"target_samples/{name}": estimate for name, estimate in distances.items()}
    return Evaluation(metrics, len(rollouts), len(rollouts.contexts))


def metric_names(target: Target, divergence: str | Divergence, context: Context, samples_per_context: int) -> list[str]:
    """What `evaluate` may measure, found by measuring empty completions of one context; all but λ, which is known."""
    rollouts = pack([context], [[((0,), (0.0,), True)] * samples_per_context])
    nothing, chats = [""] * len(rollouts), [context.messages] * len(rollouts)
    columns = {name: [value] * len(rollouts) for name, value in context.columns.items()}
    texts = Completions(nothing, nothing, [[]] * len(rollouts), [True] * len(rollouts), columns, chats=chats)
    zeros = torch.zeros(len(rollouts), dtype=torch.float64)
    scores = Scores(texts, zeros[:, None].expand(-1, len(target.features)), zeros, zeros, zeros)
    exact = TargetSamples(rollouts, samples_per_context), zeros
    is_exact = all(term.can_be_zero for term in target.terms)
    return list(evaluate(rollouts, scores, target, divergence, exact=exact if is_exact else None).metrics)
