"""sharded_linear_logprob in two processes against the whole head in one: values, gradients, collectives.

python test_tensor_parallel.py RANK FOLDER     one of the two processes; leaves its results in FOLDER
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fdpg_kernels import fdpg_loss, linear_logprob, sequence_weights
from fdpg_kernels.tensor_parallel import sharded_linear_logprob
from support.kernel_cases import head_batch

RANKS, VOCAB = 2, 11
LENGTHS = [3, 1, 5, 2]
INPUTS = ("hidden", "weight", "bias")
TOLERANCE = {torch.float64: (1e-12, 1e-11), torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-4, 2**-7)}
# bfloat16 is rounded once as a gradient of the shard and once more with the target's share added


@dataclass(frozen=True)
class Case:
    """A head, where it is cut in two, and what is asked of it."""

    split: int = 5
    vocab: int = VOCAB
    dtype: torch.dtype = torch.float64
    impl: str = "auto"
    lengths: tuple[int, ...] = tuple(LENGTHS)
    bias: bool = True
    ignored: tuple[int, ...] = (0, 6)
    frozen: tuple[str, ...] = ()
    options: dict[str, float] = field(default_factory=dict)
    wrong_start: int = 0  # added to the second shard's


CASES = {
    "even shards": Case(),
    "unequal shards": Case(split=9),
    "a shard of one token": Case(split=1),
    "first shard empty": Case(split=0),
    "second shard empty": Case(split=VOCAB),
    "no bias": Case(bias=False, ignored=()),
    "temperature": Case(options=dict(temperature=0.7)),
    "soft cap": Case(options=dict(softcap=2.0)),
    "both": Case(split=3, options=dict(temperature=1.7, softcap=3.0)),
    "float32": Case(dtype=torch.float32, options=dict(temperature=1.7, softcap=3.0)),
    "bfloat16": Case(dtype=torch.bfloat16, options=dict(temperature=1.7, softcap=3.0)),
    "bfloat16, many rows": Case(dtype=torch.bfloat16, lengths=(2048,), vocab=512, split=256),
    "reference": Case(dtype=torch.float32, impl="reference"),
    "reference, a shard empty": Case(dtype=torch.float32, impl="reference", split=0),
    "chunked": Case(impl="chunked"),
    "everything ignored": Case(ignored=tuple(range(11))),
    "no tokens": Case(lengths=(0,), ignored=()),
    "frozen head": Case(frozen=("weight", "bias")),
    "frozen body": Case(frozen=("hidden",)),
    "frozen body, a shard empty": Case(frozen=("hidden",), split=0),
}
if importlib.util.find_spec("triton"):
    CASES |= {
        "triton": Case(dtype=torch.float32, impl="triton", options=dict(temperature=1.7, softcap=3.0)),
        "triton, bfloat16": Case(dtype=torch.bfloat16, impl="triton", split=9),
    }
REFUSED = {
    "gap": (Case(wrong_start=2), "target 5 lies in no shards"),
    "overlap": (Case(split=6, wrong_start=-1, ignored=(5,)), "target 5 lies in 2 shards"),
}


def whole_head(case: Case) -> dict[str, Any]:
    """Arguments of fdpg_loss; the same in every process."""
    arguments = head_batch(list(case.lengths), vocab=case.vocab)
    for name in INPUTS:
        leaf = arguments[name].detach().to(case.dtype)
        arguments[name] = leaf.requires_grad_(name not in case.frozen)
    if not case.bias:
        arguments["bias"] = None
    arguments["target_ids"][list(case.ignored)] = -100
    return arguments


def upstream(num_tokens: int) -> torch.Tensor:
    return torch.linspace(-1, 2, num_tokens, dtype=torch.float64)


class Collectives(TorchDispatchMode):
    """Names of the collectives called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def shard(case: Case, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole head's arguments and, of them, those of sharded_linear_logprob on this rank."""
    whole = whole_head(case)
    mine = slice(0, case.split) if rank == 0 else slice(case.split, case.vocab)
    arguments = {name: whole[name] for name in ("hidden", "target_ids")}
    for name, of_shard in (("weight", "weight_shard"), ("bias", "bias")):
        x = whole[name]
        arguments[of_shard] = None if x is None else x.detach()[mine].clone().requires_grad_(x.requires_grad)
    arguments["vocab_start"] = mine.start + rank * case.wrong_start
    return whole, arguments | dict(impl=case.impl, **case.options)


def gradients(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    leaves = {name: arguments[name] for name in ("hidden", "weight_shard", "bias")}
    return {name: x.grad for name, x in leaves.items() if x is not None and x.grad is not None}


def run_case(case: Case, rank: int) -> dict[str, Any]:
    _, arguments = shard(case, rank)
    with Collectives() as forward:
        logprob = sharded_linear_logprob(**arguments)
    with Collectives() as backward:
        logprob.backward(upstream(len(logprob)).to(logprob.dtype))
    with torch.no_grad():
        quiet = sharded_linear_logprob(**arguments)
    assert torch.equal(quiet, logprob) and not quiet.requires_grad
    return dict(
        logprob=logprob.detach(),
        gradients=gradients(arguments),
        collectives=(forward.names, backward.names),
    )


def run_refused(case: Case, rank: int) -> str:
    with pytest.raises(ValueError) as caught:
        sharded_linear_logprob(**shard(case, rank)[1])
    return str(caught.value)


def run_loss(rank: int) -> dict[str, Any]:
    """The f-DPG loss of a sharded head, written out."""
    whole, arguments = shard(Case(), rank)
    cu_seqlens = whole["cu_seqlens"]
    behavior = whole["behavior_logprob"].masked_fill(whole["target_ids"] == -100, 0.0)
    logprob = sharded_linear_logprob(**arguments)  # [N]
    weights = sequence_weights(logprob, behavior, cu_seqlens, whole["target_log_score"], whole["log_z"])
    token_weight = weights.weight.repeat_interleave(cu_seqlens.diff())  # [N]
    loss = -(token_weight * logprob).sum() / len(weights.weight)
    loss.backward()
    return dict(loss=loss.detach(), weights=weights, gradients=gradients(arguments))


def run_second_backward(rank: int) -> bool:
    _, arguments = shard(Case(), rank)
    logprob = sharded_linear_logprob(**arguments)
    logprob.sum().backward(retain_graph=True)
    once = {name: x.clone() for name, x in gradients(arguments).items()}
    logprob.sum().backward()
    return all(torch.equal(x, 2 * once[name]) for name, x in gradients(arguments).items())


def run_poisoned(rank: int) -> dict[str, Any]:
    _, arguments = shard(Case(), rank)
    ignored = arguments["target_ids"] == -100
    hidden = arguments["hidden"].detach().masked_fill(ignored[:, None], torch.nan)
    arguments["hidden"] = hidden.requires_grad_()
    logprob = sharded_linear_logprob(**arguments)
    logprob.backward(upstream(len(logprob)))
    return dict(logprob=logprob.detach(), gradients=gradients(arguments))


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[str, Any] = {name: run_case(case, rank) for name, case in CASES.items()}
    results |= {name: run_refused(case, rank) for name, (case, _) in REFUSED.items()}
    results |= dict(loss=run_loss(rank), twice=run_second_backward(rank), poisoned=run_poisoned(rank))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, __file__]
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


def definition(case: Case) -> tuple[torch.Tensor, dict[str, Any]]:
    """Log-probs of the whole head in float64 from the inputs as they are rounded, and the leaves with gradients."""
    whole = whole_head(case)
    for key in INPUTS:
        if whole[key] is not None:
            whole[key] = whole[key].detach().double().requires_grad_(key not in case.frozen)
    inputs = whole["hidden"], whole["weight"], whole["target_ids"]
    logprob = linear_logprob(*inputs, bias=whole["bias"], impl="reference", **case.options)
    logprob.backward(upstream(len(logprob)))
    return logprob.detach(), whole


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
    for results in found:
        assert results["logprob"].dtype == (torch.float64 if exact else torch.float32)
        torch.testing.assert_close(results["logprob"].double(), expected, rtol=0, atol=TOLERANCE[case.dtype][0])
    assert torch.equal(found[0]["logprob"], found[1]["logprob"])
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


def test_backward_may_run_twice(ranks):
    assert all(results["twice"] for results in ranks)


def test_what_lies_under_ignored_tokens_is_not_read(ranks):
    for results in ranks:
        clean, poisoned = results["even shards"], results["poisoned"]
        assert torch.equal(clean["logprob"], poisoned["logprob"])
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


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
