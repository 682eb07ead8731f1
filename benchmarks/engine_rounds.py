"""Bare vLLM, our two engines and whole rounds with them, turn by turn on the CPU: what test_engines.py shows.

python benchmarks/engine_rounds.py SETTING     prints the measurements as JSON, after the engines were checked

One process holds every trainer, so that a machine that slows down slows all; it is a process of its own because vLLM
changes the process that it runs in (threads, memory binding), and its engines can only be closed all together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fdpg_fast.cli import prepare_environment

prepare_environment()  # before torch is imported

import torch

import engine_turns
from fdpg_fast.config.schema import TrainConfig
from fdpg_fast.trainer import Trainer
from rounds import SETTINGS, Setting, make_config, make_model

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "transformers": {"engine": {"kind": "transformers"}},
    "vllm": {"engine": {"kind": "vllm"}},
    "vllm, depth 1": {"engine": {"kind": "vllm"}, "trainer": {"pipeline_depth": 1}},
}
ROUNDS = [*VARIANTS]
SYNCS = 9


@dataclass(frozen=True)
class Repeats:
    samplings: int
    rounds: int


REPEATS = {"smollm2-135m": Repeats(samplings=5, rounds=3), "tiny-python-lm": Repeats(samplings=9, rounds=7)}


@dataclass(frozen=True)
class Measured:
    """Of one setting: gaps in nats, seconds, tokens, bytes; by sampler or by variant."""

    gaps: dict[str, dict[str, float]]
    sampling: engine_turns.Turns
    sync_seconds: list[float]
    sync_bytes: int
    rounds: dict[str, list[dict[str, float]]]  # engine_turns.phases, CPU seconds and tokens of each
    round_gaps: dict[str, list[float]]  # engine/logprob_gap_mean of each round
    load_average: list[float]  # at each turn of the rounds


def variant_config(setting: Setting, variant: str, folder: Path) -> TrainConfig:
    """The library's defaults wherever setting and variant say nothing."""
    folder.mkdir()
    config = make_config(setting, folder)
    sections = {name: getattr(config, name).model_copy(update=keys) for name, keys in VARIANTS[variant].items()}
    return config.model_copy(update=sections)


def measure(setting_name: str, folder: Path) -> Measured:
    """Check every engine, then time sampling, syncs and rounds."""
    setting, repeats = SETTINGS[setting_name], REPEATS[setting_name]
    make_model(setting)
    torch.manual_seed(0)
    trainers = {name: Trainer(variant_config(setting, name, folder / name)) for name in VARIANTS}
    gaps = {name: engine_turns.check(trainer.session) for name, trainer in trainers.items()}

    engines = [trainer.session.engine for trainer in trainers.values()]
    samplers = engine_turns.samplers_of(trainers["vllm"].session.engine)
    samplers |= engine_turns.samplers_of(trainers["transformers"].session.engine)
    sampling = engine_turns.take_turns(
        samplers, trainers["vllm"].session, repeats.samplings, lambda: engine_turns.forget_prefixes(*engines)
    )
    session = trainers["vllm"].session
    sync_seconds = engine_turns.time_syncs(session, SYNCS)
    sync_bytes = engine_turns.bytes_moved(session)

    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ROUNDS}
    round_gaps: dict[str, list[float]] = {name: [] for name in ROUNDS}
    load_average = []
    for index in range(repeats.rounds + 1):
        for name in ROUNDS[index % len(ROUNDS) :] + ROUNDS[: index % len(ROUNDS)]:
            cpu = time.process_time()
            metrics = engine_turns.run_round(trainers[name], index)
            cpu = time.process_time() - cpu
            if index > 0:  # the first warms up, and at depth 1 samples twice
                tokens = engine_turns.tokens_of(metrics)
                rounds[name].append({**engine_turns.phases(metrics), "cpu": cpu, "tokens": tokens})
                round_gaps[name].append(metrics["engine/logprob_gap_mean"])
        load_average.append(round(os.getloadavg()[0], 2))
    return Measured(gaps, sampling, sync_seconds, sync_bytes, rounds, round_gaps, load_average)


def measure_alone(setting_name: str) -> Measured:
    """`measure` in a process of its own."""
    command = [sys.executable, str(Path(__file__)), setting_name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    return Measured(**found | {"sampling": engine_turns.Turns(**found["sampling"])})


def main(setting_name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(setting_name, Path(folder))
    print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
