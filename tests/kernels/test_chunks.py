"""How rows are cut into chunks; and that neither the cuts nor a sequence longer than a chunk changes a result."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdpg_kernels import Divergence, fdpg_loss, linear_logprob
from fdpg_kernels.arguments import Head, Sequences
from fdpg_kernels.checks import make_head
from fdpg_kernels.chunks import even_chunks, pack, plan
from fdpg_kernels.triton import head as head_module
from support.kernel_cases import head_batch, packing
from support.storages import MultiplyAdds

IMPLEMENTATIONS = ("chunked", "triton")
LENGTHS = [3, 0, 20, 9, 2, 0, 36]  # rows of a chunk: 16 at least in Triton, so 20 and 36 can be long
V, D = 37, 9
LEAVES = ("hidden", "weight", "bias")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 30))
def test_every_row_has_one_chunk_and_every_sequence_one_group(lengths, rows):
    ends = packing(lengths).tolist()
    groups = plan(ends, rows)
    in_order = sorted(groups)
    assert [group.first for group in in_order] == [0, *(group.last for group in in_order[:-1])]
    assert in_order[-1].last == len(lengths)
    short = max((n for n in lengths if n <= rows), default=0)
    for group in groups:
        assert [i for chunk in group.chunks for i in range(chunk.start, chunk.stop)] == [*range(ends[-1])][group.rows]
        assert (group.rows.start, group.rows.stop) == (ends[group.first], ends[group.last])
        is_long = group.last == group.first + 1 and lengths[group.first] > rows
        assert (len(group.chunks) > 1) == is_long
        assert all(chunk.stop - chunk.start <= (rows if is_long else rows + 7 / 6 * short) for chunk in group.chunks)
    assert [len(group.chunks) > 1 for group in groups] == sorted((len(g.chunks) > 1 for g in groups), reverse=True)


def test_no_chunk_is_left_a_small_tail():
    lengths = torch.randint(128, 384, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    heights = [group.rows.stop - group.rows.start for group in plan(packing(lengths).tolist(), 4096)]
    assert len(heights) == 5 and all(abs(height - sum(lengths) / 5) < 384 for height in heights)
    assert [g.rows.stop - g.rows.start for g in plan(packing([2100] * 8).tolist(), 4096)] == [4200] * 4
    even = even_chunks(100, 8292, 4096, 128)
    assert [chunk.stop - chunk.start for chunk in even] == [4096, 4096] and even[0].start == 100
    ragged = [chunk.stop - chunk.start for chunk in even_chunks(0, 9000, 4096, 128)]
    assert ragged == [3072, 3072, 2856]  # whole tiles, and 3,000 each before rounding


def arguments_of(dtype=torch.float32, **changes):
    arguments = head_batch(LENGTHS, vocab=V, width=D, zeros=True) | changes
    arguments["behavior_logprob"][55] = -150.0  # π/q of e^150: out of range, in the second chunk of a long sequence
    ignored = torch.arange(sum(LENGTHS)) % 7 == 3
    arguments["target_ids"][ignored] = -100
    with torch.no_grad():
        arguments["hidden"][ignored] = math.nan
    return {k: x.detach().to(dtype) if getattr(x, "is_floating_point", bool)() else x for k, x in arguments.items()}


def run(arguments, **options):
    leaves = {k: arguments[k].clone().requires_grad_() for k in LEAVES}
    out = fdpg_loss(**arguments | leaves, ratio_cap=5.0, reward_cap=0.6, total_sequences=20, **options)
    out.loss.backward()
    return out, {k: x.grad for k, x in leaves.items()}


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


MINE = Divergence("mine", lambda t: (t - 1) ** 2 / (t + 1), f_prime_at_infinity=1.0)
UNKNOWN = torch.zeros(len(LENGTHS)).index_fill_(0, torch.tensor([3, 6]), -math.inf)  # a short and a long sequence
CASES = [dict(), dict(divergence=MINE), dict(softcap=2.0, temperature=0.7), dict(log_z=UNKNOWN)]


@pytest.mark.parametrize("rows", [1, 25, 10**9], ids=lambda rows: f"{rows} rows")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "plain")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_long_and_short_sequences_meet_the_definition(impl, case, rows):
    arguments = arguments_of() | case
    wide = arguments_of(torch.float64) | {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in case.items()}
    for k in LEAVES:
        wide[k] = arguments[k].double()
    wide["behavior_logprob"] = arguments["behavior_logprob"].double()
    exact, expected = run(wide, impl="reference")
    out, found = run(arguments, impl=impl, chunk_bytes=rows * 40 * 4)  # Triton's rows are padded to 40 entries
    torch.testing.assert_close(out.weights.weight.double(), exact.weights.weight, rtol=5e-5, atol=5e-5)
    for k in LEAVES:
        assert relative(found[k], expected[k]) < 5e-5, k
    if case:
        return
    into = torch.ones(V, D)
    _, found_again = run(arguments, impl=impl, chunk_bytes=rows * 40 * 4, weight_grad_out=into)
    assert relative(into - 1, expected["weight"]) < 5e-5 and found_again["weight"] is None
    assert all(torch.equal(found_again[k], found[k]) for k in ("hidden", "bias"))
    frozen = arguments | {"hidden": arguments["hidden"].clone().requires_grad_()}
    options = dict(ratio_cap=5.0, reward_cap=0.6, total_sequences=20, impl=impl, chunk_bytes=rows * 40 * 4)
    fdpg_loss(**frozen, **options).loss.backward()
    assert torch.equal(frozen["hidden"].grad, found["hidden"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_of_a_bfloat16_head_are_rounded_once(impl):
    """In one chunk and in many, the sum is taken in float32: rounding what weight_grad_out gets gives the same."""
    arguments = arguments_of()
    arguments |= {k: arguments[k].bfloat16() for k in LEAVES}
    for chunk_bytes in (1, 2**40):
        _, found = run(arguments, impl=impl, chunk_bytes=chunk_bytes)
        into = torch.zeros(V, D)
        run(arguments, impl=impl, chunk_bytes=chunk_bytes, weight_grad_out=into)
        assert torch.equal(into.bfloat16(), found["weight"])


@pytest.fixture
def counted(monkeypatch):
    """Multiply-adds of all products, those of the kernels included."""
    seen, multiply = MultiplyAdds(), head_module.Products._multiply

    def counting(self, chunk, partials, *, anchored, flag=None, **options):
        if flag is None:  # the others return at once, but for rows out of range
            seen.count += (chunk.stop - chunk.start) * D * V
        multiply(self, chunk, partials, anchored=anchored, flag=flag, **options)

    monkeypatch.setattr(head_module.Products, "_multiply", counting)
    return seen


@pytest.mark.parametrize("ignored", [0.0, 0.6])
@pytest.mark.parametrize("length", [16, 100, 200], ids=["short", "two long", "one long"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_three_products_of_rows_that_count_whatever_the_length(counted, impl, length, ignored):
    n = 200 // length * length
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(k, D, generator=rng, requires_grad=True) for k in (n, V))
    target_ids, batch = torch.randint(V, (n,), generator=rng), n // length
    target_ids[torch.rand(n, generator=rng) < ignored] = -100
    packed = packing([length] * batch), torch.full((n,), -4.0), torch.zeros(batch), torch.tensor(0.0)
    with counted:
        fdpg_loss(hidden, weight, target_ids, *packed, impl=impl, chunk_bytes=32 * 40 * 4)
    assert counted.count == 3 * int((target_ids != -100).sum()) * D * V


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_log_probs_take_four_products_of_rows_that_count_in_blocks_of_any_size(counted, impl):
    """Two forward and backward would need all logits kept between them."""
    rng = torch.Generator().manual_seed(0)
    leaves = [torch.randn(k, D, generator=rng, requires_grad=True) for k in (100, V)]
    target_ids = torch.randint(V, (100,), generator=rng)
    target_ids[::3] = -100
    found = []
    for chunk_bytes in (None, 32 * 40 * 4, 1):
        counted.count = 0
        with counted:
            logprob = linear_logprob(*leaves, target_ids, impl=impl, chunk_bytes=chunk_bytes)
            found.append([logprob, *torch.autograd.grad(logprob.sum(), leaves)])
        assert counted.count == 4 * int((target_ids != -100).sum()) * D * V
    for one in found[1:]:
        for mine, first in zip(one, found[0], strict=True):
            torch.testing.assert_close(mine, first, rtol=1e-5, atol=1e-5)


def test_ignored_rows_are_found_without_a_look_at_the_device(monkeypatch):
    """A meta tensor has no values that could be waited for, and the targets are on the CPU."""
    arguments = arguments_of()
    there = {k: arguments[k].to("meta") for k in (*LEAVES, "behavior_logprob", "target_log_score")}
    sequences = Sequences(
        arguments["cu_seqlens"], there["behavior_logprob"], there["target_log_score"], torch.zeros(())
    )
    head, num_live = Head(there["weight"], None, 1.0, None), int((arguments["target_ids"] != -100).sum())
    hidden, target_ids, _, sequences, live = pack(there["hidden"], arguments["target_ids"], head, sequences)
    assert hidden.shape == (num_live, D) and {x.device.type for x in (hidden, target_ids, live)} == {"meta"}
    assert sequences.cu_seqlens.device.type == "cpu" and int(sequences.cu_seqlens[-1]) == num_live
    inputs = there["hidden"], arguments["target_ids"], there["weight"], None, 1.0, None
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it knows no meta device
    make_head(*inputs)
    with pytest.raises(ValueError, match="hidden and target_ids must be on one device; got cpu, meta"):
        make_head(torch.empty(inputs[0].shape), inputs[1].to("meta"), torch.empty(V, D), *inputs[3:])


@pytest.mark.parametrize("chunk_bytes", [0, -1, 1.5, "1 GiB", math.nan])
def test_chunk_bytes_that_are_refused(chunk_bytes):
    arguments = head_batch([2, 4])
    refused = pytest.raises(ValueError, match="chunk_bytes=.*; it must be a positive whole number, or None")
    with refused:
        fdpg_loss(**arguments, chunk_bytes=chunk_bytes)
    with refused:
        linear_logprob(*(arguments[k] for k in ("hidden", "weight", "target_ids")), chunk_bytes=chunk_bytes)
