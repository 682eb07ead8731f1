"""A judge behind HTTP, and what is tried again: against a server that misbehaves."""

import asyncio
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fdpg_fast.config.load import parse_config
from fdpg_fast.contexts import Context
from fdpg_fast.errors import RunError, UserError
from fdpg_fast.features import Completions, Feature, check_columns, http, remote, retried
from fdpg_fast.features.judge import JudgeFeature
from support import runs


class Judge(ThreadingHTTPServer):
    """Answers with the length of each completion; before that, with what `script` holds for its next requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.at_once, self.most = [], [], 0, 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/judge?key=secret"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        judge, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.asked.append((time.monotonic(), body, dict(self.headers)))
            step = judge.script.pop(0) if judge.script else None
            judge.at_once += 1
            judge.most = max(judge.most, judge.at_once)
        if step is not None:
            step(self, body)
        else:
            time.sleep(0.05)
            lengths(self, body)

    def do_GET(self):
        self.server.asked.append((time.monotonic(), None, dict(self.headers)))
        answer(self, "[1, 2, 3]")

    def log_message(self, *_):
        pass


def answer(handler, text, status=200, **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(text.encode())))
    handler.end_headers()
    handler.wfile.write(text.encode())


def lengths(handler, body):
    with handler.server.lock:
        handler.server.at_once -= 1  # before whoever asked can know it, and ask again
    answer(handler, json.dumps([len(text) for text in body["completions"]]))


def says(text, status=200, **headers):
    return lambda handler, body: answer(handler, text, status, **headers)


def hangs_up(handler, body):
    handler.connection.close()


def stops_half_way(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"[1, ")
    handler.connection.close()


def stops_half_way_with_a_status(handler, body):
    handler.send_response(503)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"half a chunk")
    handler.connection.close()


def is_slow(handler, body):
    time.sleep(1.0)
    answer(handler, "[0, 0, 0]")


def trickles(handler, body):
    """A byte now and then, each in time for a socket's own limit."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


@pytest.fixture
def judge(monkeypatch):
    server = Judge()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    yield server
    server.shutdown()
    server.server_close()


LISTS = {"completions": ["a", "bb", "ccc"], "prompts": ["p", "q", "r"], "finished": [True, True, False]}
BATCH = Completions(**LISTS, completion_ids=[[1], [2], [3]], columns={"answer": [1, None, "é"]})


def test_a_server_gets_rows_and_gives_numbers(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", " secret-token\n")
    feature = http(judge.url, token_env="JUDGE_TOKEN")
    assert feature.name == f"http:127.0.0.1:{judge.server_port}/judge" and feature.timeout == 600
    assert feature(BATCH).tolist() == [1, 2, 3]
    ((_, body, headers),) = judge.asked
    assert body == {**LISTS, "answer": [1, None, "é"]}
    assert headers["Authorization"] == "Bearer secret-token"
    judge.script = [says("[0.5, null, true]")]
    assert feature(BATCH).nan_to_num(-1).tolist() == [0.5, -1, 1]


def test_requests_are_few_at_a_time_and_in_order(judge):
    texts = ["x" * n for n in range(20)]
    batch = Completions(texts, texts, [[]] * 20, [True] * 20)
    judge.script = [None, lambda handler, body: (time.sleep(0.3), lengths(handler, body))]
    assert http(judge.url, batch_size=2, concurrency=3)(batch).tolist() == list(range(20))
    assert len(judge.asked) == 10 and judge.most == 3


PASSING = {
    "500": says("<html>oops</html>", 500),
    "503": says("", 503),
    "429": says("slow down", 429),
    "hangs up": hangs_up,
    "stops half-way": stops_half_way,
    "stops half-way with a status": stops_half_way_with_a_status,
    "slow": is_slow,
    "trickles": trickles,
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(name, judge):
    judge.script = [PASSING[name]] * 2
    assert http(judge.url, request_timeout=0.4)(BATCH).tolist() == [1, 2, 3]
    assert len(judge.asked) == 3


@pytest.mark.parametrize("name", PASSING)
def test_and_given_up_in_one_line(name, judge):
    judge.script = [PASSING[name]] * 9
    message = r"^feature 'http:127\.0\.0\.1.*' raised ConnectionError: .*\S, at the last of 2 attempts$"
    with pytest.raises(RunError, match=message) as error:
        http(judge.url, request_timeout=0.4, attempts=2)(BATCH)
    assert "\n" not in str(error.value) and "secret" not in str(error.value) and len(judge.asked) == 2


FINAL = {
    "400": (says("no\nfield \x1b[2J answer", 400), r"status 400 Bad Request no field \\x1b\[2J answer"),
    "401": (says("", 401), "status 401"),
    "elsewhere": (says("", 302, Location="/other"), "status 302"),
    "too few": (says("[1, 2]"), r"answered '\[1, 2\]', not a list of 3 numbers"),
    "too many": (says("[1, 2, 3, 4]"), "not a list of 3 numbers"),
    "an object": (says('{"a": 1, "b": 2, "c": 3}'), "not a list of 3"),
    "a number": (says("3"), "answered '3', not a list of 3"),
    "text of three letters": (says('"abc"'), "not a list of 3"),
    "not JSON": (says("<html>welcome</html>"), "answered '<html>welcome</html>', not a list"),
    "nothing": (says(""), "answered '', not a list"),
    "NaN": (says("[NaN, 0, 0]"), "returned nan for 'a'"),
    "infinity": (says("[0, 1e999, 0]"), "returned inf for 'bb'"),
    "words": (says('["good", "bad", "ugly"]'), "returned 'good' for 'a', not a number"),
    "lists": (says("[[1], [2], [3]]"), r"returned \[1\] for 'a', not a number"),
    "nested": (says("[" * 100_000), "RecursionError|not a list"),
}


@pytest.mark.parametrize("name", FINAL)
def test_what_will_not_pass_ends_the_call_at_once(name, judge):
    step, message = FINAL[name]
    judge.script = [step]
    with pytest.raises(RunError, match=message) as error:
        http(judge.url)(BATCH)
    assert "\n" not in str(error.value) and len(judge.asked) == 1


def test_a_server_says_how_long_to_wait(judge):
    judge.script = [says("", 429, Retry_After="1")]
    assert http(judge.url)(BATCH).tolist() == [1, 2, 3]
    first, second = (when for when, _, _ in judge.asked)
    assert second - first > 0.9


def test_no_server(judge):
    judge.server_close()
    with pytest.raises(RunError, match=r"Connection refused.*, at the last of 2 attempts"):
        http(judge.url, attempts=2)(BATCH)


@pytest.mark.parametrize("token", [None, "", "  \n", "two\nlines", "schlüssel"])
def test_a_token_that_is_none_is_refused(token, monkeypatch):
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("JUDGE_TOKEN", token)
    with pytest.raises(UserError, match=r"the environment variable JUDGE_TOKEN \(token_env\) holds no token"):
        http("http://x", token_env="JUDGE_TOKEN")


@pytest.mark.parametrize(
    "url",
    ["judge:80", "ftp://x/", "http://", "http://user:pass@host/", "http://x y/", "file:///etc"]
    + ["http://[::1", "http://host:abc/", "http://host:99999/"],
)
def test_addresses_of_no_server_are_refused(url):
    with pytest.raises(UserError, match="^feature http: url: ") as refusal:
        http(url)
    assert "\n" not in str(refusal.value)
    term = {"kind": "rlhf", "beta": 1.0, "feature": {"kind": "http", "url": url}}
    with pytest.raises(UserError, match=r"^target\.0\.feature\.url: "):
        parse_config({"model": "m", "run_dir": "r", "target": [term]})


def test_an_address_may_have_any_letters(judge):
    assert http(judge.url.replace("judge", "jugé"))(BATCH).tolist() == [1, 2, 3]


@pytest.mark.parametrize("status", [200, 401, 503])
def test_a_server_that_repeats_the_token_does_not_give_it_away(status, judge, monkeypatch):
    """What is printed may be copied by a tracker."""
    monkeypatch.setenv("JUDGE_TOKEN", "secret-token")
    judge.script = [says("no such key: secret-token", status)]
    with pytest.raises(RunError, match="no such key: …") as failure:
        http(judge.url, token_env="JUDGE_TOKEN", attempts=1)(BATCH)
    assert "secret" not in str(failure.value)


def test_a_run_is_judged_by_a_server_and_keeps_its_token(judge, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret-token")
    judge.script = [PASSING["500"]]
    feature = {"kind": "http", "url": judge.url.partition("?")[0], "token_env": "JUDGE_TOKEN", "batch_size": 3}
    run_dir = runs.train(tiny_model, tmp_path, target=[{"kind": "rlhf", "feature": feature, "beta": 10.0}])
    for path in run_dir.rglob("*"):
        assert path.is_dir() or b"secret-token" not in path.read_bytes()
    for row in runs.rows(run_dir / "samples.jsonl"):
        assert list(row["features"].values()) == [len(row["completion"])]


# --- a language model that judges ---


def chat(content, **choice):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}, **choice}]})


def asked_chat(judge, template="{prompt}|{completion}|{answer}", **keys):
    url = judge.url.partition("/judge")[0] + "/v1/"
    keys = {"kind": "judge", "url": url, "model": "m", "template": template, **keys}
    return JudgeFeature.model_validate(keys).build("cpu")


def test_a_judge_is_asked_and_read(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret-token")
    judge.script = [lambda handler, body: answer(handler, chat(f"{len(body['messages'][0]['content'])}/10"))] * 3
    feature = asked_chat(judge, token_env="JUDGE_TOKEN", request={"seed": 3, "max_tokens": 8})
    assert feature.name == "judge:m" and feature(BATCH).tolist() == [5, 5, 7]
    sent = sorted((body["messages"][0]["content"], body) for _, body, _ in judge.asked)
    assert [content for content, _ in sent] == ["p|a|1", "q|bb|", "r|ccc|é"]
    assert sent[0][1] == {
        "model": "m",
        "messages": [{"role": "user", "content": "p|a|1"}],
        **{"temperature": 0.0, "max_tokens": 8, "seed": 3},
    }
    assert all(headers["Authorization"] == "Bearer secret-token" for _, _, headers in judge.asked)


def test_braces_of_completions_are_no_places(judge):
    judge.script = [lambda handler, body: answer(handler, chat(str(len(body["messages"][0]["content"]))))]
    batch = Completions(["{answer} {nobody}"], ["p"], [[]], [True], {"answer": ["x" * 50]})
    assert asked_chat(judge, '{completion} {"score": 1} {}')(batch).tolist() == [
        len('{answer} {nobody} {"score": 1} {}')
    ]


def chances(*tokens):
    return [{"token": token, "logprob": logprob} for token, logprob in tokens]


def first_token(*tokens):
    return chat("x", logprobs={"content": [{"token": "x", "top_logprobs": chances(*tokens)}]})


VERDICTS = [
    ("number", chat("Score: 7/10"), 7),
    ("number", chat("<think>1, 2, 3</think>\n-0.5"), -0.5),
    ("number", chat("none"), -1),
    ("number", chat(None), -1),
    ("number", chat("9" * 400), -1),  # is infinite as a float
    ("yes_no", chat(" **Yes**, it is."), 1),
    ("yes_no", chat("No. Yes would be wrong."), 0),
    ("yes_no", chat("Maybe yes"), -1),
    ("yes_no", chat(""), -1),
    ("yes_probability", first_token((" Yes", math.log(0.3)), ("yes", math.log(0.3)), ("NO", math.log(0.2))), 0.75),
    ("yes_probability", first_token(("Well", -0.1)), -1),
    ("yes_probability", first_token(("yes", -9999.0)), -1),
]


@pytest.mark.parametrize(("verdict", "said", "value"), VERDICTS)
def test_verdicts(verdict, said, value, judge):
    judge.script = [says(said)]
    batch = Completions(["a"], ["p"], [[]], [True])
    feature = asked_chat(judge, "{completion}", verdict=verdict, no_verdict=-1)
    assert feature(batch).tolist() == [pytest.approx(value)]
    assert ("logprobs" in judge.asked[0][1]) == (verdict == "yes_probability")


NO_CHATS = [
    "",
    "3",
    "[]",
    "{}",
    '{"choices": []}',
    '{"choices": [{}]}',
    '{"choices": [{"message": null}]}',
    "[" * 100_000,
]
NO_CHATS += [chat(3), chat(["a"]), '{"error": "no such model"}']


@pytest.mark.parametrize("said", NO_CHATS)
@pytest.mark.parametrize("verdict", ["number", "yes_no", "yes_probability"])
def test_answers_that_are_no_chat_end_the_call_at_once(said, verdict, judge):
    judge.script = [says(said)]
    batch = Completions(["a"], ["p"], [[]], [True])
    with pytest.raises(RunError, match="^feature 'judge:m' raised ValueError: .* answered .*, not a chat") as error:
        asked_chat(judge, "{completion}", verdict=verdict)(batch)
    assert "\n" not in str(error.value) and len(judge.asked) == 1


@pytest.mark.parametrize("name", ["500", "429", "hangs up", "trickles"])
def test_a_judge_is_asked_again(name, judge):
    judge.script = [PASSING[name]] * 2 + [says(chat("4"))] * 3
    assert asked_chat(judge, request_timeout=0.4)(BATCH).tolist() == [4, 4, 4]


def test_templates_that_ask_for_nothing_or_too_much_are_refused(judge):
    with pytest.raises(UserError, match=r"template has no \{completion\}"):
        asked_chat(judge, "Is it good?")
    context = Context(0, "p", (1,), {"answer": 1})
    with pytest.raises(
        UserError, match=r"contexts.train, prompt 1: template has \{gold\}, but there are only answer, co"
    ):
        check_columns([asked_chat(judge, "{completion} {gold}")], [context], "contexts.train")


# --- the same for functions of one's own ---


def test_own_functions_are_retried_sync_and_async(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    failures = {"a": 1, "bb": 2}

    def judge(text, by):
        if failures.get(text, 0):
            failures[text] -= 1
            raise ConnectionResetError("gone")
        return by * len(text)

    async def judge_async(text, by):
        await asyncio.sleep(0)
        return judge(text, by)

    for function in (judge, judge_async, lambda text, by: judge_async(text, by)):
        failures.update(a=1, bb=2)
        feature = Feature("f", lambda completions, function=function: retried(function, completions, [10] * 3))
        assert feature(BATCH).tolist() == [10, 20, 30]


def test_only_what_passes_is_retried_and_the_rest_stops():
    calls, ended = [], threading.Event()

    async def judge(text):
        calls.append(text)
        if text == "bb":
            raise KeyError("answer")
        try:
            await asyncio.sleep(20)
        finally:
            ended.set()

    with pytest.raises(RunError, match="'f' raised KeyError: 'answer'"):
        Feature("f", lambda completions: retried(judge, completions))(BATCH)
    assert calls == ["a", "bb", "ccc"] and ended.wait(5)
    with pytest.raises(RunError, match="'f' raised ConnectionError: nothing came within 0.1 s, at the last"):
        Feature("f", lambda completions: retried(asyncio.sleep, [5] * 3, attempts=1, timeout=0.1))(BATCH)
    for limits in ({"attempts": 0}, {"concurrency": 0}):  # no value would be there, or none would ever come
        with pytest.raises(RunError, match="'f' raised ValueError: retried needs 1 or more of"):
            Feature("f", lambda completions, limits=limits: retried(len, completions, **limits))(BATCH)
