"""The two settings, both pipelines behind one method, and the measuring of their rounds and peak memory.

python benchmarks/rounds.py SETTING ours|plain [ROUNDS]     one pipeline alone: peak memory and seconds as JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdpg_fast.cli import prepare_environment

prepare_environment()  # before torch is imported

import torch

from fdpg_fast.config.load import parse_config
from fdpg_fast.config.schema import TrainConfig
from fdpg_fast.contexts import Prompting, load_contexts
from fdpg_fast.engines.memory import peak_memory
from fdpg_fast.runs.metrics import round_metrics
from fdpg_fast.seeds import schedule
from fdpg_fast.trainer import Trainer
from plain_pipeline import PlainPipeline

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Setting:
    """One round of work, and how much of the plain pipeline's time and memory it may take."""

    model: str
    prompt: str | None  # None: the model folder's own prompts/train.jsonl
    feature: dict[str, Any]
    contexts: int
    samples: int
    max_new_tokens: int
    rounds: int  # timed ones, after one for warming up
    time_target: float
    memory_target: float | None


SETTINGS = {
    "smollm2-135m": Setting(
        model="models/smollm2-135m-instruct",
        prompt="It was a cold and stormy night",
        feature={"kind": "word", "word": "wind"},
        contexts=1,
        samples=64,
        max_new_tokens=24,
        rounds=3,
        time_target=0.55,
        memory_target=0.6,
    ),
    "tiny-python-lm": Setting(
        model="examples/tiny-python-lm",
        prompt=None,
        feature={"kind": "python_parses"},
        contexts=32,
        samples=8,
        max_new_tokens=64,
        rounds=7,
        time_target=0.5,
        memory_target=None,
    ),
}


@dataclass(frozen=True)
class Round:
    """What one round took: wall seconds by phase and in all, CPU seconds, completion tokens."""

    phases: dict[str, float]
    wall: float
    cpu: float
    tokens: int


@dataclass
class Measurements:
    """Rounds of both pipelines, taken in turns, and the load of the machine at each turn."""

    rounds: dict[str, list[Round]] = field(default_factory=lambda: {"ours": [], "plain": []})
    load_average: list[float] = field(default_factory=list)


def make_model(setting: Setting) -> None:
    """SmolLM2 is not shipped: its script fetches it."""
    if not (ROOT / setting.model / "model.safetensors").exists():
        subprocess.run([sys.executable, "examples/smollm2/get_model.py"], cwd=ROOT, check=True)


def make_config(setting: Setting, run_dir: Path) -> TrainConfig:
    """The library's defaults wherever the setting says nothing."""
    contexts = ROOT / setting.model / "prompts/train.jsonl"
    if setting.prompt is not None:
        contexts = run_dir / "prompts.txt"
        contexts.write_text(setting.prompt)
    config = {
        "model": str(ROOT / setting.model),
        "run_dir": str(run_dir),
        "device": "cpu",
        "target": [{"kind": "pointwise", "feature": setting.feature}],
        "contexts": {"train": str(contexts)},
        "engine": {"max_new_tokens": setting.max_new_tokens},
        "trainer": {"contexts_per_round": setting.contexts, "samples_per_context": setting.samples},
    }
    return parse_config(config)


class Ours:
    """`Trainer.round`, with the update split into its two phases by the optimizer's own hooks."""

    def __init__(self, config: TrainConfig):
        self.trainer = Trainer(config)
        assert self.trainer.session.engine is not None  # started before anything is timed
        optimizer = self.trainer.session.state.learner.optimizer
        self._started = self._optimizer = 0.0
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _after(self, *_: Any) -> None:
        self._optimizer = time.perf_counter() - self._started

    def round(self, index: int) -> tuple[dict[str, float], int]:
        metrics = round_metrics(self.trainer.round(index), self.trainer.session.scorer.feature_names)
        assert not metrics["policy/skipped"], "no sample in support: the update was skipped, nothing to compare"
        phases = {
            "sampling": metrics["time/sample"],
            "features": metrics["time/features"],
            "base score": metrics["time/base"],
            "forward+backward": metrics["time/update"] - self._optimizer,
            "optimizer": self._optimizer,
            "sync": metrics["time/sync"],
        }
        settings = self.trainer.session.config.trainer
        samples = settings.contexts_per_round * settings.samples_per_context
        return phases, round(metrics["policy/length"] * samples)


class Plain:
    """The plain pipeline on the contexts that the trainer would choose."""

    def __init__(self, config: TrainConfig):
        self.settings = config.trainer
        self.pipeline = PlainPipeline(
            config.model,
            config.target[0].feature.build("cpu"),
            max_new_tokens=config.engine.max_new_tokens,
            samples_per_context=config.trainer.samples_per_context,
            learning_rate=config.optimizer.learning_rate,
        )
        self.contexts = load_contexts(
            config.contexts.train, Prompting(self.pipeline.tokenizer, 10_000, len(self.pipeline.tokenizer))
        )

    def round(self, index: int) -> tuple[dict[str, float], int]:
        chosen = schedule(len(self.contexts), self.settings.contexts_per_round, index, self.settings.seed)
        return self.pipeline.round([self.contexts[i].text for i in chosen])


PIPELINES = {"ours": Ours, "plain": Plain}


def measure(setting: Setting, run_dir: Path) -> Measurements:
    """Both pipelines in one process, turn by turn, so that a machine that slows down slows both."""
    make_model(setting)
    torch.manual_seed(0)
    config = make_config(setting, run_dir)
    pipelines = {name: make(config) for name, make in PIPELINES.items()}
    found = Measurements()
    for index in range(setting.rounds + 1):
        for name, pipeline in pipelines.items():
            wall, cpu = time.perf_counter(), time.process_time()
            phases, tokens = pipeline.round(index)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if index > 0:
                found.rounds[name].append(Round(phases, wall, cpu, tokens))
                found.load_average.append(round(os.getloadavg()[0], 2))
    return found


def peak_memory_alone(setting_name: str, pipeline: str) -> dict[str, int]:
    """Largest resident bytes of a process that runs this pipeline and nothing else."""
    make_model(SETTINGS[setting_name])
    command = [sys.executable, str(Path(__file__)), setting_name, pipeline]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])["peak"]


def main(setting_name: str, pipeline: str, rounds: str = "2") -> None:
    """Two rounds show the peak: the second is the first with AdamW's moments in place."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as run_dir:
        make = PIPELINES[pipeline]
        running = make(make_config(SETTINGS[setting_name], Path(run_dir)))
        peak, seconds = {"loaded": peak_memory()}, []
        for index in range(int(rounds)):
            start = time.perf_counter()
            running.round(index)
            seconds.append(time.perf_counter() - start)
            peak[f"round {index}"] = peak_memory()
    print(json.dumps({"peak": peak, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
