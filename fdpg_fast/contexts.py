"""What completions continue: the prompts of a data set, or nothing at all (the start token)."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .chats import ContextsConfig, is_chat, render
from .data import Row, read_rows
from .errors import UserError, one_line
from .progress import activity, advance
from .puzzles import Puzzles

CHUNK = 1000  # prompts that are made at a time
WRITTEN_CHAT = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")


@dataclass(frozen=True)
class Context:
    """One prompt."""

    index: int  # its place in the data set; per-context statistics are kept under it
    text: str  # the prompt as the tokenizer saw it; "" for the unconditional context
    token_ids: tuple[int, ...]  # never empty
    columns: Mapping[str, Any] = field(default_factory=dict)  # of the whole data set; None where its row has none
    messages: tuple[Mapping[str, Any], ...] | None = None  # of a chat


@dataclass(frozen=True)
class Prompting:
    """How prompts are made for one model."""

    tokenizer: Any  # of transformers
    max_tokens: int  # longest allowed prompt
    embedding_rows: int  # of the model, which knows no token beyond
    continues_prompt: bool = True  # a completion goes on where its prompt ends; not so of an encoder-decoder
    settings: ContextsConfig = ContextsConfig()  # what the template of chats gets


def load_contexts(path: str | Puzzles | None, prompting: Prompting) -> list[Context]:
    """The contexts of a data set, as `read_rows` takes it, of puzzles, or of None: unconditional sampling.

    Raises:
        UserError: naming file and line: unreadable, empty, or a prompt that the model cannot be given as it is meant.
    """
    if path is None:
        tokenizer = prompting.tokenizer
        starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
        if not starts:
            raise UserError("contexts: this tokenizer has neither BOS nor EOS to start from; set contexts.train")
        prompting.settings.refuse_chat_keys("contexts.train is left out")
        _check(starts[:1], prompting, "contexts: the start")
        return [Context(0, "", (starts[0],))]
    with activity(f"reading {path}"):
        rows = path.rows() if isinstance(path, Puzzles) else read_rows(path)
    if not rows:
        raise UserError(f"contexts: {path!r} holds no prompt; write one a line, or leave the path out")
    with activity(f"tokenizing {path}", len(rows)):
        return make_contexts(rows, prompting)


def make_contexts(rows: list[Row], prompting: Prompting) -> list[Context]:
    """The contexts of rows with a "prompt", a text or chat messages, and any other columns; raises as `load_contexts`.

    A template writes its own BOS. A text gets what the tokenizer puts before it, unless it begins with that, and what
    it puts behind only if the completion is not to continue the text.
    """
    for where, row in rows:
        if not isinstance(row, dict) or "prompt" not in row:
            found = reprlib.repr([*row] if isinstance(row, dict) else row)
            raise UserError(f'{where} needs an object with "prompt", a string or a list of messages, not {found}')
    names = [name for name in dict.fromkeys(name for _, row in rows for name in row) if name != "prompt"]
    one_of_each = list(range(prompting.embedding_rows))  # or every token of the data would be an object of its own
    contexts: list[Context] = []
    for first in range(0, len(rows), CHUNK):
        part = rows[first : first + CHUNK]
        prompts = [_prompt(row, where, prompting) for where, row in part]
        try:
            before, behind = _around(prompting)
            all_ids = _tokenize([text for text, _ in prompts], prompting)
        except Exception as error:  # some fail on what they have no token for
            raise UserError(f"{part[0][0]} or after: the tokenizer fails: {one_line(error)}") from error
        for (where, row), (text, messages), ids in zip(part, prompts, all_ids, strict=True):
            if messages is None and ids:
                ids = ids if ids[:1] == before[:1] else before + ids
                ids = ids if ids[-1:] == behind[-1:] else ids + behind
            _check(ids, prompting, where)
            token_ids = tuple(map(one_of_each.__getitem__, ids))
            columns = {name: row.get(name) for name in names}
            contexts.append(Context(len(contexts), text, token_ids, columns, messages))
        advance(len(part))
    return contexts


def _prompt(row: dict[str, Any], where: str, prompting: Prompting) -> tuple[str, tuple[Mapping[str, Any], ...] | None]:
    """The text of a row's prompt, and its messages if it is a chat."""
    prompt, messages = row["prompt"], None
    if is_chat(prompt):
        prompt, messages = render(prompt, row, prompting.tokenizer, prompting.settings, where)
    elif not isinstance(prompt, str):
        raise UserError(f'{where}: "prompt" must be a string or a list of {{"role", "content"}} messages of text')
    elif WRITTEN_CHAT.match(prompt):
        raise UserError(f"{where} holds chat messages as one text; write them as a list, in a .jsonl or .parquet file")
    else:
        prompting.settings.refuse_chat_keys(f"{where} is plain text")
    if not prompt.strip():
        raise UserError(f"{where} is an empty prompt; leave the path out to sample unconditionally")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is no text: {prompt[error.start]!r} is half a character") from None
    return prompt, None if messages is None else tuple(messages)


def _tokenize(texts: list[str], prompting: Prompting) -> list[list[int]]:
    """The tokens of texts; of one that is far too long only as many as show it, since 20 MB take a minute."""

    def tokens(texts: list[str]) -> list[list[int]]:
        return prompting.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    enough, many = 64 * (prompting.max_tokens + 1), 2 * prompting.max_tokens  # a token rarely has over 64 characters
    begun = zip(texts, tokens([text[:enough] for text in texts]), strict=True)
    return [tokens([text])[0] if len(text) > enough and len(ids) <= many else ids for text, ids in begun]


def _around(prompting: Prompting) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text, as far as the model is to see it."""
    for probe in ("a", " a", "0", "."):
        bare, whole = (prompting.tokenizer(probe, add_special_tokens=special)["input_ids"] for special in (False, True))
        for place in range(len(whole) - len(bare) + 1):
            if bare and whole[place : place + len(bare)] == bare:
                return whole[:place], [] if prompting.continues_prompt else whole[place + len(bare) :]
    raise ValueError("what it adds to a text cannot be told from the text")


def _check(ids: list[int], prompting: Prompting, where: str) -> None:
    """Raises UserError where the model cannot continue a prompt of these tokens."""
    tokenizer, room, count = prompting.tokenizer, prompting.max_tokens, len(ids)
    if not ids:
        raise UserError(f"{where}: the tokenizer makes no token of this prompt")
    if count > room:
        size = str(count) if count <= 2 * room else f"more than {2 * room}"  # of such a one a part was tokenized
        raise UserError(
            f"{where} has {size} tokens but the model has room for {room} "
            "beside engine.max_new_tokens; shorten the prompt or lower engine.max_new_tokens"
        )
    if max(ids) >= prompting.embedding_rows:
        token, known = tokenizer.convert_ids_to_tokens(max(ids)), prompting.embedding_rows
        raise UserError(
            f"{where} has the token {token!r}, number {max(ids)}, but the model has only {known} embeddings; "
            f"add to them with its resize_token_embeddings({len(tokenizer)}), and save it"
        )
    if count > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise UserError(f"{where} begins with BOS twice; the template or the text should write it once")
    if count > 1 and prompting.continues_prompt and ids[-1] == tokenizer.eos_token_id:
        raise UserError(f"{where} ends with EOS, {tokenizer.eos_token!r}: the model would continue an ended text")
