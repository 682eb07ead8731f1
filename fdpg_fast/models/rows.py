"""Who sees whom in a row of texts, as data that every way to compute attention reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Text:
    """Tokens start … stop of a row, which continue those of a prompt in it; an empty prompt: they begin anew."""

    start: int
    stop: int
    prompt: slice

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def before(self) -> int:
        """Tokens of the prompt."""
        return self.prompt.stop - self.prompt.start


class Row:
    """M tokens of texts one behind the other: each token sees its text up to itself, and the prompt before that.

    Args:
        lengths: of the texts.
        prompts: the place, among the texts before it, of the one that each continues; None: it begins anew.
    """

    def __init__(self, lengths: Sequence[int], prompts: Sequence[int | None]):
        self.texts: list[Text] = []
        start = 0
        for length, prompt in zip(lengths, prompts, strict=True):
            place = slice(0, 0) if prompt is None else slice(self.texts[prompt].start, self.texts[prompt].stop)
            self.texts.append(Text(start, start + length, place))
            start += length
        self.num_tokens = start
        self.longest = max(text.before + text.length for text in self.texts)
        self._plans: dict[Any, Any] = {}

    def plan(self, make: Callable[..., Plan], *arguments: Any) -> Plan:
        """What make(row, *arguments) gives, made once: all layers of a pass share it."""
        key = (make, *arguments)
        if key not in self._plans:
            self._plans[key] = make(self, *arguments)
        return self._plans[key]

    def positions(self) -> Tensor:
        """Of each token in its prompt and text together, [M] int64."""
        return torch.cat([torch.arange(text.before, text.before + text.length) for text in self.texts])

    def ranges(self, window: int | None = None) -> tuple[Tensor, Tensor]:
        """The tokens that each sees, first and behind the last: of its prompt, and of its own text; [2, M] int64 each.

        window: tokens that one sees, itself included; None: all.
        """
        columns = [(text.start, text.prompt.start, text.prompt.stop) for text in self.texts]
        lengths = torch.tensor([text.length for text in self.texts])
        start, prompt, end = torch.tensor(columns).repeat_interleave(lengths, dim=0).unbind(1)
        token = torch.arange(self.num_tokens)
        oldest = token - start + end - prompt  # position
        oldest = torch.zeros_like(token) if window is None else (oldest - window + 1).clamp_(min=0)
        first = torch.stack([torch.minimum(prompt + oldest, end), start + (oldest - (end - prompt)).clamp_(min=0)])
        return first, torch.stack([end, token + 1])
