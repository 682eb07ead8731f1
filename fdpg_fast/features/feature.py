"""A feature: a named score of completions; its arguments go by name, its results are checked."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..config.section import Section
from ..errors import RunError, UserError, one_line
from ..imports import import_object
from ..rollouts import Rollouts
from .calling import Call, TimeUp, is_async


@dataclass(frozen=True)
class Completions:
    """B completions as features see them."""

    completions: list[str]  # without the EOS
    prompts: list[str]  # what each of them continues
    completion_ids: list[list[int]]  # without the EOS
    finished: list[bool]  # ended by EOS rather than cut off
    columns: Mapping[str, list[Any]] = field(default_factory=dict)  # JSONL fields; None where a context has none
    continues_prompt: bool = True  # prompt and completion are one text; not so of an encoder-decoder

    @property
    def texts(self) -> list[str]:
        """What was written in full: prompt + completion, or the completion alone if it does not continue its prompt."""
        if not self.continues_prompt:
            return self.completions
        return [prompt + text for prompt, text in zip(self.prompts, self.completions, strict=True)]

    def arguments(self, function: Callable[..., Any]) -> dict[str, Any]:
        """What the function takes, by name, of these lists and the columns."""
        own = ("completions", "prompts", "texts", "completion_ids", "finished")
        given = {**self.columns, **{name: getattr(self, name) for name in own}}
        parameters = inspect.signature(function).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return {name: value for name, value in given.items() if takes_all or name in parameters}

    @staticmethod
    def decode(rollouts: Rollouts, tokenizer: Any, continues_prompt: bool = True) -> Completions:
        ids = rollouts.completion_ids()
        contexts = [rollouts.contexts[i] for i in rollouts.context_index.tolist()]
        names = sorted({name for context in rollouts.contexts for name in context.columns})
        return Completions(
            completions=tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            prompts=[context.text for context in contexts],
            completion_ids=ids,
            finished=rollouts.finished.tolist(),
            columns={name: [context.columns.get(name) for context in contexts] for name in names},
            continues_prompt=continues_prompt,
        )


@dataclass(frozen=True)
class Feature:
    """A named batched score of completions.

    Attributes:
        name: under which its mean is reported.
        score: called with the keyword arguments that it takes out of completions, prompts, texts, completion_ids,
            finished and the columns; returns (or awaits) one number, bool or None a completion.
        timeout: seconds that one call may take.
    """

    name: str
    score: Callable[..., Any]
    timeout: float = 60.0

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
            values = call.result()
        return self._checked(values, batch.completions)

    @contextlib.contextmanager
    def _named_errors(self, batch: Completions) -> Iterator[None]:
        try:
            yield
        except TimeUp:
            raise RunError(
                f"feature {self.name!r} did not return within its timeout of {self.timeout:g} s "
                f"for {len(batch.completions)} completions; raise the feature's timeout or make it faster"
            ) from None
        except (Exception, SystemExit) as error:
            raise RunError(f"feature {self.name!r} raised {type(error).__name__}: {one_line(error)}") from error

    def _checked(self, values: Any, completions: list[str]) -> Tensor:
        has_returned = f"feature {self.name!r} returned"
        if isinstance(values, str) or not (isinstance(values, Sequence) or getattr(values, "ndim", 0) > 0):
            raise RunError(f"{has_returned} {type(values).__name__}, not one number a completion")
        if len(values) != len(completions):
            raise RunError(f"{has_returned} {len(values)} values for {len(completions)} completions")
        numbers = []
        for value, text in zip(values, completions, strict=True):
            shown: Any = value
            number = math.nan
            with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
                number = shown = math.nan if value is None else float(value)
            if value is not None and not math.isfinite(number):
                raise RunError(
                    f"{has_returned} {' '.join(repr(shown).split())[:60]} for {text[:60]!r}, not a number; "
                    "return a finite number, or None where the feature does not apply"
                )
            numbers.append(number)
        return torch.tensor(numbers, dtype=torch.float64)


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
        yield lambda: torch.stack([f.finish(calls[index], batch) for index, f in enumerate(features)], dim=1)
    finally:
        for call in calls.values():
            call.cancel()


def feature(function: Callable[..., Any] | None = None, *, name: str | None = None, timeout: float = 60.0) -> Any:
    """Decorator that makes a `Feature` of a batched callable: `@feature` or `@feature(name=…, timeout=…)`."""
    if function is None:
        return lambda f: feature(f, name=name, timeout=timeout)
    if isinstance(function, Feature):
        return function
    return Feature(name or str(getattr(function, "__name__", "feature")), function, timeout)


def import_feature(path: str, *, name: str | None = None, timeout: float = 60.0) -> Feature:
    """The feature at "package.module:function" or "some/file.py:function"; raises UserError if there is none."""
    function = import_object(path)
    if not callable(function):
        raise UserError(f"import path {path!r} leads to a {type(function).__name__}, not a function")
    return feature(function, name=name, timeout=timeout)


class FeatureSection(Section):
    """What the config of every feature has; subclasses say what it is made of."""

    name: str | None = None
    """Name in metrics and tables; none: made from the kind."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds that one call may take; none: 60, or 600 for a classifier."""

    def build(self, device: str) -> Feature:
        """The feature that the section describes, under the name and with the timeout that it gives."""
        feature = self.make(device)
        return replace(feature, name=self.name or feature.name, timeout=self.timeout or feature.timeout)

    def make(self, device: str) -> Feature:
        raise NotImplementedError


class ImportedFeature(FeatureSection):
    kind: Literal["import"]
    """Your own function with the signature of a TRL reward function."""
    path: str
    """package.module:function or file.py:function."""

    def make(self, device: str) -> Feature:
        return import_feature(self.path)
