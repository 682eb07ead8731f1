"""Sequences on the device: how they are weighed, and which program takes which block of which."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import Options, Sequences, to_device
from ..reference import SequenceWeights
from ..sequence_weights import weights_from_sums
from . import rows
from .head import INTERPRETED, Products

BLOCK = 16 if INTERPRETED else 128  # tokens that a program takes


class Weighing(NamedTuple):
    """What `weigh_sequence` is launched with, in its order: numbers of B sequences, where it writes, constants."""

    behavior: Tensor  # log q of each token, [N]
    score: Tensor  # log P, [B]
    log_z: Tensor  # [] or [B]
    baseline: Tensor | None  # [] or [B]
    columns: Tensor  # of `SequenceWeights`, [6, B]
    clipped: Tensor  # [B] int8
    strides: tuple[int, ...]  # of log_z and baseline; 0 where one number is everybody's
    constants: dict[str, Any]

    @property
    def per_sequence(self) -> tuple[Tensor | None, ...]:
        return self[1:6]

    def results(self) -> SequenceWeights:
        return SequenceWeights(*self.columns.unbind(), self.clipped.bool())  # type: ignore[call-arg]

    def weigh_by_pytorch(self, span: slice, options: Options) -> None:
        """Make the weights of these sequences from the sums found: a user's own f is a PyTorch function."""
        log_z, baseline = (x if x is None or not x.ndim else x[span] for x in (self.log_z, self.baseline))
        assert log_z is not None
        policy, behavior = self.columns[:2, span].double()
        made = weights_from_sums(policy, behavior, self.score[span], log_z, options._replace(baseline=baseline))
        self.columns[:, span] = torch.stack(made[:6]).to(self.columns.dtype)
        self.clipped[span] = made.clipped


def make_weighing(sequences: Sequences, options: Options, dtype: torch.dtype) -> Weighing:
    """Results come in this dtype, float32 or float64."""
    score, divergence = sequences.target_log_score.contiguous(), options.divergence
    log_z = to_device(sequences.log_z, score.device)
    baseline = None if options.baseline is None else to_device(options.baseline, score.device)
    exponent, factor = divergence.power or (0.0, 0.0)
    return Weighing(
        sequences.behavior_logprob.contiguous(),
        score,
        log_z,
        baseline,
        torch.empty(6, len(score), dtype=dtype, device=score.device),
        torch.empty(len(score), dtype=torch.int8, device=score.device),
        tuple(int(x is not None and x.ndim == 1 and x.stride(0)) for x in (log_z, baseline)),
        dict(
            FAMILY=divergence.kernel_family or "reverse_kl",  # of a user's f only the sums are used
            EXPONENT=exponent,
            FACTOR=factor,
            AT_INFINITY=divergence.f_prime_at_infinity,
            HAS_RATIO=options.ratio == "sequence",
            LOG_RATIO_CAP=None if options.ratio_cap is None else math.log(options.ratio_cap),
            LOG_RATIO_DROP=None if options.ratio_drop is None else math.log(options.ratio_drop),
            REWARD_CAP=options.reward_cap,
            HAS_BASELINE=baseline is not None,
        ),
    )


class Blocks(NamedTuple):
    """Which program of `finish_sequences` takes which block of which sequence; an empty sequence has one block too."""

    block_sequence: Tensor  # the sequence of each block
    first_block: Tensor  # of each sequence, [B+1]
    cu_seqlens: Tensor  # [B+1]
    counter: Tensor  # how many blocks of each sequence are finished, [B]
    sequence_index: Tensor  # the sequence of each token, [N]
    first_block_on_host: list[int]


def make_blocks(ends: list[int], device: torch.device) -> Blocks:
    lengths = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    counts = [max(1, -(-n // BLOCK)) for n in lengths]
    first_block = [0]
    for count in counts:
        first_block.append(first_block[-1] + count)
    sequences = torch.arange(len(lengths), dtype=torch.int32)
    tables = (
        torch.repeat_interleave(sequences, torch.tensor(counts)),
        torch.tensor(first_block, dtype=torch.int32),
        torch.tensor(ends, dtype=torch.int32),
        torch.zeros(len(lengths), dtype=torch.int32),
        torch.repeat_interleave(sequences, torch.tensor(lengths)),
    )
    block_sequence, first, cu_seqlens, counter, sequence_index = (to_device(table, device) for table in tables)
    return Blocks(block_sequence, first, cu_seqlens, counter, sequence_index, first_block)


def finish(products: Products, weighing: Weighing, blocks: Blocks, group: tuple[int, int]) -> None:
    """log π of every token of sequences first:last = group, whose `top` and `total` are known, and their weights."""
    begin, end = (blocks.first_block_on_host[i] for i in group)
    rows.finish_sequences[(end - begin,)](
        products.top, products.total, products.target_ids, weighing.behavior, products.logprob,
        *blocks[:4], *weighing.per_sequence,
        begin, len(weighing.score), *weighing.strides, BT=BLOCK, **weighing.constants,
    )  # fmt: skip
