"""A model over many processes: FSDP2 as functions over a transformers module.

Each process holds a part of every parameter. Inside a forward pass of a module that FSDP has divided its parameters are
whole, and nowhere else: what reads them runs as `inside(module, function)`. Divided parameters that are trained are
float32, the masters that AdamW moves; passes compute in the dtype of the run, and gradients are summed in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ranks
from . import parts

Result = TypeVar("Result")
INSIDE = "_fdpg_inside"  # the method of a divided module in which its parameters are whole


def blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers that a model is a stack of, by its own word."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def divide(model: PreTrainedModel, dtype: torch.dtype | None, reshard_after_forward: bool = True) -> None:
    """Divide a model's parameters among all processes, block by block; a head of its own and its embedding apart.

    The parts that this process holds already, see `parts`, are those that it holds afterwards.
    dtype: that passes compute in; None: each parameter's own.
    reshard_after_forward: False: what a forward pass has gathered stays until its backward pass, or `release`.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
    from torch.distributed.fsdp import fully_shard as shard

    policy = MixedPrecisionPolicy(dtype, torch.float32)
    # log-probs, log P and log Z are among what model and head are called with: they stay what they are
    uncast = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    mesh, put_back = parts.mesh(model.device.type), parts.set_aside(model)
    fully_shard = functools.partial(shard, mesh=mesh)
    for block in blocks(model):
        fully_shard(block, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        fully_shard(embedding, mp_policy=policy)
        fully_shard(head, mp_policy=uncast, reshard_after_forward=False)
    fully_shard(model, mp_policy=uncast)
    put_back()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums, not means: losses of processes add up to the loss
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    readers: list[Any] = [model, head] if isinstance(head, FSDPModule) else [model]
    for module in readers:
        setattr(module, INSIDE, _call)
        register_fsdp_forward_method(module, INSIDE)


def is_divided(model: PreTrainedModel) -> bool:
    return hasattr(model, INSIDE)


def inside(module: torch.nn.Module, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """A call of a function that reads a module's parameters, as a forward pass of the module."""
    return getattr(module, INSIDE, _call)(function, *arguments, **options)


def release(model: Any) -> None:
    """Let go of what a forward pass has gathered that no backward pass follows."""
    for module in model.modules() if is_divided(model) else ():
        if hasattr(module, "reshard"):
            module.reshard()


def full(tensor: Tensor) -> Tensor:
    """A parameter as a whole; all processes ask for it at once."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    if tensor.device.type != "cpu" or ranks.count() == 1:
        return tensor.full_tensor()
    own: Any = tensor
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for rank, rows in enumerate(whole.chunk(ranks.count())):  # one by one: gloo gathers into memory of its own first
        if rank == ranks.rank():
            rows.copy_(own.to_local())
        torch.distributed.broadcast(rows, rank)
    return whole


def gathered(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors as a whole, by name, on the first process's host, one at a time; the others keep nothing."""
    kept = {}
    for name, tensor in tensors:
        whole = full(tensor)
        if ranks.is_first():
            kept[name] = whole.cpu()
    return kept


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor that all have, divided as another one is; else the tensor itself."""
    if not hasattr(like, "full_tensor") or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    like_it: Any = like
    return distribute_tensor(whole.to(like.device), like_it.device_mesh, like_it.placements, src_data_rank=None)


def _call(function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    return function(*arguments, **options)
