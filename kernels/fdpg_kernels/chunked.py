"""The ops in plain PyTorch with a bounded block of logits: the CPU path, and the fall-back everywhere else.

Notation: C rows of a chunk, V vocabulary, D hidden size. A row keeps E = exp(z − max) and s = ΣE instead of
the softmax: log π(y) = z_y − max − log s, and d log π(y)/dz = 1[y] − E/s. The row scale (1/s, the incoming
gradient, the temperature) is applied to [C, D] matrices, so the [C, V] block is touched a few times only.

Log-probs need no block: they walk through the vocabulary in [C, V'] tiles that stay in a cache, and so does their
backward pass, which has the log-sum-exp kept and forms the logits again. The loss keeps a block, for its backward pass
follows as soon as weights are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import (
    Gradients,
    Head,
    LogitGradients,
    Logprobs,
    Number,
    Options,
    Sequences,
    Wants,
    is_ignored,
    result_dtype,
)
from .chunks import CHUNK_ROWS, Sums, card_bytes, even_chunks, plan
from .reference import SequenceWeights
from .sequence_weights import sequence_weights as sequence_weights

BLOCK_BYTES = 32 * 2**20  # of the one [C, V] block on a CPU
BLOCK_ROWS = 1024  # at most; a small vocabulary needs no more
FLOOR = -200.0  # below it exp is 0 in float32 and nothing in float64; −inf·0 would be NaN
TILE_BYTES = 8 * 2**20  # of the one [C, V'] tile; smaller and larger ones were slower


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
    """The LM head in the dtype that is computed with, and the gradients that accumulate while chunks pass by."""

    def __init__(self, head: Head, wants_weight: bool = False, wants_bias: bool = False, hidden: Tensor | None = None):
        compute = result_dtype(head.weight)
        self.head = head
        self.weight = head.weight.detach().to(compute)  # [V, D]
        self.bias = None if head.bias is None else head.bias.detach().to(compute)  # [V]
        self.sums = Sums(  # accumulated in float32 over chunks: a bfloat16 sum of many chunks drifts
            None if hidden is None else torch.empty_like(hidden),
            torch.empty_like(self.weight) if wants_weight else None,
            torch.zeros_like(self.bias) if wants_bias and self.bias is not None else None,
        )

    @property
    def chunk_rows(self) -> int:
        row_bytes, chunk_bytes = self.weight.element_size() * max(1, len(self.weight)), self.head.chunk_bytes
        if chunk_bytes is not None:
            return max(1, chunk_bytes // row_bytes)
        if self.weight.device.type == "cpu":
            return max(1, min(BLOCK_ROWS, BLOCK_BYTES // row_bytes))
        return max(1, min(CHUNK_ROWS, card_bytes(self.weight.device) // row_bytes))

    def tiles(self, num_rows: int) -> list[slice]:
        """Ranges of the vocabulary whose logits of so many rows make a tile."""
        return even_chunks(0, len(self.weight), max(1, TILE_BYTES // (self.weight.element_size() * num_rows)))

    def take(self, hidden: Tensor, target_ids: Tensor, rows: Any) -> tuple[Tensor, Tensor, Number]:
        """Hidden states [C, D], targets [C] and temperature, one or [C, 1], of these rows."""
        one_each = self.head.row_temperature
        temperature = self.head.temperature if one_each is None else one_each[rows, None]
        return hidden[rows].to(self.weight.dtype), target_ids[rows].long(), temperature

    def logits(self, x: Tensor, temperature: Number, columns: slice = slice(None)) -> Tensor:
        """Logits of these rows and vocabulary entries, [C, V']."""
        logits = torch.mm(x, self.weight[columns].T)
        if self.bias is not None:
            logits += self.bias[columns]
        if self.head.softcap is not None:
            logits.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        if isinstance(temperature, Tensor) or temperature != 1.0:
            logits.div_(temperature)
        return logits

    def slope(self, logits: Tensor, temperature: Number) -> Tensor | None:
        """d logit / d product where a soft cap bends it, but for the temperature; the shape of logits."""
        if self.head.softcap is None:
            return None
        return (logits * (temperature / self.head.softcap)).square_().neg_().add_(1)

    def forward(self, hidden: Tensor, target_ids: Tensor, rows: slice) -> tuple[Tensor, _Block]:
        """log-probs [C] of these rows and what the backward needs of them."""
        x, targets, temperature = self.take(hidden, target_ids, rows)
        logits = self.logits(x, temperature)
        slope = self.slope(logits, temperature)
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
        accumulate(into, minus_one_hot, block.x * scale, scale)
        into.is_first = False
        if into.hidden is not None:
            into.rows(rows).copy_(torch.mm(minus_one_hot, self.weight).mul_(scale))

    def gradients(self, hidden_grad: Tensor | None) -> Gradients:
        if self.sums.weight is not None and self.sums.is_first:  # no rows came
            self.sums.weight.zero_()
        return self.head.gradients(hidden_grad, self.sums.weight, self.sums.bias)


def accumulate(into: Sums, minus_one_hot: Tensor, scaled: Tensor, scale: Tensor, columns: slice = slice(None)) -> None:
    """Add what these rows [C, V'], with scale·hidden [C, D], are to the head's gradient."""
    if into.weight is not None:
        into.weight[columns].addmm_(minus_one_hot.T, scaled, beta=0 if into.is_first else 1)
    if into.bias is not None:
        into.bias[columns].addmv_(minus_one_hot.T, scale[:, 0])


def linear_logprob(hidden: Tensor, target_ids: Tensor, head: Head, with_entropy: bool = False) -> Logprobs:
    """log π of ids [N, K], and log-sum-exp and entropy of each row."""
    products = _Products(head)
    logprob, lse = products.weight.new_zeros(target_ids.shape), hidden.new_zeros(len(hidden), dtype=torch.float64)
    entropy = products.weight.new_zeros(len(hidden)) if with_entropy else None
    for rows in _live_chunks(target_ids, BLOCK_ROWS):
        x, targets, temperature = products.take(hidden, target_ids, rows)
        target_logit = x.new_full(targets.shape, torch.nan)  # stays where a target lies outside the vocabulary
        total, moment = x.new_zeros(len(x)), x.new_zeros(len(x))  # Σ e and Σ e·(z − largest) of e = exp(z − largest)
        largest = x.new_full((len(x),), torch.finfo(x.dtype).min)  # not −inf: a whole tile may be −inf by its bias
        for columns in products.tiles(len(x)):
            logits = products.logits(x, temperature, columns)
            local, inside = _local(targets, columns)
            target_logit = torch.where(inside, logits.gather(1, local), target_logit)
            previous, largest = largest, torch.maximum(largest, logits.amax(1))
            rescale = (previous - largest).exp()
            logits.sub_(largest[:, None])
            if entropy is not None:
                exponentials = logits.exp()
                logits.clamp_(min=FLOOR)
                moment = (moment + (previous - largest) * total) * rescale + torch.linalg.vecdot(exponentials, logits)
                total = total * rescale + exponentials.sum(1)
                del exponentials
            else:
                total = total * rescale + logits.exp_().sum(1)
            del logits  # or it would live beside the next one
        lse[rows] = largest.double() + total.log()
        logprob[rows] = target_logit - largest[:, None] - total.log()[:, None]
        if entropy is not None:
            entropy[rows] = total.log() - moment / total
    return Logprobs(logprob, lse, entropy)


def linear_logprob_backward(
    hidden: Tensor, target_ids: Tensor, head: Head, results: Logprobs, given: LogitGradients, wants: Wants
) -> Gradients:
    """Gradients of hidden, weight and bias from those of the logits, which are formed again."""
    products = _Products(head, *wants[1:])
    hidden_grad = torch.zeros_like(hidden) if wants[0] else None
    for rows in _live_chunks(target_ids, BLOCK_ROWS):
        x, targets, temperature = products.take(hidden, target_ids, rows)
        x_grad, ones = torch.zeros_like(x), x.new_ones(len(x), 1)
        lse = results.lse[rows, None].to(x.dtype)
        lost = (lse - results.lse[rows, None]).to(x.dtype)  # log π = z − lse + lost
        alpha, beta = given.alpha[rows, None] * lost.exp(), None
        if given.beta is not None:
            beta = given.beta[rows, None] * lost.exp()
            alpha = alpha + beta * lost
        for columns in products.tiles(len(x)):
            logits = products.logits(x, temperature, columns)
            slope = products.slope(logits, temperature)
            if beta is None:
                gradient = logits.sub_(lse).exp_().mul_(alpha)
            else:
                probabilities = logits.sub_(lse).exp()
                gradient = logits.clamp_(min=FLOOR).mul_(beta).add_(alpha).mul_(probabilities)
                del probabilities
            local, inside = _local(targets, columns)
            gradient.scatter_add_(1, local, given.at_target[rows] * inside)
            if slope is not None:
                gradient.mul_(slope)
            accumulate(products.sums, gradient, x, ones, columns)
            if hidden_grad is not None:
                x_grad.addmm_(gradient, products.weight[columns])
            del logits, gradient, slope  # or they would live beside the next ones
        products.sums.is_first = False
        if hidden_grad is not None:
            hidden_grad[rows] = x_grad.to(hidden.dtype)
    return products.gradients(hidden_grad)


def fdpg_loss(
    hidden: Tensor, target_ids: Tensor, head: Head, sequences: Sequences, options: Options, wants: Wants
) -> tuple[Tensor, SequenceWeights, Gradients]:
    """loss, weights (float64), and the gradients of hidden, weight and bias.

    Forward and backward in one pass over the rows, none of them ignored: the upstream gradient of a loss is one scalar.
    """
    cu_seqlens, behavior, score, log_z, total = sequences
    if not any(wants):
        logprob = linear_logprob(hidden, target_ids[:, None], head).logprob[:, 0]
        weights = sequence_weights(logprob, sequences, options)
        return _loss(weights, total, logprob.dtype), weights, (None, None, None)

    products = _Products(head, *wants[1:], hidden=hidden if wants[0] else None)
    sums, dtype = products.sums, products.weight.dtype
    ends, num_sequences = cu_seqlens.tolist(), len(cu_seqlens) - 1
    log_z = log_z.to(hidden.device).expand(num_sequences)
    baseline = torch.zeros(()) if options.baseline is None else options.baseline
    baseline = baseline.to(hidden.device).expand(num_sequences)

    found = []
    for group in plan(ends, products.chunk_rows):
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
    return _loss(weights, total, dtype), weights, products.gradients(sums.hidden)


def _loss(weights: SequenceWeights, total: int, dtype: torch.dtype) -> Tensor:
    return (-(weights.weight * weights.policy_logprob).sum() / total).to(dtype)


def _local(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Column of each target in this tile, any where it lies outside; and whether it lies inside, [C, K]."""
    local = (targets - columns.start).clamp(0, columns.stop - columns.start - 1)
    return local, (targets >= columns.start) & (targets < columns.stop)


def _live_chunks(target_ids: Tensor, rows: int) -> list[Any]:
    """Index expressions of at most `rows` rows each that together name every row not ignored."""
    live = ~is_ignored(target_ids)
    if bool(live.all()):
        return even_chunks(0, len(target_ids), rows)
    return list(live.nonzero(as_tuple=True)[0].split(rows)) if bool(live.any()) else []
