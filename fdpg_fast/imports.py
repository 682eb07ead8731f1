"""Objects of the user's own, by import path: features, targets, divergences, runners of experiments."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import UserError, one_line

_changed: dict[Path, int] = {}  # when a file had been changed last as it was imported, in ns


def import_object(path: str) -> Any:
    """Whatever is at "package.module:name" or "some/file.py:name".

    Raises:
        UserError: there is no such module or name, or the module fails when it is imported.
    """
    module_path, _, attribute = path.rpartition(":")
    if not module_path or not attribute:
        raise UserError(f"import path {path!r}: write package.module:name or file.py:name")
    importlib.invalidate_caches()  # it may have been written a moment ago
    try:
        with torch_as_before():
            module = _load_file(module_path) if module_path.endswith(".py") else _load_module(module_path)
        return getattr(module, attribute)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's module does when it is imported
        raise UserError(f"import path {path!r}: {type(error).__name__}: {one_line(error)}") from error


@contextlib.contextmanager
def torch_as_before() -> Iterator[None]:
    """A block that runs a user's code: what it sets for all of torch, as code that judges by a model may, is set back.

    Gradients switched off would end the run; another default dtype would round its tensors without a word.
    """
    gradients, dtype, device = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:  # to set one slows down all that follows
            torch.set_default_device(None if device.type == "cpu" else device)


def _load_module(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` would: a script beside the config is importable
    return importlib.import_module(name)


def _load_file(path: str) -> Any:
    """The module of a file, under its own name or, where another module has that, folder.name; executed once.

    Its folder becomes importable, behind all that is installed: no file of it hides a module of a library. Processes
    that it starts find the module by the same name on the same path. A file that was edited, as from a notebook, is
    executed again.
    """
    file = Path(path).expanduser().resolve(strict=True)
    for folder, name in ((file.parent, file.stem), (file.parent.parent, f"{file.parent.name}.{file.stem}")):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        found = None
        with contextlib.suppress(ImportError, ValueError):  # a name with a dot, or of a module without a spec
            found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None and Path(found.origin).resolve() == file:
            changed = file.stat().st_mtime_ns
            if _changed.setdefault(file, changed) != changed:
                sys.modules.pop(name, None)
                if found.cached is not None:  # which knows a change only by the second and the size
                    Path(found.cached).unlink(missing_ok=True)
            _changed[file] = changed
            return importlib.import_module(name)
    raise ImportError(f"{file.stem!r} is the name of another module, or cannot be one's: rename the file")
