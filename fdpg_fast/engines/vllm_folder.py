"""Weights that servers read from a folder: all of them, or a LoRA adapter beside those of its base, which they have."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .. import ranks
from ..errors import disk_errors
from ..models.language_model import LanguageModel
from ..models.lora import LoRAPolicy
from .vllm_replica import Replica


def hand_over(
    policy: LanguageModel, replicas: Sequence[Replica], ask: Callable[..., Any], parent: Path, name: str
) -> None:
    """Have servers read the policy's weights; where they take it, an adapter alone.

    Those of the base go ahead to whoever may not have them. ask: calls a method of all these servers.
    """
    left = list(replicas)
    if isinstance(policy, LoRAPolicy) and policy.is_plain:
        ask(replicas, Replica.ask_for_adapters)
        states = ranks.by_first(lambda: [(replica.takes_adapters, replica.holds_base) for replica in replicas])
        alone = [replica for replica, (takes, _) in zip(replicas, states, strict=True) if takes]
        if new := [replica for replica, (takes, holds) in zip(replicas, states, strict=True) if takes and not holds]:
            with policy.as_base() as base, weights_folder(base, parent, f"{name}-base") as folder:
                ask(new, partial(Replica.read_weights, is_base=True), folder)
        if alone:
            with adapter_folder(policy, parent, f"{name}-adapter") as folder:
                ask(alone, Replica.read_adapter, folder)
        left = [replica for replica in replicas if replica not in alone]
    if left:
        with weights_folder(policy, parent, name) as folder:
            ask(left, Replica.read_weights, folder)


@contextlib.contextmanager
def weights_folder(policy: LanguageModel, parent: Path, name: str) -> Iterator[Path]:
    """A folder that holds the policy's weights while servers read them, a file a block; the first process writes."""

    def write(blocks: Iterator[dict[str, Tensor]]) -> None:
        with disk_errors(f"writing weights to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            for number, block in enumerate(blocks):
                path = folder / f"model-{number:05d}.safetensors"
                save_file({name: tensor.contiguous() for name, tensor in block.items()}, path)
                path.chmod(folder.stat().st_mode & 0o666)  # the servers' user may be another
                block.clear()  # before the next is made

    with _temporary(parent, name) as folder:
        ranks.for_first(policy.blocks(), write)
        yield folder


@contextlib.contextmanager
def adapter_folder(policy: LoRAPolicy, parent: Path, name: str) -> Iterator[Path]:
    """The same with an adapter alone, as peft writes it."""
    with _temporary(parent, name) as folder:
        with disk_errors(f"writing an adapter to {folder}"):
            if ranks.is_first():
                folder.mkdir(parents=True, exist_ok=True)
            policy.save(folder)
            for path in folder.glob("*") if ranks.is_first() else ():
                path.chmod(folder.stat().st_mode & 0o666)
        yield folder


@contextlib.contextmanager
def _temporary(parent: Path, name: str) -> Iterator[Path]:
    """A folder that the first process removes in the end; nobody has made it yet."""
    folder = parent.absolute() / name
    try:
        yield folder
    finally:
        if ranks.is_first():
            shutil.rmtree(folder, ignore_errors=True)
