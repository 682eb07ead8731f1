"""Whatever lies where nothing counts, and however tensors lie in memory, every implementation gives the same numbers.

Poison is NaN, an infinity or 1e30: in ignored rows, in memory around views, and beside a log Z that is not known.
"""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdpg_kernels import fdpg_loss, linear_logprob, sequence_weights
from support.kernel_cases import ALLOW_ZEROS, head_batch

IMPLEMENTATIONS = ("reference", "chunked", "triton")
POISONS = (math.nan, math.inf, -math.inf, 1e30)
LEAVES = ("hidden", "weight", "bias")
BOUND = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 3e-2}  # relative, of values and gradients
CHECKED = settings(max_examples=40, deadline=None, derandomize=True, database=None)

lengths = st.lists(st.integers(0, 7), min_size=1, max_size=4)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("fdpg_kernels.chunked.BLOCK_BYTES", 4 * 11 * 8)
    monkeypatch.setattr("fdpg_kernels.vocabulary_walk.TILE_ROWS", 4)
    monkeypatch.setattr("fdpg_kernels.triton.head.CHUNK_ROWS", 16)


def implementations(dtype):
    return [impl for impl in IMPLEMENTATIONS if impl != "triton" or dtype != torch.float64]


def laid_out(tensor, layout, poison):
    """The same values in other memory: a view with poison beside it or in its gaps, transposed, or of stride 0."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
    if layout == "repeated":
        return tensor[:1].clone().expand(tensor.shape)
    step = 2 if layout == "gaps" else 1
    around = torch.full([step * n + 3 for n in tensor.shape], poison if tensor.is_floating_point() else -1)
    view = around.to(tensor)[tuple(slice(1, 1 + step * n, step) for n in tensor.shape)]
    return view.copy_(tensor)


@st.composite
def batches(draw):
    """Arguments of fdpg_loss in one dtype, [N, D], [V, D], …; which rows are ignored; a poison."""
    packed, dtype, poison = draw(lengths), draw(dtypes), draw(st.sampled_from(POISONS))
    arguments = head_batch(packed, zeros=draw(st.booleans()), seed=draw(st.integers(0, 999)))
    num_tokens = sum(packed)
    ignored = torch.tensor(draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)), dtype=torch.bool)
    arguments["target_ids"][ignored] = -100
    for name in LEAVES:
        arguments[name] = arguments[name].detach().to(dtype)
    if draw(st.booleans()):
        del arguments["bias"]
    scaling = draw(st.sampled_from(["none", "number", "0-d", "rows"]))
    if scaling != "none":
        rows = torch.linspace(0.6, 1.7, max(1, num_tokens), dtype=torch.float64)
        arguments["temperature"] = {"number": 0.8, "0-d": torch.tensor(0.8), "rows": rows[:num_tokens]}[scaling]
    arguments["softcap"] = draw(st.sampled_from([None, 2.0]))
    return arguments, ignored, poison


def head_of(arguments):
    return {k: v for k, v in arguments.items() if k in (*LEAVES, "target_ids", "temperature", "softcap")}


def outcome(op, arguments, impl, upstream=None):
    """Values and gradients of hidden, weight and bias, by name."""
    leaves = {k: arguments[k].detach().requires_grad_() for k in LEAVES if k in arguments}
    out = op(**arguments | leaves, impl=impl)
    value = out if isinstance(out, torch.Tensor) else out.loss
    value.backward(torch.ones_like(value) if upstream is None else upstream.to(value.dtype))
    found = {"value": value.detach(), **{f"gradient of {k}": x.grad for k, x in leaves.items()}}
    return found | (
        {} if isinstance(out, torch.Tensor) else {f"weights.{k}": x for k, x in out.weights._asdict().items()}
    )


def assert_near(found, expected, bound):
    for name, x in expected.items():
        mine, theirs = found[name].double(), x.double()
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        if name == "weights.log_t":
            torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound, msg=name)
        else:
            assert bool(mine.isfinite().all()), f"{name} is not finite"
            torch.testing.assert_close(
                mine, theirs, rtol=bound, atol=bound * (1 + scale), msg=lambda m, n=name: f"{n}: {m}"
            )


@CHECKED
@given(batches())
def test_nothing_under_an_ignored_token_reaches_a_result_or_gradient(case):
    arguments, ignored, poison = case
    upstream = torch.linspace(-1, 2, len(ignored), dtype=torch.float64)
    poisoned = arguments | {
        k: arguments[k].masked_fill(ignored if arguments[k].ndim == 1 else ignored[:, None], poison)
        for k in ("hidden", "behavior_logprob", "temperature")
        if isinstance(arguments.get(k), torch.Tensor) and arguments[k].ndim
    }
    for impl in implementations(arguments["hidden"].dtype):
        clean = outcome(fdpg_loss, arguments | {"ratio_cap": 5.0, "reward_cap": 5.0}, impl)
        found = outcome(fdpg_loss, poisoned | {"ratio_cap": 5.0, "reward_cap": 5.0}, impl)
        assert all(torch.equal(found[k], clean[k]) for k in clean), impl
    runs = implementations(arguments["hidden"].dtype)
    for run in runs + ["triton, ids on a GPU"] * ("triton" in runs):
        impl, _, unseen = run.partition(",")
        with mock.patch("fdpg_kernels.logprob._live", lambda ids: None) if unseen else contextlib.nullcontext():
            clean = outcome(linear_logprob, head_of(arguments), impl, upstream)
            found = outcome(linear_logprob, head_of(poisoned), impl, upstream.masked_fill(ignored, poison))
        assert all(torch.equal(found[k], clean[k]) for k in clean), impl
        assert not bool(found["gradient of hidden"][ignored].any()), impl


@CHECKED
@given(batches(), st.data())
def test_every_layout_gives_the_numbers_of_the_definition(case, data):
    arguments, _, poison = case
    layouts = st.sampled_from(["padded", "gaps", "transposed"])
    placed = {
        k: laid_out(v, data.draw(layouts, k), poison) if isinstance(v, torch.Tensor) and v.ndim else v
        for k, v in arguments.items()
    }
    placed["target_ids"] = placed["target_ids"].to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    placed["cu_seqlens"] = placed["cu_seqlens"].to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    if data.draw(st.booleans()):  # one row of the head for everybody, stride 0
        arguments["weight"] = arguments["weight"][:1].expand(11, 5)
        placed["weight"] = laid_out(arguments["weight"], "repeated", poison)
    dtype = arguments["hidden"].dtype
    options = dict(ratio="none", reward_cap=5.0)  # of the sequence ratio e^±20 nothing but a relative error is bounded
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    for op, mine, exact in (
        (fdpg_loss, placed | options, wide | options),
        (linear_logprob, head_of(placed), head_of(wide)),
    ):
        expected = outcome(op, exact, "reference")
        for impl in implementations(dtype):
            assert_near(outcome(op, mine, impl), expected, BOUND[dtype])


@CHECKED
@given(lengths, st.sampled_from(ALLOW_ZEROS), st.sampled_from(POISONS), st.integers(0, 999), st.data())
def test_what_is_beside_an_unknown_z_does_not_matter(packed, name, poison, seed, data):
    arguments = head_batch(packed, seed=seed)
    unknown = data.draw(st.lists(st.booleans(), min_size=len(packed), max_size=len(packed)), "unknown")
    unknown = torch.tensor(unknown)
    arguments["log_z"] = torch.zeros(len(packed), dtype=torch.float64).masked_fill(unknown, -math.inf)
    far = poison if abs(poison) == 1e30 else -1e30  # numbers: a NaN is refused wherever it is
    scores = arguments["target_log_score"].masked_fill(unknown, far)
    baseline = torch.linspace(-0.1, 0.1, len(packed), dtype=torch.float64)
    for impl in ("reference", "chunked"):
        clean = outcome(fdpg_loss, arguments | dict(divergence=name, baseline=baseline), impl)
        placed = dict(divergence=name, baseline=baseline.masked_fill(unknown, 1e30), target_log_score=scores)
        found = outcome(fdpg_loss, arguments | placed, impl)
        assert all(torch.equal(found[k], clean[k]) for k in clean), impl
        assert not bool(found["weights.weight"][unknown].any())


@CHECKED
@given(batches())
def test_without_a_ratio_nothing_of_the_sampler_reaches_the_gradient(case):
    arguments, _, poison = case
    odd = torch.full_like(arguments["behavior_logprob"], poison)
    for impl in implementations(arguments["hidden"].dtype):
        clean = outcome(fdpg_loss, arguments | dict(ratio="none", reward_cap=5.0), impl)
        found = outcome(fdpg_loss, arguments | dict(ratio="none", reward_cap=5.0, behavior_logprob=odd), impl)
        wanted = {k: x for k, x in clean.items() if k.startswith(("value", "gradient", "weights.weight"))}
        assert_near(found, wanted, BOUND[arguments["hidden"].dtype])


@pytest.mark.parametrize("target", [-math.inf, -1.0], ids=["target zero", "target not zero"])
@pytest.mark.parametrize("ratio", ["sequence", "none"])
@pytest.mark.parametrize("where", ["target_log_score", "log_z", "baseline", "policy_logprob"])
@pytest.mark.parametrize("name", ALLOW_ZEROS)
def test_where_nobody_may_look_a_nan_comes_out_as_nan(monkeypatch, name, where, ratio, target):
    """As on a GPU, which is not asked to wait: no number may come of a NaN, in any implementation."""
    monkeypatch.setattr("fdpg_kernels.checks._may_look", lambda tensor: False)
    arguments = dict(
        policy_logprob=torch.tensor([-1.0, -2.0], dtype=torch.float64),
        target_log_score=torch.tensor([target, -2.0], dtype=torch.float64),
        log_z=torch.tensor([0.3, 0.3], dtype=torch.float64),
        baseline=torch.tensor([0.1, 0.1], dtype=torch.float64),
    )
    arguments[where][0] = math.nan
    packed = dict(behavior_logprob=torch.full((2,), -1.5).double(), cu_seqlens=torch.tensor([0, 1, 2]))
    exact = sequence_weights(**arguments, **packed, divergence=name, ratio=ratio, impl="reference")
    assert exact.weight.isnan().tolist() == [True, False]
    for impl in IMPLEMENTATIONS[1:]:
        found = sequence_weights(**arguments, **packed, divergence=name, ratio=ratio, impl=impl)
        for mine, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True)
