"""A vLLM server whose answers are wrong, beside a good one: left out, never trained on, and no reason to stop."""

import contextlib
import http.client
import json
import logging
import signal
import threading
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fdpg_fast.config.load import parse_config
from fdpg_fast.engines import replicas
from fdpg_fast.engines.replicas import VLLMServerEngine
from fdpg_fast.engines.vllm import sampling_settings
from fdpg_fast.engines.vllm_answers import completions, parse
from fdpg_fast.engines.vllm_replica import Replica, ReplicaError
from fdpg_fast.errors import RunError, UserError
from fdpg_fast.models.language_model import LanguageModel
from fdpg_fast.sampling import Sampling
from support import fake_server
from support.fake_server import COMPLETIONS, DAMAGES, GENERATE, FakeServer
from support.vllm_cases import CONTEXTS, EOS, VOCABULARY, gap, perturb, save_model

MAX_NEW_TOKENS = 6
NEEDED = {"model": "m", "run_dir": "r", "target": [{"kind": "import", "path": "a:b"}]}
SLOW = "a byte now and then"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def policy(folder):
    policy = LanguageModel(LlamaForCausalLM.from_pretrained(folder))
    perturb(policy, seed=2)  # the servers begin with other weights
    return policy


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(replicas, "BACK_OFF", (0.0, 0.0))


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, replicas.__name__)
    return lambda: [record.getMessage() for record in caplog.records if record.name == replicas.__name__]


@contextlib.contextmanager
def engine_of(*fakes, tmp_path, **options):
    """An engine that has synced."""
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "weight_transfer": "disk", "weights_dir": tmp_path, "gap_limit": 0.01}
    urls = [fake.url for fake in fakes]
    with fake_server.servers(*fakes):
        engine = VLLMServerEngine(urls, EOS, **settings | options)
        for replica, fake in zip(engine.replicas, fakes, strict=True):
            if fake.damage is DAMAGES.get((fake.path, SLOW)):
                replica.timeout = 0.6  # for the others so much that a busy machine is no fault
        yield engine


def draw(engine, policy):
    """As a run draws: whatever comes is compared with the learner."""
    sampling = Sampling(parse_config(NEEDED), policy, 4096, None)
    sampling.engine = engine
    # 11: of an engine in this process it would be the last completion alone that is compared
    return sampling.agreeing(engine.sample(CONTEXTS, 3, 5), lambda: engine.sample(CONTEXTS, 3, 5), policy, seed=11)


@pytest.fixture(scope="module")
def expected(folder, policy, tmp_path_factory):
    with engine_of(FakeServer(folder), tmp_path=tmp_path_factory.mktemp("good")) as engine:
        engine.sync_weights(policy, 0)
        rollouts = draw(engine, policy)
    assert float(gap(policy, rollouts).max()) < 1e-4 and bool(rollouts.finished.any())
    return rollouts


def same(ours, expected):
    return all(torch.equal(ours.tensors()[name], tensor) for name, tensor in expected.tensors().items())


# of values that could be: only the learner can tell
PLAUSIBLE = {
    *("a log-prob off, in one", "a log-prob off, in all", "all log-probs up by a little", "log-probs of zero"),
    *("made up", "another token, under the log-prob of the sampled"),
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions_that_cannot_be_are_refused_for_what_they_are(name, folder):
    fake = FakeServer(folder)
    sampling = sampling_settings(EOS, MAX_NEW_TOKENS) | {"n": 3, "seed": 0}
    with fake_server.servers(fake):
        honest = fake_server.Answer(json.dumps(fake.generate((3,), sampling)).encode())

    def read(answer):
        return completions(parse(GENERATE, "application/json", answer.body), sampling, "", VOCABULARY)

    assert len(read(honest)) == 3
    damaged = COMPLETIONS[name](honest)
    with contextlib.nullcontext() if name in PLAUSIBLE else pytest.raises(ReplicaError):
        read(damaged)


@pytest.mark.parametrize("name", sorted({name for _, name in DAMAGES}))
def test_a_wrong_answer_leaves_that_server_out(name, folder, policy, expected, tmp_path, said):
    """In every call that there is; in the one for completions also when the probe went well."""
    bad = [FakeServer(folder, path, damage) for (path, known), damage in DAMAGES.items() if known == name]
    late = [FakeServer(folder, fake.path, fake.damage, spared=1) for fake in bad if fake.path == GENERATE]
    with engine_of(*bad, *late, good := FakeServer(folder), tmp_path=tmp_path) as engine:
        engine.sync_weights(policy, 0)
        assert set(engine.lost) == {fake.url for fake in bad}
        assert same(draw(engine, policy), expected)
        assert engine.lost.keys() == {replica.url for replica in engine.replicas} - {good.url}
    assert len(said()) == len(bad) + len(late) > 0
    for line, url in zip(sorted(said()), sorted(engine.lost), strict=True):
        assert line.startswith(f"{url} is left out until the next sync: ")
        assert line.isprintable() and len(line) < 600 and line == " ".join(line.split())


def test_there_are_enough_ways():
    assert len(COMPLETIONS) >= 60 and len(DAMAGES) >= 250


@pytest.mark.parametrize("name", ["html", "log-prob nan", "a log-prob off, in one", SLOW])
def test_without_a_good_server_the_run_ends_in_a_line_that_names_it(name, folder, policy, tmp_path):
    bad = FakeServer(folder, damage=DAMAGES[GENERATE, name], spared=1)
    with engine_of(bad, tmp_path=tmp_path) as engine:
        engine.sync_weights(policy, 0)
        with pytest.raises(RunError) as caught:
            draw(engine, policy)
    message = str(caught.value)
    assert message.startswith(f"no vLLM server is left to sample with ({bad.url}: ") and message.isprintable()
    assert "learning_rate" not in message


def test_a_server_that_was_left_out_returns_with_the_next_sync(folder, policy, expected, tmp_path, said):
    bad, good = FakeServer(folder, damage=DAMAGES[GENERATE, "log-prob nan"]), FakeServer(folder)
    with engine_of(bad, good, tmp_path=tmp_path) as engine:
        engine.sync_weights(policy, 0)
        bad.damage = None
        assert same(draw(engine, policy), expected) and bad.url in engine.lost
        engine.sync_weights(policy, 1)
        assert same(draw(engine, policy), expected) and not engine.lost
    assert len(said()) == 2 and "takes part again" in said()[1]


def test_a_deadline_is_of_the_whole_request(folder, tmp_path):
    """A byte now and then never lets a socket's own time-out pass."""
    slow = FakeServer(folder, "/pause", DAMAGES["/pause", SLOW])
    with fake_server.servers(slow):
        started = time.monotonic()
        with pytest.raises(ReplicaError, match=r"/pause: no answer \(it took more than 0\.6 s\)"):
            Replica(slow.url, 0.6, "disk").ask("POST", "/pause")
        assert 0.6 < time.monotonic() - started < 2


def test_a_signal_does_not_wait_for_a_server_that_hangs(folder, policy, tmp_path):
    hanging = FakeServer(folder, "/pause", fake_server.sent(pace=5.0))
    with engine_of(hanging, FakeServer(folder), tmp_path=tmp_path) as engine:
        engine.replicas[0].timeout = 60.0
        started = time.monotonic()
        threading.Timer(0.5, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            engine.sync_weights(policy, 0)
    assert time.monotonic() - started < 10


def test_nobody_waits_for_a_server_that_was_hung_up_on_while_a_request_connected(folder, monkeypatch):
    hanging = FakeServer(folder, "/pause", fake_server.sent(pace=5.0))
    with fake_server.servers(hanging):
        replica, connect = Replica(hanging.url, 60.0, "disk"), http.client.HTTPConnection.connect
        monkeypatch.setattr(http.client.HTTPConnection, "connect", lambda self: (connect(self), replica.hang_up()))
        started = time.monotonic()
        with pytest.raises(ReplicaError, match="/pause: it is left out"):
            replica.ask("POST", "/pause")
    assert time.monotonic() - started < 10


def test_what_distorts_is_ruled_out_in_every_request(folder, policy, tmp_path, monkeypatch):
    """A server may take what is left out from the generation config in the model's folder."""
    asked = []
    monkeypatch.setattr(FakeServer, "generate", lambda self, prompt, sampling: asked.append(sampling))
    with (
        engine_of(FakeServer(folder), tmp_path=tmp_path) as engine,
        pytest.raises(RunError, match="Invalid JSON"),
    ):
        engine.sync_weights(policy, 0)
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert (
        asked[0].items() >= (neutral | {"presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True}).items()
    )


# --- the probe ---


def another_model(folder, **changes):
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(folder, **changes)
    LlamaForCausalLM(config).save_pretrained(path := folder.with_name("-".join(map(str, changes.values()))))
    return path


def swallow(fake):
    """Take what fits of another model's weights, as a server does that does not look."""
    load = fake.model.model.load_state_dict

    def load_what_fits(state, strict):
        own = fake.model.model.state_dict()
        return load({name: x for name, x in state.items() if name in own and own[name].shape == x.shape}, strict)

    fake.model.model.load_state_dict = load_what_fits
    return fake


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda folder: FakeServer(another_model(folder, num_hidden_layers=4)), id="4 layers"),
        pytest.param(lambda folder: swallow(FakeServer(another_model(folder, vocab_size=200))), id="vocabulary"),
        pytest.param(lambda folder: FakeServer(another_model(folder, rms_norm_eps=0.3)), id="a setting"),
        pytest.param(lambda folder: FakeServer(folder, keeps_weights=True), id="stale weights"),
    ],
)
def test_a_server_with_another_model_or_other_weights_is_left_out_at_the_sync(
    other, folder, policy, expected, tmp_path, said
):
    fakes = [FakeServer(folder), other(folder), FakeServer(folder)]
    with engine_of(*fakes, tmp_path=tmp_path) as engine:
        engine.sync_weights(policy, 0)
        assert set(engine.lost) == {fakes[1].url} and len(said()) == 1
        assert same(draw(engine, policy), expected)
    assert "log-probs differ" in said()[0] or "not one of the 128" in said()[0]
    asked = [fake.asked.count(GENERATE) for fake in fakes]
    assert asked[1] == 1 and sum(asked) == 3 + len(CONTEXTS)  # one short request a server


def test_no_server_has_the_weights(folder, policy, tmp_path):
    fakes = [FakeServer(folder, keeps_weights=True) for _ in range(2)]
    with engine_of(*fakes, tmp_path=tmp_path) as engine, pytest.raises(RunError) as caught:
        engine.sync_weights(policy, 0)
    assert engine.version == -1 and all(fake.url in str(caught.value) for fake in fakes)


def test_weights_that_are_no_numbers_are_no_servers_fault(folder, tmp_path):
    broken = LanguageModel(LlamaForCausalLM.from_pretrained(folder))
    good = FakeServer(folder, keeps_weights=True)
    with torch.no_grad():
        broken.model.model.norm.weight[0] = torch.nan
    with engine_of(good, tmp_path=tmp_path) as engine, pytest.raises(RunError, match="the policy has diverged"):
        engine.sync_weights(broken, 0)


# --- keys ---


def test_a_server_with_a_key(folder, policy, expected, tmp_path, monkeypatch, said):
    monkeypatch.setenv("VLLM_API_KEY", "sk-secret-1")
    open_, locked = FakeServer(folder), FakeServer(folder, key="sk-secret-1")
    with engine_of(open_, locked, tmp_path=tmp_path) as engine:
        engine.sync_weights(policy, 0)
        assert same(draw(engine, policy), expected) and not engine.lost
        for key in ("sk-another", None):
            monkeypatch.setenv("VLLM_API_KEY", key) if key else monkeypatch.delenv("VLLM_API_KEY")
            engine.sync_weights(policy, 1)
            assert set(engine.lost) == {locked.url}
            assert same(draw(engine, policy), expected)
    assert all("set VLLM_API_KEY" in line and "status 401" in line and "sk-" not in line for line in said())


def test_a_key_that_a_server_repeats_is_not_said(folder, policy, tmp_path, monkeypatch, said):
    monkeypatch.setenv("VLLM_API_KEY", "sk-secret-2")
    talkative = FakeServer(folder, damage=fake_server.sent(b"no access with sk-secret-2", status=403))
    with engine_of(talkative, FakeServer(folder), tmp_path=tmp_path) as engine:
        engine.sync_weights(policy, 0)
    assert "no access with …" in said()[0] and "secret" not in said()[0]


@pytest.mark.parametrize("key", ["sk-1\n", "sk-é", "a\tb"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_said(key, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(UserError) as caught:
        VLLMServerEngine(["http://a:1"], EOS, max_new_tokens=1)
    assert str(caught.value).startswith("VLLM_API_KEY: ") and "sk-" not in str(caught.value)


NO_ADDRESSES = (
    "http://",
    "http://:8000",
    "http://a:abc",
    "http://a:99999",
    "http://a:0",
    "ftp://a:1",
    "a:8000",
    "//a:1",
)


def with_url(url):
    return parse_config(NEEDED | {"engine": {"kind": "vllm_server", "urls": ["http://b:1", url]}})


@pytest.mark.parametrize(
    "url",
    [
        *NO_ADDRESSES,
        "",
        "http://[::1",
        "http://a b:1",
        "http://a:1/?x=1",
        "http://a:1/#x",
        "http://a:1/v1",
        "http://a:1/v1/",
    ],
)
def test_addresses_that_are_none_are_refused(url):
    with pytest.raises(UserError, match=r"engine\.urls\.1: "):
        with_url(url)


@pytest.mark.parametrize("url", ["https://me:secret@host:8000", "me:secret@host:8000", "http://secret@host"])
def test_an_address_with_a_password_is_refused_without_being_said(url):
    with pytest.raises(UserError, match="VLLM_API_KEY") as caught:
        with_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://gpu-box:8000", "https://10.0.0.1", "http://[::1]:8000/", "http://a:1/prefix"])
def test_addresses_stay_as_they_are_written(url):
    assert with_url(url).engine.urls[1] == url
