"""Tiny runs through the command line: called in this process, or in one that dies or fills its disk at a set moment."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fdpg_fast import progress
from fdpg_fast.cli import main

# importing torch and transformers takes seconds: a server does it once, and every process is a fork of it
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["fdpg_fast.trainer", "transformers.models.llama.modeling_llama", "matplotlib.backends.backend_svg"]
)

ONE_AT_A_TIME = threading.Lock()  # a start asks how all others are, and of two who ask at once one gets no status

PROMPTS = ("a", "tea ", "def f(")
LETTERS = {"kind": "pointwise", "feature": {"kind": "regex", "name": "letters", "pattern": "[a-zA-Z]"}}


def settings(model: Path, run_dir: Path | str, **sections: Any) -> dict[str, Any]:
    """The config of a run of a second; keyword arguments replace keys, or are merged into a section."""
    config: dict[str, Any] = {
        "model": str(model),
        "run_dir": str(run_dir),
        "device": "cpu",  # where equal runs are equal to the last bit
        "target": [LETTERS],
        "engine": {"max_new_tokens": 6},
        "optimizer": {"learning_rate": 1e-3},
        "trainer": {
            "rounds": 2,
            "contexts_per_round": 2,
            "samples_per_context": 4,
            "checkpoint_every": 1,
        },
        "evaluation": {"contexts": 3, "samples_per_context": 3},
    }
    return merged(config, sections)


def merged(config: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """A config with keys replaced, or merged into a section."""
    mixed = dict(config)
    for name, value in sections.items():
        mixed[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    return mixed


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_contexts(folder: Path, *prompts: str) -> Path:
    path = folder / "contexts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts))
    return path


def imported(path: Path, function: str, **keys: Any) -> dict[str, Any]:
    """A pointwise term of a function in a Python file."""
    return {"kind": "pointwise", "feature": {"kind": "import", "path": f"{path}:{function}", **keys}}


def call(*arguments: object) -> int:
    """The command line in this process; argparse's own exit counts as the status that a shell would see."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def train(model: Path, folder: Path, run_dir: str = "run", **sections: Any) -> Path:
    """A run in this process, on PROMPTS unless told otherwise; its folder."""
    if "contexts" not in sections:
        sections["contexts"] = {"train": str(write_contexts(folder, *PROMPTS))}
    path = write_config(folder, settings(model, folder / run_dir, **sections))
    assert call("train", path) == 0
    return folder / run_dir


def rows(path: Path) -> list[dict[str, Any]]:
    """A .jsonl file, read as strictly as other tools do: no NaN, no Infinity."""
    return [strict(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def samples_by_round(run_dir: Path) -> list[list[dict[str, Any]]]:
    """What was logged of the rounds, without the evaluations."""
    samples = [row for row in rows(run_dir / "samples.jsonl") if row["split"] == "train"]
    return [list(group) for _, group in itertools.groupby(samples, lambda row: row["round"])]


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder by its name there, but for what `run` keeps of output; None for folders."""
    paths = [path for path in folder.rglob("*") if path not in (folder / "stdout", folder / "stderr")]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


# it draws from the generators of Python, NumPy and torch, which a resumed run has to find where they were
DRAWING = """
import random, sys
import numpy, torch
random.seed(1), numpy.random.seed(2), torch.manual_seed(3)

def noisy(completions):
    sys.audit("feature")
    return [random.random() / 2 + numpy.random.rand() / 4 + float(torch.rand(())) / 4 for _ in completions]
"""


def drawing(model: Path, folder: Path, run_dir: Path | str, **sections: Any) -> dict[str, Any]:
    """The config of a run with all that a checkpoint has to carry, and a feature that draws and announces its calls.

    λ, a running baseline, a running Z, AdamW's moments and a schedule.
    """
    (folder / "drawing.py").write_text(DRAWING)
    noisy = {"kind": "import", "path": f"{folder / 'drawing.py'}:noisy"}
    config = settings(
        model,
        run_dir,
        target=[LETTERS, {"kind": "distributional", "features": [noisy], "moments": [0.55]}],
        target_fit_samples=240,
        contexts={"train": str(write_contexts(folder, "a", "tea ", "def f(", "the end"))},
        loss={"baseline": "running"},
        optimizer={"warmup_rounds": 2, "schedule": "cosine"},
    )
    return merged(config, sections)


def record(run_dir: Path) -> dict[str, Any]:
    """What equal runs have in common, to the last bit: not clock and memory, nor generators that nothing drew from."""
    from fdpg_fast.runs.tensors import read_tensors

    kept: dict[str, Any] = {
        "metrics": [
            {key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))}
            for row in rows(run_dir / "metrics.jsonl")
        ]
    }
    for path in [run_dir / "evaluation.jsonl", run_dir / "samples.jsonl", *run_dir.glob("checkpoints/*/**/*")]:
        if path.is_dir() or path.parent.name == "parts":
            continue
        if path.name == "state.json":
            state = strict(path.read_text())
            state["generators"] = [own["torch"] for own in state["generators"]]
            kept[str(path.relative_to(run_dir))] = state
        elif path.name != "SHA256SUMS":
            kept[str(path.relative_to(run_dir))] = path.read_bytes()
    for path in run_dir.glob("checkpoints/*/trainer/parts"):  # whose files have a number of their own
        tensors = read_tensors(path.parents[1], {})
        kept[str(path.relative_to(run_dir))] = {name: x.numpy().tobytes() for name, x in tensors.items()}
    return kept


def assert_equal(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """Of two records, by part: a failure says what differs instead of printing weights."""
    assert ours.keys() == expected.keys()
    assert ours["metrics"] == expected["metrics"]
    assert [name for name in ours if ours[name] != expected[name]] == []


@dataclass(frozen=True)
class Moment:
    """The n-th time that the interpreter announces an audit event whose first argument contains `part`.

    Events come before the deed: at "os.rename" the file still has its old name.
    """

    event: str
    part: str = ""
    occurrence: int = 1


@dataclass(frozen=True)
class Ended:
    """How a process ended: −9 for SIGKILL, else its exit status."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Running:
    """A command in a process of its own."""

    process: Any
    outputs: list[Path]

    def has_ended(self, within: float = 0.0) -> bool:
        """Whether it has, after so many seconds at most."""
        last = time.monotonic() + within
        while True:
            with ONE_AT_A_TIME:
                if self.process.exitcode is not None:
                    return True
            if time.monotonic() >= last:
                return False
            time.sleep(0.01)

    def wait(self, seconds: float = 120) -> Ended:
        if not self.has_ended(seconds):
            self.process.kill()
            raise AssertionError(f"still running after {seconds:g} s: {self.outputs[1].read_text()}")
        return Ended(self.process.exitcode, *(path.read_text(errors="replace") for path in self.outputs))


def run(
    folder: Path,
    *arguments: object,
    at: Moment | None = None,
    room: int | None = None,
    send: int = signal.SIGKILL,
    ignored: int | None = None,
) -> Ended:
    """The command line in a process of its own, working in `folder`.

    Args:
        at: when something happens to it: the signal `send`; with `room`, from then on no file can grow by more than so
            many bytes over what the file in question holds (what a full disk does, short writes included).
        ignored: a signal that the process begins with ignoring, as nohup lets it.
    """
    return start(folder, *arguments, happens=(at, room, send, ignored)).wait()


def start(folder: Path, *arguments: object, happens: tuple[Any, ...] = (None, None, signal.SIGKILL, None)) -> Running:
    """The same, while it still runs; what happens to it is as `run` has it, in its order."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the server: a fork must not inherit a thread pool
    outputs = [folder / "stdout", folder / "stderr"]
    for path in outputs:
        path.write_bytes(b"")
    process = PROCESSES.Process(
        target=_command, args=([str(argument) for argument in arguments], folder, outputs, *happens)
    )
    with ONE_AT_A_TIME:
        process.start()
    return Running(process, outputs)


def _command(
    arguments: list[str],
    folder: Path,
    outputs: list[Path],
    moment: Moment | None,
    room: int | None,
    send: int,
    ignored: int | None,
) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    os.chdir(folder)
    progress.AFTER = 3600.0
    if ignored is not None:
        signal.signal(ignored, signal.SIG_IGN)
    if moment is not None:
        sys.addaudithook(_Trap(moment, room, send))
    sys.exit(main(arguments))


class _Trap:
    def __init__(self, moment: Moment, room: int | None, send: int):
        self.moment, self.room, self.send, self.left = moment, room, send, moment.occurrence

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != self.moment.event or self.moment.part not in str(arguments[0] if arguments else ""):
            return
        self.left -= 1
        if self.left == 0 and self.room is None:
            os.kill(os.getpid(), self.send)
        elif self.left == 0:
            path = str(arguments[0])
            held = os.path.getsize(path) if os.path.isfile(path) else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (held + self.room, resource.RLIM_INFINITY))
