"""Gradients of two processes against those of one, from the same two micro-batches, in each way to run a block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support import processes, runs
from support.architectures import save_architecture

MODELS = ("llama", "llama, tied", "gpt2", "gemma2", "mixtral", "gpt_oss", "t5", "bart")
WAYS = {
    "plain": {"activation_checkpointing": "off"},
    "recomputed": {"activation_checkpointing": "on"},
    "kept whole": {"activation_checkpointing": "off", "reshard_after_forward": False},
}


@pytest.fixture(scope="module")
def both(tiny_model, tmp_path_factory) -> Path:
    """A folder with the gradients of each model: of two processes each way, and of one."""
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
        for way, settings in WAYS.items():
            (folder / name / way).mkdir(parents=True, exist_ok=True)
            written = runs.merged(config, {"trainer": settings})
            commands.append(["gradients", runs.write_config(folder / name / way, written), folder / name / way / "two"])
    ended = processes.run(*commands)
    assert ended.returncode == 0, ended.stderr
    for name in MODELS:
        processes.do(["gradients", str(folder / name / "plain/config.yaml"), str(folder / name / "one")])
    return folder


def gradients(folder, name, way):
    return [torch.load(folder / name / path) for path in (f"{way}/two", "one")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_one_process(both, name, way):
    found, expected = gradients(both, name, way)
    assert found.keys() == expected.keys()
    largest = max(float(x.norm()) for x in expected.values())
    apart = {key: float((found[key] - x).norm()) / max(float(x.norm()), 1e-3 * largest) for key, x in expected.items()}
    assert largest > 1e-2 and {key: gap for key, gap in apart.items() if gap > 1e-5} == {}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "llama, tied", "mixtral"])
def test_equal_micro_batches_give_equal_bits(both, name, way):
    """But for the embedding, whose rows one process adds up one after another, with those of a tied head."""
    found, expected = gradients(both, name, way)
    assert [key for key, x in expected.items() if not torch.equal(found[key], x) and "embed" not in key] == []


@pytest.mark.parametrize("name", MODELS)
def test_a_block_that_stays_whole_is_gathered_once(both, name):
    plain, kept = (int((both / name / way / "two.gathers").read_text()) for way in ("plain", "kept whole"))
    assert plain - kept >= 2  # the blocks of all these models
