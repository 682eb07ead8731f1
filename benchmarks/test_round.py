"""One round, ours beside the plain pipeline: the same numbers first, then seconds by phase and peak memory."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fdpg_fast.partition import pseudo_rewards
from fdpg_fast.rollouts import Rollouts
from fdpg_fast.session import Session
from fdpg_kernels import sum_by_sequence
from plain_pipeline import PaddedBatch, PlainPipeline, jensen_shannon_loss, sequence_logprob
from replay import Replay
from rounds import PIPELINES, SETTINGS, Measurements, make_config, make_model, measure, peak_memory_alone

PHASES = {
    "sampling": ("ours", "plain"),
    "features": ("ours", "plain"),
    "proposal score": ("plain",),  # ours has these log-probs from the sampler
    "base score": ("ours", "plain"),
    "forward+backward": ("ours", "plain"),
    "optimizer": ("ours", "plain"),
    "sync": ("ours",),
}


REPLAY = Replay()


@pytest.fixture(scope="session", params=SETTINGS)
def setting_name(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def measured(setting_name: str, tmp_path_factory) -> Measurements:
    return measure(SETTINGS[setting_name], tmp_path_factory.mktemp(setting_name))


@pytest.mark.parametrize(("phase", "pipeline"), [(phase, who) for phase, both in PHASES.items() for who in both])
@pytest.mark.benchmark(timer=REPLAY)
def test_phase(benchmark, measured: Measurements, setting_name: str, phase: str, pipeline: str) -> None:
    benchmark.group = f"round of {setting_name}: {phase}"
    REPLAY.run(benchmark, [r.phases[phase] for r in measured.rounds[pipeline]])


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.benchmark(timer=REPLAY)
def test_whole_round(benchmark, measured: Measurements, setting_name: str, pipeline: str) -> None:
    rounds = measured.rounds[pipeline]
    benchmark.group = f"round of {setting_name}: whole"
    benchmark.extra_info["cpu_seconds"] = statistics.median(r.cpu for r in rounds)
    benchmark.extra_info["tokens"] = statistics.median(r.tokens for r in rounds)
    benchmark.extra_info["load_average"] = measured.load_average
    REPLAY.run(benchmark, [r.wall for r in rounds])


def test_time_ratio(measured: Measurements, setting_name: str, comparisons: list[str]) -> None:
    wall, cpu = (
        {name: statistics.median(getattr(r, unit) for r in rounds) for name, rounds in measured.rounds.items()}
        for unit in ("wall", "cpu")
    )
    comparisons.append(
        f"{setting_name}: round {wall['ours']:.2f} s, plain {wall['plain']:.2f} s, "
        f"ratio {wall['ours'] / wall['plain']:.2f} (target {SETTINGS[setting_name].time_target}); "
        f"CPU time {cpu['ours']:.2f} s, {cpu['plain']:.2f} s, ratio {cpu['ours'] / cpu['plain']:.2f}"
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_peak_memory(benchmark, name: str, comparisons: list[str]) -> None:
    """Each pipeline in a process of its own, after two rounds."""
    peak = {}

    def run_both() -> None:
        for pipeline in PIPELINES:
            peak[pipeline] = peak_memory_alone(name, pipeline)

    benchmark.group = "peak memory (see extra_info)"
    benchmark.pedantic(run_both, rounds=1)
    benchmark.extra_info["peak_resident_bytes"] = peak
    ours, plain = (max(peak[pipeline].values()) for pipeline in PIPELINES)
    target = SETTINGS[name].memory_target
    comparisons.append(
        f"{name}: peak resident memory {ours / 2**30:.2f} GiB, plain {plain / 2**30:.2f} GiB, ratio {ours / plain:.2f}"
        + (f" (target {target})" if target else "")
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_both_pipelines_compute_the_same(name: str, tmp_path: Path) -> None:
    """Like is compared with like: on the same rollouts, equal log-probs of all three models and equal gradients."""
    setting = replace(SETTINGS[name], contexts=min(4, SETTINGS[name].contexts), samples=8)
    make_model(setting)
    config = make_config(setting, tmp_path)
    session = Session(config)
    plain = PlainPipeline(
        config.model,
        session.scorer.target.features[0],
        max_new_tokens=setting.max_new_tokens,
        samples_per_context=setting.samples,
        learning_rate=1e-5,
    )
    _move_policy_off_base(session, plain)
    contexts = session.contexts[: setting.contexts]
    rollouts = session.engine.sample(contexts, setting.samples, seed=1)
    batch = pad(rollouts, plain.tokenizer.pad_token_id)
    log_phi = torch.where(
        torch.arange(len(rollouts)) % 3 == 0, -torch.inf, 0.0
    ).double()  # a constraint for all seasons

    base = sum_by_sequence(session.base.token_logprobs(rollouts, 16384), rollouts.cu_seqlens)
    behavior = sum_by_sequence(rollouts.behavior_logprob, rollouts.cu_seqlens)
    log_z = torch.full_like(base, -0.4)
    rewards = pseudo_rewards(behavior, base + log_phi, log_z, session.divergence, None)
    baseline = session.state.estimates.baseline(rewards, rollouts.context_index)
    learner = session.state.learner
    ours = []
    learner.optimizer.step = lambda: ours.extend(p.grad.clone() for p in learner.policy.model.parameters())
    gradient = learner.backward(rollouts, base + log_phi, log_z, baseline, session.divergence)
    update = learner.step(*gradient, 0)

    with torch.no_grad():
        proposal, plain_base = (sequence_logprob(model, batch) for model in (plain.policy, plain.base))
    policy = sequence_logprob(plain.policy, batch)
    score = plain_base + log_phi.float()
    jensen_shannon_loss(policy, proposal, score, log_z.float(), setting.samples).backward()
    torch.nn.utils.clip_grad_norm_(plain.policy.parameters(), config.optimizer.max_grad_norm)

    tokens = rollouts.lengths
    for mine, theirs in ((behavior, proposal), (base, plain_base), (update.weights.policy_logprob, policy)):
        # per token; torch's float32 log_softmax adds 49,152 terms in a row and is 7e-6 too high by itself
        assert float(((mine - theirs.detach()).abs() / tokens).max()) < 2e-5
    mine, theirs = (
        torch.cat([g.flatten() for g in grads]) for grads in (ours, [p.grad for p in plain.policy.parameters()])
    )
    assert float(torch.nn.functional.cosine_similarity(mine.double(), theirs.double(), dim=0)) > 0.99999
    assert abs(float(mine.norm() / theirs.norm()) - 1) < 1e-4


def pad(rollouts: Rollouts, pad_token_id: int) -> PaddedBatch:
    """Packed rollouts as `generate` would have returned them."""
    prompts = [torch.tensor(rollouts.contexts[i].token_ids) for i in rollouts.context_index.tolist()]
    completions = rollouts.token_ids.split(rollouts.lengths.tolist())
    left, right = max(map(len, prompts)), max(map(len, completions))
    input_ids = torch.full((len(rollouts), left + right), pad_token_id)
    mask = torch.zeros_like(input_ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        input_ids[row, left - len(prompt) : left + len(completion)] = torch.cat([prompt, completion])
        mask[row, left - len(prompt) : left + len(completion)] = 1
    return PaddedBatch(input_ids, mask, mask[:, left:].bool())


def _move_policy_off_base(session: Session, plain: PlainPipeline) -> None:
    """Where policy and base are equal, a pipeline that mixes them up would pass."""
    generator = torch.Generator().manual_seed(0)
    mine, theirs = session.engine.language_model.model.parameters(), plain.policy.parameters()
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            p.mul_(1 + 0.02 * torch.randn(p.shape, generator=generator))
            q.copy_(p)
