"""The policy being trained: one fused loss per micro-batch, one optimizer step per update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdpg_kernels import Divergence, SequenceWeights

from . import ranks
from .config.schema import LossConfig, OptimizerConfig
from .errors import Diverged
from .models import parallel
from .models.language_model import LanguageModel
from .optimizer import AdamWPerTensor
from .rollouts import Rollouts

BETAS = (0.9, 0.95)  # of both kinds of optimizer
MAX_OVERFLOWS = 3  # in a row: one may be chance


@dataclass(frozen=True)
class Update:
    """What a step did; weights of all B sequences, on the CPU."""

    loss: float
    grad_norm: float
    learning_rate: float
    weights: SequenceWeights
    skipped: bool


class Learner:
    """A policy that is trained in place over so many rounds, and its optimizer.

    `micro_batch_tokens` bounds the memory of a forward and backward pass. The optimizer works on float32 copies
    of the trained parameters where some are bfloat16: those do not move by less than 1/256 of themselves.
    """

    def __init__(
        self, policy: LanguageModel, loss: LossConfig, optimizer: OptimizerConfig, rounds: int, micro_batch_tokens: int
    ):
        self.policy, self.micro_batch_tokens = policy, micro_batch_tokens
        self._settings, self._rounds, self._overflows = optimizer, rounds, 0
        self._loss = loss.model_dump(exclude={"baseline"})
        self._parameters = [p for p in policy.model.parameters() if p.requires_grad]
        is_narrow = any(p.dtype != torch.float32 for p in self._parameters)
        self._copies = [p.detach().float() for p in self._parameters] if is_narrow else []
        self._trained = dict(zip(self._parameters, self._copies or self._parameters, strict=True))
        self._head, self._tables = None, set()
        if not parallel.is_divided(policy.model):
            # The two [V, D] parameters, or the one that is both: micro-batches add to one gradient of each, the loss to
            # the head's in float32 and the embedding row by row to its own.
            embedding, self._head = policy.model.get_input_embeddings().weight, self._trained.get(policy.head.weight)
            for module in policy.model.modules():  # encoder and decoder look up one table
                if isinstance(module, torch.nn.Embedding) and module.weight is embedding:
                    module.sparse = True
            self._tables = {embedding, self._head} & {*self._parameters, *self._copies}
        rate, decay = optimizer.learning_rate, optimizer.weight_decay
        self.optimizer: torch.optim.Optimizer
        if optimizer.kind == "adamw":  # fused: one pass over the parameters, and no temporaries of their size
            self.optimizer = torch.optim.AdamW(self._trained.values(), rate, BETAS, weight_decay=decay, fused=True)
        else:
            self.optimizer = AdamWPerTensor(self._trained.values(), rate, BETAS, decay)

    def backward(
        self, rollouts: Rollouts, target_log_score: Tensor, log_z: Tensor, baseline: Tensor, divergence: Divergence
    ) -> tuple[Tensor, SequenceWeights]:
        """The gradient of D_f from B rollouts, left in the parameters; loss [] and weights on the CPU.

        target_log_score, log_z and baseline are [B] float64.
        """
        self.optimizer.zero_grad(set_to_none=True)
        for table in self._tables:
            table.grad = torch.zeros_like(table)
        device = self.policy.device
        loss, found, columns = torch.zeros((), device=device), [], torch.zeros(0)
        options: dict[str, Any] = {"divergence": divergence, "total_sequences": len(rollouts), **self._loss}
        options["weight_grad_out"] = None if self._head is None else self._head.grad
        batches = rollouts.micro_batches(self.micro_batch_tokens)
        for rows, is_own in ranks.passes(batches, rollouts.lengths.tolist()):
            batch = rollouts.part(rows)
            options["baseline"] = baseline[rows].to(device)
            sequences = [x.to(device) for x in (batch.behavior_logprob, target_log_score[rows], log_z[rows])]
            result = self.policy.loss(batch, *sequences, **options)
            (result.loss * is_own).backward()
            columns = torch.stack(result.weights[:-1])
            if is_own:
                loss += result.loss.detach()
                found.append((rows, torch.cat([columns, result.weights.clipped[None]]).cpu()))
        *values, clipped = ranks.whole(found, columns.new_empty(len(columns) + 1, len(rollouts), device="cpu"))
        return ranks.total(loss), SequenceWeights(*values, clipped.bool())  # type: ignore[call-arg]

    def step(self, loss: Tensor, weights: SequenceWeights, round_index: int) -> Update:
        """Descend once along the gradient that `backward` left, whose results these are."""
        for parameter, master in zip(self._parameters, self._copies, strict=False):
            if parameter.grad is not None:
                master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                parameter.grad = None
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained.values(), self._settings.max_grad_norm))
        # no sample in support yet, or an overflow: Adam must not move on its momentum alone
        skipped = not math.isfinite(norm) or not bool((weights.weight != 0).any())
        rate = self.learning_rate(round_index)
        self._overflows = 0 if math.isfinite(norm) else self._overflows + 1
        if self._overflows == MAX_OVERFLOWS:
            raise Diverged(f"the gradient was not finite {MAX_OVERFLOWS} times in a row")
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            with torch.no_grad():
                for parameter, master in zip(self._parameters, self._copies, strict=False):
                    parameter.copy_(master)
            # the one norm that is a single fast pass, 0.05 s for 135 M parameters on a CPU
            if not bool(torch.nn.utils.get_total_norm(self._parameters).isfinite()):
                raise Diverged("weights are not finite, or huge, after this round's step")
        self.optimizer.zero_grad(set_to_none=True)
        return Update(float(loss), norm, rate, weights, skipped)

    @property
    def masters(self) -> list[Tensor]:
        """The trained parameters in float32, where the policy is saved in another dtype."""
        return [] if self.policy.saved_dtype == torch.float32 else list(self._trained.values())

    @property
    def optimizer_bytes(self) -> int:
        """What moments of the size of the parameters take, which the optimizer makes at its first step."""
        moments = 2 if self._settings.kind == "adamw" else 1
        return sum(moments * p.numel() * p.element_size() for p in self._trained.values())

    def learning_rate(self, round_index: int) -> float:
        """The rate of a round, counted from 0."""
        settings, peak = self._settings, self._settings.learning_rate
        if round_index < settings.warmup_rounds:
            return peak * (round_index + 1) / (settings.warmup_rounds + 1)
        if settings.schedule == "constant":
            return peak
        progress = (round_index - settings.warmup_rounds) / max(1, self._rounds - settings.warmup_rounds)
        return peak * (1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
