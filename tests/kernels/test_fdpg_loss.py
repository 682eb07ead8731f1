"""fdpg_loss against autograd through the float64 definition: value, weights and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdpg_kernels import chunked, fdpg_loss, linear_logprob, sequence_weights
from support.kernel_cases import ALLOW_ZEROS, NAMES, head_batch

LENGTHS = [3, 0, 1, 9, 2, 0, 5, 4]  # with 4 rows a chunk: groups, empty sequences, and two that span chunks
LEAVES = ("hidden", "weight", "bias")
CAPS = ("ratio_cap", "reward_cap", "ratio_drop")


@pytest.fixture
def four_rows(monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK_BYTES", 4 * 11 * 8)


def run(arguments, impl, dtype=torch.float64, upstream=1.0, **options):
    """loss, weights and gradients of hidden, weight, bias; leaves cast to dtype first."""
    leaves = {k: arguments[k].detach().to(dtype).requires_grad_() for k in LEAVES if k in arguments}
    out = fdpg_loss(**arguments | leaves, impl=impl, **options)
    (out.loss * upstream).backward()
    return out, {k: x.grad for k, x in leaves.items()}


def assert_meets_the_definition(arguments, rtol=1e-10, **options):
    out, gradients = run(arguments, "chunked", **options)
    expected, expected_gradients = run(arguments, "reference", **options)
    torch.testing.assert_close(out.loss, expected.loss, rtol=rtol, atol=rtol)
    for a, b in zip(out.weights, expected.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
    for k in gradients:
        torch.testing.assert_close(gradients[k], expected_gradients[k], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("ratio", ["sequence", "none"])
@pytest.mark.parametrize("caps", [(None, None, None), (1.1, None, 2.0), (None, 0.3, 1.1), (0.9, 0.5, None)], ids=str)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("four_rows")
def test_every_divergence_and_option(name, zeros, caps, ratio):
    arguments = head_batch(LENGTHS, zeros=zeros and name in ALLOW_ZEROS)
    spread = torch.linspace(-1, 1, len(LENGTHS), dtype=torch.float64)
    for baseline in (None, 0.3, spread):
        for log_z in (arguments["log_z"], spread - 0.5, spread.masked_fill(spread > 0, -math.inf)):
            options = dict(divergence=name, ratio=ratio, **dict(zip(CAPS, caps, strict=True)))
            assert_meets_the_definition(arguments | {"log_z": log_z}, baseline=baseline, **options)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 1000])
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.6), dict(softcap=1.5, temperature=1.3)], ids=str)
def test_any_chunk_size_and_head(monkeypatch, rows, options):
    monkeypatch.setattr(chunked, "BLOCK_BYTES", rows * 11 * 8)
    assert_meets_the_definition(head_batch(LENGTHS, zeros=True), upstream=2.5, **options)
    without_bias = {k: v for k, v in head_batch(LENGTHS).items() if k != "bias"}
    assert_meets_the_definition(without_bias, **options)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=7), st.sampled_from(NAMES), st.integers(1, 9), st.data())
def test_ragged_packings_with_ignored_tokens(lengths, name, rows, data):
    arguments = head_batch(lengths, zeros=name in ALLOW_ZEROS, seed=data.draw(st.integers(0, 999)))
    ignored = data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    ignored = torch.tensor(ignored, dtype=torch.bool)
    arguments["target_ids"][ignored] = -100
    arguments["behavior_logprob"][ignored] = math.nan  # not to be read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "BLOCK_BYTES", rows * 11 * 8)
        # ignoring whole prefixes makes π/q of e^20: only relative errors can be bounded
        assert_meets_the_definition(arguments, rtol=1e-8, divergence=name, ratio_cap=5.0, reward_cap=50.0)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.usefixtures("four_rows")
def test_ignored_tokens_equal_absent_ones(impl):
    arguments = head_batch(LENGTHS)
    kept = torch.arange(sum(LENGTHS)) % 3 != 1
    kept_before = torch.nn.functional.pad(kept.cumsum(0), (1, 0)).int()
    absent = arguments | {k: arguments[k][kept] for k in ("hidden", "target_ids", "behavior_logprob")}
    absent["cu_seqlens"] = kept_before[arguments["cu_seqlens"]]
    ignoring = arguments | dict(target_ids=arguments["target_ids"].masked_fill(~kept, -100))
    a, a_gradients = run(ignoring, impl)
    b, b_gradients = run(absent, impl)
    torch.testing.assert_close(a.weights, b.weights)
    assert bool((a_gradients["hidden"][~kept] == 0).all())
    torch.testing.assert_close(a_gradients["hidden"][kept], b_gradients["hidden"])
    torch.testing.assert_close(a_gradients["weight"], b_gradients["weight"])


@pytest.mark.usefixtures("four_rows")
def test_it_is_the_two_other_ops_composed():
    arguments = head_batch(LENGTHS, zeros=True)
    out, gradients = run(arguments, "chunked", divergence="alpha:0.3", baseline=0.2)
    for k in LEAVES:
        arguments[k].grad = None
    head = {k: arguments.pop(k) for k in (*LEAVES, "target_ids")}
    policy = linear_logprob(**head, impl="chunked")
    weights = sequence_weights(policy, **arguments, divergence="alpha:0.3", baseline=0.2, impl="chunked")
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    loss = -(weights.weight[owner] * policy).sum() / len(LENGTHS)
    loss.backward()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.weights, weights)
    for k in LEAVES:
        torch.testing.assert_close(gradients[k], head[k].grad)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 2**-7)], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("four_rows")
def test_low_precision_inputs(name, dtype, rtol):
    arguments = head_batch(LENGTHS, zeros=name in ALLOW_ZEROS)
    rounded = arguments | {k: arguments[k].detach().to(dtype).double().requires_grad_() for k in LEAVES}
    rounded["behavior_logprob"] = arguments["behavior_logprob"].float().double()
    single = rounded | {k: rounded[k].float() for k in ("behavior_logprob", "target_log_score", "log_z")}
    expected, expected_gradients = run(rounded, "reference", divergence=name)
    out, gradients = run(single, "chunked", dtype=dtype, divergence=name)
    assert out.loss.dtype == out.weights.weight.dtype == torch.float32
    # log-probs are float32 sums of float32 products, so weights know e^L to 1e-5 whatever the inputs' dtype
    torch.testing.assert_close(out.weights.weight.double(), expected.weights.weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-4, atol=1e-4)
    for k in LEAVES:
        assert gradients[k].dtype == dtype
        error = (gradients[k].double() - expected_gradients[k]).norm() / expected_gradients[k].norm()
        assert error < rtol, k


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_the_weights_are_detached_and_the_loss_is_not(impl):
    out = fdpg_loss(**head_batch(LENGTHS), impl=impl)
    assert out.loss.requires_grad and out.loss.shape == ()
    assert not any(x.requires_grad for x in out.weights)


def test_a_second_backward_is_refused():
    loss = fdpg_loss(**head_batch(LENGTHS), impl="chunked").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already; call it again"):
        loss.backward()


@pytest.mark.usefixtures("four_rows")
def test_a_frozen_head_gets_no_gradient():
    arguments = head_batch(LENGTHS)
    _, expected = run(arguments, "reference")
    frozen = {k: arguments[k].detach() for k in ("weight", "bias")}
    hidden = arguments["hidden"].detach().requires_grad_()
    fdpg_loss(**arguments | frozen | dict(hidden=hidden), impl="chunked").loss.backward()
    torch.testing.assert_close(hidden.grad, expected["hidden"])
    assert frozen["weight"].grad is None and frozen["bias"].grad is None


@pytest.mark.usefixtures("four_rows")
def test_gradients_of_micro_batches_add_up():
    arguments = head_batch(LENGTHS)
    _, once = run(arguments, "chunked")
    leaves = {k: arguments[k].detach().requires_grad_() for k in LEAVES}
    for upstream in (0.25, -1.25, 2.0):
        (fdpg_loss(**arguments | leaves, impl="chunked").loss * upstream).backward()
    for k in LEAVES:
        torch.testing.assert_close(leaves[k].grad, once[k])


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.usefixtures("four_rows")
def test_parts_of_a_batch_accumulate_into_one_head_gradient(impl):
    arguments = head_batch(LENGTHS)
    whole, expected = run(arguments, "reference")
    ends, first = arguments["cu_seqlens"], 3
    leaves = {k: arguments[k].detach().requires_grad_() for k in LEAVES}
    into = torch.full_like(expected["weight"], 2.0)
    losses = []
    for low, high in ((0, first), (first, len(LENGTHS))):
        tokens = slice(int(ends[low]), int(ends[high]))
        part = arguments | leaves | {"cu_seqlens": ends[low : high + 1] - ends[low]}
        part |= {k: part[k][tokens] for k in ("hidden", "target_ids", "behavior_logprob")}
        part |= {"target_log_score": part["target_log_score"][low:high]}
        out = fdpg_loss(**part, impl=impl, total_sequences=len(LENGTHS), weight_grad_out=into)
        out.loss.backward()
        losses.append(out.loss.detach())
    torch.testing.assert_close(sum(losses), whole.loss.detach())
    torch.testing.assert_close(into - 2.0, expected["weight"])
    assert leaves["weight"].grad is None
    for k in ("hidden", "bias"):
        torch.testing.assert_close(leaves[k].grad, expected[k])
    with torch.no_grad():
        fdpg_loss(**arguments, impl=impl, weight_grad_out=into)
    torch.testing.assert_close(into - 2.0, expected["weight"])  # no gradient wanted, none added


@pytest.mark.usefixtures("four_rows")
def test_a_bfloat16_head_accumulates_in_float32_or_its_own_dtype():
    arguments = head_batch(LENGTHS)
    leaves = {k: arguments[k].detach().bfloat16() for k in LEAVES}
    _, expected = run(arguments | {k: x.double().requires_grad_() for k, x in leaves.items()}, "reference")
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2**-8)):
        into = torch.zeros(11, 5, dtype=dtype)
        fdpg_loss(**arguments | leaves, impl="chunked", weight_grad_out=into).loss.backward()
        error = (into.double() - expected["weight"]).norm() / expected["weight"].norm()
        assert error < limit


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_batch_of_empty_sequences(impl):
    out, gradients = run(head_batch([0, 0]), impl)
    assert out.loss.item() == 0 and out.weights.policy_logprob.tolist() == [0, 0]
    assert gradients["hidden"].shape == (0, 5) and bool((gradients["weight"] == 0).all())
