"""Whether the engine samples from the weights that the learner has, seen from a few completions; docs/engines.md."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fdpg_kernels import sum_by_sequence

from ..config.schema import TrainConfig
from ..errors import RunError
from ..models.language_model import LanguageModel
from ..rollouts import Rollouts

GAP_TOKENS = 32  # of a round's completions, at least, that the learner scores to see whether the engine agrees
GAP_LIMITS = {"float32": (1e-4, 1e-2), "bfloat16": (0.1, 0.3)}  # warn and stop: mean nats a token

log = logging.getLogger(__name__)


def compare_with_learner(
    rollouts: Rollouts, policy: LanguageModel, config: TrainConfig, *, seed: int, micro_batch_tokens: int
) -> dict[str, float]:
    """`agreement` on a few of B completions, sampled from the weights that the policy has at this moment.

    Raises:
        RunError: the gap is above the config's limit.
    """
    ends = rollouts.cu_seqlens
    first = seed % len(rollouts)
    last = int(torch.searchsorted(ends, int(ends[first]) + GAP_TOKENS).clamp(first + 1, len(rollouts)))
    few = rollouts.part(slice(first, last))
    gaps = agreement(few, policy.token_logprobs(few, micro_batch_tokens))
    warning, limit = GAP_LIMITS[config.dtype]
    warning, limit = config.engine.gap_warning or warning, config.engine.gap_limit or limit
    gap = gaps["logprob_gap_mean"]
    complaint = f"the engine's log-probs differ from the learner's by {gap:.2g} nats a token"
    if gap > limit:
        raise RunError(
            f"{complaint} (engine.gap_limit {limit:g}): it does not sample from the weights that are trained; "
            "see docs/engines.md"
        )
    if gap > warning:
        log.warning("%s; see docs/engines.md", complaint)
    return gaps


def agreement(rollouts: Rollouts, policy_logprob: Tensor) -> dict[str, float]:
    """|log q − log π| in nats while sampler and learner should agree, a token and a sequence: mean and largest.

    Args:
        rollouts: N tokens.
        policy_logprob: log π of each under the learner, [N].
    """
    difference = policy_logprob.double() - rollouts.behavior_logprob.double()
    tokens, sequences = difference.abs(), sum_by_sequence(difference, rollouts.cu_seqlens).abs()
    return {
        "logprob_gap_mean": float(tokens.mean()),
        "logprob_gap_max": float(tokens.max()),
        "sequence_gap_mean": float(sequences.mean()),
        "sequence_gap_max": float(sequences.max()),
    }
