"""A round's samples as packed tensors: what the engine hands to everything behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contexts import Context


@dataclass(frozen=True)
class Rollouts:
    """B completions of C contexts, N completion tokens in all."""

    contexts: tuple[Context, ...]  # the C contexts of the round
    context_index: Tensor  # which of them each completion continues, [B] int64, ascending
    token_ids: Tensor  # completions back to back, the EOS that ended one included once, [N] int64
    cu_seqlens: Tensor  # completion i owns tokens cu_seqlens[i]:cu_seqlens[i+1], [B+1] int32
    behavior_logprob: Tensor  # log q of each token under the sampler, in nats, [N] float32
    finished: Tensor  # whether the completion ended with EOS (False: cut off at max_new_tokens), [B] bool

    def __len__(self) -> int:
        return len(self.context_index)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def dataset_index(self) -> Tensor:
        """The data set's index of each completion's context, [B] int64."""
        return torch.tensor([context.index for context in self.contexts])[self.context_index]

    def tensors(self) -> dict[str, Tensor]:
        """All but the contexts, by name, as `Rollouts(contexts=…, **tensors)` takes them back."""
        return {name: value for name, value in vars(self).items() if name != "contexts"}

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, [B] int64."""
        return self.cu_seqlens.diff().long()

    def completion_ids(self) -> list[list[int]]:
        """Each completion's tokens without its EOS: what the tokenizer may turn into text."""
        ends, tokens = self.cu_seqlens.tolist(), self.token_ids.tolist()
        return [tokens[a : b - eos] for a, b, eos in zip(ends, ends[1:], self.finished.tolist(), strict=False)]

    def part(self, rows: slice) -> Rollouts:
        """The completions of a range, with the contexts that they continue."""
        context_index = self.context_index[rows]
        start, stop = int(self.cu_seqlens[rows.start]), int(self.cu_seqlens[rows.stop])
        return Rollouts(
            contexts=self.contexts[int(context_index[0]) : int(context_index[-1]) + 1],
            context_index=context_index - context_index[0],
            token_ids=self.token_ids[start:stop],
            cu_seqlens=self.cu_seqlens[rows.start : rows.stop + 1] - start,
            behavior_logprob=self.behavior_logprob[start:stop],
            finished=self.finished[rows],
        )

    def where(self, chosen: Tensor) -> Rollouts:
        """The completions that are chosen, [B] bool, with the contexts that they continue."""
        tokens = chosen.repeat_interleave(self.lengths)
        places, context_index = self.context_index[chosen].unique(return_inverse=True)
        return Rollouts(
            contexts=tuple(self.contexts[place] for place in places.tolist()),
            context_index=context_index,
            token_ids=self.token_ids[tokens],
            cu_seqlens=torch.nn.functional.pad(self.lengths[chosen].cumsum(0), (1, 0)).int(),
            behavior_logprob=self.behavior_logprob[tokens],
            finished=self.finished[chosen],
        )

    def micro_batches(self, max_tokens: int) -> Iterator[slice]:
        """Ranges of consecutive completions of at most max_tokens tokens, each context's prompt counted once."""
        first, tokens, previous = 0, 0, -1
        for i, (length, context) in enumerate(zip(self.lengths.tolist(), self.context_index.tolist(), strict=True)):
            prompt = len(self.contexts[context].token_ids)
            cost = length + (prompt if context != previous else 0)
            if i > first and tokens + cost > max_tokens:
                yield slice(first, i)
                first, tokens, cost = i, 0, length + prompt
            tokens, previous = tokens + cost, context
        yield slice(first, len(self))


Completion = tuple[Sequence[int], Sequence[float], bool]  # token ids, their log q in nats, whether EOS is the last


def pack(contexts: Sequence[Context], completions: Sequence[Sequence[Completion]]) -> Rollouts:
    """The completions of each context, as a sampler lists them, as the tensors of a round."""
    drawn = [completion for group in completions for completion in group]
    lengths = torch.tensor([0, *(len(tokens) for tokens, _, _ in drawn)])
    return Rollouts(
        contexts=tuple(contexts),
        context_index=torch.tensor([index for index, group in enumerate(completions) for _ in group]),
        token_ids=torch.tensor([token for tokens, _, _ in drawn for token in tokens]),
        cu_seqlens=lengths.cumsum(0).int(),
        behavior_logprob=torch.tensor([x for _, logprobs, _ in drawn for x in logprobs], dtype=torch.float32),
        finished=torch.tensor([finished for _, _, finished in drawn]),
    )
