"""The GPU benchmark's whole command on the CPU with tiny shapes: what it times, and what it refuses to time."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
LOGPROB_MODES = ["forward", "trained", "frozen"]
MODES = [*LOGPROB_MODES, "loss trained", "loss frozen"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    return importlib.import_module("benchmarks.gpu")


def raising(error):
    def call(*_):
        raise error

    return call


@pytest.fixture
def peers(gpu):
    method, plain = importlib.import_module("benchmarks.gpu_cases").Method, gpu.EAGER.logprob
    return {
        "absent": raising(ImportError("no module named absent")),
        "wrong": lambda: method("wrong", lambda *x: 1.5 * plain(*x)),
        "not a number": lambda: method("not a number", lambda *x: plain(*x) * torch.nan),
        "raises": lambda: method("raises", raising(RuntimeError("only for Hopper\nand a long story"))),
        "too large": lambda: method("too large", raising(torch.OutOfMemoryError())),
        "sum only": lambda: method("sum only", lambda *x: plain(*x).sum(), per_token=False),
    }


def test_whole_command(gpu, peers, tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--smoke", "--repeats", "2", "--out", str(tmp_path)], peers) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["skipped"] == [{"method": "absent", "reason": "ImportError: no module named absent"}]
    assert result["left_out"] == []
    assert result["machine"]["torch"] == torch.__version__
    assert all(rate > 0 for rate in result["ceilings"].values())
    assert [case["tokens"] for case in result["cases"]] == [512, 392]
    for case in result["cases"]:
        found = {(record["method"], record["mode"]): record for record in case["results"]}
        assert set(case["gemm_tflops"]) == {"logits", "hidden_grad", "weight_grad"}
        for name in ("bare GEMMs", "PyTorch eager", "PyTorch checkpointed", "ours (chunked)", "ours (reference)"):
            for mode in MODES:
                record = found[name, mode]
                assert (record["status"], len(record["seconds"])) == ("ok", 2), (name, mode, record["reason"])
                assert record["median"] > 0 and record["tflops"] > 0 and record["ratio_to_gemms"] > 0
                assert record["extra_bytes"] is None
        for mode in MODES:
            for name in ("wrong", "not a number", "raises", "too large"):
                assert found[name, mode]["seconds"] == [] and "median" not in found[name, mode]
            assert [found[name, mode]["status"] for name in ("raises", "too large")] == ["skipped", "out of memory"]
            assert found["raises", mode]["reason"] == "RuntimeError: only for Hopper"
            assert [found[name, mode]["status"] for name in ("wrong", "not a number")] == ["wrong", "wrong"]
            assert "logprob error" in found["wrong", mode]["reason"]
        assert found["wrong", "forward"]["errors"]["logprob"] > 1
        assert [mode for name, mode in found if name == "sum only"] == LOGPROB_MODES
        assert found["sum only", "trained"]["status"] == "ok"
        # bfloat16 logits blur the log-probs, and the weights of whole sequences even more; ours stay exact
        assert found["ours (chunked)", "forward"]["errors"]["logprob"] < 1e-4
        assert found["ours (chunked)", "loss trained"]["errors"]["weight_grad"] < 0.01
        assert found["PyTorch eager", "trained"]["errors"]["logprob"] > 0.01
    output = capsys.readouterr().out
    assert "SKIPPED absent" in output and "WRONG: logprob error" in output and "SKIPPED: RuntimeError" in output
    table = path.with_suffix(".md").read_text()
    assert "**absent skipped**" in table and "**WRONG**" in table and "**OUT OF MEMORY**" in table
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_wrong_op_of_ours_fails_the_command(gpu, monkeypatch, tmp_path):
    method = importlib.import_module("benchmarks.gpu_cases").Method
    off = method("ours (off)", lambda *x: gpu.EAGER.logprob(*x) + 0.15, ours=True)  # within what a peer may be off
    monkeypatch.setattr(gpu, "own_methods", lambda device: [gpu.EAGER, off])
    assert gpu.main(["--device", "cpu", "--smoke", "--repeats", "1", "--out", str(tmp_path)], {}) == 1


def test_time_budget_names_what_it_left_out(gpu, tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--smoke", "--minutes", "0", "--out", str(tmp_path)], {}) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["cases"] == [] and [shape["name"] for shape in result["left_out"]] == ["tiny", "tiny odd"]
    assert "LEFT OUT tiny odd" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "NVIDIA GPU" in done.stderr


def test_large_shapes_are_not_for_the_cpu(gpu, tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)], {}) == 2
    assert "--smoke" in capsys.readouterr().err
