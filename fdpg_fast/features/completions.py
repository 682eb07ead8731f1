"""Completions as features see them: what the model wrote, as text, and what belongs to it."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..rollouts import Rollouts

GIVEN = {"completions", "prompts", "texts", "completion_ids", "finished"}
ROWS = ("completions", "prompts", "completion_ids", "finished")
ON_REQUEST = {"completion_texts", "prompt_texts", "tokenizer"}  # only to a function that names them


@dataclass(frozen=True)
class Completions:
    """B completions, as text.

    Where a completion continues its prompt, both together are the text of all tokens. The prompt ends where its own
    tokens' text and that of all part: a character that is begun in the prompt and ended behind belongs to the
    completion. The prompt of an encoder-decoder is the text of the data set.
    """

    completions: list[str]  # without the EOS
    prompts: list[str]  # what each of them continues
    completion_ids: list[list[int]]  # without the EOS
    finished: list[bool]  # ended by EOS rather than cut off
    columns: Mapping[str, list[Any]] = field(default_factory=dict)  # of the data set; None where a context has none
    continues_prompt: bool = True  # prompt and completion are one text; not so of an encoder-decoder
    chats: Sequence[Sequence[Mapping[str, Any]] | None] = ()  # the messages of each prompt that is a chat
    tokenizer: Any = None

    @property
    def texts(self) -> list[str]:
        """What was written in full: prompt + completion, or the completion alone if it does not continue its prompt."""
        if not self.continues_prompt:
            return list(self.completions)
        return [prompt + text for prompt, text in zip(self.prompts, self.completions, strict=True)]

    def part(self, rows: range) -> Completions:
        """The completions of a range."""
        rows_of: dict[str, Any] = {
            name: [values[i] for i in rows] for name, values in vars(self).items() if name in ROWS
        }
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return replace(self, **rows_of, columns=columns, chats=[self.chats[i] for i in rows] if self.chats else ())

    def arguments(self, function: Callable[..., Any]) -> dict[str, Any]:
        """What the function takes, by name, of GIVEN, ON_REQUEST and the columns: copies, to do with as it likes.

        Of a chat, `prompts` has the messages and `completions` a message of the assistant, as TRL gives them;
        `prompt_texts` and `completion_texts` are always text.
        """
        chats = self.chats or [None] * len(self.prompts)

        parameters = inspect.signature(function).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        wanted = {*parameters, *(self.columns.keys() | GIVEN if takes_all else ())}
        prompts = zip(self.prompts, chats, strict=True)
        answers = zip(self.completions, chats, strict=True)
        given = {
            # value by value: rows of one context share theirs
            **{name: [*map(copy.deepcopy, values)] for name, values in self.columns.items() if name in wanted},
            "completions": [[{"role": "assistant", "content": text}] if chat else text for text, chat in answers],
            "prompts": [copy.deepcopy([*chat]) if chat else text for text, chat in prompts],
            "texts": self.texts,
            "completion_ids": [[*tokens] for tokens in self.completion_ids],
            "finished": [*self.finished],
            "completion_texts": [*self.completions],
            "prompt_texts": [*self.prompts],
            # checkpoints save the original
            "tokenizer": copy.deepcopy(self.tokenizer) if "tokenizer" in wanted else None,
        }
        return {name: value for name, value in given.items() if name in wanted}

    @staticmethod
    def decode(
        rollouts: Rollouts, tokenizer: Any, continues_prompt: bool = True, keep_special_tokens: bool = False
    ) -> Completions:
        """The texts of rollouts, without special tokens, or with all but BOS, EOS and padding."""
        options = {"skip_special_tokens": not keep_special_tokens, "clean_up_tokenization_spaces": False}

        def text(sequences: list[list[int]]) -> list[str]:
            if keep_special_tokens:
                ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
                sequences = [[token for token in tokens if token not in ends] for tokens in sequences]
            return tokenizer.batch_decode(sequences, **options)

        ids, index = rollouts.completion_ids(), rollouts.context_index.tolist()
        contexts = [rollouts.contexts[i] for i in index]
        if continues_prompt:
            # not apart: many decoders drop a space at the start, join pieces of words, or need all bytes of a character
            texts = text([[*context.token_ids, *tokens] for context, tokens in zip(contexts, ids, strict=True)])
            alone = text([list(context.token_ids) for context in rollouts.contexts])
            ends = [_end(alone[i], full) for i, full in zip(index, texts, strict=True)]
            prompts = [full[:end] for full, end in zip(texts, ends, strict=True)]
            completions = [full[end:] for full, end in zip(texts, ends, strict=True)]
        else:
            prompts, completions = [context.text for context in contexts], text(ids)
        names = sorted({name for context in rollouts.contexts for name in context.columns})
        return Completions(
            completions=completions,
            prompts=prompts,
            completion_ids=ids,
            finished=rollouts.finished.tolist(),
            columns={name: [context.columns.get(name) for context in contexts] for name in names},
            continues_prompt=continues_prompt,
            chats=[context.messages for context in contexts],
            tokenizer=tokenizer,
        )


def _end(prompt: str, text: str) -> int:
    """Where the text of a prompt, as it is alone, ends in that of prompt and completion."""
    return len(prompt) if text.startswith(prompt) else len(os.path.commonprefix([prompt, text]))
