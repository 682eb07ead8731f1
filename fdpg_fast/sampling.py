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
    """The engine over the rounds of a run; round k begins with the learner's weights of version k.

    Args:
        policy: the learner's; its weights go to the engine, or those of an adaptive proposal.
        micro_batch_tokens: in one forward pass of the learner that checks the engine.

    Attributes:
        engine: None until it is started.
        ahead: rollouts of the next rounds, sampled already.
        facts: what the round has to say of engine and proposal, by the names of its metrics.
    """

    def __init__(
        self, config: TrainConfig, policy: LanguageModel, micro_batch_tokens: int, proposal: AdaptiveProposal | None
    ):
        self._config, self._policy, self.proposal = config, policy, proposal
        self._micro_batch_tokens = micro_batch_tokens
        self.engine: Engine | None = None
        self.ahead: list[Rollouts] = []
        self.facts: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[Rollouts] | None = None
        self._synced = -1

    def take(self, index: int, contexts: Callable[[int], list[Context]], clock: Clock) -> Rollouts:
        """The rollouts of round `index`; starts what is to be sampled beside it, or lets the engine sleep.

        contexts: what a round samples from.
        """
        depth, rounds = self._config.trainer.pipeline_depth, self._config.trainer.rounds
        self.facts = {}
        for missing in range(index + len(self.ahead), min(index + max(1, depth), rounds)):
            with clock("sample"):  # in turns, and at the start of rounds ahead
                self.ahead.append(self._sample(missing, contexts(missing), index))
            if self._engine.version == index:  # else the proposal is another than the policy
                self._compare(index, clock)
        if depth and index + depth < rounds:
            further = index + depth
            self._pending = self._thread.submit(self._sample, further, contexts(further), index)
        else:
            self._engine.sleep()
        return self.ahead.pop(0)

    def meet(self, index: int, clock: Clock) -> None:
        """Wait for what is sampled beside round `index`; it must agree with the learner before the weights move."""
        if self._pending is not None:
            with clock("sample"):
                self.ahead.append(self._pending.result())
            self._pending = None
            self._compare(index, clock)

    def sync(self, index: int) -> None:
        """Hand the weights that round `index` samples with to the engine, unless it has them."""
        model, version, held = self._policy, index, self._engine.version
        if self.proposal is not None:  # at first the engine has the policy's weights
            model, version, held = self.proposal.model, self.proposal.version, self._synced
        if version != held:
            self._engine.sync_weights(model, version)
            self._synced = version

    def observe(self, rollouts: Rollouts, scores: Scores, update: Update, done: int) -> None:
        """Let an adaptive proposal see the last of `done` rounds, and take the new weights if they are nearer."""
        proposal, weights = self.proposal, update.weights
        if proposal is None:
            return
        self.facts["proposal/version"] = float(proposal.version)  # that the round was sampled with
        log_ratio = weights.policy_logprob - weights.behavior_logprob
        proposal.observe(scores.log_score - scores.behavior_logprob, log_ratio, rollouts.dataset_index)
        if (gain := proposal.decide(self._policy, done)) is not None:
            self.facts["proposal/kl_gain"] = gain

    def close(self) -> None:
        """Wait for the thread, and close the engine if there is one."""
        self._thread.shutdown()
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.close()

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None
        return self.engine

    def _sample(self, index: int, contexts: list[Context], learner_version: int) -> Rollouts:
        settings, version = self._config.trainer, learner_version if self.proposal is None else self.proposal.version
        if self._engine.version != version:
            raise RunError(f"the engine holds weights of version {self._engine.version}, not {version}")
        seed = derived_seed(settings.seed, "rollouts", index)
        return self._engine.sample(contexts, settings.samples_per_context, seed)

    def _compare(self, index: int, clock: Clock) -> None:
        """Score a few of the latest rollouts with the learner, whose weights are those of round `index`."""
        seed, tokens = derived_seed(self._config.trainer.seed, "compared", index), self._micro_batch_tokens
        with clock("compare"):
            gaps = compare_with_learner(
                self.ahead[-1], self._policy, self._config, seed=seed, micro_batch_tokens=tokens
            )
        self.facts |= {f"engine/{name}": gap for name, gap in gaps.items()}
