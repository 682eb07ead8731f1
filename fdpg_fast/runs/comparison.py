"""Several runs measured alike: the same contexts, samples and seed, and Z from one large frozen sample of the base.

The Z that a run's own evaluation takes from its own sample differs from run to run and biases divergences (see
`estimators.divergence_matrix`); here every run of one base and one target is held against the same number.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..config.schema import TrainConfig
from ..errors import UserError
from ..measure.evaluate import Evaluation
from ..rollouts import Rollouts
from ..trainer import Trainer
from .checkpoint import checkpoints
from .finished import evaluate_checkpoint, sample_base
from .folder import read_config


def measure_runs(
    run_dirs: Sequence[str | Path], samples: int, base_samples: int, seed: int, say: Callable[[str], None]
) -> list[Evaluation]:
    """Evaluate the newest checkpoint of each run on the evaluation contexts of the first.

    Args:
        samples: completions a context from each policy.
        base_samples: completions a context from the base, kept in the first run's folder.

    Raises:
        UserError: a run has no checkpoint, or completions of another length than the first.
    """
    configs = [read_finished(run_dir) for run_dir in run_dirs]
    first = configs[0]
    for config in configs:
        if config.engine.max_new_tokens != first.engine.max_new_tokens:
            raise UserError(
                f"compare: completions of {config.run_dir!r} end after {config.engine.max_new_tokens} tokens and those "
                f"of {first.run_dir!r} after {first.engine.max_new_tokens}: distributions over different texts"
            )
    found = []
    for number, config in enumerate(configs, start=1):
        say(f"measuring {number}/{len(configs)}: {config.run_dir}")
        alike = config.model_copy(update={"contexts": first.contexts, "evaluation": first.evaluation})
        found.append(measure(alike, samples, base_samples, seed, Path(first.run_dir), say))
    return found


def measure(
    config: TrainConfig, samples: int, base_samples: int, seed: int, folder: Path, say: Callable[[str], None]
) -> Evaluation:
    """Evaluate a run's newest checkpoint; the base's sample comes from `folder`, or is drawn and kept there."""
    trainer = Trainer(config, resume=True, say=say)
    return evaluate_checkpoint(trainer, samples, seed, frozen_base_sample(trainer, base_samples, seed, folder))


def frozen_base_sample(trainer: Trainer, samples: int, seed: int, folder: Path) -> Rollouts:
    """The sample of a run's base for its evaluation contexts; drawn once for all runs that share both."""
    config, contexts = trainer.config, tuple(trainer.eval_contexts)
    same = [config.model, config.dtype, [c.token_ids for c in contexts], config.engine.max_new_tokens, samples, seed]
    key = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:12]
    path = folder / f"base-sample-{key}.safetensors"
    if path.exists():
        return Rollouts(contexts=contexts, **load_file(path))
    trainer.say(f"drawing {samples} completions of the base for each of {len(contexts)} contexts, for Z")
    rollouts = sample_base(trainer, samples, seed)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # of two runs side by side the later one wins
    save_file({name: value for name, value in vars(rollouts).items() if name != "contexts"}, temporary)
    temporary.rename(path)
    return rollouts


def read_finished(run_dir: str | Path) -> TrainConfig:
    """The config of a run that has a checkpoint.

    Raises:
        UserError: it has none, or there is no run.
    """
    config = read_config(run_dir)
    if not checkpoints(run_dir):
        raise UserError(f"{str(run_dir)!r} has no checkpoint yet; train it first: fdpg-fast train --resume {run_dir}")
    return config
