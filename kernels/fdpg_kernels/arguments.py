"""What the ops are called with, in groups: an LM head, packed sequences and options; and what they give."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence

IGNORED = -100  # a target id: it counts for nothing, nor does a row that has no other
RATIOS = ("sequence", "none")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)  # a uint8 cannot be -100: 156 would be taken for it

Number = Tensor | float
Wants = tuple[bool, bool, bool]  # whether hidden, weight and bias are to get gradients
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight and bias


class Logprobs(NamedTuple):
    """What N rows of logits z and their softmax π say of K ids each; 0 where an id, or the whole row, is ignored."""

    logprob: Tensor  # log π of each id, [N, K]
    lse: Tensor  # log Σ exp z, [N] float64: what float32 takes from one of 100 changes every probability by 4e-6
    entropy: Tensor | None  # −Σ π·log π, [N]


class LogitGradients(NamedTuple):
    """The gradient of a loss in capped logits, of N rows with softmax π and ids y_1 … y_K each:

    π_v·(alpha + beta·log π_v) + Σ_k at_target_k·[v = y_k].
    """

    at_target: Tensor  # [N, K]
    alpha: Tensor  # [N]
    beta: Tensor | None  # [N]; None for zeros


class Head(NamedTuple):
    """An LM head: logit = softcap·tanh((hidden·weightᵀ + bias)/softcap) / temperature."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float | None
    row_temperature: Tensor | None = None  # [N]: of each row; temperature is then 1
    weight_grad_dtype: torch.dtype | None = None  # of the gradient of weight, if another than weight's
    chunk_bytes: int | None = None  # of a block of logits; None: what suits the device

    def of_rows(self, rows: Any) -> Head:
        """The head of some rows of the hidden states."""
        return self if self.row_temperature is None else self._replace(row_temperature=self.row_temperature[rows])

    def gradients(self, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Gradients:
        """What has accumulated, in the dtypes that are wanted."""
        weight = None if weight is None else weight.to(self.weight_grad_dtype or self.weight.dtype)
        return hidden, weight, None if bias is None or self.bias is None else bias.to(self.bias.dtype)


class Sequences(NamedTuple):
    """B sequences of together N tokens and what is known of them; nothing here gets a gradient."""

    cu_seqlens: Tensor  # [B+1]: sequence i owns tokens cu_seqlens[i]:cu_seqlens[i+1]
    behavior_logprob: Tensor  # [N], log q of each token
    target_log_score: Tensor  # [B], log P; −inf where the target is zero
    log_z: Tensor  # [] or [B]; −inf where it is not known yet
    total: int = 1  # what a loss divides the sum over sequences by


class Options(NamedTuple):
    """How the weight of a sequence is made of its sums; the caps limit π/q and |f'|, and above the drop it is 0."""

    divergence: Divergence
    baseline: Tensor | None  # [] or [B]
    ratio: str  # one of RATIOS
    ratio_cap: float | None
    ratio_drop: float | None
    reward_cap: float | None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def as_tensor(value: Number | None, device: torch.device) -> Any:
    """A log Z or baseline without gradient; a float is made where it is used, with all its digits."""
    if isinstance(value, Tensor) or value is None:
        return None if value is None else value.detach()
    return torch.full((), float(value), dtype=torch.float64, device=device)


def is_ignored(target_ids: Tensor) -> Tensor:
    """Rows [N] that count for nothing: all ids [N, K] of theirs are ignored."""
    return (target_ids == IGNORED).all(1)
