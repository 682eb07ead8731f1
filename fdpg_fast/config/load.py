"""Configs in and out: a YAML file, dotted overrides, and an error in one line that names the key and what is valid."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..errors import UserError
from .schema import TrainConfig

_DISTORTING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty")


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> TrainConfig:
    """Read a YAML file and apply dotted overrides, e.g. {"trainer.rounds": "20"}.

    Raises:
        UserError: one line with the key, its value and what would be valid.
    """
    data = read_yaml(path)
    for key, text in (overrides or {}).items():
        _override(data, key, text)
    return parse_config(data)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config: {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"config: {str(path)!r} must hold keys and values, e.g. 'model: examples/tiny-python-lm'")
    return data


def parse_config(data: Mapping[str, Any]) -> TrainConfig:
    """Validate plain data.

    Raises:
        UserError: as `load_config`.
    """
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as error:
        # a mistyped key comes first: what is missing may be what it was meant to be
        complaints = sorted(error.errors(), key=lambda e: e["type"] not in ("extra_forbidden", "invalid_key"))
        raise UserError(_explain(complaints[0], data)) from None


def dump_config(config: TrainConfig) -> str:
    """The resolved config as YAML; `load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_keys() -> dict[str, str]:
    """Every dotted key with its one-line documentation; list items are written `target.N`."""
    documented: dict[str, list[str]] = {}
    for key, field in _keys(TrainConfig, ""):
        values = typing.get_args(field.annotation) if key.endswith("kind") else ()
        text = (f"{values[0]}: " if len(values) == 1 else "") + (field.description or "")
        if text not in documented.setdefault(key, []):
            documented[key].append(text)
    return {key: "; ".join(texts) for key, texts in documented.items()}


def _keys(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        models, in_list = _models_in(field.annotation)
        here = f"{prefix}{name}"
        if field.description or not models:
            yield here, field
        for inner in models:
            yield from _keys(inner, f"{here}.N." if in_list else f"{here}.")


def _models_in(annotation: Any, in_list: bool = False) -> tuple[list[type[BaseModel]], bool]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation], in_list
    found = []
    if typing.get_origin(annotation) in (list, Annotated, typing.Union, types.UnionType):
        in_list = in_list or typing.get_origin(annotation) is list
        for argument in typing.get_args(annotation):
            inner, deeper = _models_in(argument, in_list)
            found += inner
            in_list = in_list or deeper
    return found, in_list


def _generic(key: str) -> str:
    """A key with N for the places in lists, as `config_keys` has it."""
    return ".".join("N" if part.isdigit() else part for part in key.split("."))


_TEXT_KEYS = {key for key, field in _keys(TrainConfig, "") if field.annotation in (str, str | None)}


def _override(data: Any, key: str, text: str) -> None:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if value is not None and _generic(key) in _TEXT_KEYS:
        value = text  # as typed: YAML would make a number of 2024, a bool of "no" and a list of "[a-z]"
    set_key(data, key, value)


def set_key(data: Any, key: str, value: Any) -> None:
    """Put a value at a dotted key of plain data; numbers in the key are places in lists.

    Raises:
        UserError: the key leads into a plain value or past the end of a list.
    """
    *path, last = key.split(".")
    place = data
    for part in path:
        if isinstance(place, list):
            place = place[_index(place, part, key)]
        elif isinstance(place, dict):
            place[part] = {} if place.get(part) is None else place[part]  # null: a section that was left out
            place = place[part]
        else:
            raise UserError(f"--{key}: {part!r} is inside a plain value")
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise UserError(f"--{key}: {path[-1]!r} holds a plain value, not keys")


def _index(place: Sequence[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise UserError(f"--{key}: {part!r} must be a number below {len(place)}, the length of the list")
    return int(part)


def _explain(error: Any, data: Mapping[str, Any]) -> str:
    """pydantic's first complaint in one line; the tags of unions are not keys and are left out of the path."""
    path, place = [], data
    for position, part in enumerate(error["loc"], start=1):
        is_key = position == len(error["loc"]) and _has(place, part)
        if isinstance(place, Mapping) and part == place.get("kind") and not is_key:
            place = {**place, "kind": None}
            continue
        path.append(str(part))
        place = place[part] if isinstance(place, (Mapping, list)) and _has(place, part) else {}
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        if path[-1] in _DISTORTING:
            return (
                f"{key}: samples are drawn from the policy itself; {path[-1]} would make the recorded log q a "
                "number of another distribution and every importance ratio wrong, so it is not an option"
            )
        near = [known for known in config_keys() if known.split(".")[-1] == path[-1] and "N" not in known]
        near = near or difflib.get_close_matches(_generic(key), config_keys(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key}: there is no such key{hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{key}: this key is required"
    if error["type"] == "union_tag_not_found":
        kinds = [typing.get_args(f.annotation) for k, f in _keys(TrainConfig, "") if k == f"{_generic(key)}.kind"]
        return f"{key}: the key kind is required; choose one of {', '.join(repr(kind) for (kind,) in kinds)}"
    shown = "" if isinstance(error["input"], (dict, list)) else f"{error['input']!r}: "
    return f"{key}: {shown}{message}" if key else message


def _has(place: Any, part: Any) -> bool:
    return part in place if isinstance(place, Mapping) else isinstance(part, int) and part < len(place)
