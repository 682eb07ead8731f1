"""The round benchmark's whole command on the CPU with the real vLLM: what it measures, and how it takes failures."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
BROKEN = """
import sys
from benchmarks import gpu_round, gpu_round_runs
from benchmarks.gpu_round_cases import Variant
gpu_round_runs.VARIANTS += Variant("too long", {"kind": "transformers", "max_new_tokens": 4000}),
gpu_round_runs.VARIANTS += Variant("absent", {"kind": "vllm"}, needs="no_such_package"),
sys.exit(gpu_round.main(sys.argv[1:]))
"""
VLLM = ("vLLM", "vLLM, one round ahead")


@pytest.fixture
def gpu_round(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    return importlib.import_module("benchmarks.gpu_round")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that the command writes, with two engines that cannot be had, and what it printed."""
    folder = tmp_path_factory.mktemp("round")
    options = ["--device", "cpu", "--smoke", "--repeats", "2", "--out", str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, *options], cwd=REPOSITORY, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1, done.stdout + done.stderr  # one engine failed, and was no reason to stop
    return folder, done.stdout


@pytest.fixture(scope="module")
def result(written):
    (path,) = written[0].glob("round-*.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def records(result):
    (case,) = result["cases"]
    return {record["variant"]: record for record in case["results"]}


def test_all_engines_are_measured(records, result):
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["vllm"]
    for name in ("Transformers", *VLLM):
        record, medians = records[name], records[name]["medians"]
        assert record["status"] == "ok", record
        samplers = {"engine"} if name == "Transformers" else {"engine", "bare vLLM", "bare vLLM, log-probs"}
        assert set(medians["tokens_per_second"]) == samplers and min(medians["tokens_per_second"].values()) > 0
        assert len(record["rounds"]) == len(record["sync"]["seconds"]) == 2
        for row in record["rounds"]:
            seconds = dict(row["seconds"])
            whole = seconds.pop("whole")
            assert set(seconds) == {"sample", "features", "base", "compare", "update", "sync"}
            assert 0 < sum(seconds.values()) <= whole and min(seconds.values()) >= 0
            assert 0 <= row["gaps"]["logprob_gap_mean"] < 0.05
            assert 16 <= row["tokens"] <= 16 * 8


def test_weights_are_checked_before_anything_is_timed(records):
    for name in ("Transformers", *VLLM):
        gaps = records[name]["gaps"]
        assert max(gaps["fresh"], gaps["synced"]) < 0.05 < gaps["moved"]
        assert ("stale" in gaps) == (name in VLLM)
        assert gaps.get("stale", 1) > 0.05


def test_syncs_move_the_parameters(records):
    for name in VLLM:
        record = records[name]
        assert record["sync"]["bytes"] == record["parameter_bytes"]
        assert record["parameter_bytes"] == 2 * record["parameters"]
        assert record["medians"]["sync_bytes_per_second"] > 0


def test_what_fails_is_recorded(records, written):
    too_long, absent = records["too long"], records["absent"]
    assert too_long["status"] == "failed" and "UserError: engine.max_new_tokens: 4000 leaves" in too_long["reason"]
    assert any('File "fdpg_fast/session.py"' in line for line in too_long["log"]) and too_long["medians"] == {}
    assert (absent["status"], absent["reason"]) == ("skipped", "no_such_package is not installed")
    assert "FAILED: UserError" in written[1] and "SKIPPED: no_such_package" in written[1]


def test_table_and_figure(written):
    folder, printed = written
    (path,) = folder.glob("round-*.md")
    table = path.read_text()
    assert "- **too long FAILED**: UserError" in table
    for name in ("Transformers", *VLLM):
        assert sum(line.startswith(f"| {name} |") for line in table.splitlines()) == 2
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert path.with_suffix(".json").name in printed


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        (lambda job: time.sleep(60), "stopped after 1 s"),
        (lambda job: os.kill(os.getpid(), signal.SIGKILL), "ended with -9: nothing said"),
    ],
    ids=["hangs", "dies"],
)
def test_process_that_does_not_come_back(gpu_round, monkeypatch, tmp_path, deed, reason):
    runs = importlib.import_module("benchmarks.gpu_round_runs")
    monkeypatch.setattr(importlib.import_module("benchmarks.gpu_process"), "PROCESSES", get_context("fork"))
    monkeypatch.setattr(runs, "run", deed)
    job = runs.Job(runs.SMOKE_CASES[0], runs.VARIANTS[0], "", tmp_path, "cpu", 1)
    job.result.write_text(json.dumps({"variant": "Transformers", "status": "failed", "start_seconds": 2.5}))
    noted = []
    record = runs.measure(job, 1, noted.append)
    assert (record["status"], record["reason"]) == ("failed", reason)
    assert record["start_seconds"] == 2.5 and noted[0]["start_seconds"] == 2.5  # what it had found before


def test_says_what_to_carry_before_anything_else(gpu_round, monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    absent = lambda name, *rest: None if name in ("pydantic", "yaml") else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    assert gpu_round.main(["--device", "cpu", "--smoke", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "not installed here: pydantic>=2.10, pyyaml." in said and "pip download" in said
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_killed_leaves_what_it_measured(tmp_path):
    options = ["--device", "cpu", "--smoke", "--repeats", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_round", *options], cwd=REPOSITORY, stdout=subprocess.DEVNULL
    )
    deadline, found = time.monotonic() + 120, {}
    while "gaps" not in found:  # the first of its measurements; no engine is through
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
        for path in tmp_path.glob("round-*.json"):
            ((found, *_),) = (case["results"] or [{}] for case in json.loads(path.read_text())["cases"])
    process.kill()
    process.wait()
    assert json.loads(path.read_text())["cases"][0]["results"][0]["gaps"]["fresh"] < 0.05


def test_time_budget_names_what_it_left_out(gpu_round, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the command sets it, and this is its process
    assert gpu_round.main(["--device", "cpu", "--smoke", "--minutes", "0", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("round-*.json")
    (case,) = json.loads(path.read_text())["cases"]
    assert {record["status"] for record in case["results"]} == {"skipped"}
    assert all("--minutes 0" in record["reason"] for record in case["results"])
    assert not path.with_suffix(".png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu(gpu_round, tmp_path, capsys):
    assert gpu_round.main(["--out", str(tmp_path)]) == 2
    assert "NVIDIA GPU" in capsys.readouterr().err


def test_large_models_are_not_for_the_cpu(gpu_round, tmp_path, capsys):
    assert gpu_round.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "--smoke" in capsys.readouterr().err
