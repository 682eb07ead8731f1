"""A server that speaks vLLM's dialect over a tiny model, and the ways in which its answers can be wrong."""

from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fdpg_fast.contexts import Context
from fdpg_fast.engines import TransformersEngine
from fdpg_fast.models.language_model import LanguageModel

GENERATE = "/inference/v1/generate"
LOAD_ADAPTER = "/v1/load_lora_adapter"
ONE_MODEL = threading.Lock()  # at a time: the machines of tests have few cores


@dataclass(frozen=True)
class Answer:
    """What goes over the wire: `pace` seconds between two bytes, from the status line on."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    length: int | None = None  # that is announced; None: the true one
    pace: float = 0.0
    raw: bytes | None = None  # instead of all that


Damage = Callable[[Answer], Answer]


@functools.cache
def loaded(folder: Path) -> LanguageModel:
    return LanguageModel(AutoModelForCausalLM.from_pretrained(folder))


class FakeServer:
    """Samples with a model of its own, until a damage befalls what it answers.

    Args:
        model: folder; its weights are replaced as those of vLLM are, by /collective_rpc.
        damage: of the answers to `path`, all of them but the first `spared`.
        key: that requests below /inference have to show; None: none.
        keeps_weights: new ones are taken without a word and not used.
    """

    def __init__(
        self,
        model: Path,
        path: str = GENERATE,
        damage: Damage | None = None,
        spared: int = 0,
        key: str | None = None,
        keeps_weights: bool = False,
    ):
        self.path, self.damage, self.spared, self.key, self.keeps_weights = path, damage, spared, key, keeps_weights
        self.model = copy.deepcopy(loaded(model))
        self.label, self.asked = "", []
        self._lock = threading.Lock()
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                fake.serve(self)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # whoever asked has hung up
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        body = json.loads(request.rfile.read(int(request.headers.get("Content-Length", 0))) or b"null")
        with self._lock:
            seen = self.asked.count(path)
            self.asked.append(path)
        if self.key is not None and path == GENERATE and request.headers.get("Authorization") != f"Bearer {self.key}":
            answer = Answer(b'{"error": "Unauthorized"}', status=401)
        elif path == LOAD_ADAPTER:  # which servers have that were started for adapters
            answer = Answer(b'{"detail": "Not Found"}', status=404)
        else:
            said = self.answer(path, body)
            answer = Answer(b"" if said is None else json.dumps(said).encode())
            if self.damage is not None and path == self.path and seen >= self.spared:
                answer = self.damage(answer)
        send(request, answer)

    def answer(self, path: str, body: Any) -> Any:
        """What vLLM 0.32 answers."""
        if path == "/collective_rpc" and not self.keeps_weights:
            for file in Path(body["kwargs"]["weights_path"]).glob("*.safetensors"):
                with ONE_MODEL:
                    self.model.model.load_state_dict(load_file(file), strict=False)  # as vLLM: what is missing stays
        if path == "/update_weight_version":
            self.label = body["new_version"]
        if path == GENERATE:
            return self.generate(tuple(body["token_ids"]), body["sampling_params"])
        return {
            "/health": None,
            "/pause": {"status": "paused"},
            "/resume": {"status": "resumed"},
            "/collective_rpc": {"results": [None]},
            "/reset_prefix_cache": {"success": True},
            "/update_weight_version": {"success": True, "new_version": self.label},
        }[path]

    def generate(self, prompt: tuple[int, ...], sampling: dict[str, Any]) -> dict[str, Any]:
        engine = TransformersEngine(
            self.model, sampling["stop_token_ids"], max_new_tokens=sampling["max_tokens"], max_sequences=64
        )
        with ONE_MODEL, torch.inference_mode():
            rollouts = engine.sample([Context(0, "", prompt)], sampling["n"], sampling["seed"])
        ends, choices = rollouts.cu_seqlens.tolist(), []
        for index, (first, last) in enumerate(zip(ends, ends[1:], strict=False)):
            ids, values = (x[first:last].tolist() for x in (rollouts.token_ids, rollouts.behavior_logprob))
            tokens = [
                {"token_id": token, "logprob": value, "rank": 1, "top_logprobs": []}
                for token, value in zip(ids, values, strict=True)
            ]
            choices.append(
                {
                    "index": index,
                    "token_ids": ids,
                    "logprobs": {"content": tokens},
                    "finish_reason": "stop" if rollouts.finished[index] else "length",
                    "stop_reason": None,
                    "weight_versions": [{"version": self.label, "start": 0, "end": len(ids)}],
                }
            )
        return {"request_id": "1", "choices": choices, "usage": {"prompt_tokens": len(prompt)}}


def send(request: http.server.BaseHTTPRequestHandler, answer: Answer) -> None:
    head = [f"HTTP/1.1 {answer.status} Whatever"]
    head += [f"{name}: {value}" for name, value in answer.headers.items()]
    head += [f"Content-Length: {len(answer.body) if answer.length is None else answer.length}", "Connection: close"]
    raw = "\r\n".join([*head, "", ""]).encode() + answer.body if answer.raw is None else answer.raw
    with contextlib.suppress(OSError):
        for i in range(len(raw) if answer.pace else 1):
            request.wfile.write(raw[i : i + 1] if answer.pace else raw)
            time.sleep(answer.pace)
    request.close_connection = True


@contextlib.contextmanager
def servers(*fakes: FakeServer) -> Iterator[None]:
    try:
        yield
    finally:
        for fake in fakes:
            fake.close()


# --- damages ---


def parsed(change: Callable[[Any], Any]) -> Damage:
    """Of the JSON, changed in place."""

    def damage(answer: Answer) -> Answer:
        value = json.loads(answer.body)
        change(value)
        return replace(answer, body=json.dumps(value).encode())

    return damage


def numbered(change: Callable[[list[Any]], Any]) -> Damage:
    """Of the list of completions."""
    return parsed(lambda answer: change(answer["choices"]))


def choice(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Of the last completion."""
    return numbered(lambda choices: change(choices[-1]))


def token(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Of the last completion's last token."""
    return choice(lambda choice: change(choice["logprobs"]["content"][-1]))


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda value: value.pop(key)


def having(**items: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda value: value.update(items)


def last_id(value: Any) -> Damage:
    """Another id in both places."""

    def change(choice: dict[str, Any]) -> None:
        choice["token_ids"][-1] = choice["logprobs"]["content"][-1]["token_id"] = value

    return choice(change)


def with_tokens(ids: list[int], end: str) -> Damage:
    def change(choice: dict[str, Any]) -> None:
        content = [{"token_id": i, "logprob": -1.0} for i in ids]
        choice.update(token_ids=ids, logprobs={"content": content}, finish_reason=end)

    return choice(change)


def sent(body: bytes | None = None, **changes: Any) -> Damage:
    return lambda answer: replace(answer, **({} if body is None else {"body": body}), **changes)


def html(answer: Answer) -> Answer:
    page = b"<!DOCTYPE html><html><head><title>Log in</title></head><body>" + b"<p>Please.</p>" * 50 + b"</body></html>"
    return replace(answer, body=page, headers={"Content-Type": "text/html; charset=utf-8"})


def lowered(nats: float, every: bool) -> Damage:
    """The log-prob of a token, in all completions or in one."""

    def change(answer: dict[str, Any]) -> None:
        for choice in answer["choices"] if every else answer["choices"][-1:]:
            choice["logprobs"]["content"][0]["logprob"] -= nats

    return parsed(change)


def all_tokens(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def change_all(answer: dict[str, Any]) -> None:
        for choice in answer["choices"]:
            for token in choice["logprobs"]["content"]:
                change(token)

    return parsed(change_all)


def raised(nats: float) -> Callable[[dict[str, Any]], Any]:
    return lambda token: token.update(logprob=token["logprob"] + nats)


def swapped(choice: dict[str, Any]) -> None:
    """Another token than was sampled, under the log-prob of that."""
    first = choice["logprobs"]["content"][0]
    choice["token_ids"][0] = first["token_id"] = (first["token_id"] + 1) % 5


ANY: dict[str, Damage] = {  # answer of any call
    "null": sent(b"null"),
    "an empty list": sent(b"[]"),
    "an empty object": sent(b"{}"),
    "a string": sent(b'"ok"'),
    "nothing": sent(b""),
    "an error with status 200": sent(b'{"error": {"message": "no", "code": 500}}'),
    "html": html,
    "html that calls itself json": lambda answer: replace(html(answer), headers=answer.headers),
    "json that calls itself html": sent(headers={"Content-Type": "text/html"}),
    "no content type": sent(headers={}),
    "gzip": lambda answer: replace(
        answer, body=gzip.compress(answer.body), headers=answer.headers | {"Content-Encoding": "gzip"}
    ),
    "gzip unsaid": lambda answer: replace(answer, body=gzip.compress(answer.body)),
    "utf-16": lambda answer: replace(answer, body=answer.body.decode().encode("utf-16")),
    "cut json": lambda answer: replace(answer, body=answer.body[:-2]),
    "json twice": lambda answer: replace(answer, body=answer.body * 2),
    "nested deep": sent(b"[" * 100_000),
    "a long number": sent(b'{"status": ' + b"9" * 5000 + b"}"),
    "status 204": sent(b"", status=204),
    "status 302": sent(b"", status=302, headers={"Location": "http://127.0.0.1:1/"}),
    "status 400": sent(status=400),
    "status 404": sent(b"not found", status=404),
    "status 500": sent(b"\x1b[31mred\x1b[0m\r\nnext line\x00\x7f " + b"x" * 100_000, status=500),
    "status 503": sent(b"", status=503),
    "no status": sent(raw=b"hello\r\n\r\n"),
    "hangs up": sent(raw=b""),
    "hangs up in the middle": lambda answer: replace(answer, length=len(answer.body) + 100),
    "a length that is no number": sent(raw=b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"),
    "chunks that are none": sent(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
    "a long header": sent(raw=b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"),
    "a byte now and then": sent(pace=0.1),
    "more than fits": sent(b'{"x": "' + b"x" * 2**22 + b'"}'),
}
CONTROL: dict[str, dict[str, Damage]] = {
    "/pause": {"not done": parsed(having(status="resumed"))},
    "/resume": {"not done": parsed(having(status="paused"))},
    "/collective_rpc": {"not done": parsed(having(results=None))},
    "/reset_prefix_cache": {"not done": parsed(having(success=False)), "nearly": parsed(having(success="true"))},
    "/update_weight_version": {"not done": parsed(having(success=False))},
}
COMPLETIONS: dict[str, Damage] = {
    "no choices": parsed(without("choices")),
    "choices null": parsed(having(choices=None)),
    "choices an object": parsed(having(choices={})),
    "no completion": parsed(having(choices=[])),
    "a completion too few": numbered(lambda choices: choices.pop()),
    "a completion too many": numbered(lambda choices: choices.append(choices[-1] | {"index": len(choices)})),
    "a completion twice": numbered(lambda choices: choices.append(choices[-1])),
    "null among them": numbered(lambda choices: choices.append(None)),
    "no index": choice(without("index")),
    "an index twice": numbered(lambda choices: [choice.update(index=0) for choice in choices]),
    "index a float": choice(having(index=0.5)),
    "no tokens": choice(without("token_ids")),
    "tokens null": choice(having(token_ids=None)),
    "tokens empty": choice(having(token_ids=[], logprobs={"content": []})),
    "tokens a string": choice(having(token_ids="1 2 3")),
    "token a float": last_id(2.0),
    "token a fraction": last_id(2.5),
    "token a string": last_id("2"),
    "token true": last_id(True),
    "token null": last_id(None),
    "token a list": last_id([2]),
    "token 2**70": last_id(2**70),
    "token 2**31": last_id(2**31),
    "token negative": last_id(-1),
    "token just beyond the vocabulary": last_id(128),
    "another id beside the log-prob": choice(lambda choice: choice["logprobs"]["content"][0].update(token_id=3)),
    "another id than the log-prob's": choice(lambda choice: choice["token_ids"].__setitem__(0, 3)),
    "another token, under the log-prob of the sampled": choice(swapped),
    "no log-probs": choice(without("logprobs")),
    "log-probs null": choice(having(logprobs=None)),
    "log-probs without content": choice(having(logprobs={})),
    "content null": choice(having(logprobs={"content": None})),
    "a log-prob too few": choice(lambda choice: choice["logprobs"]["content"].pop()),
    "a log-prob too many": choice(
        lambda choice: choice["logprobs"]["content"].append({"token_id": 1, "logprob": -1.0})
    ),
    "log-prob missing": token(without("logprob")),
    "log-prob null": token(having(logprob=None)),
    "log-prob a string": token(having(logprob="-1.0")),
    "log-prob false": token(having(logprob=False)),
    "log-prob nan": token(having(logprob=float("nan"))),
    "log-prob infinite": token(having(logprob=float("inf"))),
    "log-prob minus infinite": token(having(logprob=float("-inf"))),
    "log-prob 1e400": lambda answer: replace(
        answer, body=answer.body.replace(b'"logprob": -', b'"logprob": -1e400, "x": -')
    ),
    "log-prob that stands for nan": token(having(logprob=-9999.0)),
    "log-prob positive": token(having(logprob=0.1)),
    "all log-probs up by 5": all_tokens(raised(5.0)),
    "all log-probs up by a little": all_tokens(raised(0.1)),
    "a log-prob off, in one": lowered(5.0, every=False),
    "a log-prob off, in all": lowered(0.5, every=True),
    "log-probs of zero": all_tokens(having(logprob=0.0)),
    "stop without eos": with_tokens([1, 2, 3, 4, 5, 6], "stop"),
    "length with eos": with_tokens([1, 2, 3, 4, 5, 7], "length"),
    "eos inside, then length": with_tokens([1, 2, 7, 4, 5, 6], "length"),
    "eos inside, then stop": with_tokens([1, 2, 7, 4, 7], "stop"),
    "cut short": with_tokens([1, 2], "length"),
    "aborted": with_tokens([1, 2], "abort"),
    "too long": with_tokens([1] * 500, "length"),
    "too long, to the end": with_tokens([1] * 500 + [7], "stop"),
    "made up": with_tokens([1, 2, 3, 4, 5, 6], "length"),
    "no reason": choice(without("finish_reason")),
    "reason null": choice(having(finish_reason=None)),
    "reason a number": choice(having(finish_reason=1)),
    "reason unknown": choice(having(finish_reason="repetition")),
    "no weight version": choice(without("weight_versions")),
    "weight version null": choice(having(weight_versions=None)),
    "weights of another run": choice(having(weight_versions=[{"version": "another-0"}])),
    "weights changed on the way": choice(lambda choice: choice["weight_versions"].append({"version": "another-1"})),
    "weight version a number": choice(having(weight_versions=[{"version": 0}])),
}
DAMAGES: dict[tuple[str, str], Damage] = {
    **{(path, name): damage for path, own in CONTROL.items() for name, damage in (ANY | own).items()},
    **{(GENERATE, name): damage for name, damage in (ANY | COMPLETIONS).items()},
}
