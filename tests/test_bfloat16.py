"""A bfloat16 policy is trained through float32 master weights: small steps add up, and runs resume as they were."""

import pytest
import torch

from fdpg_fast.config.schema import LossConfig, OptimizerConfig
from fdpg_fast.contexts import Context
from fdpg_fast.engines import TransformersEngine
from fdpg_fast.learner import Learner
from fdpg_fast.models.load import load_model
from fdpg_kernels import divergences, sum_by_sequence
from support import runs


def step(learner, rollouts):
    """One update towards texts that are likelier than e⁻¹⁰."""
    log_q = sum_by_sequence(rollouts.behavior_logprob, rollouts.cu_seqlens)
    zeros = torch.zeros(len(rollouts), dtype=torch.float64)
    gradient = learner.backward(rollouts, log_q.clamp(min=-10), zeros, zeros, divergences.get("jensen_shannon"))
    return learner.step(*gradient, 0)


def make_learner(folder, dtype, learning_rate, micro_batch_tokens=10_000):
    policy = load_model(str(folder), dtype, "cpu", trust_remote_code=False)
    settings = LossConfig(ratio="none"), OptimizerConfig(learning_rate=learning_rate)
    return Learner(policy, *settings, rounds=1, micro_batch_tokens=micro_batch_tokens)


@pytest.fixture(scope="module")
def rollouts(tiny_model):
    policy = load_model(str(tiny_model), "float32", "cpu", trust_remote_code=False)
    contexts = [Context(0, "", (5,)), Context(1, "", (80, 33))]
    return TransformersEngine(policy, [0], max_new_tokens=6).sample(contexts, 8, seed=0)


def test_steps_too_small_for_bfloat16_add_up(tiny_model, rollouts):
    learner = make_learner(tiny_model, "bfloat16", learning_rate=2e-5)
    before = [p.detach().clone() for p in learner.policy.model.parameters()]
    still = []
    for _ in range(40):
        step(learner, rollouts)
        now = list(learner.policy.model.parameters())
        still.append(sum(int((a == b).sum()) for a, b in zip(before, now, strict=True)))
    total = sum(p.numel() for p in before)
    assert still[0] > 0.9 * total and still[-1] < 0.6 * total
    for parameter, master in zip(learner.policy.model.parameters(), learner.masters, strict=True):
        assert torch.equal(parameter, master.bfloat16()) and parameter.grad is None and master.grad is None


def test_the_gradient_is_that_of_float32_but_for_rounding(tiny_model, rollouts):
    norms = {}
    for dtype in ("float32", "bfloat16"):
        learner = make_learner(tiny_model, dtype, learning_rate=1e-9, micro_batch_tokens=20)  # many micro-batches
        norms[dtype] = step(learner, rollouts).grad_norm
    assert norms["bfloat16"] == pytest.approx(norms["float32"], rel=0.05)


def test_resumed_run_is_the_same_run(tiny_model, tmp_path):
    def write(folder):
        contexts = {"train": str(runs.write_contexts(folder, *runs.PROMPTS))}
        trainer = {"rounds": 4, "checkpoint_every": 2}
        settings = runs.settings(tiny_model, folder / "run", dtype="bfloat16", contexts=contexts, trainer=trainer)
        return runs.write_config(folder, settings)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    assert runs.run(whole, "train", write(whole)).status == 0
    assert runs.run(killed, "train", write(killed), at=runs.Moment("open", "metrics.jsonl", 4)).status == -9
    assert runs.run(killed, "train", "--resume", "run").status == 0
    runs.assert_equal(runs.record(killed / "run"), runs.record(whole / "run"))
