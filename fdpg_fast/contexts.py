"""What completions continue: prompts from a text or JSONL file, or nothing at all (the start token)."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError


@dataclass(frozen=True)
class Context:
    """One prompt.

    Attributes:
        index: its place in the data set; per-context statistics are kept under it.
        text: the prompt as the tokenizer saw it; "" for the unconditional context.
        token_ids: never empty.
        columns: the other fields of its JSONL row; features receive them by name.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)


def load_contexts(path: str | None, tokenizer: Any, max_tokens: int) -> list[Context]:
    """Read the contexts of a data set.

    Args:
        path: a .jsonl file with "prompt" (a string, or chat messages for the tokenizer's chat template) and any
            other columns, any other text file with one prompt a line, or None for unconditional sampling.
        tokenizer: a transformers tokenizer.
        max_tokens: longest allowed prompt, in tokens.

    Raises:
        UserError: naming file and line: missing, unreadable, empty, or a prompt that is too long.
    """
    if path is None:
        return [Context(0, "", (_start_token(tokenizer),))]
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"contexts: cannot read {path!r}: {_reason(error)}") from None
    parse = _parse_json_line if path.endswith(".jsonl") else _parse_text_line
    contexts: list[Context] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a prompt may hold a form feed
        line = line.removesuffix("\r")
        if line.strip():
            prompt, columns = parse(line, f"contexts: {path}:{number}")
            contexts.append(
                make_context(len(contexts), prompt, columns, tokenizer, max_tokens, f"contexts: {path}:{number}")
            )
    if not contexts:
        raise UserError(f"contexts: {path!r} holds no prompt; write one a line, or leave the path out")
    return contexts


def derived_seed(seed: int, purpose: str, round_index: int) -> int:
    """Of one use of random numbers in a run of this seed: uses do not share theirs."""
    text = f"{seed}/{purpose}/{round_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def schedule(num_contexts: int, per_round: int, round_index: int, seed: int) -> list[int]:
    """The contexts of a round: every epoch is a fresh permutation, and any round can be recomputed alone."""
    chosen, epoch = [], -1
    permutation: list[int] = []
    for position in range(round_index * per_round, (round_index + 1) * per_round):
        if position // num_contexts != epoch:
            epoch = position // num_contexts
            permutation = list(range(num_contexts))
            random.Random(f"{seed}/{epoch}").shuffle(permutation)
        chosen.append(permutation[position % num_contexts])
    return sorted(chosen)


def _parse_text_line(line: str, where: str) -> tuple[str, dict[str, Any]]:
    return line, {}


def _parse_json_line(line: str, where: str) -> tuple[str | list, dict[str, Any]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg}") from None
    if not isinstance(row, dict) or "prompt" not in row:
        raise UserError(f'{where} needs an object with "prompt", a string or a list of messages')
    prompt = row.pop("prompt")
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
    ):
        return prompt, row
    if not isinstance(prompt, str):
        raise UserError(f'{where}: "prompt" must be a string or a list of {{"role", "content"}} messages')
    return prompt, row


def make_context(
    index: int, prompt: str | list, columns: dict[str, Any], tokenizer: Any, max_tokens: int, where: str
) -> Context:
    if isinstance(prompt, list):
        if tokenizer.chat_template is None:
            raise UserError(f"{where} has chat messages but the tokenizer has no chat template")
        try:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program
            message = " ".join(str(error).split())
            raise UserError(f"{where}: the chat template refuses these messages: {message}") from error
    else:
        text = prompt
    if not text.strip():
        raise UserError(f"{where} is an empty prompt; leave the path out to sample unconditionally")
    templated = isinstance(prompt, list)  # a template writes its own BOS
    token_ids = tuple(tokenizer(text, add_special_tokens=not templated)["input_ids"])
    if not token_ids:
        raise UserError(f"{where}: the tokenizer makes no token of this prompt")
    if len(token_ids) > max_tokens:
        raise UserError(
            f"{where} has {len(token_ids)} tokens but the model has room for {max_tokens} "
            "beside engine.max_new_tokens; shorten the prompt or lower engine.max_new_tokens"
        )
    return Context(index, text, token_ids, columns)


def _start_token(tokenizer: Any) -> int:
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise UserError("contexts: this tokenizer has neither BOS nor EOS to start from; give prompts in contexts.train")


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"
