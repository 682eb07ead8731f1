"""Contexts, rollouts and counts that the tests of models and engines share."""

from __future__ import annotations

import torch

from fdpg_fast.contexts import Context
from fdpg_fast.rollouts import Rollouts

VOCABULARY, EOS = 61, 0


def contexts_of(*lengths):
    """Prompts of these lengths; every one but the first holds EOS tokens too."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]
    for prompt in prompts[1:]:
        prompt[::3] = EOS
    return [Context(i, "", tuple(prompt.tolist())) for i, prompt in enumerate(prompts)]


def rollouts_of(contexts, completions):
    """Given completions, a list of token lists for each context."""
    flat = [completion for group in completions for completion in group]
    lengths = torch.tensor([len(completion) for completion in flat])
    return Rollouts(
        contexts=tuple(contexts),
        context_index=torch.repeat_interleave(
            torch.arange(len(contexts)), torch.tensor([len(group) for group in completions])
        ),
        token_ids=torch.tensor([token for completion in flat for token in completion]),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        behavior_logprob=torch.zeros(int(lengths.sum())),
        finished=torch.tensor([completion[-1] == EOS for completion in flat]),
    )


def split(rollouts, values):
    return [part.tolist() for part in values.split(rollouts.lengths.tolist())]


def p_value(counts, probability):
    """Of Pearson's χ², cells that expect fewer than 5 pooled into one."""
    expected = probability * counts.sum()
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts.double(), expected))
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2))
