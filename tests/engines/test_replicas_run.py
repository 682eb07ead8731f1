"""A run whose only vLLM server dies: it says so, soon, and goes on from its checkpoint with another engine."""

import time

import pytest

from support import processes, runs
from support.fake_server import DAMAGES, GENERATE, FakeServer, servers
from support.vllm_cases import Server

DEADLY = """
import os, signal
calls = 0

def deadly(completions):
    global calls
    calls += 1
    if calls == 4:  # the samples of the base, the first evaluation, the first round, the second
        os.killpg({pid}, signal.SIGKILL)
    return [1.0] * len(completions)
"""


KEY = "sk-of-this-test"


@pytest.fixture(scope="module")
def server(vllm_model, tmp_path_factory):
    """For the tests in their order: the last one kills it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)  # of both sides
        server = Server(vllm_model, tmp_path_factory.mktemp("server") / "log", max_length=96, lora_rank=8)
        try:
            server.wait_until_ready(240)
            yield server
        finally:
            server.kill()


def by_one_server(server, folder):
    weights = str(folder / "weights")
    return {"kind": "vllm_server", "urls": [server.url], "weight_transfer": "disk", "weights_dir": weights}


def test_a_learner_of_two_processes_has_the_servers_log_probs_after_every_sync(server, vllm_model, tmp_path):
    """All weights, and an adapter alone."""
    commands = []
    for run_dir, lora in (("whole", None), ("adapter", {"rank": 4})):
        settings = runs.settings(
            vllm_model,
            tmp_path / run_dir,
            contexts={"train": str(runs.write_contexts(tmp_path, *runs.PROMPTS))},
            engine=by_one_server(server, tmp_path),
            lora=lora,
            optimizer={"learning_rate": 1e-2},
            trainer={"rounds": 3},
        )
        (path := tmp_path / f"{run_dir}.yaml").write_text(runs.yaml.safe_dump(settings))
        commands.append(["train", path])
    ended = processes.run(*commands)
    assert ended.returncode == 0, ended.stderr
    for run_dir in ("whole", "adapter"):
        rows = runs.rows(tmp_path / run_dir / "metrics.jsonl")
        assert len(rows) == 3 and all(row["engine/logprob_gap_max"] < 1e-4 for row in rows)
        assert abs(rows[-1]["policy/kl_to_base"] - rows[0]["policy/kl_to_base"]) > 1e-2  # the weights have moved
    # 4 syncs of all weights, and one of the base; adapters: before each round and at the end
    asked = server.log.read_text()
    assert asked.count('"POST /collective_rpc HTTP/1.1" 200') == 4 + 1
    assert asked.count('"POST /v1/load_lora_adapter HTTP/1.1" 200') == 4
    assert not list((tmp_path / "weights").iterdir())


def test_a_server_that_dies_leaves_a_run_that_can_go_on(server, vllm_model, tmp_path, capsys):
    (tmp_path / "deadly.py").write_text(DEADLY.format(pid=server.process.pid))
    settings = runs.settings(
        vllm_model,
        tmp_path / "run",
        target=[runs.LETTERS, runs.imported(tmp_path / "deadly.py", "deadly")],
        contexts={"train": str(runs.write_contexts(tmp_path, *runs.PROMPTS))},
        engine=by_one_server(server, tmp_path),
        trainer={"rounds": 3},
    )
    started = time.monotonic()
    assert runs.call("train", runs.write_config(tmp_path, settings)) == 1
    assert time.monotonic() - started < 30
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fdpg-fast: no vLLM server is left to sample with ({server.url}: ")
    assert "--resume" in last
    # the round in whose features it dies was sampled already: that is done, and the next one finds no server
    checkpoints = sorted(path.name for path in tmp_path.glob("run/checkpoints/*"))
    assert checkpoints == ["round-000001", "round-000002"]
    rows = runs.rows(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2 and all(row["engine/logprob_gap_max"] < 1e-4 for row in rows)

    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert written and not [path for path in written if KEY.encode() in path.read_bytes()]
    assert runs.call("train", "--resume", tmp_path / "run", "--engine.kind=transformers") == 0
    assert len(runs.rows(tmp_path / "run" / "metrics.jsonl")) == 3


@pytest.fixture(scope="module")
def of_one_server(tiny_model, tmp_path_factory):
    """By the name of a setting, what a run with one good server leaves."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("one")
            made[name] = run_with(folder, tiny_model, name, FakeServer(tiny_model))
        return made[name]

    return get


SETTINGS = {
    "in turns": {},
    "ahead": {"trainer": {"rounds": 3, "pipeline_depth": 1, "contexts_per_round": 3}},
    "adaptive": {"proposal": {"kind": "adaptive", "every": 2}},
}


def run_with(folder, model, name, *fakes):
    urls, weights = [fake.url for fake in fakes], str(folder / "w")
    engine = {"kind": "vllm_server", "urls": urls, "weight_transfer": "disk", "weights_dir": weights}
    with servers(*fakes):
        runs.train(
            model, folder, **{"engine": engine, "trainer": {"rounds": 3, "contexts_per_round": 3}} | SETTINGS[name]
        )
    record = runs.record(folder / "run")
    return {part: content for part, content in record.items() if not part.endswith("config.yaml")}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("damage", "spared"), [("a log-prob off, in one", 1), ("a log-prob off, in one", 6), ("log-prob nan", 6)]
)
def test_a_server_that_goes_wrong_changes_nothing_in_a_run(
    setting, damage, spared, tiny_model, tmp_path, of_one_server, capsys
):
    """Neither in the first evaluation nor later: what it gave is not seen in the weights, metrics or samples."""
    bad = FakeServer(tiny_model, damage=DAMAGES[GENERATE, damage], spared=spared)
    record = run_with(tmp_path, tiny_model, setting, bad, FakeServer(tiny_model))
    runs.assert_equal(record, of_one_server(setting))
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert said and all(line.startswith(f"{bad.url} is left out until the next sync: ") for line in said)


def test_a_run_whose_only_server_goes_wrong_ends_in_one_line(tiny_model, tmp_path, capsys):
    bad = FakeServer(tiny_model, damage=DAMAGES[GENERATE, "log-prob nan"], spared=8)
    engine = {"kind": "vllm_server", "urls": [bad.url], "weight_transfer": "disk", "weights_dir": str(tmp_path / "w")}
    contexts = {"train": str(runs.write_contexts(tmp_path, *runs.PROMPTS))}
    parts = {"engine": engine, "contexts": contexts, "trainer": {"rounds": 9}, "evaluation": {"base_samples": 0}}
    settings = runs.settings(tiny_model, tmp_path / "run", **parts)
    with servers(bad):
        assert runs.call("train", runs.write_config(tmp_path, settings)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fdpg-fast: no vLLM server is left to sample with ({bad.url}: ") and "--resume" in last
    assert "learning_rate" not in last and list(tmp_path.glob("run/checkpoints/round-*"))
    assert runs.call("train", "--resume", tmp_path / "run", "--engine.kind=transformers") == 0
    assert len(runs.rows(tmp_path / "run" / "metrics.jsonl")) == 9
