"""The embedded engine: samples with the learner's own module, or with a copy of it that waits for syncs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contexts import Context
from ..models.language_model import LanguageModel
from ..progress import advance
from ..rollouts import Completion, Rollouts, pack


class TransformersEngine:
    """Samples at temperature 1 from the full distribution, and reports the log-prob of each token that it drew.

    Args:
        language_model: the module to sample from; the learner keeps updating it in place.
        eos_token_ids: tokens that end a completion.
        max_new_tokens: completions are cut off there.
        max_sequences: completions decoded side by side; bounds the key-value cache.
        copy: a module for a copy of the weights, to sample from while the learner moves on from them.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        eos_token_ids: Sequence[int],
        *,
        max_new_tokens: int,
        max_sequences: int = 256,
        copy: LanguageModel | None = None,
    ):
        self.version = -1
        self.language_model, self._copy = language_model, copy
        self.eos_token_ids = torch.tensor(sorted(eos_token_ids))
        self.max_new_tokens, self.max_sequences = max_new_tokens, max_sequences

    @torch.no_grad()
    def sample(
        self, contexts: Sequence[Context], samples_per_context: int, seed: int, share: range | None = None
    ) -> Rollouts:
        """As `PartialEngine.sample`."""
        generator = torch.Generator().manual_seed(seed)
        at_once = max(1, self.max_sequences // samples_per_context)  # contexts
        share = share or range(len(contexts))
        completions: dict[int, list[Completion]] = {place: [] for place in share}
        for first in range(0, len(contexts), at_once):
            group = contexts[first : first + at_once]
            own = range(max(first, share.start), min(first + len(group), share.stop))
            for begun in range(0, samples_per_context, self.max_sequences):  # one context may want more than fit
                count = min(self.max_sequences, samples_per_context - begun)
                # drawn up front, so that a completion does not depend on which others are still growing
                uniform = torch.rand(self.max_new_tokens, len(group), count, generator=generator, dtype=torch.float64)
                if own:
                    part, uniform = contexts[own.start : own.stop], uniform[:, own.start - first : own.stop - first]
                    for i, completion in enumerate(self._decode(part, uniform.flatten(1))):
                        completions[own.start + i // count].append(completion)
                advance(count * len(own))
        return pack([contexts[place] for place in share], list(completions.values()))

    def sync_weights(self, policy: LanguageModel, version: int) -> None:
        """Sample from this very module: nothing to move, unless there is to be a copy."""
        if self._copy is not None:
            self._copy.take_weights(policy)
        self.language_model, self.version = self._copy or policy, version

    def sleep(self) -> None:
        """Nothing is held between two calls."""

    def close(self) -> None:
        """Nothing is held."""

    def _decode(self, contexts: Sequence[Context], uniform: Tensor) -> list[Completion]:
        """Completions, as many of each context, side by side, out of one number in [0, 1) a token, [T, B] float64."""
        model, device, (limit, total) = self.language_model, self.language_model.device, uniform.shape
        count, eos, uniform = total // len(contexts), self.eos_token_ids.to(device), uniform.to(device)
        tokens = torch.zeros(total, limit, dtype=torch.long, device=device)
        logprobs = torch.zeros(total, limit, device=device)
        rows = torch.arange(total, device=device)  # completions in `decoding`; some have ended already
        has_ended = torch.zeros(total, dtype=torch.bool, device=device)  # of these

        decoding = model.start(contexts, torch.arange(total) // count, limit)
        states = decoding.first
        for step in range(limit):
            drawn, logprob = draw(model.head.logits(states), uniform[step, rows])
            tokens[rows, step], logprobs[rows, step] = drawn, logprob
            has_ended |= torch.isin(drawn, eos)
            (left,) = (~has_ended).nonzero(as_tuple=True)
            if len(left) == 0 or step == limit - 1:
                break
            if len(left) <= 0.8 * len(rows):  # drop the ended once that pays for copying the cache
                rows, drawn, has_ended = rows[left], drawn[left], has_ended[left]
                decoding.select(left)
            states = decoding.run(drawn[:, None])[:, 0]

        is_eos = torch.isin(tokens, eos).int()
        lengths = (is_eos.cumsum(1) - is_eos == 0).sum(1)  # tokens that no end precedes
        columns = (column.tolist() for column in (tokens, logprobs, lengths, is_eos.any(1)))
        return [(ids[:n], values[:n], finished) for ids, values, n, finished in zip(*columns, strict=True)]


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF: ids [B] and log-probs [B] float32 under softmax(logits).

    logits [B, V] float32 are overwritten; uniform [B] float64 is in [0, 1).
    """
    logits.sub_(logits.amax(dim=1, keepdim=True))  # stays: log-probs of rare tokens come from there
    cumulative = logits.exp().cumsum(1, dtype=torch.float64)  # [B, V]
    total = cumulative[:, -1:]
    # below the total even where rounding says otherwise, so that a token of probability zero is never the one
    threshold = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[1] - 1)  # where NaN
    logprob = logits.gather(1, token).double() - total.log()
    return token[:, 0], logprob[:, 0].float()
