"""Whether the engine samples from the weights that the learner has, seen from their log-probs; docs/engines.md."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from fdpg_kernels import sum_by_sequence

from ..config.schema import TrainConfig
from ..errors import Diverged, RunError
from ..models.language_model import LanguageModel
from ..rollouts import Rollouts

GAP_TOKENS = 32  # of a round that the learner scores, or a few more; fewer at its end
GAP_LIMITS = {"float32": (1e-4, 1e-2), "bfloat16": (0.1, 0.3)}  # warn and stop: mean nats a token
SHORTEST = 8  # tokens over which a gap is spread at least: in bfloat16 a single one errs by half a nat

log = logging.getLogger(__name__)


class Disagreement(RunError):
    """Completions, by their places in the rollouts, whose log-probs are not the learner's."""

    def __init__(self, rows: Sequence[int], gap: float, limit: float):
        self.rows = rows
        complaint = f"the engine's log-probs differ from the learner's by {gap:.2g} nats a token"
        cause = "it does not sample from the weights that are trained; see docs/engines.md"
        super().__init__(f"{complaint} (engine.gap_limit {limit:g}): {cause}")


def gap_limits(config: TrainConfig) -> tuple[float, float]:
    """Mean |log q − log π| of a token above which a round warns, and above which it stops."""
    warning, limit = GAP_LIMITS[config.dtype]
    return config.engine.gap_warning or warning, config.engine.gap_limit or limit


def log_ratio(rollouts: Rollouts, policy: LanguageModel, micro_batch_tokens: int) -> Tensor:
    """log π − log q of each token, [N] float64; raises Diverged where log π itself is no number."""
    policy_logprob = policy.token_logprobs(rollouts, micro_batch_tokens).double()
    if not bool(policy_logprob.isfinite().all()):
        raise Diverged("log π is not finite")
    return policy_logprob - rollouts.behavior_logprob.double()


def refuse_far(gaps: Tensor, lengths: Tensor, limit: float, first: int = 0) -> None:
    """Refuse completions, from place `first` on, by their |log q − log π| [B] and numbers of tokens [B].

    Raises:
        Disagreement: it is above `limit` nats a token for some, or NaN.
    """
    gaps = gaps / lengths.clamp(min=SHORTEST)
    (far,) = (~(gaps <= limit)).nonzero(as_tuple=True)
    if len(far):
        raise Disagreement((far + first).tolist(), float(gaps[far].max()), limit)


def compare_with_learner(
    rollouts: Rollouts, policy: LanguageModel, config: TrainConfig, seed: int, micro_batch_tokens: int, *, every: bool
) -> dict[str, float]:
    """|log q − log π| in nats on completions of the policy's weights, a token and a sequence: mean and largest.

    `every`: on all of them, which takes a forward pass of the learner; else on a few.

    Raises:
        Disagreement: the mean of a token is above the config's limit, in one of them or in all together.
    """
    ends = rollouts.cu_seqlens
    first = 0 if every else seed % len(rollouts)
    few = len(ends) if every else int(torch.searchsorted(ends, int(ends[first]) + GAP_TOKENS))
    last = max(first + 1, min(few, len(rollouts)))
    compared = rollouts.part(slice(first, last))
    difference = log_ratio(compared, policy, micro_batch_tokens)
    tokens, sequences = difference.abs(), sum_by_sequence(difference, compared.cu_seqlens).abs()
    warning, limit = gap_limits(config)
    refuse_far(sum_by_sequence(tokens, compared.cu_seqlens), compared.lengths, limit, first)
    gap = float(tokens.sum()) / max(len(tokens), SHORTEST)
    if not gap <= limit:
        raise Disagreement(range(first, last), gap, limit)
    if gap > warning:
        log.warning("the engine's log-probs differ from the learner's by %.2g nats a token; see docs/engines.md", gap)
    return {
        "logprob_gap_mean": float(tokens.mean()),
        "logprob_gap_max": float(tokens.max()),
        "sequence_gap_mean": float(sequences.mean()),
        "sequence_gap_max": float(sequences.max()),
    }
