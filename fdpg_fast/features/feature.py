"""A feature: a named score of completions; its arguments go by name, its results are checked."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..config.section import Section, UserPath
from ..contexts import Context
from ..errors import RunError, UserError, one_line
from ..imports import import_object
from .calling import Call, TimeUp, is_async
from .completions import GIVEN, ON_REQUEST, Completions

LONGEST = 1e6  # seconds of a call: with more the clocks of some systems overflow


@dataclass(frozen=True)
class Feature:
    """A named batched score of completions.

    Attributes:
        name: under which its mean is reported.
        score: called with those keyword arguments of `Completions.arguments` that it takes; returns (or awaits) one
            number, bool or None a completion.
        timeout: seconds that one call may take.
        answers: for majority@k, of a feature that judges an answer; called as `score` is, returns the answer that each
            completion names, None where it names none. Answers that are the same must be equal as text.
        check: what is wrong, in words, with the columns of a prompt, or None; asked of every prompt at the start.

    Raises:
        UserError: the name cannot be shown, a function takes nothing by name, or the timeout is out of range.
    """

    name: str
    score: Callable[..., Any]
    timeout: float = 60.0
    answers: Callable[..., Any] | None = None
    check: Callable[[Mapping[str, Any]], str | None] | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name and self.name.isprintable()):
            raise UserError(f"a feature cannot be called {self.name!r}: give it a name of printable characters")
        for function in self.functions:
            try:
                parameters = inspect.signature(function).parameters.values()
            except (TypeError, ValueError):  # of something written in C
                parameters = None
            if parameters is None or any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters):
                raise UserError(f"feature {self.name!r} takes no arguments by name; call it in a function that does")
        if not 0 < self.timeout <= LONGEST:
            raise UserError(f"feature {self.name!r}: its timeout is {self.timeout:g}, not in (0, {LONGEST:g}] seconds")

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """What of it is called: `score`, and `answers` if it has some."""
        return [self.score, *filter(None, [self.answers])]

    def __call__(self, batch: Completions) -> Tensor:
        """Its values, [B] float64; NaN where it does not apply.

        Raises:
            RunError: it raised, hung, or returned something else than B numbers.
        """
        return self.finish(self.start(batch), batch)

    def start(self, batch: Completions) -> Call:
        """Call it on B completions; raises as `__call__`."""
        with self._named_errors(batch):
            return Call(self.score, batch.arguments(self.score), self.timeout)

    def finish(self, call: Call, batch: Completions) -> Tensor:
        """The values of a call that was started, [B] float64; raises as `__call__`."""
        with self._named_errors(batch):
            return self._checked(call.result(), batch.completions)

    def read_answers(self, batch: Completions) -> list[str | None]:
        """The answers that B completions name, as text; of a feature with `answers`. Raises as `__call__`."""
        assert self.answers is not None
        with self._named_errors(batch):
            found = Call(self.answers, batch.arguments(self.answers), self.timeout).result()
            if isinstance(found, str) or not isinstance(found, Sequence) or len(found) != len(batch.completions):
                expected = f"a list of {len(batch.completions)} answers"
                raise RunError(f"feature {self.name!r} read {one_line(repr(found))[:60]}, not {expected}")
            return [None if answer is None else str(answer) for answer in found]

    @contextlib.contextmanager
    def _named_errors(self, batch: Completions) -> Iterator[None]:
        try:
            yield
        except TimeUp:
            raise RunError(
                f"feature {self.name!r} did not return within its timeout of {self.timeout:g} s "
                f"for {len(batch.completions)} completions; raise the feature's timeout or make it faster"
            ) from None
        except (RunError, KeyboardInterrupt):  # a RunError says all already
            raise
        except BaseException as error:  # sys.exit, and panics of libraries in Rust
            while isinstance(error, BaseExceptionGroup):  # of asyncio.TaskGroup, which says no more than how many
                error = error.exceptions[0]
            raise RunError(f"feature {self.name!r} raised {type(error).__name__}: {one_line(error)}") from error

    def _checked(self, values: Any, completions: list[str]) -> Tensor:
        has_returned = f"feature {self.name!r} returned"
        if isinstance(values, str | bytes) or not (isinstance(values, Sequence) or getattr(values, "ndim", 0) > 0):
            raise RunError(f"{has_returned} {type(values).__name__}, not one number a completion")
        if len(values) != len(completions):
            raise RunError(f"{has_returned} {len(values)} values for {len(completions)} completions")
        numbers = []
        for value, text in zip(values, completions, strict=True):
            shown: Any = value
            number = math.nan
            with contextlib.suppress(Exception):  # of somebody's own class
                number = shown = math.nan if value is None else float(value)
            if value is not None and not math.isfinite(number):
                raise RunError(
                    f"{has_returned} {one_line(repr(shown))[:60]} for {text[:60]!r}, not a number; "
                    "return a finite number, or None where the feature does not apply"
                )
            numbers.append(number)
        return torch.tensor(numbers, dtype=torch.float64)


def check_columns(features: Sequence[Feature], contexts: Sequence[Context], where: str) -> None:
    """Refuse what calls of features on a data set would end in.

    Raises:
        UserError: a column is called as an argument of ours, or a feature asks for one that is not there, or
            finds fault with what is in it.
    """
    columns = {name for context in contexts for name in context.columns}
    given = GIVEN | ON_REQUEST
    if taken := sorted(columns & given):
        raise UserError(f"{where}: the column {taken[0]!r} has the name of what features get anyway; rename it")
    for feature in features:
        signatures = map(inspect.signature, feature.functions)
        for parameter in itertools.chain.from_iterable(signature.parameters.values() for signature in signatures):
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if not variadic and parameter.default is parameter.empty and parameter.name not in columns | given:
                raise UserError(
                    f"target: feature {feature.name!r} asks for {parameter.name!r}, which {where} has no column for; "
                    f"there are {', '.join(sorted(columns | given))}"
                )
        check = feature.check or (lambda columns: None)
        for context in contexts:
            if fault := check(context.columns):
                raise UserError(f"target: feature {feature.name!r}: {where}, prompt {context.index + 1}: {fault}")


@contextlib.contextmanager
def started(features: Sequence[Feature], batch: Completions) -> Iterator[Callable[[], Tensor]]:
    """Call F features on B completions: async ones together, and meanwhile the sync ones, one after another.

    Yields a function that waits for the async ones and returns all values, [B, F] float64. Leaving the block cancels
    what is not done. Raises as `Feature.__call__`, in the block's beginning or in that function.
    """
    calls: dict[int, Call] = {}
    try:
        for index in sorted(range(len(features)), key=lambda index: not is_async(features[index].score)):
            calls[index] = features[index].start(batch)
        none = torch.zeros(len(batch.completions), 0, dtype=torch.float64)  # where a target has no feature

        def wait() -> Tensor:
            columns = [feature.finish(calls[index], batch)[:, None] for index, feature in enumerate(features)]
            return torch.cat([none, *columns], dim=1)

        yield wait
    finally:
        for call in calls.values():
            call.cancel()


def feature(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    timeout: float | None = None,
    answers: Callable[..., Any] | None = None,
) -> Any:
    """Decorator that makes a `Feature` of a batched callable: `@feature`, or with its other attributes by name."""
    given: dict[str, Any] = {"name": name, "timeout": timeout, "answers": answers}
    if function is None:
        return lambda f: feature(f, **given)
    if not isinstance(function, Feature):
        function = Feature(str(getattr(function, "__name__", type(function).__name__)), function)
    return replace(function, **{key: value for key, value in given.items() if value is not None})


def import_feature(path: str) -> Feature:
    """The feature at "package.module:function" or "some/file.py:function", under that name: two instances differ.

    Raises:
        UserError: there is none.
    """
    function = import_object(path)
    if not callable(function) or inspect.isclass(function):
        raise UserError(f"import path {path!r} leads to a {type(function).__name__}, not a function")
    return function if isinstance(function, Feature) else Feature(path.rpartition(":")[2], function)


class FeatureSection(Section):
    """What the config of every feature has; subclasses say what it is made of."""

    name: str | None = None
    """Name in metrics and tables; none: made from the kind."""
    timeout: float | None = Field(default=None, gt=0, le=LONGEST)
    """Seconds that one call may take; none: 60, or 600 for what asks a model, a server or other processes."""
    kind: str

    def build(self, device: str) -> Feature:
        """The feature that the section describes, under the name and with the timeout that it gives."""
        return feature(self.make(device), name=self.name, timeout=self.timeout)

    def make(self, device: str) -> Feature:
        raise NotImplementedError


class ImportedFeature(FeatureSection):
    kind: Literal["import"]
    """Your own function with the signature of a TRL reward function."""
    path: UserPath
    """package.module:function or file.py:function."""

    def make(self, device: str) -> Feature:
        return import_feature(self.path)
