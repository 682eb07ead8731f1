"""Objects of the user's own, by import path: features, targets, divergences, runners of experiments."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from .errors import UserError, one_line


def import_object(path: str) -> Any:
    """Whatever is at "package.module:name" or "some/file.py:name".

    Raises:
        UserError: there is no such module or name, or the module fails when it is imported.
    """
    module_path, _, attribute = path.rpartition(":")
    if not module_path or not attribute:
        raise UserError(f"import path {path!r}: write package.module:name or file.py:name")
    try:
        module = _load_file(module_path) if module_path.endswith(".py") else _load_module(module_path)
        return getattr(module, attribute)
    except Exception as error:  # whatever the user's module does when it is imported
        raise UserError(f"import path {path!r}: {type(error).__name__}: {one_line(error)}") from error


def _load_module(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` would: a script beside the config is importable
    return importlib.import_module(name)


def _load_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"fdpg_imported_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None  # as for every name that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses, for one, look their module up
    spec.loader.exec_module(module)
    return module
