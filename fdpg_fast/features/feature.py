"""A feature and the calling of it: arguments by name, results checked, time limited."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError, UserError
from ..rollouts import Rollouts


@dataclass(frozen=True)
class Completions:
    """B completions as features see them.

    Attributes:
        completions: decoded text without the EOS, [B].
        prompts: what each of them continues, [B].
        completion_ids: token ids without the EOS, [B].
        finished: ended by EOS rather than cut off, [B].
        columns: the contexts' other JSONL fields, [B] each; None where a context lacks the field.
        continues_prompt: prompt and completion are one text; not so of an encoder-decoder.
    """

    completions: list[str]
    prompts: list[str]
    completion_ids: list[list[int]]
    finished: list[bool]
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    continues_prompt: bool = True

    @property
    def texts(self) -> list[str]:
        """What was written in full: prompt + completion, or the completion alone if it does not continue its prompt."""
        if not self.continues_prompt:
            return self.completions
        return [prompt + text for prompt, text in zip(self.prompts, self.completions, strict=True)]

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
        arguments = {
            **batch.columns,
            "completions": batch.completions,
            "prompts": batch.prompts,
            "texts": batch.texts,
            "completion_ids": batch.completion_ids,
            "finished": batch.finished,
        }
        try:
            with _time_limit(self.timeout):
                values = self.score(**_accepted(self.score, arguments))
                if inspect.isawaitable(values):
                    values = _finish(values)
        except _TimeUp:
            raise RunError(
                f"feature {self.name!r} did not return within its timeout of {self.timeout:g} s "
                f"for {len(batch.completions)} completions; raise the feature's timeout or make it faster"
            ) from None
        except (Exception, SystemExit) as error:
            message = " ".join(str(error).split())
            raise RunError(f"feature {self.name!r} raised {type(error).__name__}: {message}") from error
        return self._checked(values, batch)

    def _checked(self, values: Any, batch: Completions) -> Tensor:
        is_array = getattr(values, "ndim", 0) > 0  # of numpy or torch
        if isinstance(values, str) or not (isinstance(values, Sequence) or is_array):
            raise RunError(f"feature {self.name!r} returned {type(values).__name__}, not one number a completion")
        if len(values) != len(batch.completions):
            raise RunError(
                f"feature {self.name!r} returned {len(values)} values for {len(batch.completions)} completions"
            )
        numbers = []
        for value, text in zip(values, batch.completions, strict=True):
            try:
                number = math.nan if value is None else float(value)
            except (TypeError, ValueError, OverflowError, RuntimeError):
                shown = " ".join(repr(value).split())[:60]
                raise RunError(f"feature {self.name!r} returned {shown} for {text[:60]!r}, not a number") from None
            if value is not None and not math.isfinite(number):
                raise RunError(
                    f"feature {self.name!r} returned {number} for {text[:60]!r}; "
                    "return a finite number, or None where the feature does not apply"
                )
            numbers.append(number)
        return torch.tensor(numbers, dtype=torch.float64)


def feature(function: Callable[..., Any] | None = None, *, name: str | None = None, timeout: float = 60.0) -> Any:
    """Decorator that makes a `Feature` of a batched callable: `@feature` or `@feature(name=…, timeout=…)`."""
    if function is None:
        return lambda f: feature(f, name=name, timeout=timeout)
    if isinstance(function, Feature):
        return function
    return Feature(name or str(getattr(function, "__name__", "feature")), function, timeout)


def import_feature(path: str, *, name: str | None = None, timeout: float = 60.0) -> Feature:
    """The feature at "package.module:function" or "some/file.py:function".

    Raises:
        UserError: there is no such module or function.
    """
    found = import_object(path)
    if not callable(found):
        raise UserError(f"import path {path!r} leads to a {type(found).__name__}, not a function")
    return feature(found, name=name, timeout=timeout)


def import_object(path: str) -> Any:
    """Whatever is at "package.module:name" or "some/file.py:name".

    Raises:
        UserError: there is no such module or name.
    """
    module_path, _, attribute = path.rpartition(":")
    if not module_path or not attribute:
        raise UserError(f"import path {path!r}: write package.module:name or file.py:name")
    try:
        module = _load_file(module_path) if module_path.endswith(".py") else _load_module(module_path)
        return getattr(module, attribute)
    except Exception as error:  # whatever the user's module does when it is imported
        message = " ".join(str(error).split())
        raise UserError(f"import path {path!r}: {type(error).__name__}: {message}") from error


def _load_module(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` would: a script beside the config is importable
    return importlib.import_module(name)


def _load_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"fdpg_imported_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses, for one, look their module up
    spec.loader.exec_module(module)
    return module


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def _finish(awaitable: Any) -> Any:
    """The result of an async feature, also where a loop is running already, as in a notebook."""

    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, wait()).result()


class _TimeUp(BaseException):
    """Not an Exception: a feature's own `except Exception` must not swallow it."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block with SIGALRM, which reaches even a regular expression gone exponential.

    Outside the main thread no signal arrives; there the limit is not enforced.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    rang = False

    def ring(_signal: int, _frame: Any) -> None:
        nonlocal rang
        rang = True
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)  # again and again: a bare `except:` swallows the first
    try:
        yield
        if rang:
            raise _TimeUp
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
