"""What a run writes and says while it goes: metrics, samples, evaluations, progress, complaints, checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from pathlib import Path
from typing import Any, Self

from .. import ranks
from ..config.load import dump_config
from ..config.schema import TrainConfig
from ..divergence import last_divergence
from ..errors import Diverged, RunError, UserError, one_line
from ..measure.diagnostics import Watch
from ..measure.evaluate import Evaluation
from ..rollouts import Rollouts
from ..stopping import Stopped, check, signalled, stoppable
from .best import best_rounds, early_end, read_evaluations, refuse_unknown
from .checkpoint import Settled, TrainerState, checkpoints, finish_checkpoint, prune, round_of, save_checkpoint
from .folder import ORIGIN, TRACKING, Json, NoFolder, RunFolder, refuse_taken
from .metrics import Round, progress_line, round_metrics
from .report import write_report
from .tables import evaluation_line
from .tracking import Tracker

log = logging.getLogger(__name__)

EVALUATED = (("policy", "kl_to_base"), ("policy", "length"), ("z", "log_z"))  # metrics that an evaluation has too


class Recorder:
    """The run folder and the trackers of a run that goes on; raises UserError where the folder cannot be had.

    Whatever ends the run early, a signal too, leaves a checkpoint of the last finished round, and says where it is.
    """

    def __init__(self, config: TrainConfig, feature_names: list[str], tokenizer: Any, origin: Json, *, resume: bool):
        self._config, self._names, self._tokenizer, self._resume = config, feature_names, tokenizer, resume
        self.folder = RunFolder(config.run_dir) if ranks.is_first() else NoFolder(config.run_dir)
        with contextlib.ExitStack() as opened:
            opened.callback(self.folder.close)
            if not resume and ranks.is_first():
                refuse_taken(config.run_dir)  # again: another process may have begun one since
                (self.folder.path / TRACKING).unlink(missing_ok=True)  # hidden, and left when the rest was removed
            self.folder.rows()  # what is damaged is refused before anything is written
            self.folder.write("config.yaml", dump_config(config))  # a resumed run may have more rounds now
            self.folder.write(ORIGIN, json.dumps(origin))
            self._until_done = opened.pop_all()
        self._trackers: list[Tracker] = []
        self._watch, self._first, self._seconds = Watch(), 0, 0.0
        self._state: TrainerState | None = None
        self._latest: Rollouts | None = None  # of the last finished round
        self._due = self._ends = False  # a checkpoint, and the run
        self.evaluations: dict[int, Evaluation] = {}  # by the rounds that were done
        self._best: dict[int, Evaluation] = {}  # of them, those whose checkpoints stay
        self._saved = 0  # rounds of the newest checkpoint

    def __enter__(self) -> Self:
        def at_rest() -> bool:
            return not self._ends and (self._state is None or self._state.at_rest)

        self._until_done.enter_context(stoppable(at_rest))
        return self

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        with self._until_done:
            if error is None:
                return
            self._ends = True
            ended = signalled() or error  # what a function of the user made of a signal is not what ended the run
            finished = 0 if self._state is None or self._state.settled is None else self._state.settled.round
            if isinstance(ended, UserError):
                if finished == self._first:  # no round was done by this process
                    if not self._resume:
                        self.folder.discard()  # the config asks for what cannot be had: leave no half-made run
                    return
                ended = RunError(str(error))
            what = self._leave_checkpoint(finished, error)
            ended = signalled() or ended  # one that came meanwhile
            if isinstance(ended, Stopped):
                log.warning("stopped; %s", what)
            else:
                ended.add_note(what)
            if ended is not error:
                raise ended from error

    def start(self, state: TrainerState, checkpoint: Path | None) -> None:
        """The rounds begin from this state, which is of a checkpoint if there is one."""
        self._state, self._first, state.settled = state, state.round, state.settle()
        sent: dict[str, int] = {}
        if self._resume:
            sent = self.folder.forget_from(state.round, self._is_evaluated(state.round))
            self.evaluations, there = ranks.by_first(self._found)
            self._saved = state.round if checkpoint else 0
            self._best = {done: evaluation for done, evaluation in self.evaluations.items() if done in there}
            self._best = dict(self._ranked(self._best))
            origin = f"after {checkpoint.name}" if checkpoint else "from round 0: it has no checkpoint yet"
            log.info("resuming %s %s", self.folder.path, origin)
        for name in self._config.tracking if ranks.is_first() else ():
            self._trackers.append(Tracker(name, self._config, state.round, sent))
            self._until_done.callback(self._trackers[-1].close)
        if state.round in self.evaluations:
            self._track(state.round)  # again to whom has dropped what this round began with

    def evaluation(self, round_index: int, evaluation: Evaluation, samples: list[dict[str, Any]]) -> None:
        """Add a line to evaluation.jsonl, and its samples to samples.jsonl; keep the checkpoint if it is a best one."""
        if not self.evaluations:  # some metrics depend on the values that features have
            refuse_unknown(self._config, evaluation.metrics.keys)
        trained, rounds = last_divergence(self._config.divergence).name, self._config.trainer.rounds
        self._samples(round_index, "evaluation", samples)  # first: the line says that all is there
        self.folder.append("evaluation.jsonl", {"round": round_index, "divergence": trained, **evaluation.as_dict()})
        self.evaluations[round_index] = evaluation
        self._track(round_index)
        self._complain({f"{room}/{name}": evaluation.metrics[name].value for room, name in EVALUATED})
        self._keep_if_best(round_index)
        if 0 < round_index < rounds:
            shown = ["kl_to_base", f"divergence/{trained}"]
            log.info("%s", evaluation_line(round_index, rounds, evaluation.metrics, shown))

    def ends_early(self) -> bool:
        """Whether the run ends with its last evaluation, for it gets no better; then says so, and has a checkpoint."""
        assert self._state is not None and self._state.settled is not None
        section, rounds = self._config.early_stop, self._config.trainer.rounds
        found = {done: evaluation.metrics for done, evaluation in self.evaluations.items()}
        why = early_end(None if section is None else section.model_dump(), found, rounds)
        if why is None:
            return False
        if self._saved != self._state.round:
            self._save(self._state.settled)
        finish_checkpoint(self._state)
        log.info("%s; to go on, resume it with a larger --early_stop.patience, or with --early_stop=null", why)
        return True

    def record(self, this: Round) -> None:
        """Write and say what happened in a round, and a checkpoint where one is due. Then the round is finished."""
        assert self._state is not None
        settings, done, settled = self._config.trainer, this.index + 1, self._state.settle()
        self._latest = this.rollouts.part(slice(0, 1))
        self._samples(this.index, "train", this.samples)
        metrics = round_metrics(this, self._names)
        self.folder.append("metrics.jsonl", {"round": this.index, **metrics})
        self._due = self._due or done % settings.checkpoint_every == 0
        # after an overflow the weights may be past saving: those of before it stay, until there is a gradient again
        if done == settings.rounds or (self._due and math.isfinite(this.updates.grad_norm)):
            self._save(settled)
            self._due = False
        if done == settings.rounds:
            finish_checkpoint(self._state)
        self._state.settled = settled
        for tracker in self._trackers:
            tracker.send("metrics", metrics, this.index)
        self._seconds += this.clock.total
        left = self._seconds / (done - self._first) * (settings.rounds - done)
        log.info("%s", progress_line(done, settings.rounds, metrics, self._names, left))
        self._complain(metrics)
        check()

    def report(self) -> Path:
        """Write report.html; its path."""
        return write_report(self.folder.path) if ranks.is_first() else self.folder.path / "report.html"

    def _leave_checkpoint(self, finished: int, error: BaseException) -> str:
        """Write what a run that ends early has done since its last checkpoint, and say in words what there is."""
        path, state, failure = self.folder.path, self._state, ""

        def written() -> int:
            return max(map(round_of, checkpoints(path)), default=0)

        # writing takes all processes: they are together only where they have agreed to stop
        if state is not None and (ranks.count() == 1 or isinstance(error, (Stopped, KeyboardInterrupt))):
            try:
                finish_checkpoint(state)
                is_worth_it = state.settled is not None and state.at_rest and not isinstance(error, Diverged)
                if state.settled is not None and is_worth_it and written() < finished:
                    self._save(state.settled)
                    finish_checkpoint(state)
            except RunError as full:
                failure = f"{full}; "
            except Exception as failed:  # as where memory has run out: it must not hide what ended the run
                failure = f"no checkpoint could be written: {type(failed).__name__}: {one_line(failed)}; "
        done = written()
        if not done:
            return f"{failure}no checkpoint yet; start again with --resume {path}"
        of = f"all {done}" if done >= finished else f"{done} of {finished}"
        return f"{failure}{of} finished rounds are in {checkpoints(path)[-1]}; continue with --resume {path}"

    def _save(self, settled: Settled) -> Path:
        assert self._state is not None and self._latest is not None
        if not bool(self._state.learner.policy.token_logprobs(self._latest, 1).isfinite().all()):
            raise Diverged("its log-probs are not finite")
        self._saved = settled.round
        return save_checkpoint(self.folder.path, self._state, settled, self._tokenizer, self._best)

    def _keep_if_best(self, done: int) -> None:
        """Of the evaluation after so many rounds: make a best checkpoint, and delete the one that it drives out."""
        if self._config.checkpoint.best is None or done == 0:
            return
        assert self._state is not None and self._state.settled is not None
        self._best = dict(self._ranked(self._best | {done: self.evaluations[done]}))
        if done in self._best:
            if self._saved != done:
                self._save(self._state.settled)
            finish_checkpoint(self._state)  # before what it drives out goes
            if ranks.is_first():
                prune(self.folder.path, done, self._best)

    def _ranked(self, evaluations: dict[int, Evaluation]) -> list[tuple[int, Evaluation]]:
        """The best evaluations, as many as keep their checkpoints."""
        settings = self._config.checkpoint
        if settings.best is None:
            return []
        order = best_rounds(settings.best, {done: evaluation.metrics for done, evaluation in evaluations.items()})
        return [(done, evaluations[done]) for done in order[: settings.keep_best]]

    def _found(self) -> tuple[dict[int, Evaluation], set[int]]:
        """The evaluations in the folder, and the rounds that have checkpoints there."""
        return read_evaluations(self.folder.path), set(map(round_of, checkpoints(self.folder.path)))

    def _is_evaluated(self, done: int) -> bool:
        """Whether the config asks for an evaluation after so many rounds."""
        every, rounds = self._config.evaluation.every, self._config.trainer.rounds
        return done in (0, rounds) or (every is not None and done % every == 0)

    def _track(self, done: int) -> None:
        metrics = self.evaluations[done].metrics
        found = {f"evaluation/{name}": estimate.value for name, estimate in metrics.items()}
        errors = {f"evaluation/{name}_se": estimate.standard_error for name, estimate in metrics.items()}
        for tracker in self._trackers:
            tracker.send("evaluation", found | errors, done)

    def _complain(self, metrics: dict[str, float]) -> None:
        for complaint in self._watch(metrics):
            log.warning("%s", complaint)

    def _samples(self, round_index: int, split: str, samples: list[dict[str, Any]]) -> None:
        for row in samples:
            self.folder.append("samples.jsonl", {"round": round_index, "split": split, **row})
