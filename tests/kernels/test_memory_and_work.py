"""No [N, V] tensor is ever formed: storages are watched while an op runs."""

import pytest
import torch

from fdpg_kernels import chunked, fdpg_loss, linear_logprob, vocabulary_walk
from fdpg_kernels.arguments import Head
from support.kernel_cases import packing
from support.storages import Storages

N, D, V = 2048, 8, 4096
ROWS = 64
BLOCK = ROWS * V * 4  # bytes; [N, V] is 32 of them
HEAD, HIDDEN = V * D * 4, N * D * 4  # bytes of the gradients


@pytest.fixture
def inputs(monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(chunked, "FAST_ROWS", ROWS)
    monkeypatch.setattr(vocabulary_walk, "TILE_BYTES", BLOCK)
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=rng, requires_grad=True)
    weight = torch.randn(V, D, generator=rng, requires_grad=True)
    return hidden, weight, torch.randint(V, (N,), generator=rng)


def sequences(length):
    batch = N // length
    return packing([length] * batch), torch.full((N,), -8.0), torch.zeros(batch), torch.tensor(0.0)


def test_the_watch_sees_a_full_logit_matrix(inputs):
    with Storages(*inputs) as seen:
        linear_logprob(*inputs, impl="reference")
    assert max(seen.sizes) == N * V * 8 and seen.peak() >= 2 * N * V * 8 > seen.alive


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_linear_logprob(inputs, softcap):
    with Storages(*inputs) as seen:
        logprob = linear_logprob(*inputs, softcap=softcap, impl="chunked")
    assert max(seen.sizes) == BLOCK
    assert seen.alive < 16 * N  # log-prob, max and sum of each row; nothing of a tile is saved for the backward
    with Storages(*inputs, logprob) as seen:
        logprob.sum().backward()
    assert max(seen.sizes) == BLOCK
    # the tile; a soft cap adds its slope and that of the tile before
    assert seen.peak() <= (1 if softcap is None else 3) * BLOCK + HEAD + 3 * HIDDEN + 100 * N


@pytest.mark.parametrize("length", [ROWS // 2, N, N // 4], ids=["short sequences", "a long one", "four long ones"])
def test_fdpg_loss(inputs, length):
    others = sequences(length)
    with Storages(*inputs, *others) as seen:
        loss = fdpg_loss(*inputs, *others, impl="chunked").loss
    assert max(seen.sizes) == BLOCK
    # from the second long sequence on, its share of the head's gradient lies apart until its weight is known
    assert seen.peak() <= BLOCK + (3 if length == N // 4 else 2) * HEAD + HIDDEN + 100 * N
    assert seen.alive <= HEAD + HIDDEN + 100 * N  # the gradients, waiting for backward to scale them
    loss.backward()
    assert inputs[0].grad.shape == (N, D) and inputs[1].grad.shape == (V, D)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_of_16_bits_has_no_float32_beside_it(inputs, dtype):
    """Nor has its gradient: what lives with a tile are hidden states and their gradient in float32."""
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in inputs[:2])
    others = sequences(ROWS // 2)
    with Storages(hidden, weight, inputs[2], *others) as seen:
        fdpg_loss(hidden, weight, inputs[2], *others, impl="chunked").loss.backward()
    gradients = (HIDDEN + HEAD) // 2
    assert seen.peak() <= BLOCK + gradients + 2 * HIDDEN + HEAD // 4 + 200 * N


def test_blocks_have_as_many_rows_as_are_fast_or_a_ninth_of_the_memory_of_plain_pytorch():
    vocabulary = 128_256
    head = Head(torch.empty(vocabulary, 0), None, 1.0, None)
    rows = [chunked._Products(torch.empty(0, 0), head, (False,) * 3).chunk_rows(n) for n in (64, 300, 10_000)]
    assert rows == [65, 100, 256]


def test_no_gradient_is_formed_under_no_grad(inputs):
    others = sequences(ROWS // 2)
    with torch.no_grad(), Storages(*inputs, *others) as seen:
        quiet = fdpg_loss(*inputs, *others, impl="chunked").loss
    assert not quiet.requires_grad and not {HEAD, HIDDEN} & {*seen.sizes}
    with Storages(*inputs, *others) as seen:
        learning = fdpg_loss(*inputs, *others, impl="chunked").loss
    assert learning.requires_grad and {HEAD, HIDDEN} <= {*seen.sizes}
    torch.testing.assert_close(quiet, learning.detach())
