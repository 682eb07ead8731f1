"""Runs that are killed or told to stop at random moments, resumed, and compared with undisturbed ones bit for bit."""

from __future__ import annotations

import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from support import runs

from . import Tally, tried

VLLM = {"engine": {"kind": "vllm", "max_sequences": 16}}
LORA = {"lora": {"rank": 2}}
DEPTH = {"trainer": {"pipeline_depth": 1}}

# the nine settings of a run, and how many of fifty kills each gets
SETTINGS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 6),
    "depth 1": (DEPTH, 6),
    "depth 2": ({"trainer": {"pipeline_depth": 2}}, 6),
    "LoRA": (LORA, 6),
    "LoRA, depth 1": (LORA | DEPTH, 6),
    "bfloat16": ({"dtype": "bfloat16"}, 6),
    "adaptive": ({"proposal": {"kind": "adaptive", "every": 2}}, 6),
    "vLLM": (VLLM, 4),
    "vLLM, depth 1": (VLLM | DEPTH, 4),
}
SIGNALS = {"SIGTERM": 143, "SIGINT": 130}  # and the exit status that a shell shows


@dataclass(frozen=True)
class Case:
    """A run that can be made again and again, and what it leaves when nobody disturbs it."""

    name: str
    model: Path
    sections: dict[str, Any]
    expected: dict[str, Any]
    seconds: float  # from the appearance of the run's folder to the end of the process

    def write(self, folder: Path) -> Path:
        return runs.write_config(folder, runs.drawing(self.model, folder, "run", **self.sections))


def undisturbed(name: str, model: Path, sections: dict[str, Any], folder: Path) -> Case:
    """The case of a setting, run once."""
    folder.mkdir()
    case = Case(name, model, sections, {}, 0.0)
    running = runs.start(folder, "train", case.write(folder))
    _wait_for(folder / "run", running)
    started = time.monotonic()
    ended = running.wait()
    assert ended.status == 0, f"{name}: {ended.stderr}"
    return replace(case, expected=comparable(folder / "run"), seconds=time.monotonic() - started)


def kills(models: dict[str, Path], share: float, seed: int) -> Iterator[Tally]:
    """SIGKILL at random moments of every setting, a third of the runs killed again while they resume."""
    trainer = {"rounds": 6, "checkpoint_every": 2}
    with tempfile.TemporaryDirectory() as name:
        for setting, (sections, count) in SETTINGS.items():
            settings = sections | {"trainer": trainer | sections.get("trainer", {})}
            model = models["vllm" if "vLLM" in setting else "tiny"]
            case = undisturbed(setting, model, settings, Path(name, setting))
            tries = range(max(1, round(share * count)))
            yield tried(f"SIGKILL and resume: {setting}", tries, partial(_kill, case, Path(name), seed))


def _kill(case: Case, parent: Path, seed: int, number: int) -> list[str]:
    draw = random.Random(f"{case.name}/{seed}/{number}")
    folder, ended = _hit(case, parent, signal.SIGKILL, draw.random())
    if ended.status == -signal.SIGKILL and draw.random() < 1 / 3:
        ended = _disturbed(folder, ["train", "--resume", "run"], signal.SIGKILL, draw.random() * case.seconds)
    if ended.status not in (0, -signal.SIGKILL):
        return [f"status {ended.status} before the kill: {ended.stderr.strip()}"]
    ended = runs.run(folder, "train", "--resume", "run")
    said = [] if ended.status == 0 else [f"resumed with status {ended.status}: {ended.stderr.strip()}"]
    return said or differences(comparable(folder / "run"), case.expected)


def signals(models: dict[str, Path], count: int, seed: int) -> Iterator[Tally]:
    """SIGTERM and SIGINT at random moments: no finished round is lost, and the resumed run is the undisturbed one."""
    trainer = {"rounds": 10, "checkpoint_every": 50}  # no checkpoint but the one that the signal asks for
    with tempfile.TemporaryDirectory() as name:
        cases = {}
        for setting, sections in {"plain": {}, "depth 1": DEPTH, "LoRA": LORA}.items():
            sections = sections | {"trainer": trainer | sections.get("trainer", {})}
            cases[setting] = undisturbed(setting, models["tiny"], sections, Path(name, setting))
        for kind in SIGNALS:
            tries = [(number, setting) for number, setting in zip(range(-(-count // 2)), cycle(cases), strict=False)]
            yield tried(f"{kind} and resume", tries, partial(_signal, cases, Path(name), kind, seed))


def _signal(cases: dict[str, Case], parent: Path, kind: str, seed: int, which: tuple[int, str]) -> list[str]:
    draw, case, status = random.Random(f"{kind}/{seed}/{which}"), cases[which[1]], SIGNALS[kind]
    folder, ended = _hit(case, parent, signal.Signals[kind], draw.random())
    last = ended.stderr.strip().splitlines()[-1:]
    faults = [] if ended.status in (status, -signal.Signals[kind]) else [f"status {ended.status}: {last}"]
    faults += ["a traceback"] if "Traceback" in ended.stderr else []
    metrics = folder / "run/metrics.jsonl"
    done = len(runs.rows(metrics)) if metrics.exists() else 0
    kept = max((int(path.name[6:]) for path in folder.glob("run/checkpoints/round-*")), default=0)
    faults += [] if kept == done else [f"{done} rounds were done, the checkpoint has {kept}"]
    said = len(re.findall("^round ", ended.stderr, re.MULTILINE))
    faults += [] if said <= kept else [f"{said} rounds were said to be done, the checkpoint has {kept}"]
    resumed = runs.run(folder, "train", "--resume", "run")
    if resumed.status:
        return [*faults, f"resumed with status {resumed.status}: {resumed.stderr.strip()}"]
    return faults + differences(comparable(folder / "run"), case.expected)


def _hit(case: Case, parent: Path, number: int, moment: float) -> tuple[Path, runs.Ended]:
    """A run that a signal met after so much of its time; sooner, in another run, where it came too late."""
    for _ in range(20):  # a run that does not mind the signal at all ends with status 0 each time
        folder = Path(tempfile.mkdtemp(dir=parent))
        ended = _disturbed(folder, ["train", case.write(folder)], number, moment * case.seconds)
        if ended.status:
            break
        moment *= 0.8
    return folder, ended


def _disturbed(folder: Path, arguments: list[object], number: int, delay: float) -> runs.Ended:
    running = runs.start(folder, *arguments)
    _wait_for(folder / "run" if "--resume" not in arguments else folder, running)
    running.has_ended(within=delay)
    with suppress(ProcessLookupError):
        os.kill(running.process.pid, number)
    return running.wait()


def _wait_for(path: Path, running: runs.Running) -> None:
    while not (path.exists() or running.has_ended(within=0.02)):
        pass


def comparable(run_dir: Path) -> dict[str, Any]:
    """What equal runs have in common; the engine's own count of syncs begins again in a resumed process."""
    kept = runs.record(run_dir)
    for row in kept["metrics"]:
        row.pop("engine/version", None)
    newest = max(path.name for path in (run_dir / "checkpoints").iterdir())
    return {name: value for name, value in kept.items() if "checkpoints/" not in name or newest in name}


def differences(ours: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of the parts that differ."""
    return [f"{name} differs" for name in sorted({*ours, *expected}) if ours.get(name) != expected.get(name)]
