"""Sequences on the device: the divergence as the kernels take it, and which program takes which block of which."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..divergences import Divergence
from ..reference import SequenceWeights
from ..sequence_weights import weights_from_sums
from . import rows
from .head import INTERPRETED, SLICE, Head

BLOCK = 16 if INTERPRETED else 128  # tokens that a program takes


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass
class Law:
    """The divergence and its options as `weigh_sequence` takes them, and where it writes."""

    divergence: Divergence
    num_sequences: int
    score: Tensor
    log_z: Tensor
    baseline: Tensor | float | None
    ratio: str
    ratio_cap: float | None
    reward_cap: float | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        device = self.score.device
        self.log_z = to_device(self.log_z, device)
        baseline = self.baseline
        if isinstance(baseline, float | int):
            baseline = torch.full((), baseline, dtype=torch.float64, device=device)
        elif baseline is not None:
            baseline = to_device(baseline, device)
        self.results = torch.empty(6, self.num_sequences, dtype=self.dtype, device=device)
        self.clipped = torch.empty(self.num_sequences, dtype=torch.int8, device=device)
        self.tensors = (self.score.contiguous(), self.log_z, baseline, self.results, self.clipped)
        self.strides = tuple(int(x is not None and x.ndim == 1 and x.stride(0)) for x in (self.log_z, baseline))
        family = self.divergence.kernel_family
        self.is_users = family is None
        exponent, factor = self.divergence.power or (0.0, 0.0)
        self.constants: dict[str, Any] = dict(
            FAMILY=family or "reverse_kl",  # a user's f: only the sums are used
            EXPONENT=exponent,
            FACTOR=factor,
            AT_INFINITY=self.divergence.f_prime_at_infinity,
            HAS_RATIO=self.ratio == "sequence",
            LOG_RATIO_CAP=None if self.ratio_cap is None else math.log(self.ratio_cap),
            REWARD_CAP=self.reward_cap,
            HAS_BASELINE=baseline is not None,
        )

    def overwrite_with_users(self, first: int, last: int) -> None:
        """A user's own f is a PyTorch function: the weights of these sequences by `weights_from_sums`."""
        if not self.is_users:
            return
        span = slice(first, last)
        log_z, baseline = (x[span] if isinstance(x, Tensor) and x.ndim else x for x in (self.log_z, self.baseline))
        made = weights_from_sums(
            self.results[0, span].double(),
            self.results[1, span].double(),
            self.score[span],
            torch.as_tensor(log_z),
            divergence=self.divergence,
            baseline=baseline,
            ratio=self.ratio,
            ratio_cap=self.ratio_cap,
            reward_cap=self.reward_cap,
        )
        self.results[:, span] = torch.stack(made[:6]).to(self.dtype)
        self.clipped[span] = made.clipped

    def result(self, first: int, last: int) -> SequenceWeights:
        clipped = self.clipped[first:last].bool()
        return SequenceWeights(*self.results[:, first:last].unbind(), clipped)  # type: ignore[call-arg]


class Packing:
    """Which program of `finish_sequences` takes which block of which sequence; an empty sequence has one block too."""

    def __init__(self, ends: list[int], device: torch.device):
        lengths = [b - a for a, b in zip(ends, ends[1:], strict=False)]
        blocks = [max(1, -(-n // BLOCK)) for n in lengths]
        self.first_block = [0]
        for count in blocks:
            self.first_block.append(self.first_block[-1] + count)
        sequences = torch.arange(len(lengths), dtype=torch.int32)
        tables = [
            torch.repeat_interleave(sequences, torch.tensor(blocks)),
            torch.tensor(self.first_block, dtype=torch.int32),
            torch.tensor(ends, dtype=torch.int32),
            torch.repeat_interleave(sequences, torch.tensor(lengths)),
        ]
        self.block_sequence, self.first_block_of, self.cu_seqlens, self.owner = (to_device(x, device) for x in tables)
        self.counter = torch.zeros(len(lengths), dtype=torch.int32, device=device)

    def finish(
        self,
        head: Head,
        law: Law,
        first: int,
        last: int,
        sums: Tensor | None,
        span: slice,
        top: Tensor,
        behavior: Tensor,
        logprob: Tensor,
        total: Tensor,
    ) -> None:
        """log π of every token and the weights of sequences first:last; without row sums they are 1 (top = log π)."""
        begin, end = self.first_block[first], self.first_block[last]
        rows.finish_sequences[(end - begin,)](
            sums,
            top,
            head.target_ids,
            behavior,
            logprob,
            total,
            self.block_sequence,
            self.first_block_of,
            self.cu_seqlens,
            self.counter,
            *law.tensors,
            begin,
            span.start,
            span.stop - span.start,
            head.columns,
            law.num_sequences,
            *law.strides,
            HAS_SUMS=sums is not None,
            BT=BLOCK,
            BS=SLICE,
            **law.constants,
        )
