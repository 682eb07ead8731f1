"""How passes through a model are shared out: all of them, equally many, about equally long."""

import pytest
import torch

from fdpg_fast.contexts import Context
from fdpg_fast.ranks import share_out
from fdpg_fast.rollouts import Rollouts


def rollouts(lengths: torch.Tensor, each: int = 16, prompt: int = 100) -> Rollouts:
    count, total = len(lengths), int(lengths.sum())
    return Rollouts(
        contexts=tuple(Context(i, "", (0,) * prompt) for i in range(-(-count // each))),
        context_index=torch.arange(count) // each,
        token_ids=torch.zeros(total, dtype=torch.long),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        behavior_logprob=torch.zeros(total),
        finished=torch.zeros(count, dtype=torch.bool),
    )


@pytest.mark.parametrize("spread", [0.5, 1.0])
@pytest.mark.parametrize("tokens", [2048, 8192, 16384])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_log_normal_lengths_are_balanced(world, tokens, spread):
    drawn = torch.randn(1024, generator=torch.Generator().manual_seed(world)) * spread + 6
    batch = rollouts(drawn.exp().clamp(1, 8192).long())
    lengths = batch.lengths.tolist()
    shares = share_out(list(batch.micro_batches(tokens)), lengths, world)
    costs = [[sum(lengths[rows]) for rows in own] for own in shares]
    assert max(map(sum, costs)) <= 1.05 * sum(map(sum, costs)) / world
    assert len({len(own) for own in shares}) == 1
    # a pass takes as long as its longest range: no other passes made of the same ranges take less time
    slowest = [max(of_one_pass) for of_one_pass in zip(*costs, strict=True)]
    assert slowest == sorted(sum(costs, []), reverse=True)[::world]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_sequence_is_somebodys_once(world, count):
    lengths = [3, 1, 400, 2, 2, 90, 1][:count]
    batch = rollouts(torch.tensor(lengths), each=2)
    for tokens in (1, 200, 10_000):
        parts = list(batch.micro_batches(tokens))
        shares = share_out(parts, lengths, world)
        owned = sorted(i for own in shares for rows in own for i in range(rows.start, rows.stop))
        assert owned == list(range(count)) and all(rows.stop > rows.start for own in shares for rows in own)
        assert world > 1 or shares == [parts]
        most = -(-len(parts) // world)
        assert all(len(own) == most for own in shares) or count < most * world
