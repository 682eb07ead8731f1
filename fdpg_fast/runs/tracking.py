"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases and trackio, where asked for."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.load import dump_config
from ..config.schema import TrainConfig
from ..errors import UserError, one_line
from .folder import TRACKING, Json, write_whole

log = logging.getLogger(__name__)

IDENTITY = {"wandb": ("entity", "project", "name", "id"), "trackio": ("project", "name")}  # what a run is found by


class Tracker:
    """One tracker of a run, at best: once it has failed it is left out, for metrics.jsonl has everything.

    A resumed run is the same one to it, and has no step twice: TensorBoard hides what rounds from `first` on have sent
    before, the others get no step up to the one in `sent`, the last of each kind that they had.
    """

    def __init__(self, name: str, config: TrainConfig, first: int, sent: Mapping[str, int]):
        self._name, self._sent = name, sent
        self._send: Callable[..., Any] | None = None
        self._close: Callable[[], Any] = lambda: None
        with self._at_best():
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self._sent = {}
                writer = SummaryWriter(f"{config.run_dir}/tensorboard", purge_step=first)
                writer.add_text("config", f"```yaml\n{dump_config(config)}\n```")

                def send(metrics: Json, step: int) -> None:
                    for key, value in metrics.items():
                        writer.add_scalar(key, value, step)

                self._send, self._close = send, writer.close
            else:
                if not _begin(name, config):
                    self._sent = {}  # it joins a run that others have seen from the start
                tracker = importlib.import_module(name)
                self._send, self._close = tracker.log, tracker.finish

    def send(self, kind: str, metrics: Mapping[str, float], step: int) -> None:
        """The numbers of a round or an evaluation, if they exist."""
        if self._send is not None and step > self._sent.get(kind, -1):
            with self._at_best():
                self._send({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """Send what is left."""
        with self._at_best():
            self._close()

    @contextlib.contextmanager
    def _at_best(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a network, a server, a login
            self._send, self._close = None, lambda: None
            log.warning(
                "tracking: %s failed and is left out: %s: %s", self._name, type(error).__name__, one_line(error)
            )


def _begin(name: str, config: TrainConfig) -> bool:
    """Start wandb or trackio, with what the environment says, else what the run folder remembers; whether it did."""
    path = Path(config.run_dir) / TRACKING
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    settings = {"project": "fdpg-fast", "name": config.run_dir.strip("/").replace("/", "-")}
    if name == "wandb":
        settings |= {"id": uuid.uuid4().hex[:8], "resume": "allow", "dir": config.run_dir}
    elif name in known:
        settings["resume"] = "allow"
    settings |= known.get(name, {})
    for key in settings:
        settings[key] = os.environ.get(f"{name.upper()}_{'RUN_ID' if key == 'id' else key.upper()}") or settings[key]
    run = importlib.import_module(name).init(config=config.model_dump(mode="json"), **settings)
    identity = {key: getattr(run, key, None) or settings.get(key) for key in IDENTITY[name]}
    write_whole(path, json.dumps(known | {name: {key: text for key, text in identity.items() if text}}))
    return name in known


def check_installed(names: Sequence[str]) -> None:
    """Refuse a tracker that is not there before anything is done; raises UserError with the extra to install."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f'tracking: {name} is not installed; pip install "fdpg-fast[tracking]"')
