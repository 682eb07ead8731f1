"""Engines, syncs and rounds, timed in turns: what engine_rounds.py runs on the CPU and gpu_round.py on a GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fdpg_fast.contexts import Context
from fdpg_fast.engines import Engine, VLLMEngine
from fdpg_fast.measure.agreement import GAP_LIMITS
from fdpg_fast.models.language_model import LanguageModel
from fdpg_fast.runs.metrics import round_metrics
from fdpg_fast.session import Session
from fdpg_fast.trainer import Trainer

PHASES = ("sample", "features", "base", "compare", "update", "sync")  # of a round; what is left is bookkeeping
CHECKED = (4, 8)  # contexts and samples of each by which an engine's weights are checked
PERTURBED_BY = 0.3  # standard deviations of each weight
SEEN = 3.0  # a perturbation moves log-probs by at least this many times what engine and learner differ by

Sampler = Callable[[Sequence[Context], int, int], int]  # contexts, samples of each, seed → tokens drawn


class WrongError(Exception):
    """An engine that is not where it should be: it gets no time."""


@dataclass
class Turns:
    """Wall and CPU seconds and tokens of every turn of each sampler, and the load of the machine at each turn."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    load_average: list[float] = field(default_factory=list)


def bare_vllm(engine: VLLMEngine, **settings: Any) -> Sampler:
    """`LLM.generate` on the engine's own LLM, as somebody calls it who wants tokens: the same ends, no log-probs.

    Args:
        settings: further ones of `SamplingParams`.
    """
    from vllm import SamplingParams

    kept = {key: value for key, value in engine._sampling.items() if "logprobs" not in key} | settings

    def sample(contexts: Sequence[Context], samples: int, seed: int) -> int:
        prompts = [{"prompt_token_ids": list(context.token_ids)} for context in contexts]
        outputs = engine._llm.generate(prompts, SamplingParams(**kept, n=samples), use_tqdm=False)
        return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

    return sample


def through(engine: Engine) -> Sampler:
    """`Engine.sample`, packed rollouts and all."""
    return lambda contexts, samples, seed: engine.sample(contexts, samples, seed).num_tokens


def samplers_of(engine: Engine) -> dict[str, Sampler]:
    """An engine's own way to sample and, for vLLM, the barer ones that show where its time goes."""
    if not isinstance(engine, VLLMEngine):
        return {"TransformersEngine": through(engine)}
    return {
        "bare vLLM": bare_vllm(engine),
        "bare vLLM, log-probs": bare_vllm(engine, logprobs=0, flat_logprobs=True),
        "VLLMEngine": through(engine),
    }


def take_turns(samplers: dict[str, Sampler], session: Session, repeats: int, before: Callable[[], Any]) -> Turns:
    """All samplers on the contexts of one round after the other, each turn beginning with another of them.

    Args:
        session: says which contexts a round has, and how many samples.
        before: called before every timing, and not timed.
    """
    found, samples = Turns(), session.config.trainer.samples_per_context
    for turn in range(repeats + 1):
        first = turn % len(samplers)
        for name, sample in [*samplers.items()][first:] + [*samplers.items()][:first]:
            before()
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = sample(session.round_contexts(turn), samples, turn * 2**20)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn > 0:  # the first warms up
                found.seconds.setdefault(name, []).append(wall)
                found.cpu_seconds.setdefault(name, []).append(cpu)
                found.tokens.setdefault(name, []).append(tokens)
        if turn > 0:
            found.load_average.append(round(os.getloadavg()[0], 2))
    return found


def forget_prefixes(*engines: Engine) -> None:
    """A prompt that is sampled from again would cost nothing, which does not happen in a run."""
    for engine in engines:
        if isinstance(engine, VLLMEngine):
            engine._llm.reset_prefix_cache()


def has_own_weights(engine: Engine) -> bool:
    return isinstance(engine, VLLMEngine)


def time_syncs(session: Session, repeats: int, *, asleep: bool = False) -> list[float]:
    """Seconds of a sync; with `asleep`, of putting the engine to sleep and waking it with new weights."""
    engine, policy = session.engine, session.state.learner.policy
    seconds = []
    for _ in range(repeats):
        _wait(policy)
        start = time.perf_counter()
        if asleep:
            engine.sleep()
        engine.sync_weights(policy, session.state.round)
        _wait(policy)
        seconds.append(time.perf_counter() - start)
    return seconds


def bytes_moved(session: Session) -> int:
    """By a sync: the parameters', tied ones once; 0 where engine and learner have the same ones."""
    if not has_own_weights(session.engine):
        return 0
    return sum(p.numel() * p.element_size() for p in session.state.learner.policy.model.parameters())


def run_round(trainer: Trainer, index: int) -> dict[str, float]:
    """One round of the trainer as `Trainer.train` runs it; its metrics.

    Raises:
        WrongError: the update was skipped: there is nothing to compare.
    """
    metrics = round_metrics(trainer.round(index), trainer.session.scorer.feature_names)
    if metrics["policy/skipped"]:
        raise WrongError("the update was skipped: no sample in support, or a gradient that is not finite")
    return metrics


def tokens_of(metrics: dict[str, float]) -> int:
    return round(metrics["time/tokens_per_second"] * metrics["time/round"])


def phases(metrics: dict[str, float]) -> dict[str, float]:
    """Seconds of a round by phase, and of the whole."""
    found = {phase: metrics.get(f"time/{phase}", 0.0) for phase in PHASES}
    return {**found, "whole": metrics["time/round"]}


def check(session: Session) -> dict[str, float]:
    """Perturb the policy, sync, and put it back: mean |log q − log π| a token in nats, at each stage.

    Returns:
        "fresh", as the engine starts; "moved", by how far the perturbation moves the log-probs of the same tokens;
        "stale", of samples before the sync, if the engine has weights of its own; "synced", after it; "max", the
        largest of a token while they should agree.

    Raises:
        WrongError: engine and learner disagree while they should agree, or cannot be told apart while they should.
    """
    engine, policy = session.engine, session.state.learner.policy
    contexts, samples = session.contexts[: CHECKED[0]], CHECKED[1]

    def gap(rollouts: Any) -> dict[str, float]:
        logprobs = policy.token_logprobs(rollouts, session.micro_batch_tokens)
        tokens = (logprobs.double() - rollouts.behavior_logprob.double()).abs()
        return {"logprob_gap_mean": float(tokens.mean()), "logprob_gap_max": float(tokens.max())}

    rollouts = engine.sample(contexts, samples, 1)
    before = gap(rollouts)
    found = {"fresh": before["logprob_gap_mean"]}
    with perturbed(policy):
        found["moved"] = gap(rollouts)["logprob_gap_mean"]
        if has_own_weights(engine):
            found["stale"] = gap(engine.sample(contexts, samples, 2))["logprob_gap_mean"]
        engine.sync_weights(policy, session.state.round)
        after = gap(engine.sample(contexts, samples, 2))
        found["synced"] = after["logprob_gap_mean"]
    engine.sync_weights(policy, session.state.round)
    found["max"] = max(before["logprob_gap_max"], after["logprob_gap_max"])

    limit = GAP_LIMITS[session.config.dtype][1]
    disagreement = max(found["fresh"], found["synced"])
    if not disagreement <= limit:
        raise WrongError(f"log-probs differ from the learner's by {disagreement:.2g} nats a token (limit {limit:g})")
    unseen = [key for key in ("moved", "stale") if key in found and not found[key] > SEEN * disagreement]
    if unseen:
        raise WrongError(f"other weights do not show ({unseen[0]} {found[unseen[0]]:.2g}, agreeing {disagreement:.2g})")
    return found


@contextmanager
@torch.no_grad()
def perturbed(policy: LanguageModel) -> Iterator[None]:
    """The policy's weights with noise, in place, and afterwards as they were."""
    generator = torch.Generator(policy.device).manual_seed(0)
    kept = [parameter.detach().clone() for parameter in policy.model.parameters()]
    for parameter, old in zip(policy.model.parameters(), kept, strict=True):
        noise = torch.randn(old.shape, generator=generator, device=old.device)
        parameter.add_((PERTURBED_BY * old.float().std() * noise).to(old.dtype))
    try:
        yield
    finally:
        for parameter, old in zip(policy.model.parameters(), kept, strict=True):
            parameter.copy_(old)


def _wait(policy: LanguageModel) -> None:
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
