"""A run whose only vLLM server dies: it says so, soon, and goes on from its checkpoint with another engine."""

import time

import pytest

from support import runs
from support.vllm_cases import Server

DEADLY = """
import os, signal
calls = 0

def deadly(completions):
    global calls
    calls += 1
    if calls == 3:  # the first evaluation, the first round, the second
        os.killpg({pid}, signal.SIGKILL)
    return [1.0] * len(completions)
"""


@pytest.fixture
def server(vllm_model, tmp_path):
    server = Server(vllm_model, tmp_path / "server.log", max_length=96)
    try:
        server.wait_until_ready(240)
        yield server
    finally:
        server.kill()


def test_a_server_that_dies_leaves_a_run_that_can_go_on(server, vllm_model, tmp_path, capsys):
    (tmp_path / "deadly.py").write_text(DEADLY.format(pid=server.process.pid))
    engine = {
        "kind": "vllm_server",
        "urls": [server.url],
        "weight_transfer": "disk",
        "weights_dir": str(tmp_path / "w"),
    }
    settings = runs.settings(
        vllm_model,
        tmp_path / "run",
        target=[runs.LETTERS, runs.imported(tmp_path / "deadly.py", "deadly")],
        contexts={"train": str(runs.write_contexts(tmp_path, *runs.PROMPTS))},
        engine=engine,
        trainer={"rounds": 3},
    )
    started = time.monotonic()
    assert runs.call("train", runs.write_config(tmp_path, settings)) == 1
    assert time.monotonic() - started < 30
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fdpg-fast: no vLLM server is left to sample with ({server.url}: ")
    assert "--resume" in last
    assert [path.name for path in tmp_path.glob("run/checkpoints/*")] == ["round-000001"]
    rows = runs.rows(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 1 and rows[0]["engine/logprob_gap_max"] < 1e-4

    assert runs.call("train", "--resume", tmp_path / "run", "--engine.kind=transformers") == 0
    assert len(runs.rows(tmp_path / "run" / "metrics.jsonl")) == 3
