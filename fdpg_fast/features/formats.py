"""Features of a text's form: JSON that a schema allows, and the instructions of IFEval and IFBench."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any, Literal
from unittest import mock

from pydantic import JsonValue, field_validator, model_validator

from ..config.section import UserPath
from ..errors import UserError, one_line
from .answers import needs
from .feature import Feature, FeatureSection


class JSONSchemaFeature(FeatureSection):
    kind: Literal["json_schema"]
    """1 where a completion is JSON, alone or in one code fence, that a JSON Schema allows."""
    definition: dict[str, JsonValue] | UserPath | None = None
    """The schema, or a .json file with it, which config.yaml then holds."""
    column: str | None = None
    """Instead of `definition`, the column of the data with the schema of each prompt, best as JSON text."""

    @field_validator("definition")
    @classmethod
    def _read(cls, definition: Any) -> Any:
        """What a file holds: a run that is resumed has what it began with."""
        if not isinstance(definition, str):
            return definition
        try:
            with open(definition, encoding="utf-8") as file:
                found = json.load(file)
        except Exception as error:  # no file, no text, no JSON, nested too deep
            raise ValueError(f"cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from None
        if not isinstance(found, dict):
            raise ValueError("the file must hold an object, a JSON Schema")
        return found

    @model_validator(mode="after")
    def _one_schema(self) -> JSONSchemaFeature:
        if (self.definition is None) == (self.column is None):
            raise ValueError("a json_schema feature needs either definition or column")
        return self

    def make(self, device: str) -> Feature:
        needs("json_schema", "jsonschema")
        column = self.column
        if column is None:
            schema = json.dumps(self.definition)
            if fault := _fault_of(schema):
                raise UserError(f"feature json_schema: definition {fault}")
            return Feature("json_schema", lambda completion_texts: [_allows(schema, text) for text in completion_texts])

        def check(columns: Mapping[str, Any]) -> str | None:
            if column not in columns:
                return f"there is no column {column!r}, only {', '.join(sorted(columns)) or 'prompts'}"
            given = columns[column]
            fault = None if given is None else _fault_of(_text(given))
            return fault and f"{column} {fault}"

        def score(completion_texts: list[str], **columns: list[Any]) -> list[float | None]:
            rows = zip(columns[column], completion_texts, strict=True)
            return [None if given is None else _allows(_text(given), text) for given, text in rows]

        return Feature("json_schema", score, check=check)


def _text(schema: Any) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema, default=str)


@functools.lru_cache(1024)
def _fault_of(schema: str) -> str | None:
    """What is wrong with a schema, in words."""
    import jsonschema

    try:
        plain = json.loads(schema)
        if not isinstance(plain, dict | bool):
            return "is no JSON Schema: it is not an object"
        jsonschema.validators.validator_for(plain, jsonschema.Draft202012Validator).check_schema(plain)
        return None
    except jsonschema.SchemaError as error:
        return f"is no JSON Schema: {one_line(error.message)[:200]}"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {one_line(error)[:200]}"


@functools.lru_cache(1024)
def _validator(schema: str) -> Any:
    """What looks values over; a reference leads to a place in the schema, never to the net."""
    import jsonschema
    import referencing

    plain = json.loads(schema)
    kind = jsonschema.validators.validator_for(plain, jsonschema.Draft202012Validator)
    return kind(plain, registry=referencing.Registry())


def _allows(schema: str, text: str) -> float:
    try:
        value = json.loads(_without_fence(text.strip()), parse_constant=_refuse)
        return float(_validator(schema).is_valid(value))
    except (ValueError, RecursionError):  # no JSON, NaN, more digits than are counted with; nested too deep
        return 0.0


def _without_fence(text: str) -> str:
    first, _, rest = text[3:-3].partition("\n")
    is_fenced = text.startswith("```") and text.endswith("```") and (first.strip() or "json").isalnum()
    return rest if is_fenced else text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


class InstructionsFeature(FeatureSection):
    kind: Literal["instructions"]
    """Whether a completion follows what the columns instruction_id_list and kwargs say, as in IFEval and IFBench."""
    score: Literal["all", "fraction"] = "all"
    """all: 1 where it follows each of them, strictly; fraction: the share that it follows."""

    def make(self, device: str) -> Feature:
        needs("instructions", "if_verifiable")
        whole = self.score == "all"

        def score(
            completion_texts: list[str], prompt_texts: list[str], instruction_id_list: list[Any], kwargs: list[Any]
        ) -> list[float | None]:
            found: list[float | None] = []
            rows = zip(completion_texts, prompt_texts, instruction_id_list, kwargs, strict=True)
            for text, prompt, names, given in rows:
                if not names:
                    found.append(None)
                    continue
                followed = [_follows(*one, prompt, text) for one in zip(names, _list(given), strict=True)]
                found.append(float(all(followed)) if whole else sum(followed) / len(followed))
            return found

        return Feature("instructions", score, check=_check_instructions)


def _list(kwargs: Any) -> list[dict[str, Any]]:
    """Arguments of each instruction; some data sets have them as JSON, and all have nulls for those of the others."""
    plain = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    return [{key: value for key, value in (given or {}).items() if value is not None} for given in plain]


def _check_instructions(columns: Mapping[str, Any]) -> str | None:
    names, kwargs = columns.get("instruction_id_list"), columns.get("kwargs")
    if not names:
        return None
    try:
        given = _list(kwargs)
    except Exception:
        return f"kwargs is {one_line(repr(kwargs))[:60]}, not a list of an object for each instruction"
    if not isinstance(names, list) or len(names) != len(given):
        return f"instruction_id_list has {one_line(repr(names))[:80]}, and kwargs {len(given)} objects"
    for name, arguments in zip(names, given, strict=True):
        try:
            _checker(name, arguments, "Say it.").check_following("It is said. And so on.")
        except Exception as error:
            if wanted := re.search(r"nltk\.download\('(\w+)'\)", str(error)):
                return f"{name} needs data of NLTK: python -m nltk.downloader {wanted[1]}"
            if isinstance(error, LookupError):
                return f"{one_line(repr(name))[:60]} is no instruction of IFEval or IFBench"
            return f"{name} cannot be checked with {one_line(repr(arguments))[:80]}: {one_line(error)[:200]}"
    return None


def _checker(name: str, arguments: dict[str, Any], prompt: str) -> Any:
    """The checker of one instruction, with its arguments.

    Raises:
        LookupError: there is no such instruction.
    """
    import langdetect
    import nltk
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT as known

    langdetect.DetectorFactory.seed = 0  # or a text has a language now and another one then
    if name not in known:
        with mock.patch.object(nltk, "download"):  # which this import calls: a machine without a net would wait
            from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT as known
    checker = known[name](name)
    missing = {*checker.get_instruction_args_keys()} - {*arguments, "prompt"}
    if missing:
        raise ValueError(f"kwargs have no {min(missing)}")  # the checker would make one up, anew every time
    checker.build_description(**arguments)
    if "prompt" in (checker.get_instruction_args() or ()):
        checker.build_description(prompt=prompt)
    return checker


def _follows(name: str, arguments: dict[str, Any], prompt: str, text: str) -> bool:
    checker = _checker(name, arguments, prompt)
    try:
        return bool(text.strip() and checker.check_following(text))
    except Exception:  # of a text that no checker was made for; what data can lack has shown at the start
        return False
