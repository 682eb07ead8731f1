"""Features that compare the answer which a completion names with the one that the data set has."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Literal

from pydantic import model_validator

from ..errors import UserError, one_line
from .apart import Apart
from .feature import Feature, FeatureSection

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# a sign stands before a number, not between two; a currency may stand on either side of it
_SIGN = r"(?:(?<![\w)\]}.])[-+][$€£¥]?|[$€£¥][-+]?)?"
_NUMBER = re.compile(rf"{_SIGN}(?:{_DIGITS})(?:[eE][-+]?\d{{1,3}}(?!\w))?(?:\s?/\s?\d+)?")
_UNITS = re.compile(r"[$€£¥%]|\\[$%!,;]|\s+(?=/)|(?<=/)\s+")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([-+\d.]+)\}\s*\{(\d+)\}")
_MINUS = str.maketrans("−﹣－", "---")
LONGEST_NUMBER = 1000  # characters; Python writes out no number of some thousand digits
_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


class Reading(FeatureSection):
    """Where in a completion its answer stands."""

    read: Literal["last_number", "boxed", "tags", "all"] = "last_number"
    r"""The answer: the last number, what the last \boxed{} or <answer></answer> holds, or all of the completion."""
    pattern: str | None = None
    """Instead of `read`, a regular expression: what its last match has in its first group."""

    @model_validator(mode="after")
    def _one_way(self) -> Reading:
        if self.pattern is not None and self.read != type(self).model_fields["read"].default:
            raise ValueError(f"read: {self.read} has no effect beside pattern; leave one of them out")
        return self

    def reader(self) -> Callable[[str, bool], str | None]:
        """The answer in a completion, given whether the completion is finished; None where it names none.

        Where nothing marks the end of an answer, as behind a last number, that of a completion which was cut off
        before its EOS may be half of one, and counts as none.
        """
        kind, read = self.kind, _READERS[self.read]
        if self.pattern is None:
            whole = self.read in ("last_number", "all")
            return lambda text, finished: read(text) if finished or not whole else None
        try:
            pattern = re.compile(self.pattern)
        except Exception as error:  # see `regex`
            reason = f"is not a regular expression: {one_line(error)}"
            raise UserError(f"feature {kind}: pattern {self.pattern[:80]!r} {reason}") from None
        if not pattern.groups:
            raise UserError(f"feature {kind}: pattern {self.pattern[:80]!r} has no group (…) around the answer")
        return lambda text, finished: _last(pattern, text)


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = None
    for match in pattern.finditer(text):
        found = match[1]
    return found


def _last_number(text: str) -> str | None:
    found = None
    for match in _NUMBER.finditer(text.translate(_MINUS)):
        found = match[0]
    return found


def _boxed(text: str) -> str | None:
    r"""What the last \boxed{…} holds, brackets within it in pairs; None where it does not end."""
    _, mark, inside = text.rpartition("\\boxed{")
    depth = 1 if mark else 0
    for place, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return inside[:place] if mark else None
    return None


_READERS: dict[str, Callable[[str], str | None]] = {
    "last_number": _last_number,
    "boxed": _boxed,
    "tags": lambda text: _last(_TAGS, text),
    "all": lambda text: text,
}


def as_number(text: str) -> Fraction | None:
    """The number that a text is, exactly: 1,000 and 1000.0 are one, so are 1/2, \\frac{1}{2} and 0.5, −5 and -5.

    Signs of currencies and % are units, and left out: 50% is 50. None where the text is something else.
    """
    if len(text) > LONGEST_NUMBER:
        return None
    plain = unicodedata.normalize("NFKC", _FRACTION.sub(r"\1/\2", text).translate(_MINUS))
    plain = _UNITS.sub("", plain).strip().removesuffix(".")
    try:
        return Fraction(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else None
    except ZeroDivisionError:
        return None


def same_answer(text: str) -> str:
    """One text for all that are the same answer: of a number its value, else the text without outer space."""
    number = as_number(text)
    return str(number) if number is not None else " ".join(text.split())


def gold(value: Any) -> str | None:
    """The right answer in a column, as text; of a text with ####, as GSM8K has it, what stands behind."""
    return None if value is None else str(value).rpartition("####")[2].translate(_MINUS).strip()


def check_gold(column: str, needs_number: bool = False) -> Callable[[Mapping[str, Any]], str | None]:
    """What is wrong with the column of right answers in a row, in words, or None; a row may have no answer at all."""

    def check(columns: Mapping[str, Any]) -> str | None:
        if column not in columns:
            return f"there is no column {column!r}, only {', '.join(sorted(columns)) or 'prompts'}"
        value = columns[column]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not (text := gold(value)):
            return f"{column} is {one_line(repr(value))[:60]}, not a text or a number"
        if needs_number and as_number(text) is None:
            return f"{column} is {one_line(text)[:60]!r}, which no last number equals; read another part of completions"
        return None

    return check


class ExactAnswerFeature(Reading):
    kind: Literal["exact_answer"]
    """1 where the answer that a completion names is the right one, numbers by their value; see `read`."""
    column: str = "answer"
    """Column of the data with the right answer; where it has ####, as GSM8K, what stands behind."""

    def make(self, device: str) -> Feature:
        column, read = self.column, self.reader()

        def answers(completion_texts: list[str], finished: list[bool]) -> list[str | None]:
            found = map(read, completion_texts, finished)
            return [None if answer is None else same_answer(answer) for answer in found]

        def score(completion_texts: list[str], finished: list[bool], **columns: list[Any]) -> list[float | None]:
            right = [gold(value) for value in columns[column]]
            named = zip(answers(completion_texts, finished), right, strict=True)
            return [None if wanted is None else float(answer == same_answer(wanted)) for answer, wanted in named]

        needs_number = self.read == "last_number" and self.pattern is None
        return Feature("exact_answer", score, answers=answers, check=check_gold(column, needs_number))


class MathFeature(FeatureSection):
    kind: Literal["math"]
    """1 where a finished completion ends in mathematics that equals the right answer, by the package math-verify."""
    column: str = "answer"
    """Column of the data with the right answer, in LaTeX or plain; where it has ####, what stands behind."""

    def make(self, device: str) -> Feature:
        needs("math", "math_verify")
        column, equal, read = self.column, Apart("math"), Apart("math_answer")

        def plain(texts: list[str], finished: list[bool]) -> list[str]:
            return [text.translate(_MINUS) if done else "" for text, done in zip(texts, finished, strict=True)]

        async def answers(completion_texts: list[str], finished: list[bool]) -> list[str | None]:
            return await read.each(plain(completion_texts, finished), [()] * len(finished))

        async def score(completion_texts: list[str], finished: list[bool], **columns: list[Any]) -> list[bool | None]:
            right = [None if value is None else [gold(value)] for value in columns[column]]
            return await equal.each(plain(completion_texts, finished), right, otherwise=False)

        return Feature("math", score, timeout=600.0, answers=answers, check=check_gold(column))


def needs(kind: str, *modules: str) -> None:
    """Raises UserError where a package of the extra `verifiers` is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f'feature {kind} needs {module}: pip install "fdpg-fast[verifiers]"')
