"""The ops in plain PyTorch with a bounded block of logits: the CPU path, and the fall-back everywhere else.

Notation: C rows of a chunk, V vocabulary, D hidden size. A row keeps E = exp(z − max) and s = ΣE instead of
the softmax: log π(y) = z_y − max − log s, and d log π(y)/dz = 1[y] − E/s. The row scale (1/s, the incoming
gradient, the temperature) is applied to [C, D] matrices, so the [C, V] block is touched a few times only.

Log-probs need no block: they walk through the vocabulary in [C, V'] tiles that stay in a cache, and so does their
backward pass, which has max and s kept and forms the logits again. The loss keeps a block, for its backward pass
follows as soon as weights are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reference import IGNORED, SequenceWeights
from .sequence_weights import result_dtype, sum_by_sequence, weights_from_sums

BLOCK_BYTES = 32 * 2**20  # of the one [C, V] block
BLOCK_ROWS = 1024  # at most; a small vocabulary needs no more
TILE_BYTES = 8 * 2**20  # of the one [C, V'] tile; smaller and larger ones were slower


@dataclass
class _Head:
    """The LM head in the compute dtype, and the gradients that accumulate while chunks pass by."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float | None
    weight_grad: Tensor | None = None  # [V, D]
    bias_grad: Tensor | None = None  # [V]

    @property
    def chunk_rows(self) -> int:
        return max(1, min(BLOCK_ROWS, BLOCK_BYTES // (self.weight.element_size() * len(self.weight))))

    def logits(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """Logits of these rows and vocabulary entries, [C, V']."""
        logits = torch.mm(hidden, self.weight[columns].T)
        if self.bias is not None:
            logits += self.bias[columns]
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """d logit / d product where a soft cap bends it, but for the temperature; the shape of logits."""
        if self.softcap is None:
            return None
        return (logits * (self.temperature / self.softcap)).square_().neg_().add_(1)

    def tiles(self, num_rows: int) -> list[slice]:
        """Ranges of the vocabulary whose logits of so many rows make a tile."""
        return _chunks(0, len(self.weight), max(1, TILE_BYTES // (self.weight.element_size() * num_rows)))

    def rows(self, hidden: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of a chunk [C, D] and [C], in the dtypes that are computed with."""
        return hidden.to(self.weight.dtype), target_ids.long()

    def forward(self, hidden: Tensor, target_ids: Tensor) -> tuple[Tensor, _Block]:
        """log-probs [C] and what the backward needs of these rows."""
        x, targets = self.rows(hidden, target_ids)
        logits = self.logits(x)
        slope = self.slope(logits)
        target_logit = logits.gather(1, targets[:, None])[:, 0]
        largest = logits.amax(dim=1, keepdim=True)
        exponentials = logits.sub_(largest).exp_()
        total = exponentials.sum(dim=1)
        logprob = target_logit - largest[:, 0] - total.log()
        return logprob, _Block(x, targets, exponentials, total, slope)

    def backward(self, block: _Block, gradient: Tensor, wants_hidden: bool) -> Tensor | None:
        """Add the head's gradient of Σ gradient·log π, return that of hidden [C, D]; overwrites the block."""
        scale = -gradient / (block.total * self.temperature)  # [C]
        minus_one_hot = block.exponentials
        minus_one_hot.scatter_add_(1, block.targets[:, None], -block.total[:, None])
        if block.slope is not None:
            minus_one_hot.mul_(block.slope)
        if self.weight_grad is not None:
            self.weight_grad.addmm_(minus_one_hot.T, block.x * scale[:, None])
        if self.bias_grad is not None:
            self.bias_grad.addmv_(minus_one_hot.T, scale)
        if not wants_hidden:
            return None
        return torch.mm(minus_one_hot, self.weight).mul_(scale[:, None])


@dataclass(frozen=True)
class _Block:
    x: Tensor  # [C, D]
    targets: Tensor  # [C]
    exponentials: Tensor  # [C, V]
    total: Tensor  # [C]
    slope: Tensor | None  # [C, V], d capped logit / d logit


def _head(weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> _Head:
    compute = result_dtype(weight)
    return _Head(weight.detach().to(compute), None if bias is None else bias.detach().to(compute), temperature, softcap)


def _chunks(start: int, stop: int, rows: int) -> list[slice]:
    return [slice(i, min(i + rows, stop)) for i in range(start, stop, rows)]


def linear_logprob_forward(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """log-probs [N]; and of each row its largest logit and the sum of exponentials beside it, [2, N]."""
    head = _head(weight, bias, temperature, softcap)
    logprob, kept = head.weight.new_zeros(len(hidden)), head.weight.new_zeros(2, len(hidden))
    for rows in _kept_chunks(target_ids, BLOCK_ROWS):
        x, targets = head.rows(hidden[rows], target_ids[rows])
        target_logit, total = x.new_zeros(len(x)), x.new_zeros(len(x))
        largest = x.new_full((len(x),), torch.finfo(x.dtype).min)  # not −inf: a whole tile may be −inf by its bias
        for columns in head.tiles(len(x)):
            logits = head.logits(x, columns)
            local, inside = _local(targets, columns)
            target_logit += logits.gather(1, local)[:, 0].masked_fill(~inside, 0.0)
            previous, largest = largest, torch.maximum(largest, logits.amax(1))
            total = total * (previous - largest).exp() + logits.sub_(largest[:, None]).exp_().sum(1)
            del logits  # or it would live beside the next one
        logprob[rows] = target_logit - largest - total.log()
        kept[0, rows], kept[1, rows] = largest, total
    return logprob, kept


def linear_logprob_backward(
    gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    logprob: Tensor,
    kept: Tensor,
    temperature: float,
    softcap: float | None,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias for the gradient of each log-prob [N]; logits are formed again."""
    head = _head(weight, bias, temperature, softcap)
    _allocate_gradients(head, wants[1], wants[2])
    hidden_grad = torch.zeros_like(hidden) if wants[0] else None
    for rows in _kept_chunks(target_ids, BLOCK_ROWS):
        x, targets = head.rows(hidden[rows], target_ids[rows])
        largest, total = kept[:, rows]
        scale = -gradient[rows] / (total * temperature)
        scaled, x_grad = x * scale[:, None], torch.zeros_like(x)
        for columns in head.tiles(len(x)):
            logits = head.logits(x, columns)
            slope = head.slope(logits)
            minus_one_hot = logits.sub_(largest[:, None]).exp_()
            local, inside = _local(targets, columns)
            minus_one_hot.scatter_add_(1, local, (-total * inside)[:, None])
            if slope is not None:
                minus_one_hot.mul_(slope)
            if head.weight_grad is not None:
                head.weight_grad[columns].addmm_(minus_one_hot.T, scaled)
            if head.bias_grad is not None:
                head.bias_grad[columns].addmv_(minus_one_hot.T, scale)
            if hidden_grad is not None:
                x_grad.addmm_(minus_one_hot, head.weight[columns])
            del logits, minus_one_hot, slope  # or they would live beside the next ones
        if hidden_grad is not None:
            hidden_grad[rows] = x_grad.mul_(scale[:, None]).to(hidden.dtype)
    return hidden_grad, _like(head.weight_grad, weight), _like(head.bias_grad, bias)


def _local(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Column of each target in this tile, [C, 1], any where it lies outside; and whether it lies inside, [C]."""
    local = (targets - columns.start).clamp(0, columns.stop - columns.start - 1)
    return local[:, None], (targets >= columns.start) & (targets < columns.stop)


def fdpg_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    cu_seqlens: Tensor,
    behavior: Tensor,
    score: Tensor,
    log_z: Tensor,
    total_sequences: int,
    weight_grad_out: Tensor | None,
    wants: tuple[bool, bool, bool],
    options: dict[str, Any],
) -> tuple[Tensor, SequenceWeights, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """loss, weights (float64), recomputed [B], and the gradients of hidden, weight and bias.

    Forward and backward in one pass over the rows: the upstream gradient of a loss is one scalar.
    """
    (kept,) = (target_ids != IGNORED).nonzero(as_tuple=True)
    if len(kept) < len(hidden):  # ignored rows are packed out, not computed and masked
        kept_before = torch.nn.functional.pad((target_ids != IGNORED).cumsum(0), (1, 0))
        loss, weights, recomputed, hidden_grad, weight_grad, bias_grad = fdpg_loss(
            hidden[kept],
            weight,
            target_ids[kept],
            bias,
            temperature,
            softcap,
            kept_before[cu_seqlens.to(hidden.device).long()],
            behavior[kept],
            score,
            log_z,
            total_sequences,
            weight_grad_out,
            wants,
            options,
        )
        if hidden_grad is not None:
            hidden_grad = torch.zeros_like(hidden).index_copy_(0, kept, hidden_grad)
        return loss, weights, recomputed, hidden_grad, weight_grad, bias_grad

    if not any(wants):
        logprob, _ = linear_logprob_forward(hidden, weight, target_ids, bias, temperature, softcap)
        policy, behavior = (sum_by_sequence(x, cu_seqlens.to(hidden.device)) for x in (logprob, behavior))
        weights = weights_from_sums(policy, behavior, score, log_z, **options)
        loss = (-(weights.weight * weights.policy_logprob).sum() / total_sequences).to(logprob.dtype)
        return loss, weights, torch.zeros_like(weights.clipped), None, None, None

    head = _head(weight, bias, temperature, softcap)
    adds_in_place = weight_grad_out is not None and weight_grad_out.dtype == head.weight.dtype
    _allocate_gradients(head, wants[1] and not adds_in_place, wants[2])
    if wants[1] and adds_in_place:
        head.weight_grad = weight_grad_out
    hidden_grad = torch.empty_like(hidden) if wants[0] else None
    ends, num_sequences = cu_seqlens.tolist(), len(cu_seqlens) - 1
    per_sequence: dict[str, Any] = dict(dtype=torch.float64, device=hidden.device)
    log_z = torch.as_tensor(log_z, **per_sequence).expand(num_sequences)
    baseline = options["baseline"]
    baseline = torch.as_tensor(0.0 if baseline is None else baseline, **per_sequence).expand(num_sequences)

    block: Any = None
    parts, recomputed = [], torch.zeros(num_sequences, dtype=torch.bool, device=hidden.device)
    for first, last in sequence_groups(ends, head.chunk_rows):
        group, sequences = slice(ends[first], ends[last]), slice(first, last)
        lengths = torch.tensor([ends[i + 1] - ends[i] for i in range(first, last)], device=hidden.device)
        owner = torch.repeat_interleave(torch.arange(last - first, device=hidden.device), lengths)
        chunks, token_logprob = _chunks(group.start, group.stop, head.chunk_rows), []
        for rows in chunks:
            block = None  # or the last one would live beside this one
            logprob, block = head.forward(hidden[rows], target_ids[rows])
            token_logprob.append(logprob)
        sums = torch.zeros(2, last - first, dtype=torch.float64, device=hidden.device)
        if chunks:
            sums[0].index_add_(0, owner, torch.cat(token_logprob).double())
            sums[1].index_add_(0, owner, behavior[group].double())
        weights = weights_from_sums(
            sums[0],
            sums[1],
            score[sequences],
            log_z[sequences],
            **options | {"baseline": baseline[sequences]},
        )
        parts.append(weights)
        recomputed[sequences] = len(chunks) > 1
        row_gradient = (-weights.weight / total_sequences)[owner].to(head.weight.dtype)  # d loss / d log π
        for rows in chunks:
            if len(chunks) > 1:  # a sequence longer than a chunk: its weight came after its first logits went
                block = None
                block = head.forward(hidden[rows], target_ids[rows])[1]
            gradient = row_gradient[rows.start - group.start : rows.stop - group.start]
            x_grad = head.backward(block, gradient, wants[0])
            if hidden_grad is not None and x_grad is not None:
                hidden_grad[rows] = x_grad.to(hidden.dtype)

    weights = SequenceWeights(*(torch.cat(column) for column in zip(*parts, strict=True)))
    loss = (-(weights.weight * weights.policy_logprob).sum() / total_sequences).to(head.weight.dtype)
    if weight_grad_out is not None:
        if head.weight_grad is not None and head.weight_grad is not weight_grad_out:
            weight_grad_out += head.weight_grad
        head.weight_grad = None
    return loss, weights, recomputed, hidden_grad, _like(head.weight_grad, weight), _like(head.bias_grad, bias)


def sequence_groups(ends: list[int], rows: int) -> Iterator[tuple[int, int]]:
    """Consecutive sequences that fit `rows` together; a longer sequence is a group of its own."""
    first = 0
    for i in range(1, len(ends)):
        if i == len(ends) - 1 or ends[i + 1] - ends[first] > rows:
            yield first, i
            first = i


def _kept_chunks(target_ids: Tensor, rows: int) -> list[Any]:
    """Index expressions of at most `rows` rows each that together name every row not ignored."""
    kept = target_ids != IGNORED
    if bool(kept.all()):
        return _chunks(0, len(target_ids), rows)
    return list(kept.nonzero(as_tuple=True)[0].split(rows)) if bool(kept.any()) else []


def _allocate_gradients(head: _Head, weight: bool, bias: bool) -> None:
    # accumulated in float32 over chunks: a bfloat16 sum of many chunks drifts
    head.weight_grad = torch.zeros_like(head.weight) if weight else None
    head.bias_grad = torch.zeros_like(head.bias) if bias and head.bias is not None else None


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)
