"""AdamW with one second moment a tensor: its definition in float64, what it holds, and runs that go on with it."""

import math

import pytest
import torch

from fdpg_fast.config.schema import LossConfig, OptimizerConfig
from fdpg_fast.learner import Learner
from fdpg_fast.models.load import load_model
from fdpg_fast.optimizer import AdamWPerTensor
from support import runs

SHAPES = ((5, 3), (7,), (1,), (2, 2, 4))


def gradients(steps):
    """Of each step and tensor; the second tensor has none in step 1."""
    rng = torch.Generator().manual_seed(0)
    made = [
        [torch.randn(shape, generator=rng).double() * 10.0**-i for i, shape in enumerate(SHAPES)] for _ in range(steps)
    ]
    made[1][1] = None
    return made


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_are_those_of_the_definition(weight_decay):
    rates, (beta, beta_sq) = [0.01, 0.02, 0.03, 0.01, 0.0], (0.9, 0.95)
    parameters = [torch.linspace(-1, 1, math.prod(shape)).double().view(shape).requires_grad_() for shape in SHAPES]
    optimizer = AdamWPerTensor(parameters, 1.0, (beta, beta_sq), weight_decay)
    expected = [parameter.detach().clone() for parameter in parameters]
    first, second, count = [torch.zeros_like(x) for x in expected], [0.0] * len(SHAPES), [0] * len(SHAPES)
    for rate, given in zip(rates, gradients(len(rates)), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        for i, (parameter, gradient) in enumerate(zip(parameters, given, strict=True)):
            parameter.grad = gradient
            if gradient is None:
                continue
            count[i] += 1
            first[i] = beta * first[i] + (1 - beta) * gradient
            second[i] = beta_sq * second[i] + (1 - beta_sq) * float(gradient.square().mean())
            scale = math.sqrt(second[i] / (1 - beta_sq ** count[i])) + 1e-8
            expected[i] = (1 - rate * weight_decay) * expected[i] - rate * first[i] / (1 - beta ** count[i]) / scale
        optimizer.step()
        for mine, exact in zip(parameters, expected, strict=True):
            torch.testing.assert_close(mine.detach(), exact, rtol=1e-13, atol=1e-13)


def test_tensors_of_one_coordinate_move_as_with_adamw():
    def trained(kind, **options):
        parameters = [torch.tensor([float(i)]).requires_grad_() for i in range(4)]
        optimizer = kind(parameters, lr=0.1, betas=(0.9, 0.95), weight_decay=0.2, **options)
        for step in range(6):
            for i, parameter in enumerate(parameters):
                parameter.grad = torch.tensor([math.sin(3.0 * step + i)])
            optimizer.step()
        return torch.cat(parameters).detach()

    torch.testing.assert_close(trained(AdamWPerTensor), trained(torch.optim.AdamW), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "adamw_per_tensor"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_takes_the_memory_that_it_says(kind, dtype, tiny_model):
    policy = load_model(str(tiny_model), dtype, "cpu", trust_remote_code=False)
    learner = Learner(policy, LossConfig(), OptimizerConfig(kind=kind), rounds=1, micro_batch_tokens=1)
    for parameter in learner.optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    learner.optimizer.step()
    moments = [x for state in learner.optimizer.state.values() for x in state.values() if x.ndim]
    assert learner.optimizer_bytes == sum(x.nbytes for x in moments) and {x.dtype for x in moments} == {torch.float32}


@pytest.mark.parametrize(
    "sections", [{}, {"dtype": "bfloat16"}, {"lora": {"rank": 2}}], ids=["float32", "bfloat16", "LoRA"]
)
def test_a_resumed_run_is_the_same_run(sections, tiny_model, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        contexts = {"train": str(runs.write_contexts(folder, *runs.PROMPTS))}
        given = {"optimizer": {"kind": "adamw_per_tensor"}, "trainer": {"rounds": 4, "checkpoint_every": 2}}
        runs.write_config(folder, runs.settings(tiny_model, folder / "run", contexts=contexts, **given, **sections))
    assert runs.run(whole, "train", "config.yaml").status == 0
    assert runs.run(killed, "train", "config.yaml", at=runs.Moment("open", "metrics.jsonl", 4)).status == -9
    assert runs.run(killed, "train", "--resume", "run").status == 0
    runs.assert_equal(runs.record(killed / "run"), runs.record(whole / "run"))


def test_a_round_without_a_gradient_moves_nothing_and_another_kind_is_another_run(tiny_model, tmp_path, capsys):
    never = {"kind": "pointwise", "feature": {"kind": "regex", "name": "never", "pattern": "^$^"}}
    optimizer = {"kind": "adamw_per_tensor"}
    run = runs.train(tiny_model, tmp_path, optimizer=optimizer, target=[never], loss={"baseline": "none"})
    assert [row["policy/skipped"] for row in runs.rows(run / "metrics.jsonl")] == [1.0, 1.0]
    weights = [
        load_model(str(path), "float32", "cpu", False).model for path in (tiny_model, run / "checkpoints/round-000002")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in weights), strict=True))
    capsys.readouterr()
    assert runs.call("train", "--resume", run, "--optimizer.kind=adamw", "--trainer.rounds=3") == 2
    assert "optimizer.kind" in capsys.readouterr().err
