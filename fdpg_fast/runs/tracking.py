"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases and trackio, where asked for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from ..config.load import dump_config
from ..config.schema import TrainConfig
from ..errors import UserError


def start_tracker(name: str, config: TrainConfig) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """What logs the metrics of a step, and what is called at the end."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(f"{config.run_dir}/tensorboard")
        writer.add_text("config", f"```yaml\n{dump_config(config)}\n```")

        def log(metrics: dict[str, float], step: int) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)

        return log, writer.close
    tracker = importlib.import_module(name)
    place = {"dir": config.run_dir} if name == "wandb" else {}  # trackio has no such option
    run = config.run_dir.strip("/").replace("/", "-")
    tracker.init(project="fdpg-fast", name=run, config=config.model_dump(mode="json"), **place)
    return tracker.log, tracker.finish


def check_installed(names: Sequence[str]) -> None:
    """Refuse a tracker that is not there before anything is done; raises UserError with the extra to install."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f'tracking: {name} is not installed; pip install "fdpg-fast[tracking]"')
