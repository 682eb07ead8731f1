"""Packed samples: cutting them up loses nothing, whatever the lengths."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdpg_fast.contexts import Context
from fdpg_fast.rollouts import Rollouts

EOS = 0


def rollouts_of(prompt_lengths, completions, first_index=0):
    """Contexts of these lengths; `completions` is a list of (context, tokens)."""
    lengths = torch.tensor([len(tokens) for _, tokens in completions])
    flat = [token for _, tokens in completions for token in tokens]
    return Rollouts(
        contexts=tuple(Context(first_index + i, "", (1,) * n) for i, n in enumerate(prompt_lengths)),
        context_index=torch.tensor([owner for owner, _ in completions]),
        token_ids=torch.tensor(flat),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        behavior_logprob=-torch.arange(len(flat), dtype=torch.float32),
        finished=torch.tensor([tokens[-1] == EOS for _, tokens in completions]),
    )


def unpacked(rollouts):
    """(context, tokens, log-probs, finished) of each completion."""
    lengths = rollouts.lengths.tolist()
    return [
        (rollouts.contexts[owner], tokens.tolist(), logprobs.tolist(), finished)
        for owner, tokens, logprobs, finished in zip(
            rollouts.context_index.tolist(),
            rollouts.token_ids.split(lengths),
            rollouts.behavior_logprob.split(lengths),
            rollouts.finished.tolist(),
            strict=True,
        )
    ]


SAMPLE = rollouts_of(
    (2, 5, 1), [(0, [3, 4, EOS]), (0, [EOS]), (1, [5, 6]), (1, [7, EOS, 8]), (1, [9, EOS]), (2, [10]), (2, [11, EOS])]
)


@st.composite
def samples(draw):
    """1–5 contexts with prompts of 1–9 tokens and 1–4 completions of 1–12 tokens each."""
    prompts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    tokens = st.lists(st.integers(0, 20), min_size=1, max_size=12)
    completions = [(i, text) for i in range(len(prompts)) for text in draw(st.lists(tokens, min_size=1, max_size=4))]
    return rollouts_of(prompts, completions)


def test_sizes():
    assert len(SAMPLE) == 7 and SAMPLE.num_tokens == 14
    assert SAMPLE.lengths.tolist() == [3, 1, 2, 3, 2, 1, 2]


def test_each_completion_knows_its_context_s_place_in_the_data_set():
    rollouts = rollouts_of((1, 1), [(0, [3]), (1, [4]), (1, [5])], first_index=7)
    assert rollouts.dataset_index.tolist() == [7, 8, 8] and rollouts.dataset_index.dtype == torch.int64


def test_completion_ids_lack_the_eos_that_ended_them_and_no_other():
    assert SAMPLE.completion_ids() == [[3, 4], [], [5, 6], [7, EOS, 8], [9], [10], [11]]


def test_part_keeps_each_completion_with_its_context():
    part = SAMPLE.part(slice(3, 6))
    assert unpacked(part) == unpacked(SAMPLE)[3:6]
    assert part.contexts == SAMPLE.contexts[1:3] and part.context_index.tolist() == [0, 0, 1]
    assert part.cu_seqlens.tolist() == [0, 3, 5, 6] and part.cu_seqlens.dtype == torch.int32


def cost_of(part):
    return part.num_tokens + sum(len(context.token_ids) for context in part.contexts)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(samples(), st.integers(1, 40))
def test_micro_batches_cover_everything_within_the_limit(rollouts, max_tokens):
    rows = list(rollouts.micro_batches(max_tokens))
    parts = [rollouts.part(r) for r in rows]
    assert [completion for part in parts for completion in unpacked(part)] == unpacked(rollouts)
    for part in parts:
        assert len(part) >= 1
        assert cost_of(part) <= max_tokens or len(part) == 1  # one sequence may be too long by itself
    for earlier, later in zip(rows, rows[1:], strict=False):  # greedy: the next completion did not fit
        assert cost_of(rollouts.part(slice(earlier.start, later.start + 1))) > max_tokens


@settings(max_examples=50, deadline=None, derandomize=True)
@given(samples(), st.data())
def test_a_cut_loses_nothing(rollouts, data):
    cut = data.draw(st.integers(1, max(1, len(rollouts) - 1)))
    pieces = [slice(0, cut), slice(cut, len(rollouts))] if cut < len(rollouts) else [slice(0, cut)]
    parts = [rollouts.part(rows) for rows in pieces]
    assert [completion for part in parts for completion in unpacked(part)] == unpacked(rollouts)
    assert all(part.cu_seqlens.dtype == torch.int32 for part in parts)
    assert [ids for part in parts for ids in part.completion_ids()] == rollouts.completion_ids()
