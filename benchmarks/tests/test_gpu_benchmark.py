"""The GPU benchmark rehearsed on the CPU as a whole: every phase, and steps that hang, die, raise and are wrong."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
# what no plan would have in it, as a module that processes of the run can import
TROUBLE = """
import multiprocessing, os, signal, time
from benchmarks import gpu_checks, gpu_methods, gpu_shapes
from benchmarks.gpu_cases import SMOKE_SHAPES, Method
from support import kernel_checks

def fine(name):
    yield {"found": name}

def hangs(name):
    yield {"found": name}
    time.sleep(600)

def dies(name):
    yield {"found": name}
    print("a last word", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def raises(name):
    yield {"found": name}
    raise RuntimeError("only for Hopper\\nand a long story")

def is_off(name):  # an op of ours within what others may be off
    off = Method(name, lambda *x: gpu_methods.plain_logprob(*x) + 0.15, ours=True)
    gpu_methods.METHODS[name] = lambda: off
    yield from gpu_shapes.measure(SMOKE_SHAPES[1], "forward", name, "cpu", 2)

def check_is_off(name):
    right = kernel_checks.linear_logprob
    kernel_checks.linear_logprob = lambda *x, impl, **o: right(*x, impl=impl, **o) + 1e-3 * (impl == "triton")
    yield from gpu_checks.check("log-probs, plain", "cpu")

def no_fork(name):
    if os.getppid() != multiprocessing.parent_process().pid:
        raise RuntimeError("initialization error")  # as CUDA says where a parent has used it
    yield {"found": name}

def slow(name):
    yield {"found": name}
    time.sleep(0.5)
    yield {"second": name}
"""
LAUNCH = """
import sys, trouble
from benchmarks import gpu
from benchmarks.gpu_plan import Phase
from benchmarks.gpu_process import Step

def change(plan):
    names = "fine", "hangs", "dies", "raises", "is_off", "check_is_off", "fine again"
    steps = [Step("trouble", n, getattr(trouble, n.split()[0]), (n,), silence=2 if n == "hangs" else 60) for n in names]
    steps.append(Step("trouble", "a peer raises", trouble.raises, ("a peer",), ours=False))
    return [*plan, Phase("trouble", [steps], 1, 1.0)]

def only_slow(plan):
    ceilings = Phase("ceilings", [[Step("ceilings", "products", trouble.no_fork, ("products",))]], 1, 1.0)
    return [ceilings, Phase("slow", [[Step("slow", str(n), trouble.slow, (n,)) for n in range(100)]], 1, 1.0)]

if __name__ == "__main__":
    sys.exit(gpu.main(sys.argv[2:], {"change": change, "only_slow": only_slow}[sys.argv[1]]))
"""
NVIDIA_SMI = """#!/bin/sh
case "$*" in *throttle*|*event_reasons*) echo "Field is not a valid field to query."; exit 2;; esac
while sleep 0.1; do echo "1755, 612.30, 64"; done
"""


def command(folder: Path, change: str, *options: str) -> tuple[list[str], dict[str, str]]:
    """The command with a changed plan, beside an nvidia-smi of a driver that is too old to know why clocks are low."""
    (folder / "trouble.py").write_text(TROUBLE)
    (folder / "launch.py").write_text(LAUNCH)
    (folder / "nvidia-smi").write_text(NVIDIA_SMI)
    (folder / "nvidia-smi").chmod(0o755)
    given = ["--device", "cpu", "--smoke", "--repeats", "2", "--out", str(folder / "out"), *options]
    parts = [folder, REPOSITORY, REPOSITORY / "kernels", REPOSITORY / "tests"]  # trouble.py comes before gpu.py
    paths = os.pathsep.join([*map(str, parts), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return [sys.executable, "-W", "ignore", str(folder / "launch.py"), change, *given], environment


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for path in (folder / "out").glob("*.jsonl") for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a whole run, and what it printed."""
    folder = tmp_path_factory.mktemp("gpu")
    arguments, environment = command(folder, "change", "--without", "PyTorch checkpointed", "--without", "TRL chunked")
    done = subprocess.run(arguments, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1, done.stdout + done.stderr  # an op was wrong, and was no reason to stop
    return folder, done.stdout


@pytest.fixture(scope="module")
def steps(run):
    (path,) = (run[0] / "out").glob("*.json")
    result = json.loads(path.read_text())
    assert result["machine"]["torch"] == torch.__version__
    return {(step["phase"], step["step"]): step for step in result["steps"]}


def test_every_path_is_checked(steps):
    checks = {name: step for (phase, name), step in steps.items() if phase == "checks"}
    assert len(checks) > 40
    for name, step in checks.items():
        assert step["status"] == "ok", (name, step["reason"])
        assert all(error <= step["limits"][what] for what, error in step.get("errors", {}).items())
        assert step.get("errors") or name == "CUDA graph"
    assert steps["ceilings", "products and copies"]["gemm_tflops"] > 0


def test_what_is_timed_is_compiled_and_taken_apart(steps):
    of = {phase: [step for (p, _), step in steps.items() if p == phase] for phase in ("compile", "breakdown", "shapes")}
    compiled = [step for step in of["compile"] if "CCE" not in step["step"]]  # which may be installed
    assert len(compiled) == 2 and all(step["status"] == "ok" for step in compiled)
    names = [step["step"] for step in of["breakdown"]]
    assert sum("mm" in name for name in names) == 4 and sum("cast" in name for name in names) == 1
    assert sum("TMA" in name for name in names) == 2 and sum("ours" in name for name in names) == 2
    for step in of["breakdown"]:
        assert step["status"] == "ok", step
        assert len(step["seconds"]) == 2 and step["host_seconds"] > 0
    for step in (step for step in of["breakdown"] if "ours" in step["step"]):
        assert any(row["kernel"] == "aten::mm" for row in step["kernels"]) and step["over_bare"] > 0


def test_whole_shapes_beside_others(steps):
    shapes = {(s["shape"], s["method"], s["mode"]): s for (p, _), s in steps.items() if p == "shapes" and "shape" in s}
    modes = ("loss trained", "trained", "forward", "loss frozen", "frozen")
    titles = {title for title, _, _ in shapes}
    assert len(titles) == 2
    for title in titles:
        bare = "bare products of probabilities", "bare products of logits"
        for name in (*bare, "PyTorch eager", "ours (chunked)"):
            for mode in modes:
                step = shapes[title, name, mode]
                assert step["status"] == "ok", step
                assert len(step["seconds"]) == len(step["bare_seconds"]) == 2
                assert min(step["tflops"], step["tokens_per_second"], step["over_bare"], step["mean_length"]) > 0
        # bfloat16 logits blur the log-probs, and the weights of whole sequences even more; ours stay exact
        assert shapes[title, "ours (chunked)", "forward"]["errors"]["logprob"] < 1e-4
        assert shapes[title, "ours (chunked)", "loss trained"]["errors"]["weight_grad"] < 0.01
        assert shapes[title, "PyTorch eager", "trained"]["errors"]["logprob"] > 0.01
    assert steps["shapes", "PyTorch checkpointed"]["reason"] == "--without"
    assert steps["shapes", "ours (triton)"]["status"] == "left out"


def test_a_step_that_hangs_dies_or_raises_costs_itself(steps):
    found = {name: step for (phase, name), step in steps.items() if phase == "trouble"}
    for name in ("fine", "fine again"):
        assert (found[name]["status"], found[name]["found"]) == ("ok", name)
    reasons = {
        "hangs": ("hung", "stopped after 2 s of silence"),
        "dies": ("died", "ended with -9: a last word"),
        "raises": ("failed", "RuntimeError: only for Hopper"),
        "a peer raises": ("skipped", "RuntimeError: only for Hopper"),
    }
    for name, reason in reasons.items():
        assert (found[name]["status"], found[name]["reason"]) == reason
        assert found[name]["found"]  # what it had found before
    assert found["dies"]["log"][-1] == "a last word"


def test_what_is_wrong_is_timed_and_marked(steps, run):
    off, check = steps["trouble", "is_off"], steps["trouble", "check_is_off"]
    assert off["status"] == "wrong" and "logprob error" in off["reason"] and len(off["seconds"]) == 2
    assert check["status"] == "wrong" and "logprob, nats off by 0.001" in check["reason"]
    assert "WRONG trouble, is_off: logprob error" in run[1] and "HUNG trouble, hangs" in run[1]


def test_clocks_are_sampled_along(steps, run):
    samples = [line for line in lines_of(run[0]) if line["event"] == "sample"]
    assert len(samples) > 5 and samples[0]["sm_mhz"] == 1755 and "held_back_by" not in samples[0]
    hangs = steps["trouble", "hangs"]
    assert (hangs["sm_mhz"], hangs["watts"], hangs["celsius"]) == (1755, 612.3, 64)


def test_tables_and_figure(run):
    (path,) = (run[0] / "out").glob("*.md")
    table = path.read_text()
    for text in (
        "## Checks: ",
        "## Breakdown, tiny",
        "time in no kernel",
        "× bare",
        "mean length",
        "- shapes, PyTorch ch",
    ):
        assert text in table, text
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert len(list(path.parent.iterdir())) == 4  # lines, JSON, tables, figure


def test_a_run_that_is_killed_leaves_what_it_measured(tmp_path, benchmark_modules):
    arguments, environment = command(tmp_path, "only_slow")
    process = subprocess.Popen(arguments, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(line["event"] == "end" and line["phase"] == "slow" for line in lines_of(tmp_path)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    before = [line for line in lines_of(tmp_path) if line["event"] != "sample"]
    time.sleep(1)
    assert [line for line in lines_of(tmp_path) if line["event"] != "sample"] == before  # its processes ended with it
    (path,) = (tmp_path / "out").glob("*.jsonl")
    with open(path, "a") as file:
        file.write('{"event": "found", "cut": "sho')
    report = benchmark_modules("gpu_report")
    assert any(text.startswith("slow: ") for text in report.summary(report.write(path, figure=True)))
    steps = json.loads(path.with_suffix(".json").read_text())["steps"]
    assert [step["step"] for step in steps[:3]] == ["products", "products, afresh", "0"]
    assert [step["status"] for step in steps[:3]] == ["failed", "ok", "ok"] and steps[2]["second"] == 0
    assert steps[-1]["status"] in ("ok", "unfinished")
    assert "# cpu" in path.with_suffix(".md").read_text()


@pytest.fixture
def benchmark_modules(monkeypatch):
    for name in ("TRITON_INTERPRET", "OMP_NUM_THREADS", "PYTORCH_NVML_BASED_CUDA_CHECK"):  # the command sets them
        monkeypatch.setenv(name, "1")
    monkeypatch.syspath_prepend(str(REPOSITORY))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_time_budget_names_what_it_left_out(tmp_path, benchmark_modules):
    options = ["--device", "cpu", "--smoke", "--minutes", "0", "--out", str(tmp_path / "out")]
    assert benchmark_modules("gpu").main(options) == 0
    lines = [line for line in lines_of(tmp_path) if "step" in line]
    assert {line["status"] for line in lines} == {"left out"} and len(lines) > 50
    assert all("--minutes" in line["reason"] for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_it_needs_a_gpu(tmp_path, benchmark_modules, capsys):
    assert benchmark_modules("gpu").main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and "NVIDIA GPU" in said


def test_large_shapes_are_not_for_the_cpu(tmp_path, benchmark_modules, capsys):
    assert benchmark_modules("gpu").main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "--smoke" in capsys.readouterr().err
