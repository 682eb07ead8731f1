"""The ops in plain PyTorch with a bounded block of logits: the CPU path, and the fall-back everywhere else.

Notation: C rows of a chunk, V vocabulary, D hidden size. A row keeps E = exp(z − max) and s = ΣE instead of
the softmax: log π(y) = z_y − max − log s, and d log π(y)/dz = 1[y] − E/s. The row scale (1/s, the incoming
gradient, the temperature) is applied to [C, D] matrices, so the [C, V] block is touched a few times only.

Log-probs need no block, they walk through the vocabulary. The loss keeps one, for its backward pass follows as soon as
weights are known; of a head that has to be cast to float32 it would need a copy, so that loss walks too, twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import Gradients, Head, LogitGradients, Number, Options, Sequences, Wants, result_dtype
from .chunks import CHUNK_ROWS, Sums, card_bytes, plan
from .reference import SequenceWeights
from .sequence_weights import sequence_weights as sequence_weights
from .vocabulary_walk import linear_logprob as linear_logprob
from .vocabulary_walk import linear_logprob_backward as linear_logprob_backward
from .vocabulary_walk import to_logits, to_slope

BLOCK_BYTES = 32 * 2**20  # of the one [C, V] block on a CPU, at least
BLOCK_ROWS = 1024  # at most; a small vocabulary needs no more
FAST_ROWS = 256  # fewer are slow: each block passes once over the head's gradient


@dataclass(frozen=True)
class _Block:
    """What the backward of a chunk needs of its forward."""

    x: Tensor  # [C, D]
    targets: Tensor  # [C]
    exponentials: Tensor  # [C, V]
    total: Tensor  # [C]
    slope: Tensor | None  # [C, V], d capped logit / d logit
    temperature: Number


class _Products:
    """The LM head, and the gradients that accumulate while chunks pass by."""

    def __init__(self, hidden: Tensor, head: Head, wants: Wants):
        self.head, self.weight = head, head.weight.detach()  # [V, D]
        self.bias = None if head.bias is None else head.bias.detach()  # [V]
        self.sums = Sums(
            torch.empty_like(hidden) if wants[0] else None,
            torch.empty_like(self.weight) if wants[1] else None,
            torch.zeros_like(self.bias) if wants[2] and self.bias is not None else None,
        )

    def chunk_rows(self, num_rows: int) -> int:
        """Rows of a block of logits, where there are so many: a third of them is a ninth of what plain PyTorch has."""
        row_bytes, chunk_bytes = self.weight.element_size() * max(1, len(self.weight)), self.head.chunk_bytes
        if chunk_bytes is not None:
            return max(1, chunk_bytes // row_bytes)
        if self.weight.device.type == "cpu":
            return max(1, min(BLOCK_ROWS, max(BLOCK_BYTES // row_bytes, min(FAST_ROWS, num_rows // 3))))
        return max(1, min(CHUNK_ROWS, card_bytes(self.weight.device) // row_bytes))

    def forward(self, hidden: Tensor, target_ids: Tensor, rows: slice) -> tuple[Tensor, _Block]:
        """log-probs [C] of these rows and what the backward needs of them."""
        x, targets, one_each = hidden[rows], target_ids[rows].long(), self.head.row_temperature
        temperature = self.head.temperature if one_each is None else one_each[rows, None]
        logits = to_logits(torch.mm(x, self.weight.T), self.bias, self.head, temperature)
        slope = to_slope(logits, self.head, temperature)
        target_logit = logits.gather(1, targets[:, None])[:, 0]
        largest = logits.amax(dim=1, keepdim=True)
        exponentials = logits.sub_(largest).exp_()
        total = exponentials.sum(dim=1)
        return target_logit - largest[:, 0] - total.log(), _Block(x, targets, exponentials, total, slope, temperature)

    def backward(self, block: _Block, gradient: Tensor, rows: slice, into: Sums) -> None:
        """Add the gradients of Σ gradient·log π of these rows; overwrites the block."""
        scale = -(gradient / block.total)[:, None] / block.temperature  # [C, 1]
        minus_one_hot = block.exponentials
        minus_one_hot.scatter_add_(1, block.targets[:, None], -block.total[:, None])
        if block.slope is not None:
            minus_one_hot.mul_(block.slope)
        if into.weight is not None:
            into.weight.addmm_(minus_one_hot.T, block.x * scale, beta=0 if into.is_first else 1)
        if into.bias is not None:
            into.bias.addmv_(minus_one_hot.T, scale[:, 0])
        into.is_first = False
        if into.hidden is not None:
            into.rows(rows).copy_(torch.mm(minus_one_hot, self.weight).mul_(scale))

    def gradients(self) -> Gradients:
        if self.sums.weight is not None and self.sums.is_first:  # no rows came
            self.sums.weight.zero_()
        return self.head.gradients(self.sums.hidden, self.sums.weight, self.sums.bias)


def fdpg_loss(
    hidden: Tensor, target_ids: Tensor, head: Head, sequences: Sequences, options: Options, wants: Wants
) -> tuple[Tensor, SequenceWeights, Gradients]:
    """loss, weights (float64), and the gradients of hidden, weight and bias.

    Forward and backward in one pass over the rows, none of them ignored: the upstream gradient of a loss is one scalar.
    """
    cu_seqlens, behavior, score, log_z, total = sequences
    if not any(wants) or head.weight.dtype != result_dtype(head.weight):
        return _walking_twice(hidden, target_ids[:, None], head, sequences, options, wants)

    products = _Products(hidden, head, wants)
    sums, dtype = products.sums, products.weight.dtype
    ends, num_sequences = cu_seqlens.tolist(), len(cu_seqlens) - 1
    log_z = log_z.to(hidden.device).expand(num_sequences)
    baseline = torch.zeros(()) if options.baseline is None else options.baseline
    baseline = baseline.to(hidden.device).expand(num_sequences)

    found = []
    for group in plan(ends, products.chunk_rows(len(hidden))):
        span, token_logprob = slice(group.first, group.last), [hidden.new_empty(0)]
        unit = sums.apart(group.rows) if len(group.chunks) > 1 else None
        for rows in group.chunks:
            logprob, block = products.forward(hidden, target_ids, rows)
            token_logprob.append(logprob)
            if unit is not None:  # its weight is not known yet: 1
                products.backward(block, torch.ones_like(logprob), rows, unit)
                del block  # or it would live beside the next one
        own_ends = cu_seqlens[group.first : group.last + 1].to(hidden.device) - group.rows.start
        own = Sequences(own_ends, behavior[group.rows], score[span], log_z[span])
        weights = sequence_weights(torch.cat(token_logprob), own, options._replace(baseline=baseline[span]))
        found.append((group.first, weights))
        factor = (-weights.weight / total).to(dtype)  # d loss / d log π
        if unit is not None:
            sums.add(unit, factor[0])
        elif group.chunks:
            products.backward(block, factor.repeat_interleave(own_ends.diff()), group.rows, sums)
            del block

    in_order = (weights for _, weights in sorted(found, key=lambda pair: pair[0]))
    weights = SequenceWeights(*(torch.cat(column) for column in zip(*in_order, strict=True)))
    return _loss(weights, total, dtype), weights, products.gradients()


def _walking_twice(
    hidden: Tensor, target_ids: Tensor, head: Head, sequences: Sequences, options: Options, wants: Wants
) -> tuple[Tensor, SequenceWeights, Gradients]:
    """`fdpg_loss` in four products: log-probs, and when all weights are known the gradients, if any are wanted."""
    results = linear_logprob(hidden, target_ids, head)
    weights = sequence_weights(results.logprob[:, 0], sequences, options)
    gradients: Gradients = (None, None, None)
    if any(wants):
        lengths = sequences.cu_seqlens.to(hidden.device).diff()
        factor = (-weights.weight / sequences.total).to(results.logprob.dtype).repeat_interleave(lengths)
        factor /= head.temperature if head.row_temperature is None else head.row_temperature
        given = LogitGradients(factor[:, None], -factor, None)
        gradients = linear_logprob_backward(hidden, target_ids, head, results, given, wants)
    return _loss(weights, sequences.total, results.logprob.dtype), weights, gradients


def _loss(weights: SequenceWeights, total: int, dtype: torch.dtype) -> Tensor:
    return (-(weights.weight * weights.policy_logprob).sum() / total).to(dtype)
