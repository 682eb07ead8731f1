"""Runs of two processes against the same runs of one: what they measure in every round, and what they leave."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from support import processes, runs
from support.architectures import save_architecture

ROUNDS = 5
BEGINS = {"kind": "pointwise", "feature": {"kind": "regex", "name": "begins", "pattern": "^[ -Z]"}}
RARE = "^[A-Z]"
# sums of both signs and differences of nearly equal numbers: held against 1e-4 nats, not against themselves
NEARLY_ZERO = ("z/log_z", "engine/", "policy/kl_to_base", "policy/log_ratio_max", "proposal/kl_gain")


@dataclass
class Case:
    """A run, which model it trains, and which other one is its base."""

    model: str = "tied"
    base: str | None = None
    sections: dict[str, Any] = field(default_factory=dict)
    by_torchrun: bool = False  # the run of one process too


CASES = {
    "tied": Case(),
    "untied": Case("untied"),
    "LoRA": Case("untied", sections={"lora": {"rank": 4}}),
    "fewer sequences than processes": Case(
        # Z from a sample of the base: by a Z of its own a single sequence has nothing to learn but rounding
        sections={
            "trainer": {"contexts_per_round": 1, "samples_per_context": 1},
            "target": [{"kind": "rlhf", "beta": 0.5, "feature": runs.LETTERS["feature"]}],
            "partition": {"kind": "oracle"},
            "loss": {"baseline": "none"},
        }
    ),
    "one micro-batch a sequence": Case(sections={"trainer": {"micro_batch_tokens": 1}}),
    "very uneven lengths": Case(
        # all completions of length 60 hold a letter, and of a target that all meet there is nothing to learn but noise
        sections={"engine": {"max_new_tokens": 60}, "trainer": {"micro_batch_tokens": 64}, "target": [BEGINS]}
    ),
    "a round ahead": Case(sections={"trainer": {"pipeline_depth": 1}, "loss": {"ratio_drop": 1.02}}),
    "one second moment a tensor": Case(sections={"optimizer": {"kind": "adamw_per_tensor", "weight_decay": 0.1}}),
    "two updates a round": Case(sections={"trainer": {"updates_per_round": 2, "micro_batch_tokens": 20}}),
    "adaptive proposal": Case(sections={"proposal": {"kind": "adaptive", "every": 2}}),
    "another base": Case(base="untied", sections={"partition": {"kind": "oracle"}}),
    "a base that moves": Case(sections={"base": {"refresh_every": 2}}),
    "the best stays, and the end comes early": Case(
        sections={
            "evaluation": {"every": 1},
            "checkpoint": {"best": "min kl_to_base"},
            "early_stop": {"metric": "max feature/letters", "patience": 4},
            "trainer": {"checkpoint_every": 1},
        }
    ),
    "LoRA, a base that moves": Case("untied", sections={"lora": {"rank": 4}, "base": {"refresh_every": 2}}),
    "rounds without a sample in support": Case(
        sections={
            "target": [{"kind": "pointwise", "feature": {"kind": "regex", "name": "rare", "pattern": RARE}}],
            "loss": {"baseline": "none"},  # or a round of which all is in support would be skipped too
        }
    ),
    "bfloat16": Case(
        # one process alone rounds the sum of its gradients; micro-batches are equal, for what they hold decides how
        # a log-prob is rounded
        sections={"dtype": "bfloat16", "trainer": {"micro_batch_tokens": 1}},
        by_torchrun=True,
    ),
}


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "tied": tiny_model,
        "untied": save_architecture("qwen3", folder / "untied", tiny_model),
    }


def write(case: Case, models: dict[str, Path], folder: Path, run_dir: str) -> Path:
    folder.mkdir(exist_ok=True)
    sections = {"contexts": {"train": str(runs.write_contexts(folder, *runs.PROMPTS))}} | case.sections
    if case.base is not None:
        sections["base"] = {"model": str(models[case.base])}
    config = runs.settings(models[case.model], folder / run_dir, **sections)
    config = runs.merged(config, {"engine": {"kind": "transformers"}, "trainer": {"rounds": ROUNDS}})
    path = folder / f"{run_dir}.yaml"
    path.write_text(runs.yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory) -> Path:
    """Every case, trained by two processes and by one."""
    folder = tmp_path_factory.mktemp("runs")
    ended = processes.run(*(["train", write(case, models, folder / name, "two")] for name, case in CASES.items()))
    assert ended.returncode == 0, ended.stderr
    alone = {name: ["train", write(case, models, folder / name, "one")] for name, case in CASES.items()}
    ended = processes.run(*(alone.pop(name) for name, case in CASES.items() if case.by_torchrun), count=1)
    assert ended.returncode == 0, ended.stderr
    assert [name for name, command in alone.items() if runs.call(*command)] == []
    return folder


def differences(ours: Path, expected: Path) -> dict[str, float]:
    """Of each metric the largest difference in all rounds; relative, but for what is nearly zero."""
    largest: dict[str, float] = {}
    pairs = zip(runs.rows(ours / "metrics.jsonl"), runs.rows(expected / "metrics.jsonl"), strict=True)
    for a, b in pairs:
        assert a.keys() == b.keys()
        for key in a:
            if key.startswith(("time/", "memory/")) or a[key] == b[key]:
                continue
            scale = 1.0 if key.startswith(NEARLY_ZERO) else b["policy/length"] if key == "loss" else abs(b[key])
            largest[key] = max(largest.get(key, 0.0), abs(a[key] - b[key]) / scale if scale else math.inf)
    return largest


@pytest.mark.parametrize("name", CASES)
def test_two_processes_measure_what_one_does(finished, name):
    found = differences(finished / name / "two", finished / name / "one")
    assert {key: value for key, value in found.items() if not value <= 1e-4} == {}


@pytest.mark.parametrize("name", ["tied", "LoRA", "a round ahead", "one micro-batch a sequence"])
def test_distances_on_exact_samples_of_the_target_are_the_same(finished, name):
    two, one = (runs.rows(finished / name / run / "evaluation.jsonl") for run in ("two", "one"))
    for ours, expected in zip(two, one, strict=True):
        for key in ("forward_kl", "jensen_shannon", "kl_of_target_to_base"):
            values = [row["metrics"][f"target_samples/{key}"]["value"] for row in (ours, expected)]
            assert values[0] == pytest.approx(values[1], abs=1e-4) and values[1] > 0


def test_three_processes_do_too(finished, models, tmp_path):
    """Where rows of a parameter, contexts and passes are no multiple of the processes."""
    names = ("tied", "fewer sequences than processes", "very uneven lengths")
    commands = [["train", write(CASES[name], models, tmp_path / name, "three")] for name in names]
    ended = processes.run(*commands, count=3)
    assert ended.returncode == 0, ended.stderr
    found = {name: differences(tmp_path / name / "three", finished / name / "one") for name in names}
    assert {name: far for name in names if (far := [k for k, v in found[name].items() if not v <= 1e-4])} == {}


def test_both_end_where_one_does_with_the_same_best_checkpoint(finished):
    both = [finished / "the best stays, and the end comes early" / name for name in ("two", "one")]
    rounds, kept = [], []
    for run_dir in both:
        rounds.append([row["round"] for row in runs.rows(run_dir / "evaluation.jsonl")])
        kept.append(sorted(path.name for path in (run_dir / "checkpoints").iterdir()))
    assert rounds == [[0, 1, 2, 3, 4]] * 2 and kept == [["round-000002", "round-000003", "round-000004"]] * 2


def test_a_checkpoint_is_in_the_dtype_of_the_run(finished):
    models = (AutoModelForCausalLM.from_pretrained(path) for path in finished.glob("bfloat16/*/checkpoints/*5"))
    assert [model.dtype for model in models] == [torch.bfloat16] * 2


def test_a_round_is_skipped_by_both(finished):
    run_dir = finished / "rounds without a sample in support" / "two"
    assert {row["policy/skipped"] for row in runs.rows(run_dir / "metrics.jsonl")} == {0, 1}


def test_two_machines_do_what_two_processes_of_one_do(finished, models, tmp_path):
    for ended in processes.run_on_two_machines(["train", write(CASES["tied"], models, tmp_path, "two")]):
        assert ended.returncode == 0, ended.stderr
    runs.assert_equal(runs.record(tmp_path / "two"), runs.record(finished / "tied" / "two"))


def test_a_checkpoint_goes_on_with_any_number_of_processes(models, tmp_path):
    """2 → 2 to the last bit, with a feature that draws too; 2 → 1 and 1 → 2 as near as sums in another order are.

    Their base moves, and of second moments each tensor has one. 2 → 2 from a checkpoint that was written while the next
    round went on.
    """
    names = ("two", "one", "2 to 2", "2 to 1", "1 to 2")
    moves = Case("untied", sections={"base": {"refresh_every": 2}, "optimizer": {"kind": "adamw_per_tensor"}})
    paths = {name: write(moves, models, tmp_path / name, "run") for name in names}
    for name in ("drawing", "drawing, 2 to 2"):
        (tmp_path / name).mkdir()
        # of nine completions one process scores four and one five: their generators are soon in different places
        sections = {
            "engine": {"kind": "transformers"},
            "optimizer": {"schedule": "constant"},
            "trainer": {"contexts_per_round": 3, "samples_per_context": 3},
            "evaluation": {"every": 1},
            "checkpoint": {"best": "max kl_to_base"},
        }
        config = runs.drawing(models["tied"], tmp_path / name, tmp_path / name / "run", **sections)
        paths[name] = runs.write_config(tmp_path / name, config)

    def train(name: str) -> list[object]:
        return ["train", paths[name], f"--trainer.rounds={3 if name == '2 to 2' else 2 if ' to ' in name else 4}"]

    def resume(name: str) -> list[object]:
        return ["train", "--resume", tmp_path / name / "run", "--trainer.rounds=4"]

    assert runs.call(*train("one")) == runs.call(*train("1 to 2")) == 0
    latest = ["remove", tmp_path / "2 to 2" / "run/checkpoints/round-000003"]
    commands = [train("two"), train("2 to 2"), latest, resume("2 to 2"), train("2 to 1"), resume("1 to 2")]
    drawing = [train("drawing"), train("drawing, 2 to 2"), resume("drawing, 2 to 2")]
    ended = processes.run(*commands, *drawing)
    assert ended.returncode == 0, ended.stderr
    assert runs.call(*resume("2 to 1")) == 0

    for pair in (("2 to 2", "two"), ("drawing, 2 to 2", "drawing")):
        bitwise = [runs.record(tmp_path / name / "run") for name in pair]
        for record in bitwise:  # which has rows of where the first part ended
            record.pop("evaluation.jsonl"), record.pop("samples.jsonl")
        runs.assert_equal(*bitwise)
    for name, whole in (("2 to 1", "two"), ("1 to 2", "one")):
        both = [tmp_path / folder / "run" for folder in (name, whole)]
        found = differences(*both)
        assert {key: value for key, value in found.items() if not value <= 1e-5} == {}
        ours, theirs = (AutoModelForCausalLM.from_pretrained(run / "checkpoints/round-000004") for run in both)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert float((a - b).detach().abs().mean()) < 1e-6
