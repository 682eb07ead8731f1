"""A model of which every process holds a part of each parameter, from the moment that its weights are read.

transformers reads no more of a tensor than its own part where the parameter that waits for it is a DTensor: weights
under other names and fused experts too. It makes its parameters DTensors itself, by a plan of its own, which few of its
models have; `_divided_before_reading` puts ours in its place. What is read so is bit for bit what one process reads.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import ranks
from ..errors import UserError, is_out_of_memory, one_line
from . import pages

Loaded = tuple[Any, dict[str, Any]]  # a model, and what was found of its weights
# of experts one after another, of which a process reads its own; others mix the rows of a tensor
KEEPING_ROWS = {("MergeModulelist", 0), ("Concatenate", 1)}


def read_parts(load: Callable[..., Loaded], device: torch.device) -> Loaded:
    """What `load` loads from files, of which this process has its part; arguments are those of `from_pretrained`.

    Where transformers cannot read a part, or reads it in another order than FSDP2 divides, the processes of a machine
    load the whole model in turn and keep their parts: so it is whole once on a machine. What is wrong with the files
    shows there too, and is said as one process says it.
    """
    if device.type == "cpu":
        pages.give_back_from(2**20)  # between gathered weights, which come and go, the heap would be full of holes
    found = None
    try:
        with _divided_before_reading(device) as options:
            found = load(**options)
        found[0].config.__dict__.pop("distributed_config")
        if not _keeps_rows(found[0]):
            found = None
    except Exception as error:
        if is_out_of_memory(error):
            raise
    if all(ranks.gathered(found is not None)):
        assert found is not None
        return found
    del found
    return _in_turn(load, device)


def _in_turn(load: Callable[..., Loaded], device: torch.device) -> Loaded:
    found, failure = None, None
    for turn in range(int(os.environ["LOCAL_WORLD_SIZE"])):
        if turn == int(os.environ["LOCAL_RANK"]):
            try:
                found = load()
                keep_part(found[0], device)
            except Exception as error:
                failure = error
        failures = ranks.gathered(failure and one_line(failure))
        if failure is not None:
            raise failure
        for number, said in enumerate(failures):
            if said is not None:
                raise UserError(f"model: process {number} could not load it: {said}")
    assert found is not None
    return found


def keep_part(model: PreTrainedModel, device: torch.device) -> None:
    """Let go of all but this process's part of each parameter: the rows that FSDP2 gives it."""
    from torch.distributed.tensor import DTensor, Shard

    def part(whole: nn.Parameter) -> nn.Parameter:
        rows = whole.chunk(ranks.count())[ranks.rank() :][:1]  # of few rows the last processes have none
        own = rows[0].detach().clone() if rows else whole.detach()[:0].clone()
        shape, stride = whole.shape, whole.stride()
        options: dict[str, Any] = {"run_check": False, "shape": shape, "stride": stride}
        return nn.Parameter(DTensor.from_local(own, mesh(device.type), [Shard(0)], **options), whole.requires_grad)

    replace(model, part)


def set_aside(model: nn.Module) -> Callable[[], None]:
    """Leave nothing but shapes of a model's parts, for FSDP2 takes whole parameters only; puts them back when called.

    Where FSDP2 has a parameter of several modules, so was the part.
    """
    held: list[tuple[nn.Module, str, Any]] = []

    def shape_of(part: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.empty(part.shape, dtype=part.dtype, device="meta"), part.requires_grad)

    for module in model.modules():
        held += [(module, name, x) for name, x in module._parameters.items() if hasattr(x, "to_local")]
    replace(model, lambda x: shape_of(x) if hasattr(x, "to_local") else x)

    def put_back() -> None:
        for module, name, part in held:
            module._parameters[name] = part

    return put_back


def replace(model: nn.Module, new: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Put other parameters in the place of a module's; tied ones stay tied."""
    known: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in known:
                    known[parameter] = new(parameter)
                module._parameters[name] = known[parameter]


@functools.cache
def mesh(device: str) -> Any:
    """All processes in a row; parts that are to fit together need the same one."""
    return torch.distributed.init_device_mesh(device, (ranks.count(),))


def are_parts(model: nn.Module) -> bool:
    """Whether this process has its part of each weight only."""
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def broken(model: nn.Module) -> list[str]:
    """Names of the parameters with NaN or infinity, on whichever process they are."""
    held = {name: x.to_local() if hasattr(x, "to_local") else x for name, x in model.named_parameters()}
    found = [name for name, x in held.items() if not x.sum().isfinite() and not x.isfinite().all()]
    return sorted({name for names in ranks.gathered(found) for name in names}) if are_parts(model) else found


@contextlib.contextmanager
def _divided_before_reading(device: torch.device) -> Iterator[dict[str, Any]]:
    """Options of a `from_pretrained` whose model is divided when it is made and not yet read (transformers 5.19).

    Weights that are not in the files, or of another shape, end it: transformers would draw them, by collectives that
    only some processes may come to. An older release lacks what is patched here, or leaves parameters undivided, and
    does without. To go when `DistributedConfig` takes a function.
    """
    from transformers.distributed import DistributedConfig

    def divide(kind: type, model: PreTrainedModel, *_: Any) -> PreTrainedModel:
        keep_part(model, device)
        return model

    def refuse(model: PreTrainedModel, missing: Any, *rest: Any) -> None:
        if left := missing - model.all_tied_weights_keys.keys():
            raise LookupError(f"no whole {min(left)} in the files")
        move(model, missing, *rest)

    move = PreTrainedModel._move_missing_keys_from_meta_to_device
    with (
        mock.patch.object(PreTrainedModel, "maybe_distribute_model", classmethod(divide)),
        mock.patch.object(PreTrainedModel, "_move_missing_keys_from_meta_to_device", refuse),
    ):
        yield {"distributed_config": DistributedConfig()}


def _keeps_rows(model: PreTrainedModel) -> bool:
    """Whether parts were read, and each is of the rows that it would be if the model had been whole first."""
    changes: Any = model._weight_conversions or ()
    steps = [step for change in changes for step in getattr(change, "operations", ())]
    kinds = {(type(step).__name__, getattr(step, "dim", None)) for step in steps}
    return kinds <= KEEPING_ROWS and are_parts(model)
