"""Tensors of a trainer's state in a checkpoint: whole in one file of one process, or of many each one's parts.

    trainer/state.tensors   safetensors by another suffix, for loaders and uploads of models take every *.safetensors
    trainer/parts/          PyTorch's distributed checkpoint: what is divided, a file a process; any number reads it

Parts are written by threads, while the next rounds go on: what is written is a copy.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import ranks
from ..errors import disk_errors, one_line
from ..models import parallel
from ..models.parts import mesh

TENSORS, PARTS = "trainer/state.tensors", "trainer/parts"


def write_tensors(folder: Path, tensors: dict[str, Tensor], moving: dict[str, Tensor]) -> Callable[[], None]:
    """Write what all have, and what moves with the weights; what is divided by the function, in a thread."""
    if not ranks.joined():
        save_file(tensors | moving, folder / TENSORS)
        return lambda: None
    from torch.distributed import checkpoint

    if ranks.is_first():
        save_file(tensors, folder / TENSORS)
    copies = {name: _copy(tensor) for name, tensor in moving.items()}

    def write() -> None:
        try:
            checkpoint.save(copies, checkpoint_id=folder / PARTS, process_group=ranks.writers())
        except checkpoint.CheckpointException as error:  # of any process; not even an Exception
            raise OSError(one_line(next(iter(error.failures.values()))[0])) from error

    return write


def read_tensors(folder: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors by name; of those that belong to one of `like`, under its name, the part that this process has."""
    found = {}
    with safe_open(folder / TENSORS, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no dict
            whole = file.get_tensor(name)
            found[name] = parallel.part_of(whole, like[name]) if name in like else whole
    if not (folder / PARTS).is_dir():
        return found
    from torch.distributed import checkpoint

    reader = checkpoint.FileSystemReader(folder / PARTS)
    parts, stored_tensors = {}, reader.read_metadata().state_dict_metadata
    stored: Any
    for name, stored in stored_tensors.items():
        size, dtype = stored.size, stored.properties.dtype
        is_known = name in like and like[name].shape == size
        parts[name] = torch.empty_like(like[name], dtype=dtype) if is_known else torch.empty(size, dtype=dtype)
    with warnings.catch_warnings(action="ignore"):  # that a single process is one
        checkpoint.load(parts, storage_reader=reader, no_dist=not ranks.joined())
    return found | parts


def keep(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of tensors whole or not at all; of two processes side by side the later one wins."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(f"writing {path}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)


def _copy(tensor: Tensor) -> Tensor:
    """On the host, the part of the same whole."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    options: dict[str, Any] = {"run_check": False, "shape": tensor.shape, "stride": tensor.stride()}
    own = tensor.to_local().detach().to("cpu", copy=True)
    return DTensor.from_local(own, mesh("cpu"), tensor.placements, **options)
