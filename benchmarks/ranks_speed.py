"""Rounds of SmolLM2-135M by two processes of one thread, by one of two, and by one of one, in turns.

python benchmarks/ranks_speed.py --output benchmarks/results/NAME.json [--model FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
KINDS: dict[str, tuple[list[str], int]] = {  # how it is started, and threads of each process
    "two processes of one thread": (TORCHRUN, 1),
    "one process of two threads": ([], 2),
    "one process of one thread": ([], 1),
}
TARGETS = {"one process of two threads": 0.95, "one process of one thread": 1.7}  # of two processes' speed
PROMPTS = ("It was a cold and stormy night", "The old house", "In the morning", "Far away, in the hills,")


def worker(config: str, rounds: str, output: str) -> None:
    """Rounds of the trainer; the first process writes seconds by phase, processor seconds of all, and tokens."""
    from engine_turns import phases, run_round, tokens_of
    from fdpg_fast import ranks
    from fdpg_fast.config.load import load_config
    from fdpg_fast.trainer import Trainer

    trainer = Trainer(load_config(config))
    assert trainer.session.engine is not None  # started before anything is timed
    found = []
    for index in range(int(rounds)):
        cpu = time.process_time()
        metrics = run_round(trainer, index)
        cpu = sum(ranks.gathered(time.process_time() - cpu))
        found.append(phases(metrics) | {"cpu": cpu, "tokens": tokens_of(metrics)})
    if ranks.is_first():
        Path(output).write_text(json.dumps(found))


def turn(kind: str, config: Path, rounds: int) -> list[dict[str, float]]:
    start, threads = KINDS[kind]
    output = config.with_suffix(".json")
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "benchmarks"))
    quiet = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "THP_MEM_ALLOC_ENABLE": "1", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | quiet | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *start, __file__, "--worker", str(config), str(rounds), str(output)]
    subprocess.run(command, check=True, env=environment)
    return json.loads(output.read_text())


def main() -> None:
    from run import machine

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16, help="completions of each of four prompts")
    parser.add_argument("--micro-batch-tokens", type=int, help="the model's own default if left out")
    parser.add_argument("--keep-whole", action="store_true", help="trainer.reshard_after_forward: false")
    parser.add_argument("--rounds", type=int, default=3, help="of each turn; the first warms up")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "load_average": [], "turns": {kind: [] for kind in KINDS}}
    found |= {"samples": options.samples, "micro_batch_tokens": options.micro_batch_tokens}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS))
        config = {
            "model": str(options.model.resolve()),
            "run_dir": str(folder / "run"),
            "device": "cpu",
            "target": [{"kind": "pointwise", "feature": {"kind": "regex", "name": "the", "pattern": "the"}}],
            "contexts": {"train": str(folder / "prompts.txt")},
            "engine": {"kind": "transformers", "max_new_tokens": 24},
            "trainer": {
                "contexts_per_round": len(PROMPTS),
                "samples_per_context": options.samples,
                "micro_batch_tokens": options.micro_batch_tokens,
                "reshard_after_forward": not options.keep_whole,
            },
        }
        (folder / "config.yaml").write_text(json.dumps(config))
        for _ in range(options.turns):
            for kind in KINDS:
                found["turns"][kind].append(turn(kind, folder / "config.yaml", options.rounds))
                found["load_average"].append(round(os.getloadavg()[0], 2))
                print(kind, found["turns"][kind][-1], found["load_average"][-1], flush=True)
    rounds = {kind: [one for turn in turns for one in turn[1:]] for kind, turns in found["turns"].items()}
    medians = {k: {phase: statistics.median(one[phase] for one in v) for phase in v[0]} for k, v in rounds.items()}
    ours = medians["two processes of one thread"]["whole"]
    found |= {"medians": medians, "speed_up": {kind: medians[kind]["whole"] / ours for kind in TARGETS}}
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    for kind, target in TARGETS.items():
        print(f"{found['speed_up'][kind]:.2f} times the speed of {kind} (target {target})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
