"""Features of Python source. The text is parsed and looked at, never executed."""

from __future__ import annotations

import ast
import io
import warnings
from collections.abc import Callable
from typing import Literal

from ..errors import UserError
from .feature import Feature, FeatureSection


class PythonParsesFeature(FeatureSection):
    kind: Literal["python_parses"]
    """1 where prompt + completion is finished and parses as Python; nothing is executed."""

    def make(self, device: str) -> Feature:
        return python_parses()


def python_parses() -> Feature:
    """1 where prompt + completion (of an encoder-decoder: the completion) is a complete Python module, else 0.

    What was cut off before its EOS counts as 0, though by chance it may parse.
    """
    return _of_source("python_parses", parses)


class Pep8Feature(FeatureSection):
    kind: Literal["pep8"]
    """1 where prompt + completion is finished, parses, and pycodestyle has nothing to say about it."""

    def make(self, device: str) -> Feature:
        return pep8()


def pep8() -> Feature:
    """As `python_parses`, and only where pycodestyle has nothing to say about it either."""
    try:
        import pycodestyle
    except ModuleNotFoundError:
        raise UserError('feature pep8 needs pycodestyle: pip install "fdpg-fast[examples]"') from None

    # spelled out, or the user's own ~/.config/pycodestyle would change the target
    checks = {"select": (), "ignore": pycodestyle.DEFAULT_IGNORE.split(","), "max_line_length": 79}
    options = pycodestyle.StyleGuide(quiet=2, **checks).options

    def clean(source: str) -> bool:
        lines = io.StringIO(source.rstrip("\n") + "\n", newline=None).readlines()  # as of a file: no other line ends
        # pycodestyle only cuts source into tokens: `x = 1 1` has no fault of style
        return parses(source) and pycodestyle.Checker(lines=lines, options=options).check_all() == 0

    return _of_source("pep8", clean)


def _of_source(name: str, holds: Callable[[str], bool]) -> Feature:
    def score(texts: list[str], finished: list[bool]) -> list[float]:
        return [float(done and holds(text)) for text, done in zip(texts, finished, strict=True)]

    return Feature(name, score)


def parses(source: str) -> bool:
    """Whether `ast.parse` takes the source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
            return False
    return True
