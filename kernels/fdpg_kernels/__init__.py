"""Fused ops for f-DPG: token log-probs, importance ratios and f-divergence weights out of hidden states.

    linear_logprob(hidden, weight, target_ids)                  -> log-probs [...], differentiable; LinearLogprob
    sharded_linear_logprob(hidden, weight_shard, ...)            -> the same, a head split over processes
    sequence_weights(policy, behavior, cu_seqlens, log_P, log_Z) -> SequenceWeights, one row a sequence
    fdpg_loss(hidden, weight, target_ids, cu_seqlens, ...)       -> FDPGLoss(loss, weights)
    sum_by_sequence(token_values, cu_seqlens)                    -> float64 sums [B]
    divergences.get("jensen_shannon")                            -> Divergence

Needs torch, and Triton for `impl="triton"`; knows nothing of a trainer.
"""

from . import divergences
from .divergences import Divergence
from .reference import SequenceWeights
from .sequence_weights import sum_by_sequence

# isort: split
# after the module of the same name, which would take its place
from .logprob import LinearLogprob
from .loss import FDPGLoss, fdpg_loss
from .ops import linear_logprob, sequence_weights
from .tensor_parallel import sharded_linear_logprob

__version__ = "0.1.0"
__all__ = [
    "Divergence",
    "FDPGLoss",
    "LinearLogprob",
    "SequenceWeights",
    "divergences",
    "fdpg_loss",
    "linear_logprob",
    "sequence_weights",
    "sharded_linear_logprob",
    "sum_by_sequence",
]
