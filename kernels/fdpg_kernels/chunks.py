"""How rows are packed and cut into chunks, and the gradients that add up while chunks pass by.

A chunk keeps its [C, V] block of logits from the forward products to the backward ones, for which the weights of its
sequences must be known: so it holds whole sequences. Of a sequence longer than a chunk the weight w comes too late, but
it is one number: the gradients are summed as if it were 1, and multiplied when it is known. No logits are formed twice.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import IGNORED, Head, Sequences, to_device

CHUNK_ROWS = 16_384  # at most, where nobody says how large a block may be: more rows save next to nothing
CARD_SHARE = 50  # a block has this part of a GPU's memory, and no less than 1 GiB


class Group(NamedTuple):
    """Sequences first:last, whose weights become known together."""

    first: int
    last: int
    rows: slice
    chunks: list[slice]  # of the rows; several only of a single sequence that is longer than a chunk


def pack(
    hidden: Tensor, target_ids: Tensor, head: Head, sequences: Sequences
) -> tuple[Tensor, Tensor, Head, Sequences, Tensor | None]:
    """All that belongs to rows without the ignored ones, and which rows these are [N'], None where nothing is ignored.

    Only target_ids (and cu_seqlens) are read, which costs a wait where they lie on a GPU.
    """
    is_live = target_ids != IGNORED
    live = is_live.nonzero()[:, 0]
    if len(live) == len(target_ids):
        return hidden, to_device(target_ids, hidden.device), head, sequences, None
    ends = torch.nn.functional.pad(is_live.cumsum(0), (1, 0))[sequences.cu_seqlens.to(is_live.device).long()]
    target_ids, live = (to_device(x, hidden.device) for x in (target_ids[live], live))
    sequences = sequences._replace(cu_seqlens=ends, behavior_logprob=sequences.behavior_logprob[live])
    return hidden[live], target_ids, head.of_rows(live), sequences, live


def card_bytes(device: torch.device) -> int:
    """Bytes of a block of logits on a GPU, where nobody says."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(2**30, total // CARD_SHARE)


def even_chunks(start: int, stop: int, rows: int, multiple: int = 1) -> list[slice]:
    """Rows start:stop in as few chunks of at most `rows` as can be, of one height but for rounding it up."""
    height = -(-(stop - start) // max(1, -(-(stop - start) // rows)))
    height = max(1, -(-height // multiple)) * multiple
    return [slice(i, min(i + height, stop)) for i in range(start, stop, height)]


def plan(ends: list[int], rows: int, multiple: int = 1) -> list[Group]:
    """Groups of the sequences ends[i]:ends[i+1], the long ones first.

    A sequence of more than `rows` is long, and alone. Others share chunks, cut at the boundaries nearest to equal
    heights: of `rows`, give or take half a sequence, and never more than 7/6 of the longest sequence above.
    """
    lengths = [b - a for a, b in pairwise(ends)]
    long = [i for i, length in enumerate(lengths) if length > rows]
    groups = [_group(ends, i, i + 1, even_chunks(ends[i], ends[i + 1], rows, multiple)) for i in long]
    for before, last in zip([-1, *long], [*long, len(lengths)], strict=True):
        first, cuts = before + 1, {before + 1, last}
        height = ends[last] - ends[first]
        count = -(-(height - max(lengths[first:last], default=0) // 2) // rows)
        for at in (ends[first] + height * k // count for k in range(1, count)):
            behind = bisect_left(ends, at, first, last)
            cuts.add(min(behind - 1, behind, key=lambda i: abs(ends[i] - at)))
        for a, b in pairwise(sorted(cuts)):
            groups.append(_group(ends, a, b, [slice(ends[a], ends[b])] if ends[a] < ends[b] else []))
    return groups


def _group(ends: list[int], first: int, last: int, chunks: list[slice]) -> Group:
    return Group(first, last, slice(ends[first], ends[last]), chunks)


@dataclass
class Sums:
    """Gradients of hidden [N, D], weight [V, D] and bias [V]; None where nobody wants one.

    The first rows write `weight` instead of adding to it, a pass over [V, D] less; bias is 0 at first.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    start: int = 0  # the first row of hidden
    is_first: bool = True

    def apart(self, rows: slice) -> Sums:
        """Sums of a long sequence, as if its weight were 1; in this memory as long as it holds nothing else."""
        weight, bias, hidden = self.weight, self.bias, None
        if not self.is_first:
            weight = None if weight is None else torch.empty_like(weight)
            bias = None if bias is None else torch.zeros_like(bias)
        if self.hidden is not None:  # this memory again if it is float32
            hidden = self.hidden[rows].to(torch.promote_types(self.hidden.dtype, torch.float32))
        return Sums(hidden, weight, bias, rows.start)

    def rows(self, chunk: slice) -> Tensor:
        """Where the gradient of these rows of hidden goes, [C, D]."""
        assert self.hidden is not None
        return self.hidden[chunk.start - self.start : chunk.stop - self.start]

    def add(self, long: Sums, factor: Tensor) -> None:
        """Add what `apart` gave, times `factor` []."""
        for mine, its in ((self.weight, long.weight), (self.bias, long.bias)):
            if mine is not None and its is not None:
                mine.mul_(factor) if mine is its else mine.addcmul_(its, factor)
        if self.hidden is not None and long.hidden is not None:
            self.hidden[long.start :][: len(long.hidden)] = long.hidden.mul_(factor)
        self.is_first = False
        long.hidden = long.weight = long.bias = None  # free before there is another
