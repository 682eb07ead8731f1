"""Rounds ahead: what is sampled for which round, with which weights, and whether they are the learner's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from fdpg_kernels import SequenceWeights

from .clock import Clock
from .config.schema import TrainConfig
from .contexts import Context
from .engines import Engine, VLLMServerEngine
from .errors import RunError
from .measure.agreement import Disagreement, compare_with_learner, gap_limits, refuse_far
from .models.language_model import LanguageModel
from .proposal import AdaptiveProposal
from .rollouts import Rollouts
from .scoring import Scores
from .seeds import derived_seed
from .updates import Updates


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
            self._compare(missing, index, clock)
        if depth and index + depth < rounds:
            further = index + depth
            self._pending = self._thread.submit(self._sample, further, contexts(further), index)
        else:
            self._engine.sleep()
        return self.ahead.pop(0)

    def meet(self, index: int, rollouts: Rollouts, weights: SequenceWeights, clock: Clock) -> None:
        """Wait for what is sampled beside round `index`; it must agree with the learner before the weights move.

        So must completions of its own, all or a mini-batch, if the learner has the weights that they were drawn from.
        """
        depth = self._config.trainer.pipeline_depth
        if self.proposal is None and not depth:
            log_ratio = weights.policy_logprob - weights.behavior_logprob
            refuse_far(log_ratio.abs(), rollouts.lengths, gap_limits(self._config)[1])
        if self._pending is not None:
            with clock("sample"):
                self.ahead.append(self._pending.result())
            self._pending = None
            self._compare(index + depth, index, clock)

    def sync(self, index: int) -> None:
        """Hand the weights that round `index` samples with to the engine, unless it has them."""
        model, version, held = self._policy, index, self._engine.version
        if self.proposal is not None:  # at first the engine has the policy's weights
            model, version, held = self.proposal.model, self.proposal.version, self._synced
        if version != held:
            self._engine.sync_weights(model, version)
            self._synced = version

    def sync_policy(self, version: int) -> None:
        """Hand the learner's weights to the engine, whatever the rounds sample with."""
        if version != self._engine.version:  # it has those of the round before, or of an adaptive proposal
            self._engine.sync_weights(self._policy, version)
            self._synced = -1

    def observe(self, rollouts: Rollouts, scores: Scores, updates: Updates, done: int) -> None:
        """Let an adaptive proposal see the last of `done` rounds, and take the new weights if they are nearer."""
        proposal, rows = self.proposal, updates.rows
        if proposal is None:
            return
        weights = updates.weights
        self.facts["proposal/version"] = float(proposal.version)  # that the round was sampled with
        log_ratio = weights.policy_logprob - weights.behavior_logprob
        log_weight = scores.log_score - scores.behavior_logprob
        proposal.observe(log_weight[rows], log_ratio, rollouts.dataset_index[rows])
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

    def agreeing(
        self, rollouts: Rollouts, draw_again: Callable[[], Rollouts], model: LanguageModel, seed: int
    ) -> Rollouts:
        """What the engine drew, with a model's weights as they are now.

        Of servers every completion is compared, else a few. A server that gave a wrong one is left out, and the others
        draw all of them again: completions depend on no server.

        Raises:
            RunError: they are not of these weights, and there is no other server.
        """
        engine, tokens = self._engine, self._micro_batch_tokens
        servers = engine if isinstance(engine, VLLMServerEngine) else None
        while True:
            try:
                gaps = compare_with_learner(rollouts, model, self._config, seed, tokens, every=servers is not None)
            except Disagreement as error:
                if servers is None:
                    raise
                servers.leave_out(error.rows, str(error))
                rollouts = draw_again()
            else:
                self.facts |= {f"engine/{name}": gap for name, gap in gaps.items()}
                return rollouts

    def _sample(self, index: int, contexts: Sequence[Context], learner_version: int) -> Rollouts:
        settings, version = self._config.trainer, learner_version if self.proposal is None else self.proposal.version
        if self._engine.version != version:
            raise RunError(f"the engine holds weights of version {self._engine.version}, not {version}")
        seed = derived_seed(settings.seed, "rollouts", index)
        return self._engine.sample(contexts, settings.samples_per_context, seed)

    def _compare(self, sampled: int, index: int, clock: Clock) -> None:
        """Compare the latest rollouts, those of round `sampled`, with whose weights the engine has in round `index`."""
        latest, model = self.ahead.pop(), self._policy if self.proposal is None else self.proposal.model
        draw_again = partial(self._sample, sampled, latest.contexts, index)
        with clock("compare"):
            seed = derived_seed(self._config.trainer.seed, "compared", index)
            self.ahead.append(self.agreeing(latest, draw_again, model, seed))
