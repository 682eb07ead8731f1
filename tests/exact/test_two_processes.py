"""Training by two processes reaches the optimum: D_f over every text, of the checkpoint that transformers opens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fdpg_fast.experiments.enumerable import D_F
from support import processes, runs
from support.enumerable_llama import LONGEST, TEXTS, save_model

COUNT_B = "def count(completions):\n    return [float(text.count('b')) for text in completions]\n"
ROUNDS = 50


@torch.no_grad()
def log_prob(folder: Path) -> Tensor:
    """Of every text after the prompt "c", [B] float64, by the model's own forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = torch.tensor([[3, *text, *[0] * (LONGEST - len(text))] for text in TEXTS])
    logprobs = model(tokens[:, :-1]).logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    has_place = torch.arange(LONGEST) <= torch.tensor([[len(text)] for text in TEXTS])  # of an END one
    return (logprobs * has_place).sum(-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    model = save_model(folder / "model")
    (folder / "reward.py").write_text(COUNT_B)
    soft = runs.imported(folder / "reward.py", "count") | {"kind": "rlhf", "beta": 0.7}
    hard = {"kind": "pointwise", "feature": {"kind": "regex", "name": "b", "pattern": "b"}}
    commands = []
    for name, divergence, target in (("soft", "reverse_kl", soft), ("hard", "jensen_shannon", hard)):
        config = runs.settings(
            model,
            folder / name,
            divergence=divergence,
            target=[target],
            contexts={"train": str(runs.write_contexts(folder, "c"))},
            engine={"kind": "transformers", "max_new_tokens": LONGEST, "max_sequences": 512},
            optimizer={"learning_rate": 3e-3, "schedule": "linear"},
            trainer={"rounds": ROUNDS, "samples_per_context": 512, "checkpoint_every": ROUNDS},
            evaluation={"contexts": 1, "samples_per_context": 2},
        )
        (folder / name).mkdir()
        commands.append(["train", runs.write_config(folder / name, config | {"run_dir": str(folder / name / "run")})])
    ended = processes.run(*commands)
    assert ended.returncode == 0, ended.stderr
    return folder


# a softmax reaches a p that is zero on some texts only in the limit
@pytest.mark.parametrize(("name", "divergence", "nearer"), [("soft", "reverse_kl", 50), ("hard", "jensen_shannon", 10)])
def test_training_reaches_the_optimum(folder, name, divergence, nearer):
    base, policy = log_prob(folder / "model"), log_prob(folder / name / f"run/checkpoints/round-{ROUNDS:06d}")
    assert float(base.exp().sum()) == pytest.approx(1) and float(policy.exp().sum()) == pytest.approx(1)
    count = torch.tensor([float(text.count(2)) for text in TEXTS], dtype=torch.float64)
    p = (base + (count / 0.7 if name == "soft" else count.clamp(max=1).log())).softmax(0)
    before, after = (float(D_F[divergence](x.exp(), p)) for x in (base, policy))
    assert before > 0.1 and after < before / nearer
