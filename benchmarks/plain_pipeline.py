"""One f-DPG round the obvious way, with transformers alone: what the trainer's round is compared with.

`generate` samples, then three separate forward passes over the padded batch (the sampler, the base model, and the
policy with gradients) make full logits, `log_softmax` and `gather` score the tokens, and autograd and AdamW do the
rest. It is written as somebody who knows transformers would write it: the whole batch at once, prompts padded on the
left with positions from the mask, EOS counted once, softmax over completion positions only, no anomaly mode, no
`.item()` in a loop. What it lacks is exactly what the library adds: log-probs out of the sampler, prompts computed
once, no padding through the layers, no [tokens, vocabulary] matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fdpg_fast.clock import Clock
from fdpg_fast.features import Completions, Feature
from fdpg_fast.models.generation import eos_token_ids


@dataclass(frozen=True)
class PaddedBatch:
    """B prompts padded on the left and their completions padded on the right.

    Attributes:
        input_ids, attention_mask: [B, P+T].
        valid: which completion tokens count, the first EOS included, [B, T] bool.
    """

    input_ids: Tensor
    attention_mask: Tensor
    valid: Tensor

    @property
    def prompt_length(self) -> int:
        return self.input_ids.shape[1] - self.valid.shape[1]

    @property
    def completions(self) -> Tensor:
        return self.input_ids[:, self.prompt_length :]


def sequence_logprob(model: PreTrainedModel, batch: PaddedBatch) -> Tensor:
    """log-prob of every completion, [B]."""
    position_ids = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=position_ids).logits
    logprobs = logits[:, batch.prompt_length - 1 : -1].log_softmax(-1)
    token_logprob = logprobs.gather(2, batch.completions[:, :, None])[:, :, 0]
    return (token_logprob * batch.valid).sum(1)


def jensen_shannon_loss(policy: Tensor, proposal: Tensor, log_score: Tensor, log_z: Tensor, group: int) -> Tensor:
    """−mean of (π/q)·(r − b)·log π with r = −f'(π/p); b: mean reward of the context's other samples."""
    log_t = policy.detach() - log_score + log_z
    reward = torch.nn.functional.softplus(-log_t) - math.log(2)  # → −log 2 where log P = −inf
    by_context = reward.view(-1, group)
    others = (by_context.sum(1, keepdim=True) - by_context) / (group - 1)
    weight = (policy.detach() - proposal).exp() * (reward - others.flatten())
    weight = weight.masked_fill(log_z == -torch.inf, 0.0)  # nothing satisfying seen yet: the context waits
    return -(weight * policy).mean()


class PlainPipeline:
    """Policy, base model and optimizer, all float32.

    Args:
        folder: of the model.
        feature: 0 or 1; the target is the base model restricted to texts where it is 1.
    """

    def __init__(
        self,
        folder: str,
        feature: Feature,
        *,
        max_new_tokens: int,
        samples_per_context: int,
        learning_rate: float,
    ):
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.base, self.policy = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2)
        )
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.feature = feature
        self.eos_token_ids = torch.tensor(eos_token_ids(self.policy, self.tokenizer))
        self.max_new_tokens, self.samples_per_context = max_new_tokens, samples_per_context
        self._z_sums: dict[str, Tensor] = {}
        self._z_counts: dict[str, int] = {}

    def round(self, prompts: list[str]) -> tuple[dict[str, float], int]:
        """Sample, score, update; returns the seconds of each phase and the number of completion tokens."""
        clock, group = Clock(), self.samples_per_context
        with clock("sampling"):
            batch = self.sample(prompts)
        with clock("features"):
            repeated = [prompt for prompt in prompts for _ in range(group)]
            satisfied = self.feature(self.texts(batch, repeated))
        with clock("proposal score"), torch.no_grad():
            proposal = sequence_logprob(self.policy, batch)
        with clock("base score"), torch.no_grad():
            log_score = sequence_logprob(self.base, batch) + satisfied.log().float()
        log_z = self.log_z(prompts, (log_score - proposal).exp().view(-1, group))
        with clock("forward+backward"):
            policy = sequence_logprob(self.policy, batch)
            loss = jensen_shannon_loss(policy, proposal, log_score, log_z.repeat_interleave(group), group)
            loss.backward()
        with clock("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return clock.phases, int(batch.valid.sum())

    def sample(self, prompts: list[str]) -> PaddedBatch:
        """Completions of every prompt, side by side."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        sequences = self.policy.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.max_new_tokens,
            num_return_sequences=self.samples_per_context,
            eos_token_id=self.eos_token_ids.tolist(),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        ended = torch.isin(sequences[:, inputs["input_ids"].shape[1] :], self.eos_token_ids).long()
        valid = ended.cumsum(1) - ended == 0  # up to the first EOS and with it, also where pad is EOS
        prompt_mask = inputs["attention_mask"].repeat_interleave(self.samples_per_context, 0)
        return PaddedBatch(sequences, torch.cat([prompt_mask, valid.long()], 1), valid)

    def texts(self, batch: PaddedBatch, prompts: list[str]) -> Completions:
        """What the feature looks at; prompts [B]."""
        finished = (torch.isin(batch.completions, self.eos_token_ids) & batch.valid).any(1).tolist()
        rows = zip(batch.completions, batch.valid, finished, strict=True)
        ids = [row[valid].tolist()[: -1 if done else None] for row, valid, done in rows]
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Completions(decoded, prompts, ids, finished)

    def log_z(self, prompts: list[str], weights: Tensor) -> Tensor:
        """Running mean of P/q per context, [C]; weights [C, n] are this round's."""
        for prompt, row in zip(prompts, weights, strict=True):
            self._z_sums[prompt] = self._z_sums.get(prompt, torch.zeros(())) + row.sum()
            self._z_counts[prompt] = self._z_counts.get(prompt, 0) + len(row)
        return torch.stack([self._z_sums[prompt] / self._z_counts[prompt] for prompt in prompts]).log()
