"""Where metrics go: metrics.jsonl always, TensorBoard, Weights & Biases and trackio where asked for."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Protocol

from ..config.load import dump_config
from ..config.schema import TrainConfig
from ..errors import UserError
from .folder import RunFolder


class Tracker(Protocol):
    def log(self, metrics: dict[str, float], round_index: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, config: TrainConfig):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(f"{config.run_dir}/tensorboard")
        self._writer.add_text("config", f"```yaml\n{dump_config(config)}\n```")

    def log(self, metrics: dict[str, float], round_index: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, round_index)

    def close(self) -> None:
        self._writer.close()


class WandbLike:
    """wandb, or trackio, which has the same three calls."""

    def __init__(self, module: Any, config: TrainConfig, **options: Any):
        self._module = module
        name = config.run_dir.strip("/").replace("/", "-")
        module.init(project="fdpg-fast", name=name, config=config.model_dump(mode="json"), **options)

    def log(self, metrics: dict[str, float], round_index: int) -> None:
        self._module.log(metrics, step=round_index)

    def close(self) -> None:
        self._module.finish()


class Tracking:
    """The fan-out."""

    def __init__(self, config: TrainConfig, folder: RunFolder):
        self._folder = folder
        self._backends = [_open(name, config) for name in config.tracking]

    def log(self, round_index: int, metrics: dict[str, float]) -> None:
        self._folder.append("metrics.jsonl", {"round": round_index, **metrics})
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for backend in self._backends:
            backend.log(finite, round_index)

    def close(self) -> None:
        for backend in self._backends:
            backend.close()


def check_installed(names: Sequence[str]) -> None:
    """Refuse a backend that is not there before anything is done.

    Raises:
        UserError: naming the extra to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f'tracking: {name} is not installed; pip install "fdpg-fast[tracking]"')


def _open(name: str, config: TrainConfig) -> Tracker:
    if name == "tensorboard":
        return TensorBoard(config)
    if name == "wandb":
        return WandbLike(importlib.import_module(name), config, dir=config.run_dir)
    return WandbLike(importlib.import_module(name), config)
