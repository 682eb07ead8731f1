"""Configs in and out: a YAML file, dotted overrides, and an error in one line that names the key and what is valid."""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..errors import UserError, one_line
from .schema import TrainConfig
from .section import UserPath

_TEXTS = (str, str | None, UserPath | None)
_DISTORTING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty")


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> TrainConfig:
    """Read a YAML file and apply dotted overrides, e.g. {"trainer.rounds": "20"}.

    Raises:
        UserError: one line with the key, its value and what would be valid.
    """
    data = read_yaml(path)
    for key, text in (overrides or {}).items():
        try:
            value = yaml.load(text, _Loader)
        except Exception:  # no YAML, or no value of the type that it looks like
            value = text
        texts = {field.annotation for field in _FIELDS.get(_generic(key), ())}.intersection(_TEXTS)
        if texts and (value is not None or str in texts):
            value = text  # as typed: YAML would make a number of 2024, a bool of "no" and a list of "[a-z]"
        set_key(data, key, value)
    return parse_config(data)


class _Loader(yaml.SafeLoader):
    """YAML in which a mapping names a key once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[Any] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file; raises UserError where it holds something else."""
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    except Exception as error:  # also of a date that there is not, of digits or brackets by the thousand
        raise UserError(f"config: {str(path)!r} is not YAML: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"config: {str(path)!r} must hold keys and values, e.g. 'model: examples/tiny-python-lm'")
    return data


def parse_config(data: Mapping[str, Any]) -> TrainConfig:
    """Validate plain data; raises as `load_config`."""
    try:
        config = TrainConfig.model_validate(data)
        json.dumps(config.model_dump(), ensure_ascii=False, default=str).encode()
        return config
    except ValidationError as error:
        # a mistyped key comes first: what is missing may be what it was meant to be
        complaints = sorted(error.errors(), key=lambda e: e["type"] not in ("extra_forbidden", "invalid_key"))
        raise UserError(one_line(_explain(complaints[0]))) from None
    except ValueError:  # of what encodes
        raise UserError("config: a text holds half a character (a lone surrogate), which no file can hold") from None


def dump_config(config: TrainConfig) -> str:
    """The resolved config as YAML; `load_config` reads it back."""
    text = yaml.safe_dump(plain := config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    # YAML reads the rarer ends of lines as line feeds unless they are escaped
    return yaml.safe_dump(plain, sort_keys=False) if re.search("[\x85\u2028\u2029]", text) else text


def config_keys() -> dict[str, str]:
    """Every dotted key with its one-line documentation; list items are written `target.N`."""
    return {key: "; ".join(dict.fromkeys(map(_document, fields))) for key, fields in _FIELDS.items()}


def set_key(data: Any, key: str, value: Any) -> None:
    """Put a value at a dotted key of plain data; numbers in the key are places in lists.

    Raises UserError where the key leads into a plain value or past the end of a list.
    """
    *path, last = key.split(".")
    for part in path:
        place = _place(data, part, key)
        if isinstance(data, dict) and data.get(place) is None:
            data[place] = {}  # a section that was left out
        data = data[place]
    if path and not isinstance(data, (dict, list)):
        raise UserError(f"--{key}: {path[-1]!r} holds a plain value, not keys")
    data[_place(data, last, key)] = value


def _place(data: Any, part: str, key: str) -> Any:
    if isinstance(data, list):
        if not part.isdecimal() or len(part) > 9 or int(part) >= len(data):
            raise UserError(f"--{key}: {part!r} must be a number below {len(data)}, the length of the list")
        return int(part)
    if not isinstance(data, dict):
        raise UserError(f"--{key}: {part!r} is inside a plain value")
    return part


def _walk(annotation: Any, key: str) -> Iterator[tuple[str, FieldInfo]]:
    """The documented fields of all models in an annotation, and in theirs, under their keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            inner = f"{key}.{name}" if key else name
            if field.description:  # a section itself has none
                yield inner, field
            yield from _walk(field.annotation, inner)
        return
    for argument in typing.get_args(annotation):
        yield from _walk(argument, f"{key}.N" if typing.get_origin(annotation) is list else key)


_FIELDS: dict[str, list[FieldInfo]] = {}  # by key; the members of a union share some
for _key, _field in _walk(TrainConfig, ""):
    _FIELDS.setdefault(_key, []).append(_field)


def _document(field: FieldInfo) -> str:
    kinds = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
    return f"{kinds[0]}: {field.description}" if len(kinds) == 1 else str(field.description)


def _generic(key: str) -> str:
    """A key with N for the places in lists."""
    return ".".join("N" if part.isdecimal() else part for part in key.split("."))


def _explain(error: Any) -> str:
    """pydantic's complaint in one line; in its path, what follows a union is the tag of a member and no key."""
    path: list[str] = []
    in_union = False
    for part in error["loc"]:
        if not in_union:
            path.append(str(part))
        in_union = not in_union and len(_FIELDS.get(_generic(".".join([*path, "kind"])), ())) > 1
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        if path[-1] in _DISTORTING:
            return f"{key}: samples come from the policy itself, or the recorded log q and all ratios would be wrong"
        near = [known for known in _FIELDS if known.split(".")[-1] == path[-1] and "N" not in known]
        near = near or difflib.get_close_matches(_generic(key), _FIELDS, n=1, cutoff=0.5)
        meant = f"; did you mean {min(near, key=lambda known: known.count('.'))}?" if near else ""
        return f"{key}: there is no such key{meant}"
    if error["type"] == "missing":
        return f"{key}: this key is required"
    if error["type"] == "union_tag_not_found":
        kinds = [repr(kind) for field in _FIELDS[f"{_generic(key)}.kind"] for kind in typing.get_args(field.annotation)]
        return f"{key}: the key kind is required; choose one of {', '.join(kinds)}"
    message = error["msg"].removeprefix("Value error, ")
    try:
        shown = "" if isinstance(error["input"], (dict, list)) else f"{repr(error['input'])[:80]}: "
    except ValueError:
        shown = ""  # a number of thousands of digits
    return f"{key}: {shown}{message}" if key else message
