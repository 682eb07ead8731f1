"""What a run writes and says while it goes: metrics, samples, evaluations, progress, complaints, checkpoints."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any, Self

from ..config.load import dump_config
from ..config.schema import TrainConfig
from ..divergence import last_divergence
from ..errors import UserError
from ..measure.diagnostics import Watch
from ..measure.evaluate import Evaluation
from .checkpoint import TrainerState, save_checkpoint
from .folder import RunFolder, refuse_taken, write_whole
from .metrics import Round, progress_line, round_metrics
from .tracking import start_tracker

log = logging.getLogger(__name__)


class Recorder:
    """The run folder and the trackers of a run that goes on; raises UserError where the folder cannot be had."""

    def __init__(self, config: TrainConfig, feature_names: list[str], tokenizer: Any, *, resume: bool):
        self._config, self._names, self._tokenizer, self._resume = config, feature_names, tokenizer, resume
        if not resume:
            refuse_taken(config.run_dir)
        self.folder = RunFolder(config.run_dir)
        write_whole(self.folder.path / "config.yaml", dump_config(config))  # a resumed run may have more rounds now
        self._trackers = [start_tracker(name, config) for name in config.tracking]
        self._watch, self._first, self._started = Watch(), 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        for _, finish in self._trackers:
            finish()
        if isinstance(error, UserError) and not self._resume:
            self.folder.discard()  # the config asks for what cannot be had: leave no half-made run in its way
        self.folder.close()

    def resume(self, round_index: int, checkpoint: Path | None) -> None:
        """Go on after so many rounds, from a checkpoint if there is one."""
        self.folder.forget_from(round_index)
        if checkpoint is None:
            log.info("%s has no checkpoint yet: starting from round 0", self.folder.path)
        else:
            log.info("resuming %s after round %d (%s)", self.folder.path, round_index, checkpoint.name)

    def start(self, round_index: int) -> None:
        """The first round that is run now: what is left is reckoned from here."""
        self._first, self._started = round_index, time.perf_counter()

    def evaluation(self, round_index: int, evaluation: Evaluation, samples: list[dict[str, Any]]) -> None:
        """Add a line to evaluation.jsonl, and its samples to samples.jsonl."""
        trained = last_divergence(self._config.divergence).name
        self.folder.append("evaluation.jsonl", {"round": round_index, "divergence": trained, **evaluation.as_dict()})
        self._samples(round_index, "evaluation", samples)

    def record(self, this: Round, state: TrainerState) -> None:
        """Write and say what happened in a round, and a checkpoint where one is due."""
        settings, done = self._config.trainer, this.index + 1
        self._samples(this.index, "train", this.samples)
        metrics = round_metrics(this, self._names)
        self.folder.append("metrics.jsonl", {"round": this.index, **metrics})
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for track, _ in self._trackers:
            track(finite, step=this.index)
        left = (time.perf_counter() - self._started) / (done - self._first) * (settings.rounds - done)
        log.info("%s", progress_line(done, settings.rounds, metrics, self._names, left))
        for complaint in self._watch(metrics):
            log.warning("%s", complaint)
        if done % settings.checkpoint_every == 0 or done == settings.rounds:
            save_checkpoint(self.folder.path, state, self._tokenizer)

    def _samples(self, round_index: int, split: str, samples: list[dict[str, Any]]) -> None:
        for row in samples:
            self.folder.append("samples.jsonl", {"round": round_index, "split": split, **row})
