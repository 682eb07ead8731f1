"""Gradients of two processes against those of one, from the same two micro-batches."""

from __future__ import annotations

import pytest
import torch

from support import processes, runs
from support.architectures import save_architecture

MODELS = ("llama", "llama, tied", "gpt2", "gemma2", "mixtral", "gpt_oss", "t5", "bart")


@pytest.fixture(scope="module")
def both(tiny_model, tmp_path_factory):
    """The gradients of each model, of two processes and of one."""
    folder = tmp_path_factory.mktemp("gradients")
    commands = []
    for name in MODELS:
        model = save_architecture(name, folder / name, tiny_model)
        config = runs.settings(
            model,
            folder / name / "run",
            target=[{"kind": "pointwise", "feature": {"kind": "regex", "name": "begins", "pattern": "^[ -Z]"}}],
            engine={"max_new_tokens": 6, "kind": "transformers"},
            contexts={"train": str(runs.write_contexts(folder, "a", "tea "))},
            # two micro-batches, each of one context: one of each process
            trainer={"contexts_per_round": 2, "samples_per_context": 8, "micro_batch_tokens": 60},
        )
        (folder / name).mkdir(exist_ok=True)
        commands.append(["gradients", runs.write_config(folder / name, config)])
    ended = processes.run(*([*command, folder / f"{i} two"] for i, command in enumerate(commands)))
    assert ended.returncode == 0, ended.stderr
    for i, command in enumerate(commands):
        processes.do([*map(str, command), str(folder / f"{i} one")])
    return {name: [torch.load(folder / f"{i} {who}") for who in ("two", "one")] for i, name in enumerate(MODELS)}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_one_process(both, name):
    found, expected = both[name]
    assert found.keys() == expected.keys()
    largest = max(float(x.norm()) for x in expected.values())
    apart = {key: float((found[key] - x).norm()) / max(float(x.norm()), 1e-3 * largest) for key, x in expected.items()}
    assert largest > 1e-2 and {key: gap for key, gap in apart.items() if gap > 1e-5} == {}


@pytest.mark.parametrize("name", ["llama", "llama, tied", "mixtral"])
def test_equal_micro_batches_give_equal_bits(both, name):
    """But for the embedding, whose rows one process adds up one after another, with those of a tied head."""
    found, expected = both[name]
    assert [key for key, x in expected.items() if not torch.equal(found[key], x) and "embed" not in key] == []
