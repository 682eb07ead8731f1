"""The policy being trained: one fused loss per micro-batch, one AdamW step per round."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fdpg_kernels import Divergence, SequenceWeights, fdpg_loss

from .config.schema import LossConfig, OptimizerConfig
from .models.language_model import LanguageModel
from .rollouts import Rollouts

BETAS = (0.9, 0.95)  # AdamW's averaging of gradient and squared gradient


@dataclass(frozen=True)
class Update:
    """What a step did; weights of all B sequences, on the CPU."""

    loss: float
    grad_norm: float
    learning_rate: float
    weights: SequenceWeights
    skipped: bool


class Learner:
    """Policy and optimizer.

    Args:
        policy: trained in place.
        loss: ratio and caps.
        optimizer: AdamW's settings.
        rounds: of the whole run; the schedule ends there.
        micro_batch_tokens: bounds the memory of a forward and backward pass.
    """

    def __init__(
        self,
        policy: LanguageModel,
        loss: LossConfig,
        optimizer: OptimizerConfig,
        *,
        rounds: int,
        micro_batch_tokens: int,
    ):
        self.policy, self.micro_batch_tokens = policy, micro_batch_tokens
        self._loss, self._settings, self._rounds = loss, optimizer, rounds
        self._parameters = [p for p in policy.model.parameters() if p.requires_grad]
        # the two [V, D] parameters, or the one that is both: a micro-batch adds to their gradients, the head's inside
        # the loss and the embedding's row by row, instead of making two more of their size
        embedding = policy.model.get_input_embeddings()
        for module in policy.model.modules():  # encoder and decoder look up one table
            if isinstance(module, torch.nn.Embedding) and module.weight is embedding.weight:
                module.sparse = True
        self._tables = [p for p in {embedding.weight, policy.head.weight} if p.requires_grad]
        self._head_grad: Tensor | None = None  # [V, D]
        # a bfloat16 weight does not move by less than 1/256 of itself: AdamW works on float32 copies
        narrow = any(p.dtype != torch.float32 for p in self._parameters)  # a LoRA adapter never is
        self.masters = [p.detach().float() for p in self._parameters] if narrow else []
        self.optimizer = torch.optim.AdamW(
            self.masters or self._parameters,
            lr=optimizer.learning_rate,
            betas=BETAS,
            weight_decay=optimizer.weight_decay,
            fused=True,  # one pass over the parameters, and no temporaries of their size
        )

    def backward(
        self, rollouts: Rollouts, target_log_score: Tensor, log_z: Tensor, baseline: Tensor, divergence: Divergence
    ) -> tuple[Tensor, SequenceWeights]:
        """The gradient of D_f from B rollouts, left in the parameters; loss [] and weights on the CPU.

        target_log_score, log_z and baseline are [B] float64.
        """
        self.optimizer.zero_grad(set_to_none=True)
        for table in self._tables:
            table.grad = torch.zeros_like(table)
        head, device = self.policy.head, self.policy.device
        # the head's gradient is summed in float32 over micro-batches
        self._head_grad = head.weight.grad
        if self.masters and head.weight.requires_grad:
            self._head_grad = torch.zeros_like(head.weight, dtype=torch.float32)
        loss = torch.zeros((), device=device)
        parts = []
        for rows in rollouts.micro_batches(self.micro_batch_tokens):
            part = rollouts.part(rows)
            part_loss, weights, _ = fdpg_loss(
                self.policy.hidden(part),
                head.weight,
                part.token_ids.to(device),
                part.cu_seqlens,
                part.behavior_logprob.to(device),
                target_log_score[rows].to(device),
                log_z[rows].to(device),
                divergence=divergence,
                baseline=baseline[rows].to(device),
                ratio=self._loss.ratio,
                ratio_cap=self._loss.ratio_cap,
                reward_cap=self._loss.reward_cap,
                total_sequences=len(rollouts),
                weight_grad_out=self._head_grad,
                **head.options(),
            )
            part_loss.backward()
            loss += part_loss.detach()
            parts.append(weights)
        return loss, SequenceWeights(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))

    def step(self, loss: Tensor, weights: SequenceWeights, round_index: int) -> Update:
        """Descend once along the gradient that `backward` left, whose results these are."""
        self._move_gradients_to_masters()
        trained = self.masters or self._parameters
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self._settings.max_grad_norm))
        # no sample in support yet, or an overflow: Adam must not move on its momentum alone
        skipped = not math.isfinite(norm) or not bool((weights.weight != 0).any())
        rate = self.learning_rate(round_index)
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            with torch.no_grad():
                for parameter, master in zip(self._parameters, self.masters, strict=False):
                    parameter.copy_(master)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(float(loss), norm, rate, weights, skipped)

    def _move_gradients_to_masters(self) -> None:
        for parameter, master in zip(self._parameters, self.masters, strict=False):
            if parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
            if parameter is self.policy.head.weight and self._head_grad is not None:
                master.grad = self._head_grad if master.grad is None else master.grad.add_(self._head_grad)
        self._head_grad = None

    @property
    def optimizer_bytes(self) -> int:
        """What AdamW's two moments take, which it makes at its first step."""
        return sum(2 * p.numel() * 4 for p in self.masters or self._parameters)

    def learning_rate(self, round_index: int) -> float:
        """Of a round, counted from 0."""
        settings, peak = self._settings, self._settings.learning_rate
        if round_index < settings.warmup_rounds:
            return peak * (round_index + 1) / (settings.warmup_rounds + 1)
        if settings.schedule == "constant":
            return peak
        progress = (round_index - settings.warmup_rounds) / max(1, self._rounds - settings.warmup_rounds)
        return peak * (1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
