"""The edge where files of a model come in: from a folder or the hub, of anybody, and perhaps damaged."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

from .errors import UserError, is_out_of_memory, one_line
from .progress import say_once

MISMATCH = re.compile(r"(?m)^(\S+).*MISMATCH.*ckpt: torch.Size\((.*?)\) vs model: ?torch.Size\((.*?)\)")
SAID_BETTER = re.compile("LOAD REPORT|we will NOT tie them")  # by lines of ours


@contextlib.contextmanager
def reading(path: str, what: str | None = None, key: str = "model") -> Iterator[None]:
    """Whatever libraries raise or print over the files of a model becomes a line of ours, which begins with a key.

    Args:
        path: folder or hub name.
        what: is read, if not the model itself.

    Raises:
        UserError: in place of any exception but for want of memory.
    """
    transformers.utils.logging.disable_progress_bar()  # a bar for every load drowns the lines that matter
    logger, said = logging.getLogger("transformers"), logging.handlers.BufferingHandler(10**6)
    handlers, logger.handlers = logger.handlers, [said]
    try:
        with warnings.catch_warnings(action="ignore"):
            _refuse_place(path, key)
            if transformers.utils.find_adapter_config_file(path) is not None:
                remedy = "merge it into its base and give the merged model, or continue its run with --resume"
                raise UserError(f"{key}: {path!r} holds an adapter, not a model: {remedy}")
            yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        says_little = isinstance(error, (LookupError, ArithmeticError, TypeError, AttributeError))
        reason = f"{type(error).__name__}: " * says_little + one_line(error)[:300]
        if "trust_remote_code" in str(error):
            remedy = (
                "; read that, and set trust_remote_code: true" if key == "model" else ", which a feature never runs"
            )
            reason = f"it needs Python code that comes with it{remedy}"
        for record in said.buffer:
            if shapes := MISMATCH.search(record.getMessage()):
                reason = "{} is {} in the file, {} by config.json".format(*shapes.groups())
        raise UserError(f"{key}: cannot load {what or repr(path)}: {_damage(path) or reason}") from None
    finally:
        logger.handlers = handlers
    for record in said.buffer:  # of the config nothing is said twice: the tokenizer reads it too
        if not (SAID_BETTER.search(record.getMessage()) or (what and "tokeniz" not in record.name)):
            say_once(f"{key}: {path}: {one_line(record.getMessage())}")


def _refuse_place(path: str, key: str) -> None:
    folder = Path(path)
    if os.path.isfile(path):
        raise UserError(f"{key}: {path!r} is a file; give the folder that holds it")
    if os.path.isdir(path):
        generation = folder / "generation_config.json"  # transformers passes over a damaged one, and over its EOS
        if generation.is_file() and not isinstance(json.loads(generation.read_bytes()), dict):
            raise ValueError("generation_config.json holds no object")
        return
    if path.startswith((".", "/", "~")) or ("/" in path and folder.parent.is_dir()):
        raise UserError(f"{key}: there is no folder {path!r} here")  # mistyped: no name to ask the network for
    if huggingface_hub.try_to_load_from_cache(path, "config.json") is None:
        try:  # one question; transformers would ask for half a minute where there is no network
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(path, "config.json"), timeout=10)
        except EntryNotFoundError:
            pass  # there is such a repository
        except Exception as error:
            raise UserError(
                f"{key}: there is no folder {path!r} here, and the hub does not give it: {one_line(error)[:300]}"
            ) from None


def _damage(path: str) -> str | None:
    """What is wrong with a file of a model that could not be loaded."""
    folder = Path(path)
    opens: dict[str, Callable[[Path], Any]] = {
        ".safetensors": lambda file: safe_open(file, "pt"),
        ".json": lambda file: json.loads(file.read_bytes()),
        ".model": lambda file: None,  # of sentencepiece
    }
    for file in sorted(folder.iterdir()) if os.path.isdir(path) else ():
        if not file.is_file() or file.suffix not in opens:
            continue
        with open(file, "rb") as opened:
            head = opened.read(64).lstrip()
        if head.startswith(b"version https://git-lfs"):
            return f"{file.name} is a Git LFS pointer; fetch the file itself with `git lfs pull`"
        if head.startswith(b"<"):
            return f"{file.name} is a web page, not the file"
        try:
            opens[file.suffix](file)
        except Exception as error:
            return f"{file.name} is damaged or cut short ({one_line(error)[:200]})"
    if os.path.isdir(path) and not any(folder.glob("*.safetensors")):
        return f"{path!r} holds no .safetensors file, the only format that is loaded"
    return None
