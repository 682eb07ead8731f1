"""From config to parts: whoever trains, evaluates, samples, compares or asks what a run would do starts here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from . import ranks
from .base import load_base, sampled_from
from .clock import Clock
from .config.schema import TrainConfig
from .config.terms import build_target
from .contexts import Context, Prompting, load_contexts
from .divergence import last_divergence
from .engines import Engine
from .engines.build import build_engine
from .errors import UserError, is_out_of_memory, one_line
from .features import check_columns
from .learner import Learner
from .measure.estimators import LogPartition
from .measure.evaluate import Evaluation, evaluate, metric_names
from .measure.target_samples import TargetSamples
from .models.activations import plan_passes, recompute
from .models.generation import eos_token_ids
from .models.language_model import LanguageModel
from .models.load import load_model, load_tokenizer
from .models.lora import LoRAPolicy
from .models.older import OlderPolicy
from .partition import Baseline, Estimates, PartitionFunction
from .progress import activity
from .proposal import AdaptiveProposal
from .rollouts import Rollouts, pack
from .runs.best import best_checkpoint, refuse_unknown
from .runs.checkpoint import TrainerState, latest_checkpoint, load_checkpoint, round_of
from .runs.folder import refuse_taken
from .runs.origin import origin_of, refuse_changes
from .runs.recorder import Recorder
from .runs.tracking import check_installed
from .sampling import Sampling
from .scoring import Scorer
from .seeds import derived_seed, schedule


class Session:
    """All parts of a run, made from its config; to be closed.

    Args:
        config: of the run.
        resume: with the weights of the newest checkpoint in config.run_dir, if there is one.
        best: of the best one instead, which there must be.

    Raises:
        UserError: something in the config does not fit; nothing has been written.
    """

    def __init__(self, config: TrainConfig, *, resume: bool = False, best: bool = False):
        self.config, self.resumes, rounds = config, resume, config.trainer.rounds
        if not resume:
            refuse_taken(config.run_dir)
        self._device = ranks.join(config.device)
        check_installed(config.tracking)
        self.divergence = last_divergence(config.divergence)
        target = build_target(config.target, self._device)
        if target.can_be_zero and not self.divergence.allows_zeros:
            raise UserError(f"divergence: {self.divergence.refusal}")
        self.tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        if config.base.refresh_every and target.needs_fit:
            raise UserError("base.refresh_every: λ of a distributional target is of the first base; leave the key out")
        start = self._load(config.model)  # that training starts from
        base = load_base(config, start, self.tokenizer, self._load)
        max_new_tokens, held_out = config.engine.max_new_tokens, config.contexts.to_evaluate_on
        room, positions = min((model.prompt_room(max_new_tokens), model.max_length) for model in (start, base))
        if room < 1:
            raise UserError(
                f"engine.max_new_tokens: {max_new_tokens} leaves no room for a prompt "
                f"in the model's {positions} positions"
            )
        rows = len(start.model.get_input_embeddings().weight)
        self.prompting = Prompting(self.tokenizer, room, rows, start.continues_prompt, config.contexts)
        self.contexts = load_contexts(config.contexts.to_train_on, self.prompting)
        in_round, updates = min(config.trainer.contexts_per_round, len(self.contexts)), config.trainer.updates_per_round
        if updates > max(in_round, config.trainer.samples_per_context // 2):
            raise UserError(
                f"trainer.updates_per_round: {updates} updates need {updates} contexts in a round, which has "
                f"{in_round}, or trainer.samples_per_context: {2 * updates}"
            )
        self.eval_contexts = self.contexts if held_out is None else load_contexts(held_out, self.prompting)
        self.eval_contexts = self.eval_contexts[: config.evaluation.contexts]
        for model in (start, base):
            model.refuse_lengths(self.contexts + self.eval_contexts, max_new_tokens)
        check_columns(target.features, self.contexts, "contexts.train")
        check_columns(target.features, self.eval_contexts, "contexts.eval")
        prompts = {"train": self.contexts, "eval": self.eval_contexts}
        self._origin = origin_of(config, start, base, self.tokenizer, **prompts)
        if resume:
            refuse_changes(config.run_dir, self._origin)
        count = config.evaluation.samples_per_context
        refuse_unknown(config, partial(metric_names, target, self.divergence, self.eval_contexts[0], count))
        found = best_checkpoint(config) if best else latest_checkpoint(config.run_dir) if resume else None
        self.checkpoint = found
        done = 0 if self.checkpoint is None else round_of(self.checkpoint)
        if done > rounds:
            raise UserError(f"trainer.rounds: {rounds} is less than the {done} that the run has done")
        if config.lora is None:
            del start  # or there would be three models where the base is another
            policy = self._load(config.model if self.checkpoint is None else str(self.checkpoint), is_trained=True)
        else:
            policy = LoRAPolicy(start, config.lora, self.seed("lora", 0), self.checkpoint)
            base = policy if base is start else base
        longest = max(len(context.token_ids) for context in self.contexts) + max_new_tokens
        self.micro_batch_tokens, self.recomputes = plan_passes(policy, base.dtype, config.trainer, longest)
        if self.recomputes:
            recompute(policy.model)
        if ranks.joined():
            base.divide(None)
            if policy is not base:
                dtype = base.dtype if config.lora is None else None
                policy.divide(dtype, config.trainer.reshard_after_forward)
        self.eos_token_ids = eos_token_ids(policy.model, self.tokenizer)
        # where activations are kept, scoring keeps none: larger micro-batches fit, and waste less
        scored_tokens = (1 if self.recomputes else 4) * self.micro_batch_tokens
        if not config.starts_from_base:
            plain = config.trainer.model_copy(update={"activation_checkpointing": "off"})
            scored_tokens = min(scored_tokens, 4 * plan_passes(base, base.dtype, plain, longest)[0])
        self.scorer = Scorer(target, base, self.tokenizer, scored_tokens, config.keep_special_tokens)
        proposal = None
        if config.proposal.kind == "adaptive":
            proposal = AdaptiveProposal(config.proposal.every, self._load(config.model))
            if ranks.joined():
                proposal.model.divide(None)
            proposal.model.take_weights(policy)
        self.sampling = Sampling(config, policy, self.micro_batch_tokens, proposal)
        learner = Learner(policy, config.loss, config.optimizer, rounds, self.micro_batch_tokens)
        per_context = config.partition.per_context
        partition = PartitionFunction(len(self.contexts), kind=config.partition.kind, per_context=per_context)
        estimates = Estimates(partition, Baseline(config.loss.baseline), config.loss.reward_cap)
        moving = OlderPolicy(base) if config.base.refresh_every else None
        self.state = TrainerState(learner, estimates, self.sampling, moving, round=done)
        self.target_samples: TargetSamples | None = None  # for the evaluation contexts, where there are exact ones

    @property
    def base(self) -> LanguageModel:
        """The frozen model of the target; it may be the policy of a LoRA run, to be asked as `as_base()`."""
        return self.scorer.base

    @property
    def engine(self) -> Engine:
        """The engine of the run, started at first use with the policy's weights."""
        if self.sampling.engine is None:
            self.sampling.engine = self.start_engine(self.state.learner.policy, self.state.round)
        return self.sampling.engine

    def start_engine(self, model: LanguageModel, version: int) -> Engine:
        """One more engine, with the weights of policy or base; whoever starts it closes it."""
        config = sampled_from(self.config) if model is self.base else self.config
        learner = self.state.learner
        max_new_tokens = config.engine.max_new_tokens

        def step() -> None:
            """A forward and backward pass of one full micro-batch of made-up tokens; changes nothing."""
            completions = [([0] * max_new_tokens, [0.0] * max_new_tokens, False)]
            rollouts = pack([Context(0, "", (0,))], [completions * -(-self.micro_batch_tokens // max_new_tokens)])
            zeros = torch.zeros(len(rollouts), dtype=torch.float64)
            learner.backward(rollouts, zeros, zeros, zeros, self.divergence)
            learner.optimizer.zero_grad(set_to_none=True)

        longest = max(len(context.token_ids) for context in self.contexts + self.eval_contexts) + max_new_tokens
        with activity("starting the engine"):
            engine = build_engine(config, model, self.eos_token_ids, longest, step, learner.optimizer_bytes)
            try:
                engine.sync_weights(model, version)
            except BaseException:
                engine.close()
                raise
        return engine

    def recorder(self) -> Recorder:
        """The folder of the run, once the engine is there: where that fails nothing has been written."""
        assert self.engine is not None
        return Recorder(self.config, self.scorer.feature_names, self.tokenizer, self._origin, resume=self.resumes)

    def restore(self) -> None:
        """Load the newest checkpoint, which there must be."""
        assert self.checkpoint is not None
        try:
            load_checkpoint(self.checkpoint, self.state, self.round_contexts)
        except Exception as error:  # its files are whole, and of another run or version
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"checkpoint {self.checkpoint} does not fit this run: {reason}") from error
        if self.state.exponents is not None:
            exponents, errors = self.state.exponents
            self.scorer.target = replace(self.scorer.target, exponents=exponents, exponent_errors=errors)

    def sample(self, contexts: Sequence[Context], samples_per_context: int, seed: int) -> Rollouts:
        """Completions of the policy, whose weights the engine has; compared with it as those of a round are."""
        draw = partial(self.engine.sample, contexts, samples_per_context, seed)
        return self.sampling.agreeing(draw(), draw, self.state.learner.policy, seed)

    def measure(
        self, samples_per_context: int, seed: int, count: int, log_z: LogPartition | None = None
    ) -> tuple[Evaluation, list[dict[str, Any]]]:
        """The engine's weights, on a fresh sample of the evaluation contexts; and `count` of its completions."""
        total = len(self.eval_contexts) * samples_per_context
        what = f"{len(self.eval_contexts)} contexts × {samples_per_context} completions"
        with activity(f"evaluating: sampling {what}", total):
            rollouts = self.sample(self.eval_contexts, samples_per_context, seed)
        with activity(f"evaluating: scoring {what}", total):
            scores = self.scorer(rollouts, Clock())
            exact, policy = self.target_samples, self.state.learner.policy
            known = None if exact is None else (exact, exact.logprob(policy, self.scorer.micro_batch_tokens))
        found = evaluate(rollouts, scores, self.scorer.target, self.divergence, log_z, known)
        return found, self.scorer.rows(scores, count)

    def round_contexts(self, round_index: int) -> list[Context]:
        """What a round samples from."""
        settings, count = self.config.trainer, len(self.contexts)
        chosen = schedule(count, min(settings.contexts_per_round, count), round_index, settings.seed)
        return [self.contexts[i] for i in chosen]

    def seed(self, purpose: str, round_index: int) -> int:
        """A seed for one kind of the run's draws."""
        return derived_seed(self.config.trainer.seed, purpose, round_index)

    def close(self) -> None:
        """Close the engine, if it was started."""
        self.sampling.close()

    def _load(self, path: str, is_trained: bool = False) -> LanguageModel:
        with activity(f"loading {path}"):
            # spread over processes, what is trained is its own master
            dtype = "float32" if is_trained and ranks.joined() else self.config.dtype
            model = load_model(path, dtype, self._device, self.config.trust_remote_code, ranks.joined())
        if not is_trained:
            model.model.requires_grad_(False)
        return model
