"""The rows of a data set: of a file, by its suffix, or of the `datasets` library; each with its place, for errors."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError, one_line

Row = tuple[str, Any]  # its place, such as "contexts: p.jsonl:7", and its fields by name

LFS_POINTER = "version https://git-lfs.github.com/spec/"
FOR_TEMPLATES = ("prompt", "tools", "chat_template_kwargs")


def read_rows(path: str) -> list[Row]:
    """All rows of a file of a kind that READERS has; or of FOLDER, OWNER/NAME or OWNER/NAME/CONFIG, with :SPLIT behind.

    Raises:
        UserError: it cannot be read, or is not what it says; names the file, and the line if there is one.
    """
    try:
        suffix, is_file = Path(path).suffix.lower(), Path(path).is_file()
        if is_file and suffix not in READERS:
            raise UserError(f"contexts: {path!r} is of no known kind; these are known: {', '.join(READERS)}")
        return list(READERS.get(suffix, _data_set)(path))
    except UserError:
        raise
    except Exception as error:  # of whichever library
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = getattr(cause, "strerror", None) or one_line(cause) or type(cause).__name__
        if isinstance(cause, ImportError):
            reason = f'{cause.name} is not installed; pip install "fdpg-fast[datasets]"'
        raise UserError(f"contexts: cannot read {path!r}: {reason}") from None


def _text(path: str) -> str:
    data = Path(path).read_bytes()  # read_text would take a lone \r for the end of a line
    try:
        text = data.replace(b"\0", b"\xff").decode("utf-8-sig")  # NUL is in no text, but in UTF-16
    except UnicodeDecodeError:
        raise UserError(f"contexts: cannot read {path!r}: it is not UTF-8 text") from None
    if text.startswith(LFS_POINTER):
        raise UserError(f"contexts: {path!r} is only a pointer to the file; git lfs pull fetches it")
    return text


def _lines(path: str) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), start=1):  # not splitlines: a prompt may hold a form feed
        if line.strip():
            yield f"contexts: {path}:{number}", {"prompt": line.removesuffix("\r")}


def _jsonl(path: str) -> Iterator[Row]:
    return ((where, _parse(row["prompt"], where)) for where, row in _lines(path))


def _json(path: str) -> Iterator[Row]:
    rows = _parse(_text(path), f"contexts: {path}")
    if not isinstance(rows, list):
        raise UserError(f"contexts: {path} must hold one list of objects; a file with an object a line is a .jsonl")
    return ((f"contexts: {path}: item {number}", row) for number, row in enumerate(rows, start=1))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_fields)
    except Exception as error:  # also what nests too deep, or has too many digits
        raise UserError(f"{where} is not JSON: {one_line(error).replace('line 1 column', 'column')}") from None


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):  # all but the last value would be lost
        raise ValueError(f"a key is there twice among {', '.join(name for name, _ in pairs)}")
    return fields


def _csv(path: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default is less than a long prompt
    rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    line = 1
    try:
        names, line = next(rows, []), rows.line_num + 1
        for fields in rows:
            if fields:  # no blank line
                if not len(fields) == len(names) == len({*names}):
                    raise csv.Error(f"{len(fields)} fields, but {len({*names})} in the header")
                yield f"contexts: {path}:{line}", dict(zip(names, fields, strict=True))
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"contexts: {path}:{line} is not CSV: {error}") from None


def _parquet(path: str) -> Iterator[Row]:
    from pyarrow import parquet

    return _arrow_rows(parquet.read_table(path), path)


def _data_set(path: str) -> Iterator[Row]:
    name, _, split = path.partition(":")
    parts, folder = name.split("/"), Path(name)
    if not folder.is_dir() and (len(parts) not in (2, 3) or parts[0] in ("", ".", "..") or folder.parent.is_dir()):
        known = f"give a file of {', '.join(READERS)}, a folder, or OWNER/NAME:SPLIT of the hub"
        raise UserError(f"contexts: cannot read {path!r}: No such file or directory; {known}")
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # it would say each of five attempts
    if folder.is_dir() and any((folder / mark).exists() for mark in ("state.json", "dataset_dict.json")):
        loaded, given = datasets.load_from_disk(name), ""
    else:
        source = (name,) if folder.is_dir() else ("/".join(parts[:2]), *parts[2:])
        loaded, given = datasets.load_dataset(*source, split=split or None), split
    splits = loaded if isinstance(loaded, dict) else {given: loaded}
    if split not in splits and (split or len(splits) > 1):
        known = ", ".join(f"{name}:{one}".rstrip(":") for one in splits)
        raise UserError(f"contexts: {path!r}: there is no such split; write {known}")
    return _arrow_rows(splits[split or next(iter(splits))].with_format("arrow")[:], path)


def _arrow_rows(table: Any, path: str) -> Iterator[Row]:
    rows = (row for batch in table.to_batches(1024) for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        for name in row.keys() & FOR_TEMPLATES:
            row[name] = _without_nulls(row[name])  # Arrow gives each message the keys of all others
        yield f"contexts: {path}: row {number}", row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [*map(_without_nulls, value)] if isinstance(value, list) else value


READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _lines}
