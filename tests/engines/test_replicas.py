"""Real vLLM servers on the CPU: exact log-probs after every sync, EOS, seeds, and servers that hang, lie or die.

The tests share two servers and run in the order below: the last ones kill them.
"""

import contextlib
import inspect
import logging
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from fdpg_fast.engines import replicas, vllm_replica
from fdpg_fast.engines.replicas import SAMPLES_PER_REQUEST, VLLMServerEngine
from fdpg_fast.engines.vllm_replica import PassingError, Replica, ReplicaError, kinds_of, within
from fdpg_fast.errors import RunError, UserError
from fdpg_fast.models.language_model import LanguageModel
from support import vllm_cases
from support.vllm_cases import CONFIG_EOS, CONTEXTS, EOS, TOLERANCE, Server, perturb, save_model

MAX_NEW_TOKENS = 24


# --- servers ---


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), tied=True)


@pytest.fixture(scope="module")
def servers(model_folder, tmp_path_factory):
    logs = tmp_path_factory.mktemp("servers")
    before = set(Path("/dev/shm").glob("psm_*"))
    both = [Server(model_folder, logs / f"{name}.log") for name in ("first", "second")]
    try:
        for server in both:
            server.wait_until_ready(240)
        yield both
    finally:
        for server in both:
            server.kill()
        for left in set(Path("/dev/shm").glob("psm_*")) - before:  # of servers that were killed
            left.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def policy(model_folder):
    return LanguageModel(LlamaForCausalLM.from_pretrained(model_folder))


class Engine(VLLMServerEngine):
    """Weights through a folder."""

    def __init__(self, servers, tmp_path, **options):
        settings = {"max_new_tokens": MAX_NEW_TOKENS, "weight_transfer": "disk", "weights_dir": tmp_path / "weights"}
        super().__init__([server.url for server in servers], EOS, **settings | options)


@pytest.fixture
def said(caplog):
    """What the engine has said since the last call."""
    caplog.set_level(logging.INFO, "fdpg_fast.engines.replicas")

    def lines():
        messages = [record.getMessage() for record in caplog.records if record.name == "fdpg_fast.engines.replicas"]
        caplog.clear()
        return messages

    return lines


@pytest.fixture(scope="module")
def engine(servers, policy, tmp_path_factory):
    engine = Engine(servers, tmp_path_factory.mktemp("shared"))
    with contextlib.closing(engine):
        yield engine


def gap(policy: LanguageModel, rollouts) -> float:
    """The largest difference between the servers' log-probs and the learner's."""
    return float(vllm_cases.gap(policy, rollouts).max())


def send(replica, policy) -> None:
    """As a sync does, tied weights once."""
    replica.send_weights(policy.weights(repeat_tied=False), kinds_of(policy), None)


def equal(a, b) -> bool:
    return torch.equal(a.token_ids, b.token_ids) and torch.equal(a.cu_seqlens, b.cu_seqlens)


# --- without a server ---


@pytest.mark.parametrize(
    ("urls", "options", "key"),
    [
        ([], {}, "engine.urls"),
        (["gpu-box:8000"], {}, "engine.urls"),
        (["http://a:1"], {"weight_transfer": "disk"}, "engine.weights_dir"),
        (["http://a:1"], {"weights_dir": Path("w")}, "engine.weights_dir"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(urls, options, key):
    with pytest.raises(UserError, match=key):
        VLLMServerEngine(urls, EOS, max_new_tokens=4, **options)


def test_nothing_is_sampled_before_the_first_sync():
    with pytest.raises(RunError, match="sync_weights comes first"):
        VLLMServerEngine(["http://localhost:1"], EOS, max_new_tokens=4).sample(CONTEXTS, 1, 0)


def test_a_server_that_is_not_there_is_named_with_what_to_do(tmp_path, policy, said):
    engine = VLLMServerEngine(
        ["http://localhost:1"], EOS, max_new_tokens=4, weight_transfer="disk", weights_dir=tmp_path / "w"
    )
    with pytest.raises(RunError) as caught:
        engine.sync_weights(policy, 0)
    (line,) = said()
    assert "localhost:1 is left out" in line
    assert all(part in str(caught.value) for part in ("http://localhost:1", "refused", "vllm serve"))
    assert engine.version == -1 and not (tmp_path / "w").exists()


def test_a_model_on_the_cpu_is_refused_where_weights_go_from_gpu_to_gpu(policy):
    engine = VLLMServerEngine(["http://localhost:1"], EOS, max_new_tokens=4)
    with pytest.raises(UserError, match="use disk"):
        engine.sync_weights(policy, 0)


@pytest.mark.parametrize(("failures", "lost"), [(2, False), (3, True)])
def test_a_failure_that_may_pass_is_tried_again_before_the_server_is_left_out(failures, lost, monkeypatch, said):
    answers = iter([PassingError("busy")] * failures)

    def complete(replica, token_ids, sampling):
        if replica.url == "http://a:1" and (error := next(answers, None)):
            raise error
        return [([EOS[0]], [-1.0], True)] * sampling["n"]

    monkeypatch.setattr(Replica, "complete", complete)
    monkeypatch.setattr(replicas, "BACK_OFF", (0.0, 0.0))
    engine = VLLMServerEngine(["http://a:1", "http://b:1"], EOS, max_new_tokens=4)
    engine.version = 0
    assert len(engine.sample(CONTEXTS[:1], 3, seed=0)) == 3
    assert (
        said() == ["http://a:1 is left out until the next sync: busy"] * lost and ("http://a:1" in engine.lost) == lost
    )


def test_what_cannot_pass_leaves_the_server_out_at_once(monkeypatch, said):
    asked = []

    def complete(replica, token_ids, sampling):
        asked.append(replica.url)
        raise ReplicaError("status 400")

    monkeypatch.setattr(Replica, "complete", complete)
    engine = VLLMServerEngine(["http://a:1", "http://b:1"], EOS, max_new_tokens=4)
    engine.version = 0
    with pytest.raises(RunError, match="no vLLM server is left.*http://a:1: status 400; http://b:1: status 400"):
        engine.sample(CONTEXTS[:1], 3, seed=0)
    assert asked == ["http://a:1", "http://b:1"] and len(said()) == 2


def test_a_call_that_hangs_is_given_up():
    release = threading.Event()
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"more than 0\.2 s"):
        within(0.2, release.wait)
    assert time.monotonic() - started < 2
    release.set()
    assert within(5, lambda: 3) == 3
    with pytest.raises(TimeoutError, match="its own"):
        within(5, lambda: (_ for _ in ()).throw(TimeoutError("its own")))


def test_a_hanging_collective_leaves_the_server_out_and_aborts_the_communicator(policy, monkeypatch):
    """vLLM's own NCCL engine, with the broadcast itself replaced by one whose peer is dead."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    release, log = threading.Event(), []
    calls = {
        name: lambda *arguments, name=name: log.append(name)
        for name in ("start_weight_update", "update_weights", "finish_weight_update")
    }

    def open_transfer(replica, source):
        engine = NCCLTrainerWeightTransferEngine(client=SimpleNamespace(**calls), source=source)
        engine.model_update_group = SimpleNamespace(destroy=lambda: (log.append("aborted"), release.set()))
        return engine

    monkeypatch.setattr(NCCLTrainerWeightTransferEngine, "_broadcast", lambda *arguments: release.wait())
    monkeypatch.setattr(vllm_replica, "open_transfer", open_transfer)
    replica = Replica("http://localhost:1", timeout=0.5, weight_transfer="nccl")
    started = time.monotonic()
    with pytest.raises(ReplicaError, match=r"nccl failed: it took more than 0\.5 s"):
        send(replica, policy)
    assert time.monotonic() - started < 5
    assert log[:3] == ["start_weight_update", "update_weights", "aborted"] and replica._transfer is None

    release.set()  # from here on the peer is there
    log.clear()
    send(replica, policy)
    send(replica, policy)  # over the same communicator
    assert log == ["start_weight_update", "update_weights", "finish_weight_update"] * 2
    replica.close()
    assert log[-1] == "aborted"


def test_a_communicator_that_cannot_even_be_closed_is_its_servers_fault(policy, monkeypatch):
    broken = SimpleNamespace(send_weights=lambda: 1 / 0, shutdown=lambda: [].pop())
    monkeypatch.setattr(vllm_replica, "open_transfer", lambda *_: broken)
    with pytest.raises(ReplicaError, match="nccl failed: division by zero"):
        send(Replica("http://localhost:1", timeout=5.0, weight_transfer="nccl"), policy)


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_vllms_transfer_engines_take_what_they_are_given(kind, policy, monkeypatch):
    """As far as a machine without GPU goes: real init infos, and calls that bind to the real signatures."""
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ModuleSource, WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine

    seen = []

    def trainer_init(init_info, *, client, source):
        real = WeightTransferTrainerFactory._registry[init_info.backend]()
        inspect.signature(real.trainer_init).bind(init_info=init_info, client=client, source=source)
        assert isinstance(init_info, real.init_info_cls)
        seen.append((init_info, client))
        return SimpleNamespace(source=source)

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    monkeypatch.setattr(HTTPVLLMWeightSyncClient, "shutdown_weight_transfer_engine", lambda self: seen.append("freed"))
    monkeypatch.setattr(Replica, "ask", lambda self, method, path: {"world_size": 4})
    vllm_replica.open_transfer(Replica("http://box:8000", 9.0, kind), ModuleSource(policy.model))
    assert seen[0] == "freed"
    init_info, client = seen[1]
    assert (init_info.backend, init_info.rank, client.base_url, client.timeout) == (kind, 0, "http://box:8000", 9.0)
    if kind == "nccl":
        assert init_info.world_size == 5 and init_info.master_port > 0 and init_info.master_address
    assert not inspect.signature(TrainerWeightTransferEngine.send_weights).parameters.keys() - {"self"}
    assert not inspect.signature(TrainerWeightTransferEngine.shutdown).parameters.keys() - {"self"}


# --- with two servers ---


def test_logprobs_are_the_learners_after_each_sync_and_only_then(engine, policy, said):
    count = 2 * SAMPLES_PER_REQUEST  # every prompt goes to both servers, and into both prefix caches
    engine.sync_weights(policy, 0)
    first = engine.sample(CONTEXTS, count, seed=1)
    assert gap(policy, first) < TOLERANCE
    perturb(policy, seed=1)
    stale = engine.sample(CONTEXTS, count, seed=1)
    assert equal(stale, first) and gap(policy, stale) > 0.05
    engine.sync_weights(policy, 1)
    fresh = engine.sample(CONTEXTS, count, seed=1)
    assert gap(policy, fresh) < TOLERANCE and not equal(fresh, first)
    assert engine.version == 1 and not said()
    assert not any(engine.weights_dir.iterdir())


def test_rollouts_are_packed_context_by_context(engine):
    count = SAMPLES_PER_REQUEST + 3  # more than one request
    rollouts = engine.sample(CONTEXTS, count, seed=2)
    assert rollouts.context_index.tolist() == [i for i in range(len(CONTEXTS)) for _ in range(count)]
    assert rollouts.contexts == CONTEXTS
    assert len(rollouts.token_ids) == len(rollouts.behavior_logprob) == rollouts.cu_seqlens[-1]
    assert rollouts.behavior_logprob.dtype == torch.float32 and float(rollouts.behavior_logprob.max()) <= 0


def test_a_completion_ends_with_our_eos_and_with_no_other(engine):
    rollouts = engine.sample(CONTEXTS, 32, seed=3)
    ended, inside = rollouts.finished.tolist(), set()
    completions = rollouts.token_ids.split(rollouts.lengths.tolist())
    for token_ids, finished in zip(completions, ended, strict=True):
        *body, last = token_ids.tolist()
        assert finished == (last in EOS) and not set(body) & set(EOS)
        assert finished or len(token_ids) == MAX_NEW_TOKENS
        inside |= set(body)
    assert any(ended) and not all(ended) and CONFIG_EOS in inside


def test_seeds_reproduce_and_separate(engine):
    first, again, other = (engine.sample(CONTEXTS, 4, seed=seed) for seed in (5, 5, 6))
    assert equal(first, again) and not equal(first, other)
    torch.testing.assert_close(first.behavior_logprob, again.behavior_logprob, atol=TOLERANCE, rtol=0)
    completions = [tuple(part.tolist()) for part in first.token_ids.split(first.lengths.tolist())]
    assert CONTEXTS[1].token_ids == CONTEXTS[2].token_ids
    assert len(set(completions[4:12])) == 8  # equal prompts, different samples


def test_the_samples_do_not_depend_on_how_many_servers_there_are(engine, policy, servers, tmp_path, said):
    """And a server that another run has given weights to is not ours any more until the next sync."""
    engine.sync_weights(policy, 2)
    together = engine.sample(CONTEXTS, 20, seed=7)
    alone = Engine(servers[:1], tmp_path)
    alone.sync_weights(policy, 2)
    assert equal(alone.sample(CONTEXTS, 20, seed=7), together)

    assert equal(engine.sample(CONTEXTS, 20, seed=7), together)  # all of it by the second server
    (line,) = said()
    assert servers[0].url in line and "another run" in line
    Engine(servers[:1], tmp_path).sync_weights(policy, 2)
    with pytest.raises(RunError, match="another run"):
        alone.sample(CONTEXTS, 1, seed=0)
    said()
    engine.sync_weights(policy, 3)
    assert gap(policy, engine.sample(CONTEXTS, 4, seed=8)) < TOLERANCE
    (line,) = said()
    assert "takes part again" in line


def test_prompts_that_do_not_fit_into_the_server_are_refused(servers, policy, tmp_path):
    engine = Engine(servers, tmp_path, max_new_tokens=100)  # 180 + 100 > 256
    engine.sync_weights(policy, 0)
    with pytest.raises(RunError, match="max-model-len|max_model_len|context length"):
        engine.sample(CONTEXTS[3:], 64, seed=0)  # some run on to the end


def test_a_failed_reload_leaves_the_server_out_and_the_next_sync_mends_it(engine, policy, tmp_path, said):
    engine.replicas[0].expect_weights()
    with pytest.raises(ReplicaError, match="collective_rpc"):
        engine.replicas[0].read_weights(tmp_path / "missing")
    engine.sync_weights(policy, 4)
    assert said() == [] and gap(policy, engine.sample(CONTEXTS, 8, seed=9)) < TOLERANCE


def test_a_server_that_hangs_is_noticed_and_stays_out_until_it_takes_new_weights(engine, policy, servers, said):
    engine.sync_weights(policy, 5)
    expected = engine.sample(CONTEXTS, 20, seed=10)
    servers[0].send(signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert equal(engine.sample(CONTEXTS, 20, seed=10), expected)
        assert time.monotonic() - started < 30
        (line,) = said()
        assert servers[0].url in line and "/health: no answer" in line
    finally:
        servers[0].send(signal.SIGCONT)
    assert equal(engine.sample(CONTEXTS, 20, seed=10), expected)
    assert servers[0].url in engine.lost  # it would answer, with weights that it need not have
    perturb(policy, seed=2)
    engine.sync_weights(policy, 6)
    assert not engine.lost and "takes part again" in said()[-1]
    assert gap(policy, engine.sample(CONTEXTS, 20, seed=10)) < TOLERANCE


def test_a_server_killed_while_sampling_costs_no_sample(engine, policy, servers, said):
    many = CONTEXTS * 4
    threading.Timer(0.3, servers[0].kill).start()
    started = time.monotonic()
    while not (lines := said()):
        rollouts = engine.sample(many, 24, seed=11)
        assert len(rollouts) == 24 * len(many) and gap(policy, rollouts) < TOLERANCE
        assert time.monotonic() - started < 30
    (line,) = lines
    assert servers[0].url in line and "left out" in line
    assert equal(engine.sample(many, 24, seed=11), rollouts) and not said()
    perturb(policy, seed=3)
    for version in (7, 8, 9):  # the dead one is tried each time, and no line repeated
        engine.sync_weights(policy, version)
    assert len(said()) <= 1 and servers[0].url in engine.lost
    assert gap(policy, engine.sample(CONTEXTS, 8, seed=12)) < TOLERANCE


def test_no_server_left_is_an_error_for_a_person(engine, policy, servers):
    servers[1].kill()
    started = time.monotonic()
    with pytest.raises(RunError) as caught:
        engine.sample(CONTEXTS, 8, seed=13)
    assert time.monotonic() - started < 30
    message = str(caught.value)
    assert all(server.url in message for server in servers) and "vllm serve" in message
    with pytest.raises(RunError, match="no vLLM server is left"):
        engine.sync_weights(policy, 10)
