"""The runner of most experiments: train a run, and measure it as `compare` would."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..config.load import parse_config
from ..runs.folder import read_run
from ..trainer import Trainer
from .compare import measure
from .rows import Row

CURVE_POINTS = 50
CURVE = ("target/", "z/log_z", "policy/", "proposal/")  # what of a round's metrics goes into curves


def run_case(settings: dict[str, Any], seed: int, folder: Path) -> Row:
    """Train in `folder`, going on where an earlier attempt stopped, and measure the last checkpoint.

    Args:
        settings: a `TrainConfig` without run_dir, and `base_samples`, completions of the base a context for Z.
        seed: trainer.seed; the measurement has one seed for all runs.
    """
    base_samples = settings.pop("base_samples")
    settings = {**settings, "run_dir": str(folder), "trainer": {**settings.get("trainer", {}), "seed": seed}}
    config = parse_config(settings)
    started = (folder / "config.yaml").exists()
    Trainer(config, resume=started).train(evaluate=False)
    samples = config.evaluation.samples_per_context
    evaluation = measure(config, samples, base_samples, 1, folder.parent)
    rounds = read_run(folder).metrics
    kept = rounds[:: -(-len(rounds) // CURVE_POINTS)]
    curve = [
        {"round": row["round"]} | {key: float(f"{row[key]:.6g}") for key in row if key.startswith(CURVE)}
        for row in kept
    ]
    shutil.rmtree(folder / "checkpoints")  # a sweep of a hundred would fill the disk; the row is what is kept
    return Row({}, seed, evaluation.metrics, curve)
