"""Servers beside a learner of two processes: the first one asks them, all gather the weights, and none waits in vain.

The servers are threads of the test; where weights go by NCCL, the stand-in is its communicator alone.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fdpg_fast import ranks
from fdpg_fast.config.schema import EngineConfig
from fdpg_fast.engines.build import choose_engine
from fdpg_fast.errors import UserError
from support import processes, runs
from support.architectures import save_architecture
from support.fake_server import FakeServer, servers

from .test_runs import differences

ROUNDS = 3
READ = "/collective_rpc"  # by which servers are told to read new weights
TIMEOUT = 10.0


@dataclass
class Case:
    """A run, and what becomes of its first server when it is to read the weights of round 1; the second is good."""

    fault: str | None = None
    sections: dict[str, Any] = field(default_factory=dict)
    model: str = "tied"


CASES = {
    "good": Case(),
    "LoRA, a round ahead": Case(sections={"lora": {"rank": 4}, "trainer": {"pipeline_depth": 1}}, model="untied"),
    "one dies": Case("dies"),
    "one hangs": Case("hangs"),
}


class Servers:
    """Two for a case, or the first one alone; closed with the test."""

    def __init__(self, model: Path, fault: str | None, alone: bool = False):
        self.released = threading.Event()
        first = FakeServer(model, path=READ, spared=1, damage=fault and getattr(self, fault))
        self.fakes = [first] if alone else [first, FakeServer(model)]

    def dies(self, answer):
        self.fakes[0].close()
        return replace(answer, raw=b"")

    def hangs(self, answer):
        self.released.wait(120)
        return answer


def write(case: Case, model: Path, folder: Path, run_dir: str, urls: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    engine = {"kind": "vllm_server", "urls": urls, "weight_transfer": "disk", "request_timeout": TIMEOUT}
    config = runs.settings(
        model,
        folder / run_dir,
        engine=engine | {"weights_dir": str(folder / "weights")},
        contexts={"train": str(runs.write_contexts(folder, *runs.PROMPTS))},
        trainer={"rounds": ROUNDS},
    )
    path = folder / f"{run_dir}.yaml"
    path.write_text(runs.yaml.safe_dump(runs.merged(config, case.sections)))
    return path


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> dict[str, Path]:
    return {"tied": tiny_model, "untied": save_architecture("qwen3", tmp_path_factory.mktemp("untied"), tiny_model)}


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """Every case by two processes; then weights by NCCL; last a run whose only server dies. And what was said."""
    folder = tmp_path_factory.mktemp("servers")
    pools = {name: Servers(models[case.model], case.fault) for name, case in CASES.items()}
    by_nccl, last = Servers(models["untied"], None), Servers(models["tied"], "dies", alone=True)
    everybody = [fake for pool in (*pools.values(), by_nccl, last) for fake in pool.fakes]

    def config(name: str, case: Case, pool: Servers) -> Path:
        return write(case, models[case.model], folder / name, "two", [fake.url for fake in pool.fakes])

    commands: list[list[object]] = [["train", config(name, case, pools[name])] for name, case in CASES.items()]
    commands.append(["by_nccl", config("by NCCL", Case(model="untied"), by_nccl), folder / "by NCCL/sent"])
    commands.append(["train", config("none left", Case(), last)])
    with servers(*everybody):
        ended = processes.run(*commands)
        for pool in pools.values():
            pool.released.set()
    return folder, ended


def test_without_a_server_all_processes_end_alike(finished):
    folder, ended = finished
    said = [line for line in ended.stderr.splitlines() if line.startswith("fdpg-fast: ")]
    first, *others = [line.replace("process 1: ", "") for line in said]
    assert ended.returncode == 1 and "no vLLM server is left to sample with (http://" in first, ended.stderr
    assert set(others) <= {first}  # which may be ended before they have said it
    assert len(runs.rows(folder / "none left/two/metrics.jsonl")) == 1  # of the round before the sync


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fault is None])
def test_two_processes_measure_what_one_does_with_one_server(finished, name, models):
    folder, case = finished[0] / name, CASES[name]
    good = FakeServer(models[case.model])
    with servers(good):
        assert runs.call("train", write(case, models[case.model], folder, "one", [good.url])) == 0
    found = differences(folder / "two", folder / "one")
    assert {key: value for key, value in found.items() if not value <= 1e-4} == {}
    rows = runs.rows(folder / "two/metrics.jsonl")
    assert len(rows) == ROUNDS and max(row.get("engine/logprob_gap_max", 0.0) for row in rows) < 1e-4
    assert not list((folder / "weights").iterdir())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fault is not None])
def test_a_server_that_is_lost_amid_a_sync_changes_nothing_and_is_named(finished, name):
    folder, ended = finished
    of_good, of_lost = (runs.record(folder / which / "two") for which in ("good", name))
    runs.assert_equal(of_lost, of_good)
    urls = runs.yaml.safe_load((folder / name / "two.yaml").read_text())["engine"]["urls"]
    said = [line for line in ended.stderr.splitlines() if "is left out until the next sync" in line]
    (first, *_), of_second = ([line for line in said if line.startswith(url)] for url in urls)
    assert f"{READ}: " in first and not of_second


def test_by_nccl_a_server_that_hangs_amid_the_weights_keeps_nobody(finished, models):
    """The other one gets all of them; both processes know who is lost, and sample."""
    found = torch.load(finished[0] / "by NCCL/sent")
    sent, expected = found["sent"], AutoModelForCausalLM.from_pretrained(models["untied"]).state_dict()
    assert (
        sent.keys() == expected.keys() and [name for name in sent if not torch.equal(sent[name], expected[name])] == []
    )
    assert found["asked for"] == 3  # by the one that hung
    urls = runs.yaml.safe_load((finished[0] / "by NCCL/two.yaml").read_text())["engine"]["urls"]
    assert [list(lost) for lost in found["lost"]] == [[urls[0]]] * 2
    assert "nccl failed: it took more than" in found["lost"][1][urls[0]]
    assert torch.equal(*found["samples"])


def test_weights_within_one_gpu_are_refused_with_what_to_take(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    config = EngineConfig(kind="vllm_server", urls=["http://localhost:8000"], weight_transfer="ipc")
    with pytest.raises(UserError, match="^engine.weight_transfer: ipc .* one process only; use nccl or disk"):
        choose_engine(config, torch.device("cpu"))
