"""The round, as data flows: sync → sample → score → log Z and baseline → gradient → steps."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

import transformers

from . import stopping
from .clock import Clock
from .config.schema import TrainConfig
from .divergence import divergence_at
from .engines.build import describe_engine
from .measure.evaluate import Evaluation
from .preparation import find_target_samples, prepare
from .runs.metrics import Round
from .runs.recorder import Recorder
from .seeds import own_generators
from .session import Session
from .updates import division, mini_batches, update

log = logging.getLogger(__name__)

SAMPLES_LOGGED = {"train": 8, "evaluation": 16}  # completions in samples.jsonl, of a round and of an evaluation


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves; without evaluations and report where none was asked for, or on resuming."""

    run_dir: Path
    before: Evaluation | None
    after: Evaluation | None
    report: Path | None


class Trainer:
    """A run of f-DPG, by this process or by all that torchrun has started.

    Args:
        config: of the run.
        resume: continue from the newest checkpoint in config.run_dir; without one, from the start.

    Raises:
        UserError: something in the config does not fit; nothing has been written yet.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False):
        self.session = Session(config, resume=resume)

    def train(self, evaluate: bool = True) -> RunResult:
        """Run all rounds that are left, evaluate before, after and where the config asks for it, and write the report.

        Args:
            evaluate: False: not before and after, and no report, for whoever measures many runs alike (see `compare`).

        Raises:
            RunError: something failed on the way; the checkpoints written so far are intact.
        """
        session, config = self.session, self.session.config
        rounds, every = config.trainer.rounds, config.evaluation.every
        before = after = None
        with contextlib.closing(session), session.recorder() as run:
            transformers.set_seed(config.trainer.seed)  # for features that draw from the global generators
            prepare(session) if session.checkpoint is None else session.restore()
            if evaluate or every:
                find_target_samples(session)
            run.start(session.state, session.checkpoint)
            if session.checkpoint is None and evaluate:
                before = self._evaluate(run)
            log.info("%s", describe_engine(config, session.state.learner.policy))
            for index in range(session.state.round, rounds):
                if index and every and index % every == 0:
                    after = self._evaluate(run)
                    if run.ends_early():
                        break
                run.record(self.round(index))
            else:
                after = self._evaluate(run) if evaluate else None
            return RunResult(run.folder.path, before, after, run.report() if evaluate else None)

    def round(self, index: int) -> Round:
        """Sync, sample, score, estimate and step, once. Until the step nothing has happened to what is trained."""
        session, clock = self.session, Clock()
        state, sampling, learner = session.state, session.sampling, session.state.learner
        divergence = divergence_at(session.config.divergence, index, session.config.trainer.rounds)
        with clock("sync"):
            sampling.sync(index)
        self._refresh_base(index)
        rollouts = sampling.take(index, session.round_contexts, clock)  # waits; starts what is ahead
        scores = session.scorer(rollouts, clock)  # φ beside log a
        count, seed = session.config.trainer.updates_per_round, session.seed("updates", index)
        part = division(rollouts, count, seed)  # [B]: the update that each sequence is for
        groups = rollouts.context_index * count + part
        log_z, baseline = state.estimates.update(rollouts, scores, divergence, groups)
        batches = mini_batches(rollouts, scores.log_score, log_z, baseline, part)
        with clock("update"):
            loss, weights = learner.backward(*batches[0][:4], divergence)
        sampling.meet(index, batches[0].rollouts, weights, clock)  # all samples must agree with weights that now move
        stopping.check()
        state.round = index + 1  # from here on this round is finished, or lost
        with clock("update"):
            updates = update(learner, batches, (loss, weights), divergence, index)
            sampling.observe(rollouts, scores, updates, index + 1)
        log_z_now, samples = state.estimates.partition.summary(), session.scorer.rows(scores, SAMPLES_LOGGED["train"])
        return Round(index, rollouts, scores, log_z_now, updates, samples, sampling.facts, clock)

    def _refresh_base(self, index: int) -> None:
        """Let a base that moves become the policy as it is before a round, if that is due."""
        state, every = self.session.state, self.session.config.base.refresh_every
        if state.base is not None and every and index and index % every == 0:
            state.base.take(state.learner.policy, index)
            state.estimates.partition.forget()

    def _evaluate(self, run: Recorder) -> Evaluation:
        """Measure the policy as it is now, on one fresh sample, and record that; unless a process before has.

        No round knows of it: generators stay as they are, and the engine gets back what rounds sample with.
        """
        session, done = self.session, self.session.state.round
        if done in run.evaluations:
            return run.evaluations[done]
        session.sampling.sync_policy(done)
        # one seed for every evaluation: before and after are compared on common random numbers
        each, seed = session.config.evaluation.samples_per_context, session.seed("evaluation", 0)
        with own_generators(session.base.device, seed):
            evaluation, samples = session.measure(each, seed, SAMPLES_LOGGED["evaluation"])
        run.evaluation(done, evaluation, samples)
        return evaluation
