"""Whether a completion solves the problem of reasoning-gym that its prompt is, by the data set's own scorer."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal

from .answers import Reading, needs
from .apart import Apart
from .checkers import ARITHMETIC
from .feature import Feature

_EVALUATES = re.compile(r"\b(eval|exec|parse_expr|sympify)\(")
# these evaluate texts of their own, and no answer (looked at in 0.1.25)
_HARMLESS = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic"}


class ReasoningGymFeature(Reading):
    kind: Literal["reasoning_gym"]
    """1 where a completion solves the problem of contexts.reasoning_gym, by that data set's own scorer; see `read`."""
    read: Literal["last_number", "boxed", "tags", "all"] = "tags"
    partial: bool = False
    """The scorer's value in [0, 1], which is above 0 for some wrong answers, in place of 1 where it is 1."""

    def make(self, device: str) -> Feature:
        needs("reasoning_gym", "reasoning_gym")
        read, scorer = self.reader(), Apart("reasoning_gym")

        def answers(completion_texts: list[str], finished: list[bool]) -> list[str | None]:
            found = map(read, completion_texts, finished)
            return [None if answer is None else answer.strip() for answer in found]

        async def score(
            completion_texts: list[str], finished: list[bool], reasoning_gym: list[Any]
        ) -> list[float | None]:
            named = [answer or "" for answer in answers(completion_texts, finished)]
            values = await scorer.each(named, reasoning_gym, otherwise=0.0)
            return values if self.partial else [None if v is None else float(v > 1 - 1e-9) for v in values]

        return Feature("reasoning_gym", score, timeout=600.0, answers=answers, check=_check)


def _check(columns: Mapping[str, Any]) -> str | None:
    puzzle: Any = columns.get("reasoning_gym")
    if puzzle is None:
        return None
    try:
        recipe, index, question = puzzle
        name = json.loads(recipe)[0]
        assert isinstance(index, int) and isinstance(question, str)
    except Exception:
        return "the column reasoning_gym is not what contexts.reasoning_gym makes"
    if _evaluates_answers(name):
        return f"the scorer of {name} executes answers as Python; compare them with another feature, as exact_answer"
    return None


@functools.cache
def _evaluates_answers(name: str) -> bool:
    """Whether the module of a data set evaluates something that may be an answer."""
    from reasoning_gym.factory import DATASETS

    source = inspect.getsource(sys.modules[DATASETS[name][0].__module__])
    return name == "composite" or (name not in _HARMLESS | ARITHMETIC and bool(_EVALUATES.search(source)))
