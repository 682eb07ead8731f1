"""The cache of decoding: it holds what transformers' own holds, and appends without copying what it has."""

import pytest
import torch
from transformers import DynamicCache

from fdpg_fast.models.decoding import pad_prompts, roomy_cache
from support.language import contexts_of

LAYERS = 2


def states(batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 3, length, 4, generator=generator)  # keys and values


def test_it_holds_what_a_growing_cache_holds():
    ours, theirs = roomy_cache(2), DynamicCache()
    lengths = (5, 1, 1, 1, 3)  # more than there was room for at first
    chosen = torch.tensor([2, 0, 0, 1])
    for step, length in enumerate(lengths):
        batch = 3 if step == 0 else 4
        for layer in range(LAYERS):
            new = states(batch, length, seed=10 * step + layer)
            for a, b in zip(ours.update(*new, layer), theirs.update(*new, layer), strict=True):
                assert torch.equal(a, b)
        assert ours.get_seq_length() == theirs.get_seq_length() == sum(lengths[: step + 1])
        if step in (0, 2):
            chosen_now = chosen if step == 0 else chosen.new_tensor([3, 1, 0, 2])
            ours.batch_select_indices(chosen_now), theirs.batch_select_indices(chosen_now)


def test_a_token_is_appended_in_place():
    cache, places = roomy_cache(4), set()
    cache.update(*states(2, 6, seed=0), 0)
    for step in range(4):
        keys, values = cache.update(*states(2, 1, seed=step), 0)
        places.add((keys.data_ptr(), values.data_ptr()))
    assert keys.shape[2] == 10 and len(places) == 1


@pytest.mark.parametrize("lengths", [(4,), (1, 6, 3), (2, 2)], ids=str)
def test_prompts_are_padded_at_their_end(lengths):
    contexts = contexts_of(*lengths)
    input_ids, is_real = pad_prompts(contexts, torch.device("cpu"))
    assert is_real.sum(1).tolist() == [*lengths]
    for row, mask, context in zip(input_ids, is_real, contexts, strict=True):
        assert tuple(row[mask].tolist()) == tuple(row[: len(context.token_ids)].tolist()) == context.token_ids
