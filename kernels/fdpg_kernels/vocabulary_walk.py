"""Log-probs and their gradients in plain PyTorch: once through the vocabulary, in tiles of logits that stay in a cache.

Each part of the head is cast to float32 if it is smaller, all rows pass by it, and its gradient is complete. So beside
a head of any dtype there is nothing as large as it, nor as the logits. The backward pass has the log-sum-exp kept and
forms the logits again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .arguments import Gradients, Head, LogitGradients, Logprobs, Number, Wants, is_ignored, result_dtype
from .chunks import even_chunks

FLOOR = -200.0  # below it exp is 0 in float32 and nothing in float64; −inf·0 would be NaN
TILE_ROWS = 1024  # C of a tile [C, V'], at most
TILE_BYTES = 2 * 2**20  # on a CPU; larger ones leave its cache, smaller ones cost calls
DEVICE_TILE_BYTES = 256 * 2**20


class _Walk:
    """Rows that are not ignored, [n], and the parts of the head that they meet."""

    def __init__(self, hidden: Tensor, target_ids: Tensor, head: Head):
        ignored = is_ignored(target_ids)
        self.head, self.num_rows = head, len(hidden)
        self.live = (~ignored).nonzero()[:, 0] if bool(ignored.any()) else None
        self.x = self.pack(hidden).to(result_dtype(head.weight))  # [n, D]
        self.targets = self.pack(target_ids).long()  # [n, K]
        self.row_temperature = None if head.row_temperature is None else self.pack(head.row_temperature)[:, None]
        self.chunks = even_chunks(0, len(self.x), TILE_ROWS)
        rows = self.chunks[0].stop if self.chunks else 0
        tile_bytes = TILE_BYTES if hidden.device.type == "cpu" else DEVICE_TILE_BYTES
        width = (head.chunk_bytes or tile_bytes) // (self.x.element_size() * max(1, rows))
        self.columns = even_chunks(0, len(head.weight) if rows else 0, max(1, width))
        self.tile = self.x.new_empty(rows * (self.columns[0].stop if self.columns else 0))

    def pack(self, rows: Tensor) -> Tensor:
        return rows if self.live is None else rows[self.live]

    def unpack(self, rows: Tensor) -> Tensor:
        """As many rows as were given; zeros where one is ignored."""
        if self.live is None:
            return rows
        return rows.new_zeros(self.num_rows, *rows.shape[1:]).index_copy_(0, self.live, rows)

    def parts(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Ranges of the vocabulary, with weight [V', D] and bias [V'] in the dtype that is computed with."""
        for columns in self.columns:
            weight, bias = self.head.weight.detach()[columns].to(self.x.dtype), self.head.bias
            yield columns, weight, None if bias is None else bias.detach()[columns].to(self.x.dtype)

    def temperature(self, rows: slice) -> Number:
        return self.head.temperature if self.row_temperature is None else self.row_temperature[rows]

    def logits(self, rows: slice, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Logits [C, V'] of these rows and this part of the head, where the ones before them were."""
        x = self.x[rows]
        product = torch.mm(x, weight.T, out=self.tile[: len(x) * len(weight)].view(len(x), len(weight)))
        return to_logits(product, bias, self.head, self.temperature(rows))


def linear_logprob(hidden: Tensor, target_ids: Tensor, head: Head, with_entropy: bool = False) -> Logprobs:
    """log π of ids [N, K], and log-sum-exp and entropy of each row."""
    walk = _Walk(hidden, target_ids, head)
    target_logit = walk.x.new_full(walk.targets.shape, torch.nan)  # stays where a target lies outside the vocabulary
    total, moment = walk.x.new_zeros(2, len(walk.x))  # Σ e and Σ e·(z − largest) of e = exp(z − largest)
    largest = torch.full_like(total, torch.finfo(total.dtype).min)  # not −inf: a whole tile may be −inf by its bias
    for columns, weight, bias in walk.parts():
        for rows in walk.chunks:
            logits = walk.logits(rows, weight, bias)
            local, inside = _local(walk.targets[rows], columns)
            target_logit[rows] = torch.where(inside, logits.gather(1, local), target_logit[rows])
            previous, before = largest[rows].clone(), total[rows]
            torch.maximum(previous, logits.amax(1), out=largest[rows])
            fall = previous - largest[rows]
            logits.sub_(largest[rows, None])
            if with_entropy:
                exponentials = logits.exp()
                vecdot = torch.linalg.vecdot(exponentials, logits.clamp_(min=FLOOR))
                moment[rows] = (moment[rows] + fall * before) * fall.exp() + vecdot
            else:
                exponentials = logits.exp_()
            total[rows] = before * fall.exp() + exponentials.sum(1)
    log_total = total.log()
    logprob = target_logit - largest[:, None] - log_total[:, None]
    entropy = walk.unpack(log_total - moment / total) if with_entropy else None
    return Logprobs(walk.unpack(logprob), walk.unpack(largest.double() + log_total), entropy)


def linear_logprob_backward(
    hidden: Tensor, target_ids: Tensor, head: Head, results: Logprobs, given: LogitGradients, wants: Wants
) -> Gradients:
    """Gradients of hidden, weight and bias from those of the logits, which are formed again."""
    walk = _Walk(hidden, target_ids, head)
    exact, at_target = walk.pack(results.lse), walk.pack(given.at_target)
    lse = exact.to(walk.x.dtype)
    lost = (lse - exact).to(walk.x.dtype)  # log π = z − lse + lost
    alpha, beta = walk.pack(given.alpha) * lost.exp(), None
    if given.beta is not None:
        beta = walk.pack(given.beta) * lost.exp()
        alpha += beta * lost
    x_grad = torch.zeros_like(walk.x) if wants[0] else None
    empty = torch.empty_like if walk.columns else torch.zeros_like  # no rows: nothing will be written
    weight_grad = empty(head.weight, dtype=head.weight_grad_dtype) if wants[1] else None
    bias_grad = torch.zeros_like(head.bias) if wants[2] and head.bias is not None else None
    for columns, weight, bias in walk.parts():
        part = None if weight_grad is None else _sums(weight_grad[columns], weight.dtype)
        bias_part = None if bias_grad is None else _sums(bias_grad[columns], weight.dtype).zero_()
        for rows in walk.chunks:
            logits = walk.logits(rows, weight, bias)
            slope = to_slope(logits, head, walk.temperature(rows))
            logits.sub_(lse[rows, None])
            if beta is None:
                gradient = logits.exp_().mul_(alpha[rows, None])
            else:
                probabilities = logits.exp()
                gradient = logits.clamp_(min=FLOOR).mul_(beta[rows, None]).add_(alpha[rows, None]).mul_(probabilities)
            local, inside = _local(walk.targets[rows], columns)
            gradient.scatter_add_(1, local, at_target[rows] * inside)
            if slope is not None:
                gradient.mul_(slope)
            if part is not None:
                part.addmm_(gradient.T, walk.x[rows], beta=int(rows.start > 0))  # the first rows write
            if bias_part is not None:
                bias_part += gradient.sum(0)
            if x_grad is not None:
                x_grad[rows].addmm_(gradient, weight)
        if weight_grad is not None and part is not None:
            weight_grad[columns] = part
        if bias_grad is not None and bias_part is not None:
            bias_grad[columns] = bias_part
    return None if x_grad is None else walk.unpack(x_grad).to(hidden.dtype), weight_grad, bias_grad


def to_logits(product: Tensor, bias: Tensor | None, head: Head, temperature: Number) -> Tensor:
    """Logits in the place of hidden·weightᵀ, [C, V']; temperature: of these rows, one or [C, 1]."""
    if bias is not None:
        product += bias
    if head.softcap is not None:
        product.div_(head.softcap).tanh_().mul_(head.softcap)
    if isinstance(temperature, Tensor) or temperature != 1.0:
        product.div_(temperature)
    return product


def to_slope(logits: Tensor, head: Head, temperature: Number) -> Tensor | None:
    """d logit / d product where a soft cap bends it, but for the temperature; the shape of logits."""
    if head.softcap is None:
        return None
    return (logits * (temperature / head.softcap)).square_().neg_().add_(1)


def _sums(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a gradient is summed: in `part` itself if it has the dtype, for a bfloat16 sum would drift."""
    return part if part.dtype == dtype else torch.empty_like(part, dtype=dtype)


def _local(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Column of each target in this tile, any where it lies outside; and whether it lies inside, [C, K]."""
    local = (targets - columns.start).clamp(0, columns.stop - columns.start - 1)
    return local, (targets >= columns.start) & (targets < columns.stop)
