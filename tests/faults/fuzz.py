"""Made-up examples at the edges where somebody else's text comes in: an answer of ours, or one line of refusal."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fdpg_fast.config.load import config_keys, dump_config, load_config
from fdpg_fast.contexts import Context, Prompting, load_contexts
from fdpg_fast.engines import vllm_answers
from fdpg_fast.errors import UserError
from fdpg_fast.features import Completions, regex
from fdpg_fast.rollouts import pack
from fdpg_fast.runs.folder import to_float, to_json
from fdpg_kernels import fdpg_loss
from support import runs
from support.tokenizers import FAMILIES

from . import Tally

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
NUMBER = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -(10**20), 1e-320, 2**63]))
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
YAML = st.one_of(
    TEXT,
    PLAIN.map(str),
    PLAIN.map(json.dumps),
    st.text("[]{}:,-#&*!|>'\"%@`~ \n\t0123456789.eE+_xoabcnulltrue", max_size=30),
    st.sampled_from(
        ["2024-13-45", "!!int x", "!!binary x", "0x", "0b2", "1_0", "1:99", ".inf", "=", "<<: 1", "&a [*a]"]
    ),
)

# nothing, or all but the last value of a config
RIGHT = "model: m\nrun_dir: r\ntarget: [{kind: import, path: a.py:b}]\n"
KEYS = ("device: ", "contexts:\n  system_prompt: ", "contexts:\n  tools: ", "contexts:\n  chat_template_kwargs: ")
STARTS = ["", *(RIGHT + key for key in KEYS), RIGHT + "contexts:\n  chat_template_kwargs:\n    key: "]

SAMPLING = {"n": 2, "stop_token_ids": [0], "max_tokens": 3}
IDS, LABEL, VOCABULARY = [[5, 2, 9], [4, 0]], "run-1", 12
ANSWER = {
    "choices": [
        {
            "index": index,
            "token_ids": ids,
            "finish_reason": reason,
            "logprobs": {"content": [{"token_id": token, "logprob": -1.5} for token in ids]},
            "weight_versions": [{"version": LABEL}],
        }
        for index, (ids, reason) in enumerate(zip(IDS, ("length", "stop"), strict=True))
    ]
}
OTHERWISE = st.one_of(PLAIN, st.integers(-2, 13), st.floats(-3, 0), st.sampled_from(["stop", "length", LABEL]))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something in JSON."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def refused_in_a_line(error: UserError) -> None:
    """What every refusal is; the command line escapes what is not to be shown, but would hide a second line so."""
    message = str(error)
    assert message and message == message.strip() and len(message.splitlines()) == 1, repr(message)


class Fuzz:
    """The properties, each a function of made-up arguments that raises where something is wrong."""

    def __init__(self, model: Path, folder: Path):
        self.folder = folder
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.prompting = Prompting(tokenizer, max_tokens=64, embedding_rows=len(tokenizer))
        self.config = runs.write_config(folder, runs.settings(model, folder / "run"))
        self.tokenizers = {name: make() for name, make in FAMILIES.items()}
        self.keys = sorted(key.replace(".N", ".0") for key in config_keys())

    def properties(self) -> dict[str, tuple[Callable[..., None], dict[str, Any]]]:
        lines = st.one_of(YAML, PLAIN.map(json.dumps), PLAIN.map(lambda x: json.dumps({"prompt": x})))
        changes = st.dictionaries(st.sampled_from([*places(ANSWER)]), OTHERWISE, max_size=2)
        ids = st.tuples(*[st.lists(st.integers(0, 10**4), max_size=8)] * 2)
        seeds, bad = st.integers(0, 2**31), st.sampled_from([math.nan, math.inf, -math.inf, 1e30])
        heads = {"poison": bad, "temperature": st.floats(0.2, 3.0), "softcap": st.sampled_from([None, 2.0])}
        suffixes = st.sampled_from([".jsonl", ".JSONL", ".ndjson", ".json", ".csv", ".txt"])
        return {
            "--key=value": (self.override, {"key": st.one_of(st.sampled_from(self.keys), TEXT), "value": YAML}),
            "YAML file": (
                self.yaml_file,
                {"start": st.sampled_from(STARTS), "text": st.lists(YAML, max_size=4).map("\n".join)},
            ),
            "prompt file": (self.prompts, {"lines": st.lists(lines, max_size=4), "suffix": suffixes}),
            "pattern": (self.pattern, {"text": st.one_of(TEXT, st.text("()[]{}|*+?\\^$.a1-,:<>=!P#", max_size=20))}),
            "answer of a server": (self.answer, {"changes": changes}),
            "ids of a text": (
                self.texts,
                {"family": st.sampled_from([*self.tokenizers]), "ids": ids, "keep": st.booleans()},
            ),
            "batch of the ops": (
                self.ops,
                {"lengths": st.lists(st.integers(0, 5), min_size=1, max_size=4), "seed": seeds, **heads},
            ),
            "JSON line": (self.json_line, {"row": st.dictionaries(TEXT, PLAIN, max_size=3)}),
        }

    def override(self, key: str, value: str) -> None:
        self.reads_back(self.config, {key: value})

    def yaml_file(self, start: str, text: str) -> None:
        path = self.folder / "fuzz.yaml"
        path.write_text(start + text, encoding="utf-8", errors="surrogatepass")
        self.reads_back(path, {})

    def reads_back(self, path: Path, overrides: dict[str, str]) -> None:
        """A config that is taken is the same one when a run has written it down."""
        try:
            config = load_config(path, overrides)
        except UserError as error:
            return refused_in_a_line(error)
        kept = self.folder / "kept.yaml"
        kept.write_text(dump_config(config), encoding="utf-8")
        assert load_config(kept) == config

    def prompts(self, lines: list[str], suffix: str) -> None:
        path = self.folder / f"fuzz{suffix}"
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        try:
            contexts = load_contexts(str(path), self.prompting)
        except UserError as error:
            return refused_in_a_line(error)
        texts = [line for line in path.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
        if "json" in suffix.lower() and suffix != ".json":
            texts = [json.loads(line)["prompt"] for line in texts]
        if suffix not in (".json", ".csv"):
            assert [context.text for context in contexts] == [text.removesuffix("\r") for text in texts]
        columns = {name for context in contexts for name in context.columns}
        assert all(context.text.strip() and context.token_ids for context in contexts)
        assert all(context.columns.keys() == columns for context in contexts)

    def pattern(self, text: str) -> None:
        try:
            feature = regex(text)
        except UserError as error:
            return refused_in_a_line(error)
        assert re.compile(text) and feature.name

    def answer(self, changes: dict[tuple[Any, ...], Any]) -> None:
        """What is wrong with it is noticed, and whatever is taken could have been sampled."""
        said = json.loads(json.dumps(ANSWER))
        for path, value in sorted(changes.items(), key=lambda change: -len(change[0])):
            within = said
            for key in path[:-1]:
                within = within[key]
            if path:
                within[path[-1]] = value
            else:
                said = value
        try:
            body = json.dumps(said).encode()
            parsed = vllm_answers.parse(vllm_answers.GENERATE, "application/json", body)
            taken = vllm_answers.completions(parsed, SAMPLING, LABEL, VOCABULARY)
        except vllm_answers.ReplicaError as error:
            assert str(error).isprintable()
            return
        assert len(taken) == SAMPLING["n"]
        for tokens, logprobs, finished in taken:
            assert 0 < len(tokens) == len(logprobs) <= 3 and finished == (tokens[-1] == 0) and 0 not in tokens[:-1]
            assert finished or len(tokens) == 3
            assert all(type(token) is int and 0 <= token < VOCABULARY for token in tokens)
            assert all(-9999 < value <= 1e-3 for value in logprobs)

    def texts(self, family: str, ids: tuple[list[int], list[int]], keep: bool) -> None:
        """Prompt and completion together are the text of all ids."""
        tokenizer = self.tokenizers[family]
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        size = len(tokenizer)
        prompt = [token % size for token in ids[0]] or [tokenizer.bos_token_id]
        completion = [token % size for token in ids[1] if token % size != tokenizer.eos_token_id]
        drawn = [*completion, tokenizer.eos_token_id]
        rollouts = pack([Context(0, "", tuple(prompt))], [[(drawn, [0.0] * len(drawn), True)]])
        seen = Completions.decode(rollouts, tokenizer, keep_special_tokens=keep)
        kept = [token for token in [*prompt, *completion] if not (keep and token in ends)]
        whole = tokenizer.decode(kept, skip_special_tokens=not keep, clean_up_tokenization_spaces=False)
        assert seen.texts == [whole] == [seen.prompts[0] + seen.completions[0]]

    def ops(self, lengths: list[int], seed: int, poison: float, temperature: float, softcap: float | None) -> None:
        """Values and gradients are those of the definition, and what lies under ignored tokens is in none of them."""
        generator = torch.Generator().manual_seed(seed)
        count, options = sum(lengths), {"generator": generator, "dtype": torch.float64}
        hidden, weight = torch.randn(count, 4, **options), torch.randn(7, 4, **options)
        ids = torch.randint(0, 7, (count,), generator=generator)
        ids[torch.rand(count, generator=generator) < 0.3] = -100
        behavior = -torch.rand(count, **options)
        log_score, log_z = torch.randn(len(lengths), **options), torch.randn(len(lengths), **options)
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        found = []
        for implementation, below in (("reference", 0.0), ("chunked", poison)):
            states = hidden.masked_fill((ids == -100)[:, None], below).requires_grad_()
            head = weight.clone().requires_grad_()
            scaling = {"temperature": temperature, "softcap": softcap, "impl": implementation}
            result = fdpg_loss(states, head, ids, ends, behavior, log_score, log_z, **scaling)
            result.loss.backward()
            found.append((result.loss.detach(), states.grad, head.grad))
        for ours, expected in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)

    def json_line(self, row: dict[str, Any]) -> None:
        line = to_json(row)
        assert "\n" not in line and math.isnan(to_float(None))
        read = runs.strict(line)
        assert read.keys() == row.keys()
        for name, value in row.items():
            if isinstance(value, float):
                assert to_float(read[name]) == value or math.isnan(value) and math.isnan(to_float(read[name]))
            elif isinstance(value, (int, str)):
                assert read[name] == value


def fuzz(model: Path, examples: int, seed: int) -> Iterator[Tally]:
    """So many examples in all, evenly over the properties; each property stops at its first find."""
    with tempfile.TemporaryDirectory() as name:
        properties = Fuzz(model, Path(name)).properties()
        for what, (check, arguments) in properties.items():
            tally = Tally(f"made-up {what}")
            try:
                _run(check, arguments, examples // len(properties), seed, tally)
            except Exception as error:
                tally.wrong.append(f"{what}: {type(error).__name__}: {error} {getattr(error, '__notes__', '')}")
            yield tally


def _run(check: Callable[..., None], arguments: dict[str, Any], examples: int, seed: int, tally: Tally) -> None:
    from hypothesis import seed as seeded

    @seeded(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(**arguments)
    def run(**made: Any) -> None:
        tally.tried += 1
        check(**made)

    run()
