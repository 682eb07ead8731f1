"""A round's samples as packed tensors: what the engine hands to everything behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contexts import Context


@dataclass(frozen=True)
class Rollouts:
    """B completions of C contexts, N completion tokens in all.

    Attributes:
        contexts: the C contexts of the round.
        context_index: which of them each completion continues, [B] int64, ascending.
        token_ids: completions back to back, the EOS that ended one included once, [N] int64.
        cu_seqlens: completion i owns tokens cu_seqlens[i]:cu_seqlens[i+1], [B+1] int32.
        behavior_logprob: log q of each token under the sampler, in nats, [N] float32.
        finished: whether the completion ended with EOS (False: cut off at max_new_tokens), [B] bool.
    """

    contexts: tuple[Context, ...]
    context_index: Tensor
    token_ids: Tensor
    cu_seqlens: Tensor
    behavior_logprob: Tensor
    finished: Tensor

    def __len__(self) -> int:
        return len(self.context_index)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, [B] int64."""
        return self.cu_seqlens.diff().long()

    def completion_ids(self) -> list[list[int]]:
        """Each completion's tokens without its EOS: what the tokenizer may turn into text."""
        ends = self.cu_seqlens.tolist()
        eos = self.finished.tolist()
        tokens = self.token_ids.tolist()
        return [tokens[a : b - e] for a, b, e in zip(ends, ends[1:], eos, strict=False)]

    def part(self, rows: slice) -> Rollouts:
        """The completions of a range, with the contexts that they continue."""
        first, last = rows.start, rows.stop
        index = self.context_index[first:last]
        low, high = int(index[0]), int(index[-1]) + 1
        start, stop = int(self.cu_seqlens[first]), int(self.cu_seqlens[last])
        return Rollouts(
            contexts=self.contexts[low:high],
            context_index=index - low,
            token_ids=self.token_ids[start:stop],
            cu_seqlens=self.cu_seqlens[first : last + 1] - start,
            behavior_logprob=self.behavior_logprob[start:stop],
            finished=self.finished[first:last],
        )

    def micro_batches(self, max_tokens: int) -> Iterator[slice]:
        """Ranges of consecutive completions of at most max_tokens tokens, each context's prompt counted once."""
        lengths, owners = self.lengths.tolist(), self.context_index.tolist()
        first, tokens, owner = 0, 0, -1
        for i, length in enumerate(lengths):
            cost = length + (len(self.contexts[owners[i]].token_ids) if owners[i] != owner else 0)
            if i > first and tokens + cost > max_tokens:
                yield slice(first, i)
                first, tokens = i, 0
                cost = length + len(self.contexts[owners[i]].token_ids)
            tokens, owner = tokens + cost, owners[i]
        yield slice(first, len(lengths))


Completion = tuple[Sequence[int], Sequence[float], bool]


def pack(contexts: Sequence[Context], completions: Sequence[Sequence[Completion]]) -> Rollouts:
    """Completions as a sampler lists them, as the tensors of a round.

    Args:
        contexts: C of them.
        completions: of each context its completions: token ids, their log-probs in nats, and whether EOS ended it
            (and is the last of the ids).
    """
    counts = torch.tensor([len(group) for group in completions])
    drawn = [completion for group in completions for completion in group]
    lengths = torch.tensor([0, *(len(tokens) for tokens, _, _ in drawn)])
    return Rollouts(
        contexts=tuple(contexts),
        context_index=torch.arange(len(contexts)).repeat_interleave(counts),
        token_ids=torch.tensor([token for tokens, _, _ in drawn for token in tokens]),
        cu_seqlens=lengths.cumsum(0).int(),
        behavior_logprob=torch.tensor([x for _, logprobs, _ in drawn for x in logprobs], dtype=torch.float32),
        finished=torch.tensor([finished for _, _, finished in drawn]),
    )


def concatenate(parts: list[Rollouts]) -> Rollouts:
    """Rollouts of the same contexts, sampled in several batches, as one."""
    first_tokens = torch.tensor([0, *(part.num_tokens for part in parts)]).cumsum(0)
    ends = [part.cu_seqlens[1:] + first for part, first in zip(parts, first_tokens.tolist(), strict=False)]
    return Rollouts(
        contexts=parts[0].contexts,
        context_index=torch.cat([part.context_index for part in parts]),
        token_ids=torch.cat([part.token_ids for part in parts]),
        cu_seqlens=torch.cat([parts[0].cu_seqlens[:1], *ends]).int(),
        behavior_logprob=torch.cat([part.behavior_logprob for part in parts]),
        finished=torch.cat([part.finished for part in parts]),
    )
