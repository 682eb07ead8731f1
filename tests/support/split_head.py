"""linear_logprob of a head that is split over two processes: what they run, and what they leave for the tests.

python -m support.split_head RANK FOLDER     one of the two; leaves its results in FOLDER
"""

from __future__ import annotations

import datetime
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fdpg_kernels import fdpg_loss, linear_logprob, sequence_weights, sharded_linear_logprob

from .kernel_cases import head_batch

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
    ids: int = 1  # of each row
    wrong_start: int = 0  # added to the second shard's


EVERYTHING = dict(return_entropy=True, return_lse=True)
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
    "everything": Case(split=3, ids=3, options=EVERYTHING | dict(temperature=1.7, softcap=3.0)),
    "everything, a shard empty": Case(split=0, ids=3, options=EVERYTHING),
    "everything, reference": Case(dtype=torch.float32, impl="reference", ids=3, options=EVERYTHING),
    "everything ignored and asked for": Case(ignored=tuple(range(11)), ids=2, options=EVERYTHING),
}
if importlib.util.find_spec("triton"):
    CASES |= {
        "triton": Case(dtype=torch.float32, impl="triton", options=dict(temperature=1.7, softcap=3.0)),
        "triton, bfloat16": Case(dtype=torch.bfloat16, impl="triton", split=9),
        "triton, everything": Case(dtype=torch.float32, impl="triton", ids=3, options=EVERYTHING | dict(softcap=3.0)),
    }
DTENSORS = {VOCAB: EVERYTHING, 2: {}, 8: dict(return_lse=True)}  # sizes that divide evenly and one that does not
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
    if case.ids > 1:
        ids = arguments["target_ids"]
        arguments["target_ids"] = torch.stack([ids.roll(k) for k in range(case.ids)], 1)
    arguments["target_ids"][list(case.ignored)] = -100
    return arguments


def upstream(num_tokens: int) -> torch.Tensor:
    return torch.linspace(-1, 2, num_tokens, dtype=torch.float64)


def as_list(results) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else [x for x in results if x is not None]


def backward(results: list[torch.Tensor]) -> None:
    sum((x.flatten() * upstream(x.numel()).to(x)).sum() for x in results).backward()


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
    with Collectives() as of_forward:
        results = as_list(sharded_linear_logprob(**arguments))
    with Collectives() as of_backward:
        backward(results)
    with torch.no_grad():
        quiet = as_list(sharded_linear_logprob(**arguments))
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(quiet, results, strict=True))
    return dict(
        results=[x.detach() for x in results],
        gradients=gradients(arguments),
        collectives=(of_forward.names, of_backward.names),
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
    return dict(results=[logprob.detach()], gradients=gradients(arguments))


def run_dtensors(vocab: int, rank: int, **options: Any) -> dict[str, Any]:
    """linear_logprob and fdpg_loss of a split head that is a DTensor; what a plain hidden is told."""
    case = Case(vocab=vocab, options=options)
    whole, mesh = whole_head(case), init_device_mesh("cpu", (RANKS,))
    leaves = {
        name: torch.nn.Parameter(distribute_tensor(whole[name].detach(), mesh, [how]))
        for name, how in (("hidden", Replicate()), ("weight", Shard(0)), ("bias", Shard(0)))
    }
    inputs = leaves["hidden"], leaves["weight"], whole["target_ids"]
    with Collectives() as of_forward:
        results = as_list(linear_logprob(*inputs, bias=leaves["bias"], **options))
    backward(results)
    of_logprob = {name: x.grad.full_tensor() for name, x in leaves.items()}
    for x in leaves.values():
        x.grad = None
    made = fdpg_loss(**whole | leaves)
    made.loss.backward()
    refusals = []
    for change in (
        dict(hidden=whole["hidden"]),
        dict(bias=whole["bias"]),
        dict(weight_grad_out=torch.zeros(vocab, 5, dtype=torch.float64)),
    ):
        with pytest.raises(ValueError) as caught:
            fdpg_loss(**whole | leaves | change)
        refusals.append(str(caught.value))
    return dict(
        results=[x.detach() for x in results],
        gradients=of_logprob,
        collectives=of_forward.names,
        loss=made.loss.detach(),
        weights=made.weights,
        gradients_of_loss={name: x.grad.full_tensor() for name, x in leaves.items()},
        refusals=refusals,
    )


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
    results |= {("DTensors", vocab): run_dtensors(vocab, rank, **options) for vocab, options in DTENSORS.items()}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
