"""What is known of rollouts before the update: their texts, features, log a, log q and log P."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdpg_kernels import sum_by_sequence

from .clock import Clock
from .engines.memory import FrozenPages
from .errors import RunError
from .features import Completions
from .models.language_model import LanguageModel
from .rollouts import Rollouts
from .targets import Target


@dataclass(frozen=True)
class Scores:
    """What is known of B rollouts before the update; tensors are [B] float64.

    Attributes:
        texts: the rollouts as the features saw them.
        values: of the target's features, [B, F]; NaN where one does not apply.
        behavior_logprob: log q.
        base_logprob: log a.
        log_score: log P = log a + log φ.
    """

    texts: Completions
    values: Tensor
    behavior_logprob: Tensor
    base_logprob: Tensor
    log_score: Tensor


class Scorer:
    """A target and its base model, asked about rollouts.

    Attributes:
        target: replaced when λ is fitted.
        base: frozen; `pages` are its weights, given back to the system after each use, where it has weights of its own.
        micro_batch_tokens: in one forward pass of the base.
    """

    def __init__(
        self, target: Target, base: LanguageModel, pages: FrozenPages | None, tokenizer: Any, micro_batch_tokens: int
    ):
        self.target, self.base, self.pages, self.tokenizer = target, base, pages, tokenizer
        self.micro_batch_tokens = micro_batch_tokens

    @property
    def feature_names(self) -> list[str]:
        return [feature.name for feature in self.target.features]

    def __call__(self, rollouts: Rollouts, clock: Clock) -> Scores:
        """
        Raises:
            RunError: log q is not finite: training has diverged.
        """
        with clock("features"):
            texts = self.texts(rollouts)
            values = self.values(texts)
        with clock("base"):
            base = self.base.token_logprobs(rollouts, self.micro_batch_tokens)
            if self.pages is not None:
                self.pages.release()
        base_logprob = sum_by_sequence(base, rollouts.cu_seqlens)
        behavior_logprob = sum_by_sequence(rollouts.behavior_logprob, rollouts.cu_seqlens)
        if not bool(behavior_logprob.isfinite().all()):
            raise RunError(
                "the policy's log-probs are not finite any more: training has diverged; "
                "start again with a lower optimizer.learning_rate"
            )
        return Scores(texts, values, behavior_logprob, base_logprob, base_logprob + self.target.log_phi(values))

    def texts(self, rollouts: Rollouts) -> Completions:
        return Completions.decode(rollouts, self.tokenizer, self.base.continues_prompt)

    def values(self, texts: Completions) -> Tensor:
        """Of the target's features, [B, F]."""
        return torch.stack([feature(texts) for feature in self.target.features], dim=1)

    def log_phi(self, base: Rollouts, fit: bool = False) -> Tensor:
        """[B], of samples of the base, where it is log P/q; with `fit`, λ is fitted to them first."""
        values = self.values(self.texts(base))
        if fit:
            self.target = self.target.fit(values, base.context_index)
        return self.target.log_phi(values)

    def rows(self, scores: Scores, count: int) -> list[dict[str, Any]]:
        """A few completions, evenly from all of them, as samples.jsonl records them."""
        texts, total = scores.texts, len(scores.log_score)
        chosen = torch.linspace(0, total - 1, min(count, total)).long().tolist()
        return [
            {
                "prompt": texts.prompts[i],
                "completion": texts.completions[i],
                "finished": texts.finished[i],
                "features": dict(zip(self.feature_names, scores.values[i].tolist(), strict=True)),
                "log_q": float(scores.behavior_logprob[i]),
                "log_score": float(scores.log_score[i]),
            }
            for i in chosen
        ]
