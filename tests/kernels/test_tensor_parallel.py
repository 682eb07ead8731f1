"""Heads that are split over two processes against the whole head in one: values, gradients, collectives."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from fdpg_kernels import fdpg_loss, linear_logprob, sharded_linear_logprob
from support.split_head import (
    CASES,
    DTENSORS,
    INPUTS,
    RANKS,
    REFUSED,
    TOLERANCE,
    Case,
    as_list,
    backward,
    shard,
    whole_head,
)  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, "-m", "support.split_head"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in workers]
    finally:
        for process in workers:
            process.kill()
    assert all(process.returncode == 0 for process in workers), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def definition(case: Case) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Results of the whole head in float64 from the inputs as they are rounded, and the leaves with gradients."""
    whole = whole_head(case)
    for key in INPUTS:
        if whole[key] is not None:
            whole[key] = whole[key].detach().double().requires_grad_(key not in case.frozen)
    inputs = whole["hidden"], whole["weight"], whole["target_ids"]
    results = as_list(linear_logprob(*inputs, bias=whole["bias"], impl="reference", **case.options))
    backward(results)
    return [x.detach() for x in results], whole


def assert_gradients(found: list[dict[str, torch.Tensor]], whole: dict[str, Any], case: Case) -> None:
    """Of hidden the whole gradient on every rank, of the head its own rows."""
    atol, rtol = TOLERANCE[case.dtype]
    for name in INPUTS:
        of_shard = "weight_shard" if name == "weight" else name
        if whole[name] is None or name in case.frozen:
            assert not any(of_shard in grads for grads in found)
            continue
        parts = [grads[of_shard] for grads in found]
        assert all(part.dtype == case.dtype for part in parts)
        expected = whole[name].grad
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        for whole_found in parts if name == "hidden" else [torch.cat(parts)]:
            torch.testing.assert_close(whole_found.double(), expected, rtol=rtol, atol=max(atol, rtol * scale))


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_whole_head(ranks, name):
    case = CASES[name]
    found = [results[name] for results in ranks]
    expected, whole = definition(case)
    exact = case.dtype == torch.float64 or case.impl == "reference"
    for *mine, truth in zip(*(results["results"] for results in found), expected, strict=True):
        assert torch.equal(*mine)
        assert mine[0].dtype == (torch.float64 if exact else torch.float32)
        torch.testing.assert_close(mine[0].double(), truth, rtol=0, atol=TOLERANCE[case.dtype][0])
    assert_gradients([results["gradients"] for results in found], whole, case)


def test_the_first_token_of_a_shard_is_no_less_exact(ranks):
    # the shard asks for it in every row whose target it has not, and must not be left with the rounding of these
    name = "bfloat16, many rows"
    expected = definition(CASES[name])[1]
    found = torch.cat([results[name]["gradients"]["weight_shard"] for results in ranks]).double()
    error = (found - expected["weight"].grad).norm(dim=1) / expected["weight"].grad.norm(dim=1)
    assert float(error[[0, CASES[name].split]].max()) < 2**-8


@pytest.mark.parametrize("name", CASES)
def test_one_gather_forward_and_one_reduction_backward(ranks, name):
    for results in ranks:
        forward, backward = results[name]["collectives"]
        assert len(forward) == 1 and "gather" in forward[0]
        assert len(backward) == ("hidden" not in CASES[name].frozen) and all("allreduce" in x for x in backward)


@pytest.mark.parametrize("name", REFUSED)
def test_shards_that_do_not_tile_the_vocabulary(ranks, name):
    for results in ranks:
        assert REFUSED[name][1] in results[name] and "vocab_start" in results[name]


def test_the_loss_of_a_sharded_head_is_fdpg_loss(ranks):
    whole = whole_head(Case())
    expected = fdpg_loss(**whole)
    expected.loss.backward()
    assert float(whole["weight"].grad.abs().max()) > 1e-3
    for results in ranks:
        torch.testing.assert_close(results["loss"]["loss"], expected.loss.detach(), rtol=1e-11, atol=1e-12)
        for mine, theirs in zip(results["loss"]["weights"], expected.weights, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    assert_gradients([results["loss"]["gradients"] for results in ranks], whole, Case())


@pytest.mark.parametrize("vocab", DTENSORS)
def test_a_split_head_that_is_a_dtensor(ranks, vocab):
    case = Case(vocab=vocab, options=DTENSORS[vocab])
    expected, whole = definition(case)
    of_loss = whole_head(case)
    loss = fdpg_loss(**of_loss)
    loss.loss.backward()
    for found in (results["DTensors", vocab] for results in ranks):
        torch.testing.assert_close(found["results"], expected, rtol=0, atol=1e-12)
        assert len(found["collectives"]) == 1 and "gather" in found["collectives"][0]
        torch.testing.assert_close([found["loss"], *found["weights"]], [loss.loss.detach(), *loss.weights])
        for name in INPUTS:
            torch.testing.assert_close(found["gradients"][name], whole[name].grad)
            torch.testing.assert_close(found["gradients_of_loss"][name], of_loss[name].grad)
        plain_hidden, plain_bias, accumulated = found["refusals"]
        assert "full_tensor()" in plain_hidden and "replicated on the head's mesh" in plain_hidden
        assert "bias must be a DTensor" in plain_bias and "weight_grad_out" in accumulated


def test_backward_may_run_twice(ranks):
    assert all(results["twice"] for results in ranks)


def test_what_lies_under_ignored_tokens_is_not_read(ranks):
    for results in ranks:
        clean, poisoned = results["even shards"], results["poisoned"]
        assert torch.equal(clean["results"][0], poisoned["results"][0])
        for name, gradient in clean["gradients"].items():
            torch.testing.assert_close(poisoned["gradients"][name], gradient)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vocab_start=-1), "vocab_start=-1"),
        (dict(impl="fast"), "impl='fast'"),
        (dict(bias=torch.tensor([0.0, -torch.inf, 0.0, 0.0, 0.0], dtype=torch.float64)), "finite"),
        (dict(bias=torch.zeros(6, dtype=torch.float64)), "bias must be"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(target_ids=torch.zeros(3, dtype=torch.int64)), "target_ids must be"),
    ],
    ids=["start", "impl", "infinite bias", "length of bias", "temperature", "length of targets"],
)
def test_bad_arguments_are_refused_before_any_collective(change, message):
    _, arguments = shard(Case(), 0)
    with pytest.raises(ValueError, match=message):  # without a process group a collective would say so
        sharded_linear_logprob(**arguments | change)
