"""The round, as data flows: sample → score → Z and baseline → update → sync; the one module that knows them all."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from .clock import Clock
from .config.schema import TrainConfig
from .contexts import Context, derived_seed, load_contexts, schedule
from .divergence import divergence_at, last_divergence
from .engines import Engine
from .engines.memory import FrozenPages, plan_micro_batch_tokens, trim
from .errors import RunError, UserError
from .learner import Learner, Update
from .measure.agreement import compare_with_learner
from .measure.diagnostics import Watch
from .measure.estimators import LogPartition
from .measure.evaluate import Evaluation, evaluate
from .models.language_model import LanguageModel, eos_token_ids, load_model, load_tokenizer
from .models.lora import LoRAPolicy
from .partition import Baseline, PartitionFunction, pseudo_rewards
from .proposal import AdaptiveProposal
from .rollouts import Rollouts
from .runs.checkpoint import TrainerState, latest_checkpoint, load_checkpoint, round_of, save_checkpoint
from .runs.folder import RunFolder
from .runs.metrics import progress_line, round_metrics
from .runs.report import write_report
from .runs.tracking import Tracking, check_installed
from .scoring import Scorer, Scores
from .session import build_engine, build_target, choose_device, describe_engine


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves; without evaluations and report where none was asked for, or on resuming."""

    run_dir: Path
    before: Evaluation | None
    after: Evaluation | None
    report: Path | None


class Trainer:
    """f-DPG on one machine.

    Args:
        config: of the run.
        resume: continue from the newest checkpoint in config.run_dir; without one, from the start.
        say: takes the lines that tell a person how it goes.

    Raises:
        UserError: something in the config does not fit; nothing has been written yet.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False, say: Callable[[str], None] | None = None):
        self.config, self.resume = config, resume
        self.say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        if not resume:
            RunFolder.refuse_taken(config)
        device = choose_device(config.device)
        check_installed(config.tracking)
        self.divergence = last_divergence(config.divergence)
        target = build_target(config, device)
        if target.can_be_zero and not self.divergence.allows_zeros:
            raise UserError(f"divergence: {self.divergence.refusal}")
        self.tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        self.base = load_model(config.model, config.dtype, device, config.trust_remote_code)
        pages: FrozenPages | None = FrozenPages(self.base.model)
        self.room = self.base.prompt_room(config.engine.max_new_tokens)
        if self.room < 1:
            raise UserError(
                f"engine.max_new_tokens: {config.engine.max_new_tokens} leaves no room for a prompt "
                f"in the model's {self.base.max_length} positions"
            )
        self.contexts = load_contexts(config.contexts.train, self.tokenizer, self.room)
        held_out = config.contexts.eval
        self.eval_contexts = self.contexts if held_out is None else load_contexts(held_out, self.tokenizer, self.room)
        self.eval_contexts = self.eval_contexts[: config.evaluation.contexts]

        self.checkpoint = latest_checkpoint(config.run_dir) if resume else None
        done = 0 if self.checkpoint is None else round_of(self.checkpoint)
        if done > config.trainer.rounds:
            raise UserError(f"trainer.rounds: {config.trainer.rounds} is less than the {done} that the run has done")
        if config.lora is None:
            policy_path = config.model if self.checkpoint is None else str(self.checkpoint)
            policy = load_model(policy_path, config.dtype, device, config.trust_remote_code)
        else:
            policy = LoRAPolicy(self.base, config.lora, self.seed("lora", 0), self.checkpoint)
            self.base, pages = policy.base, None  # the policy needs their pages as often as the base does
        self.micro_batch_tokens = config.trainer.micro_batch_tokens or plan_micro_batch_tokens(policy.model)
        # no activations are kept in scoring: larger parts fit, and waste less
        self.scorer = Scorer(target, self.base, pages, self.tokenizer, 4 * self.micro_batch_tokens)
        self.eos_token_ids = eos_token_ids(policy.model, self.tokenizer)
        partition, rounds = config.partition, config.trainer
        self.state = TrainerState(
            Learner(
                policy,
                self.divergence,
                loss=config.loss,
                optimizer=config.optimizer,
                rounds=rounds.rounds,
                micro_batch_tokens=self.micro_batch_tokens,
            ),
            PartitionFunction(len(self.contexts), kind=partition.kind, per_context=partition.per_context),
            Baseline(config.loss.baseline),
            round=done,
            proposal=self._proposal(policy),
        )
        self._sampler = ThreadPoolExecutor(1)  # for the rounds ahead

    def _proposal(self, policy: LanguageModel) -> AdaptiveProposal | None:
        config = self.config
        if config.proposal.kind == "policy":
            return None
        model = load_model(config.model, config.dtype, str(policy.device), config.trust_remote_code)
        model.take_weights(policy)
        return AdaptiveProposal(config.proposal.every, model)

    @functools.cached_property
    def engine(self) -> Engine:
        """Started at first use, with the policy's weights."""
        return self.start_engine(self.state.learner.policy, self.state.round)

    def start_engine(self, model: LanguageModel, version: int) -> Engine:
        """One more, with a model's weights; whoever starts it closes it."""
        config = self.config
        longest = max(len(context.token_ids) for context in self.contexts + self.eval_contexts)
        max_length = longest + config.engine.max_new_tokens
        engine = build_engine(config, model, self.eos_token_ids, max_length, self.micro_batch_tokens, self.say)
        try:
            engine.sync_weights(model, version)
        except BaseException:
            engine.close()
            raise
        return engine

    def train(self, evaluate: bool = True) -> RunResult:
        """Run all rounds that are left, evaluate before and after, and write the report.

        Args:
            evaluate: False: only the rounds, for whoever measures many runs alike (see `comparison`).

        Raises:
            RunError: something failed on the way; the checkpoints written so far are intact.
        """
        with contextlib.ExitStack() as at_the_end:
            at_the_end.callback(self.engine.close)
            at_the_end.callback(self._sampler.shutdown)
            folder = RunFolder(self.config.run_dir) if self.resume else RunFolder.create(self.config)
            at_the_end.callback(folder.close)
            try:
                return self._rounds(folder, evaluate)
            except UserError:  # the config asks for what cannot be had: leave no half-made run in its way
                if not self.resume:
                    folder.discard()
                raise

    def _rounds(self, folder: RunFolder, evaluate: bool) -> RunResult:
        config, state = self.config, self.state
        # trackers first: they may draw from the generators that a resumed run restores
        with contextlib.closing(Tracking(config, folder)) as tracking:
            before = self._start(folder, evaluate)
            self.say(describe_engine(config, self.base))
            if state.proposal is not None:
                self.engine.sync_weights(state.proposal.model, state.proposal.version)
            first, rounds, started = state.round, config.trainer.rounds, time.perf_counter()
            watch = Watch()
            for round_index in range(first, rounds):
                metrics = self.round(round_index, folder)
                tracking.log(round_index, metrics)
                left = (time.perf_counter() - started) / (state.round - first) * (rounds - state.round)
                self.say(progress_line(round_index, rounds, metrics, self.scorer.feature_names, left))
                for complaint in watch(metrics):
                    self.say(complaint)
                if state.round % config.trainer.checkpoint_every == 0 or state.round == rounds:
                    save_checkpoint(folder.path, state, self.tokenizer, config.trainer.keep_checkpoints)
        if not evaluate:
            return RunResult(folder.path, None, None, None)
        if state.proposal is not None:
            self.engine.sync_weights(state.learner.policy, state.round)  # which is what is evaluated
        after = self._evaluate(folder, rounds)
        return RunResult(folder.path, before, after, write_report(folder.path))

    def round(self, round_index: int, folder: RunFolder) -> dict[str, float]:
        """Sample, score, estimate, update, sync; returns the round's metrics."""
        settings, state, clock = self.config.trainer, self.state, Clock()
        agrees: dict[str, float] = {}
        first_ahead = min(round_index + max(1, settings.pipeline_depth), settings.rounds)
        for missing in range(round_index + len(state.ahead), first_ahead):  # at depth 0, and at the start
            with clock("sample"):
                state.ahead.append(self._sample(missing))
            if self.engine.version == state.round:  # else the proposal is another than the policy
                agrees = self._compare(state.ahead[-1], clock)
        rollouts = state.ahead.pop(0)
        ahead: Future[Rollouts] | None = None
        if settings.pipeline_depth and round_index + settings.pipeline_depth < settings.rounds:
            ahead = self._sampler.submit(self._sample, round_index + settings.pipeline_depth)
        else:
            self.engine.sleep()
        scores = self.scorer(rollouts, clock)
        owner = torch.tensor([context.index for context in rollouts.contexts])[rollouts.context_index]
        state.partition.update(scores.log_score - scores.behavior_logprob, owner)
        log_z = state.partition.log_z(owner)
        divergence = state.learner.divergence = divergence_at(self.config.divergence, round_index, settings.rounds)
        rewards = pseudo_rewards(
            scores.behavior_logprob, scores.log_score, log_z, divergence, self.config.loss.reward_cap
        )
        baseline = state.baseline(rewards, rollouts.context_index)
        with clock("update"):
            loss, weights = state.learner.backward(rollouts, scores.log_score, log_z, baseline)
        if ahead is not None:
            with clock("sample"):  # what is left of it
                state.ahead.append(ahead.result())
            agrees = self._compare(state.ahead[-1], clock)
        with clock("update"):
            update = state.learner.update(loss, weights, round_index)
            trim()  # or the base model would come to lie beside the space of gradients and activations
        state.round = round_index + 1
        with clock("sync"):
            proposal = self._sync(scores, update, owner)

        for row in self.scorer.rows(scores, settings.samples_logged):
            folder.append("samples.jsonl", {"round": round_index, "split": "train", **row})
        learning_rate = state.learner.learning_rate(round_index)
        return round_metrics(
            rollouts, scores, self.scorer.feature_names, state.partition, update, learning_rate, agrees, proposal, clock
        )

    def round_contexts(self, round_index: int) -> list[Context]:
        """What a round samples from."""
        settings = self.config.trainer
        per_round = min(settings.contexts_per_round, len(self.contexts))
        return [self.contexts[i] for i in schedule(len(self.contexts), per_round, round_index, settings.seed)]

    def _sample(self, round_index: int) -> Rollouts:
        proposal = self.state.proposal
        version = self.state.round if proposal is None else proposal.version
        if self.engine.version != version:
            raise RunError(f"the engine holds weights of version {self.engine.version}, not {version}")
        samples, seed = self.config.trainer.samples_per_context, self.seed("rollouts", round_index)
        return self.engine.sample(self.round_contexts(round_index), samples, seed)

    def _sync(self, scores: Scores, update: Update, owner: Tensor) -> dict[str, float]:
        """Hand the new weights to the engine, unless an adaptive proposal stays; what there is to say of it."""
        policy, proposal, weights = self.state.learner.policy, self.state.proposal, update.weights
        if proposal is None:
            self.engine.sync_weights(policy, self.state.round)
            return {}
        found: dict[str, float] = {"version": float(proposal.version)}  # that the round was sampled with
        log_ratio = weights.policy_logprob - weights.behavior_logprob
        proposal.observe(scores.log_score - scores.behavior_logprob, log_ratio, owner)
        gain = proposal.decide(policy, self.state.round)
        if gain is not None:
            found["kl_gain"] = gain
        if proposal.version == self.state.round:
            self.engine.sync_weights(proposal.model, proposal.version)
        return found

    def _compare(self, rollouts: Rollouts, clock: Clock) -> dict[str, float]:
        seed = self.seed("compared", self.state.round)
        with clock("compare"):
            return compare_with_learner(
                rollouts,
                self.state.learner.policy,
                self.config,
                seed=seed,
                micro_batch_tokens=4 * self.micro_batch_tokens,
            )

    def _start(self, folder: RunFolder, evaluate: bool) -> Evaluation | None:
        """Resume, or do what precedes the first round: λ, oracle Z, and the evaluation of the base model."""
        transformers.set_seed(self.config.trainer.seed)  # for features that draw from the global generators
        if self.resume:
            folder.record(self.config)  # it may have more rounds now
        if self.checkpoint is not None:
            self.restore()
            folder.forget_from(self.state.round)
            self.say(f"resuming {folder.path} after round {self.state.round} ({self.checkpoint.name})")
            return None
        if self.resume:
            folder.forget_from(0)
            self.say(f"{folder.path} has no checkpoint yet: starting from round 0")
        if self.scorer.target.needs_fit:
            contexts = self.contexts[: self.config.target_fit_samples]
            per_context = self.config.target_fit_samples // len(contexts)
            base = self.engine.sample(contexts, per_context, self.seed("fit", 0))  # which the policy still is
            self.scorer.log_phi(base, fit=True)
            self.state.exponents = self.scorer.target.exponents
            self.say(f"target: λ = {', '.join(f'{x:.4g}' for x in self.state.exponents or ())}")
        if self.config.partition.kind == "oracle":
            base = self.engine.sample(self.contexts, self.config.partition.oracle_samples, self.seed("oracle", 0))
            self.state.partition.update(self.scorer.log_phi(base), base.context_index)  # P/q is φ
        return self._evaluate(folder, 0) if evaluate else None

    def restore(self) -> None:
        """Load the newest checkpoint, which there must be."""
        assert self.checkpoint is not None
        load_checkpoint(self.checkpoint, self.state, self.round_contexts)
        if self.state.exponents is not None:
            self.scorer.target = self.scorer.target.with_exponents(self.state.exponents)

    def _evaluate(self, folder: RunFolder, round_index: int) -> Evaluation:
        """Of the policy as it is now, on one fresh sample; recorded in evaluation.jsonl."""
        settings = self.config.evaluation
        # one seed for every evaluation: before and after are compared on common random numbers
        evaluation, rows = self.measure(settings.samples_per_context, self.seed("evaluation", 0), count=16)
        folder.append("evaluation.jsonl", {"round": round_index, **evaluation.as_dict()})
        for row in rows:
            folder.append("samples.jsonl", {"round": round_index, "split": "evaluation", **row})
        return evaluation

    def measure(
        self, samples_per_context: int, seed: int, count: int, known: LogPartition | None = None
    ) -> tuple[Evaluation, list[dict[str, Any]]]:
        """The engine's weights, on a fresh sample of the evaluation contexts; and `count` of its completions."""
        rollouts = self.engine.sample(self.eval_contexts, samples_per_context, seed)
        scores = self.scorer(rollouts, Clock())
        evaluation = evaluate(rollouts, scores, self.scorer.target, self.divergence.name, known)
        return evaluation, self.scorer.rows(scores, count)

    def seed(self, purpose: str, round_index: int) -> int:
        """Of one of the run's draws."""
        return derived_seed(self.config.trainer.seed, purpose, round_index)
