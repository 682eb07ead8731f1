"""Whether the engine samples from the weights that the learner has, seen from a few completions; docs/engines.md."""

from __future__ import annotations

import logging

import torch

from fdpg_kernels import sum_by_sequence

from ..config.schema import TrainConfig
from ..errors import RunError
from ..models.language_model import LanguageModel
from ..rollouts import Rollouts

GAP_TOKENS = 32  # of a round, at least, that the learner scores
GAP_LIMITS = {"float32": (1e-4, 1e-2), "bfloat16": (0.1, 0.3)}  # warn and stop: mean nats a token

log = logging.getLogger(__name__)


def compare_with_learner(
    rollouts: Rollouts, policy: LanguageModel, config: TrainConfig, *, seed: int, micro_batch_tokens: int
) -> dict[str, float]:
    """|log q − log π| in nats on a few completions of the policy's weights, a token and a sequence: mean and largest.

    Raises:
        RunError: the mean of a token is above the config's limit.
    """
    ends = rollouts.cu_seqlens
    first = seed % len(rollouts)
    last = int(torch.searchsorted(ends, int(ends[first]) + GAP_TOKENS).clamp(first + 1, len(rollouts)))
    few = rollouts.part(slice(first, last))
    difference = policy.token_logprobs(few, micro_batch_tokens).double() - few.behavior_logprob.double()
    tokens, sequences = difference.abs(), sum_by_sequence(difference, few.cu_seqlens).abs()
    gap, (warning, limit) = float(tokens.mean()), GAP_LIMITS[config.dtype]
    warning, limit = config.engine.gap_warning or warning, config.engine.gap_limit or limit
    complaint = f"the engine's log-probs differ from the learner's by {gap:.2g} nats a token"
    if gap > limit:
        raise RunError(
            f"{complaint} (engine.gap_limit {limit:g}): it does not sample from the weights that are trained; "
            "see docs/engines.md"
        )
    if gap > warning:
        log.warning("%s; see docs/engines.md", complaint)
    return {
        "logprob_gap_mean": gap,
        "logprob_gap_max": float(tokens.max()),
        "sequence_gap_mean": float(sequences.mean()),
        "sequence_gap_max": float(sequences.max()),
    }
