"""Rounds ahead: what is sampled for which round, with which weights, and whether they are the learner's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from .clock import Clock
from .config.schema import TrainConfig
from .contexts import Context
from .engines import Engine
from .errors import RunError
from .learner import Update
from .measure.agreement import compare_with_learner
from .models.language_model import LanguageModel
from .proposal import AdaptiveProposal
from .rollouts import Rollouts
from .scoring import Scores
from .seeds import derived_seed


class Sampling:
    """The engine over the rounds of a run.

    Args:
        config: of the run.
        policy: the learner's; its weights go to the engine, or an adaptive proposal's do.
        contexts: what a round samples from, by its index.
        start: makes an engine that has a model's weights of some version.
        micro_batch_tokens: in one forward pass of the learner that checks the engine.
        proposal: left out, the policy itself is sampled from.

    Attributes:
        ahead: rollouts of the next rounds, sampled already.
        facts: what the round has to say of engine and proposal, by the names of its metrics.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: LanguageModel,
        contexts: Callable[[int], list[Context]],
        start: Callable[[LanguageModel, int], Engine],
        *,
        micro_batch_tokens: int,
        proposal: AdaptiveProposal | None,
    ):
        self._config, self._settings, self._policy = config, config.trainer, policy
        self._contexts, self._start, self._micro_batch_tokens = contexts, start, micro_batch_tokens
        self.proposal = proposal
        self.ahead: list[Rollouts] = []
        self.facts: dict[str, float] = {}
        self._engine: Engine | None = None
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[Rollouts] | None = None

    def engine(self, version: int) -> Engine:
        """The engine; at first use it starts, with the policy's weights, which are of this version."""
        if self._engine is None:
            self._engine = self._start(self._policy, version)
        return self._engine

    def begin(self, version: int) -> None:
        """Start the engine, and give it the proposal's weights before the first round."""
        engine = self.engine(version)
        if self.proposal is not None:
            engine.sync_weights(self.proposal.model, self.proposal.version)

    def take(self, index: int, clock: Clock) -> Rollouts:
        """The rollouts of a round, counted from 0; starts what is to be sampled beside it, or lets the engine sleep."""
        engine, settings = self.engine(index), self._settings
        self.facts = {}
        for missing in range(index + len(self.ahead), min(index + max(1, settings.pipeline_depth), settings.rounds)):
            with clock("sample"):  # in turns, and at the start of rounds ahead
                self.ahead.append(self._sample(missing, index))
            if engine.version == index:  # else the proposal is another than the policy
                self._compare(index, clock)
        rollouts, further = self.ahead.pop(0), index + settings.pipeline_depth
        if settings.pipeline_depth and further < settings.rounds:
            self._pending = self._thread.submit(self._sample, further, index)
        else:
            engine.sleep()
        return rollouts

    def meet(self, index: int, clock: Clock) -> None:
        """Wait for what is sampled beside round `index`; it must agree with the learner before the weights move."""
        if self._pending is not None:
            with clock("sample"):
                self.ahead.append(self._pending.result())
            self._pending = None
            self._compare(index, clock)

    def sync(self, rollouts: Rollouts, scores: Scores, update: Update, version: int) -> None:
        """Hand the policy's new weights to the engine, unless an adaptive proposal stays what it is."""
        proposal, weights = self.proposal, update.weights
        if proposal is None:
            self.engine(version).sync_weights(self._policy, version)
            return
        self.facts["proposal/version"] = float(proposal.version)  # that the round was sampled with
        log_ratio = weights.policy_logprob - weights.behavior_logprob
        proposal.observe(scores.log_score - scores.behavior_logprob, log_ratio, rollouts.dataset_index)
        gain = proposal.decide(self._policy, version)
        if gain is not None:
            self.facts["proposal/kl_gain"] = gain
        if proposal.version == version:
            self.engine(version).sync_weights(proposal.model, version)

    def close(self) -> None:
        """Wait for the thread, and close the engine."""
        self._thread.shutdown()
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _sample(self, index: int, learner_version: int) -> Rollouts:
        engine, version = self.engine(learner_version), learner_version
        if self.proposal is not None:
            version = self.proposal.version
        if engine.version != version:
            raise RunError(f"the engine holds weights of version {engine.version}, not {version}")
        seed = derived_seed(self._settings.seed, "rollouts", index)
        return engine.sample(self._contexts(index), self._settings.samples_per_context, seed)

    def _compare(self, index: int, clock: Clock) -> None:
        """Score a few of the latest rollouts with the learner, whose weights are those of round `index`."""
        with clock("compare"):
            gaps = compare_with_learner(
                self.ahead[-1],
                self._policy,
                self._config,
                seed=derived_seed(self._settings.seed, "compared", index),
                micro_batch_tokens=self._micro_batch_tokens,
            )
        self.facts |= {f"engine/{name}": gap for name, gap in gaps.items()}
