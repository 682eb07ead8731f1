"""Fused ops for f-DPG: token log-probs, importance ratios and f-divergence weights out of hidden states.

    linear_logprob(hidden, weight, target_ids)                  -> log-probs [N], differentiable
    sharded_linear_logprob(hidden, weight_shard, ...)            -> the same, a head split over processes
    sequence_weights(policy, behavior, cu_seqlens, log_P, log_Z) -> SequenceWeights, one row a sequence
    fdpg_loss(hidden, weight, target_ids, cu_seqlens, ...)       -> FDPGLoss(loss, weights, recomputed)
    sum_by_sequence(token_values, cu_seqlens)                    -> float64 sums [B]
    divergences.get("jensen_shannon")                            -> Divergence

Needs torch, and Triton for `impl="triton"`; knows nothing of the trainer.
"""

from . import divergences as divergences
from .divergences import Divergence as Divergence
from .reference import SequenceWeights as SequenceWeights
from .sequence_weights import sum_by_sequence as sum_by_sequence

# isort: split
# after the module of the same name, which would take its place
from .ops import FDPGLoss as FDPGLoss
from .ops import fdpg_loss as fdpg_loss
from .ops import linear_logprob as linear_logprob
from .ops import sequence_weights as sequence_weights
from .tensor_parallel import sharded_linear_logprob as sharded_linear_logprob
