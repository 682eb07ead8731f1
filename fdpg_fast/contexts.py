"""What completions continue: prompts from a text or JSONL file, or nothing at all (the start token)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError, one_line


@dataclass(frozen=True)
class Context:
    """One prompt."""

    index: int  # its place in the data set; per-context statistics are kept under it
    text: str  # the prompt as the tokenizer saw it; "" for the unconditional context
    token_ids: tuple[int, ...]  # never empty
    columns: Mapping[str, Any] = field(default_factory=dict)  # the other fields of its JSONL row, for features


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
        starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
        if not starts:
            raise UserError("contexts: this tokenizer has neither BOS nor EOS to start from; set contexts.train")
        return [Context(0, "", (starts[0],))]
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # read_text would take a lone \r for the end of a line
    except UnicodeDecodeError:
        raise UserError(f"contexts: cannot read {path!r}: it is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"contexts: cannot read {path!r}: {error.strerror or error}") from None
    contexts: list[Context] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a prompt may hold a form feed
        if line.strip():
            where, line = f"contexts: {path}:{number}", line.removesuffix("\r")
            prompt, columns = _parse_json(line, where) if path.endswith(".jsonl") else (line, {})
            contexts.append(make_context(len(contexts), prompt, columns, tokenizer, max_tokens, where))
    if not contexts:
        raise UserError(f"contexts: {path!r} holds no prompt; write one a line, or leave the path out")
    return contexts


def _parse_json(line: str, where: str) -> tuple[str | list, dict[str, Any]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg}") from None
    if not isinstance(row, dict) or "prompt" not in row:
        raise UserError(f'{where} needs an object with "prompt", a string or a list of messages')
    prompt = row.pop("prompt")
    is_chat = isinstance(prompt, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
    if not (isinstance(prompt, str) or (is_chat and prompt)):
        raise UserError(f'{where}: "prompt" must be a string or a list of {{"role", "content"}} messages')
    return prompt, row


def make_context(
    index: int, prompt: str | list, columns: dict[str, Any], tokenizer: Any, max_tokens: int, where: str
) -> Context:
    """A context of a text or of chat messages; raises as `load_contexts`, errors that begin with `where`."""
    is_chat = isinstance(prompt, list)
    if is_chat and tokenizer.chat_template is None:
        raise UserError(f"{where} has chat messages but the tokenizer has no chat template")
    try:
        options = {"add_generation_prompt": True, "tokenize": False}
        text = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, **options)
    except Exception as error:  # a template is a program
        raise UserError(f"{where}: the chat template refuses these messages: {one_line(error)}") from error
    if not text.strip():
        raise UserError(f"{where} is an empty prompt; leave the path out to sample unconditionally")
    token_ids = tuple(tokenizer(text, add_special_tokens=not is_chat)["input_ids"])  # a template writes its own BOS
    if not token_ids:
        raise UserError(f"{where}: the tokenizer makes no token of this prompt")
    if len(token_ids) > max_tokens:
        raise UserError(
            f"{where} has {len(token_ids)} tokens but the model has room for {max_tokens} "
            "beside engine.max_new_tokens; shorten the prompt or lower engine.max_new_tokens"
        )
    return Context(index, text, token_ids, columns)
