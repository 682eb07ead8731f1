"""Chats as the tokenizer's template writes them, up to the place where the model goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue, model_validator

from .config.section import Section, UserPath
from .errors import UserError, one_line
from .puzzles import Puzzles, PuzzlesConfig

Messages = list[dict[str, Any]]


class ContextsConfig(Section):
    train: UserPath | None = None
    """.jsonl .ndjson .json .csv .parquet or .txt, a folder, or OWNER/NAME:SPLIT of the hub; none: start from BOS."""
    eval: UserPath | None = None
    """Prompts that are never trained on, for the evaluation; none: those of `train`."""
    system_prompt: str | None = None
    """Put before every chat that has no system message."""
    chat_template_kwargs: dict[str, JsonValue] = {}
    """For the chat template, such as {enable_thinking: false}; chat_template is its name where there are several."""
    tools: list[dict[str, JsonValue]] = []
    """JSON schemas for the chat template; columns called tools and chat_template_kwargs go before these two."""
    reasoning_gym: PuzzlesConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ContextsConfig:
        for key in ("train", "eval"):
            if self.reasoning_gym is not None and getattr(self, key) is not None:
                raise ValueError(f"{key} has no effect beside reasoning_gym, which makes both; leave one of them out")
        return self

    @property
    def to_train_on(self) -> str | Puzzles | None:
        """What `load_contexts` takes; None: the start token."""
        return self.train if self.reasoning_gym is None else Puzzles(self.reasoning_gym, held_out=False)

    @property
    def to_evaluate_on(self) -> str | Puzzles | None:
        """What `load_contexts` takes; None: what is trained on."""
        return self.eval if self.reasoning_gym is None else Puzzles(self.reasoning_gym, held_out=True)

    def refuse_chat_keys(self, where: str) -> None:
        """Raises UserError where one is set that reaches chats only, of which there is none."""
        for key in ("system_prompt", "chat_template_kwargs", "tools"):
            if getattr(self, key):
                raise UserError(f"{where}, but contexts.{key} reaches chat messages only; leave it out")


def is_chat(prompt: Any) -> bool:
    """Whether it is a list of messages whose contents are text."""
    return isinstance(prompt, list) and bool(prompt) and all(map(_is_message, prompt))


def _is_message(message: Any) -> bool:
    if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
        return False
    content = message.get("content")
    if content and isinstance(content, list):
        return all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def render(
    messages: Messages, columns: Mapping[str, Any], tokenizer: Any, settings: ContextsConfig, where: str
) -> tuple[str, Messages]:
    """The text of a chat, and its messages with the system prompt.

    It ends where the model answers, or within the answer that a last message of the assistant begins.

    Raises:
        UserError: the template refuses it, or would leave out something of what it was given.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{where} has chat messages but the tokenizer has no chat template")
    system = None if messages[0]["role"] in ("system", "developer") else settings.system_prompt
    messages = [*([] if system is None else [{"role": "system", "content": system}]), *messages]
    begun = messages[-1]["role"] == "assistant"
    end = {"add_generation_prompt": not begun, "continue_final_message": begun, "tokenize": False}
    try:
        tools = columns.get("tools") or settings.tools or None
        tools = json.loads(tools) if isinstance(tools, str) else tools
        variables = {**settings.chat_template_kwargs, **(columns.get("chat_template_kwargs") or {})}
        template = tokenizer.get_chat_template(variables.pop("chat_template", None), tools)
        text = tokenizer.apply_chat_template(messages, chat_template=template, tools=tools, **end, **variables)
    except Exception as error:  # a template is a program
        raise UserError(f"{where}: the chat template refuses these messages: {one_line(error)}") from error
    for name in ("messages", *variables, *(["tools"] if tools else [])):
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(f"{where}: the chat template {template[:40]!r}… does not look at {name}; leave it out")
    if system is not None and system.strip() not in text:
        raise UserError(f"{where}: the chat template leaves the system message out; so must contexts.system_prompt be")
    parts = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    # as Python prints them, up to the last text: an answer to be continued ends with it
    if any(str(part).rpartition(repr(part[-1]["text"]))[0] in text for part in parts):
        raise UserError(f'{where}: the chat template takes no lists of parts; write each "content" as one string')
    return text, messages
