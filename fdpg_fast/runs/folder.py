"""A run on disk: config.yaml, *.jsonl, checkpoints/ and report.html in one folder, one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config.load import dump_config, load_config
from ..config.schema import TrainConfig
from ..errors import RunError, UserError

TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}  # a lone surrogate in a prompt is no reason to stop


class RunFolder:
    """The folder of a run that this process owns until `close`.

    Args:
        path: made if it is not there.

    Raises:
        UserError: another process is using it, or it cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 (held until close)
        except OSError as error:
            raise UserError(f"run_dir: cannot write to {str(path)!r}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"run_dir: {str(path)!r} is in use by another process; choose another folder") from None

    @staticmethod
    def create(config: TrainConfig) -> RunFolder:
        """Start a run; refuses a folder that already holds one."""
        RunFolder.refuse_taken(config)
        folder = RunFolder(config.run_dir)
        folder.record(config)
        return folder

    @staticmethod
    def refuse_taken(config: TrainConfig) -> None:
        """Raises UserError where run_dir holds a run already."""
        if (Path(config.run_dir) / "config.yaml").exists():
            raise UserError(
                f"run_dir: {config.run_dir!r} already holds a run; continue it with --resume {config.run_dir}, "
                "or choose another run_dir"
            )

    def record(self, config: TrainConfig) -> None:
        """Make this the config of the run."""
        write_whole(self.path / "config.yaml", dump_config(config))

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add one object to a .jsonl file."""
        with disk_errors(f"writing {self.path / name}"), open(self.path / name, "a", **TEXT) as file:
            file.write(to_json(row) + "\n")

    def forget_from(self, round_index: int) -> None:
        """Drop what rounds ≥ round_index left in the .jsonl files: a resumed run writes them again."""
        for name in ("metrics.jsonl", "samples.jsonl", "evaluation.jsonl"):
            if (self.path / name).exists():
                kept = [row for row in _whole_rows(self.path / name) if row["round"] < round_index]
                write_whole(self.path / name, "".join(to_json(row) + "\n" for row in kept))

    def discard(self) -> None:
        """Undo `create`: remove what this process has written, and the folder if nothing else is in it."""
        for name in ("config.yaml", "evaluation.jsonl", "samples.jsonl", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def close(self) -> None:
        self._lock.close()


def read_config(run_dir: str | Path, overrides: dict[str, str] | None = None) -> TrainConfig:
    """The config of an existing run.

    Raises:
        UserError: there is no run in that folder.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.exists():
        raise UserError(f"{str(run_dir)!r} is not the folder of a run: it has no config.yaml")
    return load_config(path, {**(overrides or {}), "run_dir": str(run_dir)})


def write_whole(path: Path, text: str) -> Path:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(f"writing {path}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, **TEXT)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Say plainly that the disk is full or not writable."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{what}: {error.strerror or error}; free some space and continue with --resume") from error


def fsync_folder(path: Path) -> None:
    """Make a rename inside the folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):  # the line that a kill cut short, maybe inside a character
            yield json.loads(line)


def to_json(row: dict[str, Any]) -> str:
    """One line of JSON, which has no NaN and no infinity: null and the strings "inf", "-inf" stand for them."""
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
