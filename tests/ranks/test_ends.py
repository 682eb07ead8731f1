"""How runs of two processes end early: all of them, soon, with a checkpoint that is whole and one line that says so."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support import processes, runs

PATIENCE = 30.0  # seconds in which all must be gone


def begin(tiny_model: Path, folder: Path, **sections) -> subprocess.Popen[str]:
    """A run that goes on until it is stopped, when its second round is written."""
    config = runs.settings(tiny_model, folder / "run", **sections)
    config = runs.merged(config, {"engine": {"kind": "transformers"}, "trainer": {"rounds": 10_000}})
    config["contexts"] = {"train": str(runs.write_contexts(folder, *runs.PROMPTS))}
    process = processes.start(["train", runs.write_config(folder, config)])
    metrics, last = folder / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 1):
        assert process.poll() is None and time.monotonic() < last, process.communicate()
        time.sleep(0.05)
    return process


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started, by rank."""
    found = {}
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            pairs = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
            found[dict(pair.split("=", 1) for pair in pairs if "=" in pair)["RANK"]] = child
    return [found[rank] for rank in sorted(found)]


def end(process: subprocess.Popen[str], of: list[int]) -> tuple[int, str]:
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert not [child for child in of if Path(f"/proc/{child}").exists()]
    return process.returncode, stderr


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_takes_the_others_along(tiny_model, tmp_path, killed):
    process = begin(tiny_model, tmp_path)
    pids, last = workers(process), time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/.writing-*/trainer/parts")):  # of one of the next rounds
        assert time.monotonic() < last
    os.kill(pids[killed], signal.SIGKILL)
    status, stderr = end(process, pids)
    assert status == 1 and "fdpg_fast/" not in stderr  # no traceback of ours
    written = runs.rows(tmp_path / "run" / "metrics.jsonl")
    rounds = len(written) + 1
    resumed = processes.run(["train", "--resume", tmp_path / "run", f"--trainer.rounds={rounds}"])
    assert resumed.returncode == 0, resumed.stderr
    assert [row["round"] for row in runs.rows(tmp_path / "run" / "metrics.jsonl")] == list(range(rounds))


def test_a_signal_stops_all_behind_the_same_round(tiny_model, tmp_path):
    process = begin(tiny_model, tmp_path, trainer={"checkpoint_every": 10_000})
    pids = workers(process)
    process.send_signal(signal.SIGTERM)  # as a job manager does, to torchrun, which hands it on
    _, stderr = end(process, pids)
    finished = len(runs.rows(tmp_path / "run" / "metrics.jsonl"))
    assert f"stopped; all {finished} finished rounds are in" in stderr
    assert (tmp_path / "run" / "checkpoints" / f"round-{finished:06d}").is_dir()


def test_bad_input_is_refused_in_one_line(tiny_model, tmp_path):
    config = runs.settings(tiny_model, tmp_path / "run", contexts={"train": str(tmp_path / "none.jsonl")})
    ended = processes.run(["train", runs.write_config(tmp_path, config)])
    said = [line for line in ended.stderr.splitlines() if line.startswith("fdpg-fast:")]
    assert ended.returncode == 1 and len(said) == 1 and "none.jsonl" in said[0]
    assert not (tmp_path / "run").exists()


def test_processes_that_have_ended_well_end_with_status_0(tmp_path):
    """Gloo aborts at the end of every second process or so whose last exchange was a broadcast, unless they part."""
    script = tmp_path / "broadcasts.py"
    script.write_text(
        "import torch\n"
        "from fdpg_fast import ranks\n"
        "ranks.join('cpu')\n"
        "for sender in [*range(4)] * 5:\n"
        "    torch.distributed.broadcast(torch.zeros(1000), sender)\n"
        "ranks.by_first(lambda: None)\n"
    )
    command = [*processes.TORCHRUN, "--nproc-per-node", "4", str(script)]
    ended = subprocess.run(command, env=processes.environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
