"""This tree beside an earlier commit of it, in turns: rounds, sampling, memory, the plain pipeline, the CLI's start.

python benchmarks/beside.py COMMIT --output benchmarks/results/NAME.json

Every turn is a process of its own, of one tree and one setting: rounds by phase, tokens and peak memory, the first
round left out of medians. Both trees run the rounds of their own `rounds.py`, in the environment of this one.
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

from run import machine

ROOT = Path(__file__).resolve().parents[1]
TURN = """
import json, sys, tempfile, time
from pathlib import Path
import rounds, torch
setting, pipeline, count = rounds.SETTINGS[sys.argv[1]], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
made = {**rounds.PIPELINES, "without oneDNN": getattr(rounds, "OursWithMKL", rounds.Ours)}[pipeline]
with tempfile.TemporaryDirectory() as folder:
    running, found = made(rounds.make_config(setting, Path(folder))), []
    for index in range(count):
        start = time.perf_counter()
        phases, tokens = running.round(index)
        found.append({**phases, "whole": time.perf_counter() - start, "tokens": tokens})
print(json.dumps({"rounds": found, "peak_bytes": rounds.peak_memory()}))
"""


def environment(tree: Path) -> dict[str, str]:
    """What makes Python import a tree's own packages."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(str(tree / part) for part in ("", "kernels", "benchmarks"))}


def turn(tree: Path, setting: str, pipeline: str, rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-c", TURN, setting, pipeline, str(rounds)]
    done = subprocess.run(command, cwd=tree, env=environment(tree), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of_help(tree: Path) -> float:
    start = time.perf_counter()
    command = [sys.executable, "-m", "fdpg_fast.cli", "--help"]
    subprocess.run(command, cwd=tree, env=environment(tree), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def summary(turns: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over all rounds but the first of each turn; the largest peak."""
    rounds = [found for turn in turns for found in turn["rounds"][1:]]
    phases = {phase: statistics.median(found[phase] for found in rounds) for phase in rounds[0]}
    rate = statistics.median(found["tokens"] / found["sampling"] for found in rounds)
    return phases | {"tokens_per_second": rate, "peak_bytes": max(turn["peak_bytes"] for turn in turns)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--settings", nargs="+", default=["smollm2-135m", "tiny-python-lm"])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4, help="of each turn; the first warms up")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "commit_beside": options.commit, "settings": {}}

    def save() -> None:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as scratch:
        before = Path(scratch) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", str(before), options.commit], cwd=ROOT, check=True)
        try:
            (before / "models").symlink_to(ROOT / "models")
            trees = {"before": before, "after": ROOT}
            helps = [{name: seconds_of_help(tree) for name, tree in trees.items()} for _ in range(9)]
            found["help_seconds"] = {name: statistics.median(one[name] for one in helps) for name in trees}
            for setting in options.settings:
                cases = [("before", "ours"), ("after", "ours"), ("before", "without oneDNN"), ("after", "plain")]
                turns: dict[str, list[dict[str, Any]]] = {f"{name} {pipeline}": [] for name, pipeline in cases}
                for _ in range(options.turns):
                    for name, pipeline in cases:
                        turns[f"{name} {pipeline}"].append(turn(trees[name], setting, pipeline, options.rounds))
                        summaries = {case: summary(made) for case, made in turns.items() if made}
                        found["settings"][setting] = {"medians": summaries, "turns": turns}
                        save()
                for case, medians in summaries.items():
                    shown = {phase: round(value, 3) for phase, value in medians.items() if phase != "peak_bytes"}
                    print(f"{setting}, {case}: {shown}, peak {medians['peak_bytes'] / 2**30:.2f} GiB", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
