"""What is known of rollouts before the update: their texts, features, log a, log q and log P."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdpg_kernels import sum_by_sequence

from . import ranks
from .clock import Clock
from .errors import Diverged
from .features import Completions, started
from .models.language_model import LanguageModel
from .rollouts import Rollouts
from .targets import Target


@dataclass(frozen=True)
class Reading:
    """What features, base and sampler say of B rollouts, as float64."""

    texts: Completions  # as the features saw them
    values: Tensor  # of the target's features, [B, F]; NaN where one does not apply
    behavior_logprob: Tensor  # log q, [B]
    base_logprob: Tensor  # log a, [B]


@dataclass(frozen=True)
class Scores(Reading):
    """What is known of B rollouts before the update, as float64."""

    log_score: Tensor  # log P = log a + log φ, [B]


@dataclass
class Scorer:
    """A target and its base model, asked about rollouts."""

    target: Target  # replaced when λ is fitted
    base: LanguageModel
    tokenizer: Any
    micro_batch_tokens: int  # of a forward pass of the base
    keep_special_tokens: bool = False  # in the texts that features read

    @property
    def feature_names(self) -> list[str]:
        return [feature.name for feature in self.target.features]

    def __call__(self, rollouts: Rollouts, clock: Clock) -> Scores:
        """Scores, by the target as it is."""
        reading = self.read(rollouts, clock)
        log_phi = self.target.log_phi(reading.values, reading.base_logprob)
        return Scores(**vars(reading), log_score=reading.base_logprob + log_phi)

    def read(self, rollouts: Rollouts, clock: Clock, is_of_base: bool = False) -> Reading:
        """All but log P, while async features and the base's forward pass run side by side.

        is_of_base: the base is what they were sampled from, so log a is log q.
        `clock` counts under "features" the text, the sync features and what is then left to wait for the async ones;
        under "base" the pass of the base, at the end of which async features may be done already.
        """
        with contextlib.ExitStack() as until_done:
            with clock("features"):
                texts = self._texts(rollouts)
                wait_for_values = until_done.enter_context(self._started(texts))
            token_logprobs = rollouts.behavior_logprob
            if not is_of_base:
                with clock("base"), self.base.as_base() as base:
                    token_logprobs = base.token_logprobs(rollouts, self.micro_batch_tokens)
            with clock("features"):
                values = wait_for_values()
        base_logprob = sum_by_sequence(token_logprobs, rollouts.cu_seqlens)
        behavior_logprob = sum_by_sequence(rollouts.behavior_logprob, rollouts.cu_seqlens)
        if not bool(behavior_logprob.isfinite().all()):
            raise Diverged("log q is not finite")
        return Reading(texts, values, behavior_logprob, base_logprob)

    def _texts(self, rollouts: Rollouts) -> Completions:
        return Completions.decode(rollouts, self.tokenizer, self.base.continues_prompt, self.keep_special_tokens)

    @contextlib.contextmanager
    def _started(self, texts: Completions) -> Iterator[Callable[[], Tensor]]:
        """As `started`, each process asking about its share of the texts: who asks once gets one answer."""
        own = ranks.share(len(texts.completions))
        with started(self.target.features, texts.part(own)) as wait_for_values:

            def all_values() -> Tensor:
                values = wait_for_values().T
                place = slice(own.start, own.stop)
                return ranks.whole([(place, values)], values.new_empty(len(values), len(texts.completions))).T

            yield all_values if ranks.count() > 1 else wait_for_values

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
