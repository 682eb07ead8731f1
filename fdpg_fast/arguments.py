"""What argparse does not know of our command line: dotted keys of a config, and numbers above 0."""

from __future__ import annotations

import argparse
import contextlib
import functools
from typing import Any

from .errors import UserError

TRAIN_OPTIONS = ("--resume", "--dry-run", "--keys", "--help")


def split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take --a.b=c and --a.b c out of the arguments of a command that has a config; argparse knows no such."""
    if arguments[:1] not in (["train"], ["doctor"]):
        return arguments, {}
    known, overrides = [], {}
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name in TRAIN_OPTIONS:
            known.append(argument)
            if argument == "--resume":
                known += [value for value in [next(waiting, None)] if value is not None]
            continue
        if not equals and (value := next(waiting, "--")).startswith("--"):
            raise UserError(f"{name}: a value is missing; write {name}=VALUE")
        overrides[name[2:]] = value
    return known, overrides


def positive(text: str, kind: Any = int) -> Any:
    with contextlib.suppress(ValueError):
        if 0 < (number := kind(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive {'whole ' if kind is int else ''}number")


positive_number = functools.partial(positive, kind=float)
