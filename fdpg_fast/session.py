"""From config to parts: whoever trains, evaluates, samples, compares or asks what a run would do starts here."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any, Self

import torch

from .clock import Clock
from .config.schema import TrainConfig
from .contexts import Context, load_contexts
from .divergence import last_divergence
from .engines import Engine
from .engines.build import build_engine
from .errors import UserError
from .learner import Learner
from .measure.estimators import LogPartition
from .measure.evaluate import Evaluation, evaluate
from .models.language_model import LanguageModel, plan_micro_batch_tokens
from .models.load import eos_token_ids, load_model, load_tokenizer
from .models.lora import LoRAPolicy
from .partition import Baseline, Estimates, PartitionFunction
from .progress import activity
from .proposal import AdaptiveProposal
from .rollouts import pack
from .runs.checkpoint import TrainerState, latest_checkpoint, load_checkpoint, round_of
from .runs.folder import RunFolder
from .runs.metrics import RESERVED
from .runs.recorder import Recorder
from .runs.tracking import check_installed
from .sampling import Sampling
from .scoring import Scorer
from .seeds import derived_seed, schedule
from .targets import Target


class Session:
    """All parts of a run, made from its config; a context manager that closes the engine.

    Args:
        config: of the run.
        resume: with the weights of the newest checkpoint in config.run_dir, if there is one.

    Raises:
        UserError: something in the config does not fit; nothing has been written.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False):
        self.config, self.resumes = config, resume
        if not resume:
            RunFolder.refuse_taken(config)
        device = choose_device(config.device)
        check_installed(config.tracking)
        self.divergence = last_divergence(config.divergence)
        target = build_target(config, device)
        if target.can_be_zero and not self.divergence.allows_zeros:
            raise UserError(f"divergence: {self.divergence.refusal}")
        self.tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        with activity(f"loading {config.model}"):
            base = load_model(config.model, config.dtype, device, config.trust_remote_code)
        base.model.requires_grad_(False)
        self._read_contexts(base)
        self.checkpoint = latest_checkpoint(config.run_dir) if resume else None
        done = 0 if self.checkpoint is None else round_of(self.checkpoint)
        if done > config.trainer.rounds:
            raise UserError(f"trainer.rounds: {config.trainer.rounds} is less than the {done} that the run has done")
        if config.lora is None:
            path = config.model if self.checkpoint is None else str(self.checkpoint)
            with activity(f"loading {path} once more, to be trained"):
                policy = load_model(path, config.dtype, device, config.trust_remote_code)
        else:
            policy = base = LoRAPolicy(base, config.lora, self.seed("lora", 0), self.checkpoint)
        self.micro_batch_tokens = config.trainer.micro_batch_tokens or plan_micro_batch_tokens(policy.model)
        # no activations are kept in scoring: larger micro-batches fit, and waste less
        self.scorer = Scorer(target, base, self.tokenizer, 4 * self.micro_batch_tokens)
        learner = Learner(
            policy,
            config.loss,
            config.optimizer,
            rounds=config.trainer.rounds,
            micro_batch_tokens=self.micro_batch_tokens,
        )
        partition = PartitionFunction(
            len(self.contexts), kind=config.partition.kind, per_context=config.partition.per_context
        )
        self.sampling = Sampling(
            config,
            policy,
            self.round_contexts,
            self.start_engine,
            micro_batch_tokens=4 * self.micro_batch_tokens,
            proposal=self._proposal(policy),
        )
        estimates = Estimates(partition, Baseline(config.loss.baseline), config.loss.reward_cap)
        self.state = TrainerState(learner, estimates, self.sampling, round=done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.sampling.close()

    @property
    def base(self) -> LanguageModel:
        """The frozen model of the target; of a LoRA run the policy, to be asked as `as_base()`."""
        return self.scorer.base

    @property
    def engine(self) -> Engine:
        """The engine of the run, started at first use with the policy's weights."""
        return self.sampling.engine(self.state.round)

    def start_engine(self, model: LanguageModel, version: int) -> Engine:
        """One more engine, with a model's weights; whoever starts it closes it."""
        config, learner = self.config, self.state.learner
        longest = max(len(context.token_ids) for context in self.contexts + self.eval_contexts)
        max_length = longest + config.engine.max_new_tokens
        arguments = (self.eos_token_ids, max_length, self._largest_step, learner.optimizer_bytes)
        with activity("starting the engine"):
            engine = build_engine(config, model, *arguments)
            try:
                engine.sync_weights(model, version)
            except BaseException:
                engine.close()
                raise
        return engine

    def recorder(self) -> Recorder:
        """The folder of the run, once the engine is there: where that fails nothing has been written."""
        self.sampling.engine(self.state.round)
        return Recorder(self.config, self.scorer.feature_names, self.tokenizer, resume=self.resumes)

    def restore(self) -> None:
        """Load the newest checkpoint, which there must be."""
        assert self.checkpoint is not None
        load_checkpoint(self.checkpoint, self.state, self.round_contexts)
        if self.state.exponents is not None:
            self.scorer.target = self.scorer.target.with_exponents(self.state.exponents)

    def measure(
        self, samples_per_context: int, seed: int, count: int, log_z: LogPartition | None = None
    ) -> tuple[Evaluation, list[dict[str, Any]]]:
        """The engine's weights, on a fresh sample of the evaluation contexts; and `count` of its completions."""
        total = len(self.eval_contexts) * samples_per_context
        what = f"{len(self.eval_contexts)} contexts × {samples_per_context} completions"
        with activity(f"evaluating: sampling {what}", total):
            rollouts = self.engine.sample(self.eval_contexts, samples_per_context, seed)
        with activity(f"evaluating: scoring {what}", total):
            scores = self.scorer(rollouts, Clock())
        evaluation = evaluate(rollouts, scores, self.scorer.target, self.divergence, log_z)
        return evaluation, self.scorer.rows(scores, count)

    def round_contexts(self, round_index: int) -> list[Context]:
        """What a round samples from."""
        settings = self.config.trainer
        per_round = min(settings.contexts_per_round, len(self.contexts))
        return [self.contexts[i] for i in schedule(len(self.contexts), per_round, round_index, settings.seed)]

    def seed(self, purpose: str, round_index: int) -> int:
        """A seed for one kind of the run's draws."""
        return derived_seed(self.config.trainer.seed, purpose, round_index)

    @functools.cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        return eos_token_ids(self.base.model, self.tokenizer)

    def _read_contexts(self, base: LanguageModel) -> None:
        config = self.config
        self.room = base.prompt_room(config.engine.max_new_tokens)
        if self.room < 1:
            raise UserError(
                f"engine.max_new_tokens: {config.engine.max_new_tokens} leaves no room for a prompt "
                f"in the model's {base.max_length} positions"
            )
        self.contexts = load_contexts(config.contexts.train, self.tokenizer, self.room)
        held_out = config.contexts.eval
        self.eval_contexts = self.contexts if held_out is None else load_contexts(held_out, self.tokenizer, self.room)
        self.eval_contexts = self.eval_contexts[: config.evaluation.contexts]

    def _proposal(self, policy: LanguageModel) -> AdaptiveProposal | None:
        config = self.config
        if config.proposal.kind == "policy":
            return None
        model = load_model(config.model, config.dtype, str(policy.device), config.trust_remote_code)
        model.take_weights(policy)
        return AdaptiveProposal(config.proposal.every, model)

    def _largest_step(self) -> None:
        """A forward and backward pass of one full micro-batch of made-up tokens; changes nothing."""
        learner, length = self.state.learner, self.config.engine.max_new_tokens
        completions = [([0] * length, [0.0] * length, False)] * max(1, self.micro_batch_tokens // length)
        rollouts = pack([Context(0, "", (0,))], [completions])
        zeros = torch.zeros(len(rollouts), dtype=torch.float64)
        learner.backward(rollouts, zeros, zeros, zeros, self.divergence)
        learner.optimizer.zero_grad(set_to_none=True)


def choose_device(name: str) -> str:
    """The name of the device that `device:` asks for.

    Raises:
        UserError: there is none of this name here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} is not usable here: {str(error).splitlines()[0]}") from None
    return name


def build_target(config: TrainConfig, device: str) -> Target:
    """The product of the config's terms.

    Raises:
        UserError: a feature or target cannot be made, or two features share a name.
    """
    target = Target(())
    for term in config.target:
        target *= term.build(device)
    names = [feature.name for feature in target.features]
    for name in names:
        if name in RESERVED:
            raise UserError(f"target: {name!r} is the name of a metric of its own; give the feature another name")
        if names.count(name) > 1:
            raise UserError(f"target: two features are called {name!r}; give one of them another name")
    return target
