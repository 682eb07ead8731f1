"""Features of Python source. The text is parsed and looked at, never executed."""

from __future__ import annotations

import ast
import warnings

from ..errors import UserError
from .feature import Feature


def python_parses() -> Feature:
    """1 where prompt + completion is a complete Python module, else 0.

    A completion that was cut off before its EOS counts as 0, though by chance it may parse.
    """
    return Feature("python_parses", _score_parses)


def pep8() -> Feature:
    """1 where prompt + completion parses and pycodestyle has nothing to say about it, else 0; cut off counts as 0."""
    try:
        import pycodestyle
    except ModuleNotFoundError:
        raise UserError('feature pep8 needs pycodestyle: pip install "fdpg-fast[examples]"') from None

    def score(completions: list[str], prompts: list[str], finished: list[bool]) -> list[float]:
        # spelled out, or the user's own ~/.config/pycodestyle would change the target
        checks = {"select": (), "ignore": pycodestyle.DEFAULT_IGNORE.split(","), "max_line_length": 79}
        style = pycodestyle.StyleGuide(quiet=2, **checks)

        def clean(source: str) -> bool:
            lines = (source.rstrip("\n") + "\n").splitlines(keepends=True)
            # pycodestyle only cuts source into tokens: `x = 1 1` has no fault of style
            return parses(source) and pycodestyle.Checker(lines=lines, options=style.options).check_all() == 0

        return [float(done and clean(p + c)) for p, c, done in zip(prompts, completions, finished, strict=True)]

    return Feature("pep8", score)


def _score_parses(completions: list[str], prompts: list[str], finished: list[bool]) -> list[float]:
    return [float(done and parses(p + c)) for p, c, done in zip(prompts, completions, finished, strict=True)]


def parses(source: str) -> bool:
    """Whether `ast.parse` takes the source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
            return False
    return True
