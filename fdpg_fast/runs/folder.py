"""A run on disk: config.yaml, *.jsonl, checkpoints/ and report.html in one folder, one process at a time.

JSON has no NaN and no infinity: null and the strings "inf" and "-inf" stand for them in every file of a run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config.load import load_config, read_yaml
from ..config.schema import RESUMABLE, EngineConfig, TrainConfig
from ..divergence import last_divergence
from ..errors import UserError, disk_errors, one_line
from ..measure.estimators import Estimate

Json = dict[str, Any]
Parsed = TypeVar("Parsed")
TARGET_SAMPLES = "target-samples.safetensors"
OURS = (
    *("config.yaml", "metrics.jsonl", "samples.jsonl", "evaluation.jsonl"),
    *(TARGET_SAMPLES, "checkpoints", "report.html"),
)
ORIGIN, TRACKING = ".origin.json", ".tracking.json"
TEXT: Json = {"encoding": "utf-8", "errors": "replace"}  # a lone surrogate in a prompt is no reason to stop
EVERY_ENGINE = ("kind", "max_new_tokens", "gap_warning", "gap_limit")  # keys of `engine` that mean the same to all
NO_NUMBERS = {"NaN": None, "Infinity": "inf", "-Infinity": "-inf"}  # as Python's json has them, and as we do


class RunFolder:
    """The folder of a run, made if it is not there, which this process owns until `close`, or UserError."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        names, folders = (*OURS, ORIGIN, TRACKING, ".lock"), (self.path, *self.path.parents)
        try:
            self._made = [self.path / name for name in names if not os.path.lexists(self.path / name)]
            self._made += [folder for folder in folders if not folder.exists()]  # inner ones first
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a")  # noqa: SIM115 (held until close)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._lock.fileno()).st_nlink == 0:
                raise BlockingIOError  # discarded meanwhile by who held it: it locks nothing any more
        except BlockingIOError:
            raise UserError(f"run_dir: {str(path)!r} is in use by another process; choose another folder") from None
        except OSError as error:
            raise UserError(f"run_dir: cannot write to {str(path)!r}: {error.strerror}") from None

    def append(self, name: str, row: Json) -> None:
        """Add one object to a .jsonl file."""
        with disk_errors(f"writing {self.path / name}"), open(self.path / name, "a", **TEXT) as file:
            file.write(to_json(row) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        write_whole(self.path / name, text)

    def forget_from(self, round_index: int, keeps_evaluation: bool) -> dict[str, int]:
        """Drop what rounds ≥ round_index left in the .jsonl files, to be written again; the last round of each file.

        keeps_evaluation: but not an evaluation that was made, and written to its end, before that round.
        """
        last, files = {}, self.rows()
        evaluated = {index for path, rows in files.items() if path.stem == "evaluation" for index, _ in rows}
        for path, rows in files.items():
            last[path.stem] = max((index for index, _ in rows), default=-1)
            kept = [row for index, row in rows if index < round_index]
            if keeps_evaluation and round_index in evaluated:
                before = [row for index, row in rows if index == round_index]
                kept += [row for row in before if "evaluation" in (path.stem, row.get("split"))]
            write_whole(path, "".join(to_json(row) + "\n" for row in kept))
        return last

    def rows(self) -> dict[Path, list[tuple[int, Json]]]:
        """The rows of every .jsonl file that there is, with their rounds; raises UserError where one is damaged."""
        paths = [self.path / name for name in OURS if name.endswith(".jsonl")]
        return {path: read_jsonl(path, lambda row: (int(row["round"]), row)) for path in paths if path.exists()}

    def discard(self) -> None:
        """Remove what this process has made, before a first round; folders only where nothing else is in them."""
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()

    def close(self) -> None:
        self._lock.close()


class NoFolder(RunFolder):
    """The folder of a run that another process writes: what would go there is dropped."""

    def __init__(self, path: str | Path):
        self.path, self._made = Path(path), []

    def append(self, name: str, row: Json) -> None: ...

    def write(self, name: str, text: str) -> None: ...

    def forget_from(self, round_index: int, keeps_evaluation: bool) -> dict[str, int]:
        return {}

    def close(self) -> None: ...


def refuse_taken(run_dir: str) -> None:
    """Raises UserError where the folder of a new run holds one already, or anything that has the name of a part."""
    for name in OURS:
        if os.path.lexists(Path(run_dir) / name):
            held, remedy = "a run", f"continue it with --resume {run_dir}, or "
            if not os.path.lexists(Path(run_dir) / "config.yaml"):
                held, remedy = f"{name}, as a run would", ""
            raise UserError(f"run_dir: {run_dir!r} already holds {held}; {remedy}choose another run_dir")


@dataclass(frozen=True)
class Run:
    """What a run folder holds; of a file that is not there, nothing."""

    path: Path
    config: Json
    trained: str  # the name under which `before` and `after` have the divergence that is trained
    metrics: list[dict[str, float]]
    samples: list[Json]
    evaluations: dict[int, dict[str, Estimate]]  # by the rounds that were done
    before: dict[str, Estimate]  # the evaluation of the base
    after: dict[str, Estimate]  # of the last policy that was evaluated


def read_run(run_dir: str | Path) -> Run:
    """Whatever a run has written so far; raises UserError where there is no run, or a file is damaged."""
    path = _config_path(run_dir)
    config = read_yaml(path)
    metrics = read_jsonl(path.with_name("metrics.jsonl"), lambda row: {key: to_float(row[key]) for key in row})
    samples = read_jsonl(path.with_name("samples.jsonl"), _sample)
    rows = read_jsonl(path.with_name("evaluation.jsonl"), lambda row: row | {"metrics": estimates_of(row)})
    trained = str(config.get("divergence", "?"))
    if rows and "divergence" in rows[-1]:
        trained = str(rows[-1]["divergence"])
    elif trained.startswith("alpha:"):  # of a path of α the last one is measured
        trained = last_divergence(trained).name
    # a lone evaluation is the base model's if it says round 0
    has_before = len(rows) > 1 or any(row.get("round") == 0 for row in rows)
    before, after = rows[0] if has_before else {}, rows[-1] if len(rows) > has_before else {}
    evaluations = {int(row.get("round", place)): row["metrics"] for place, row in enumerate(rows)}
    ends = before.get("metrics", {}), after.get("metrics", {})
    return Run(path.parent, config, trained, metrics, samples, evaluations, *ends)


def estimates_of(evaluation: Json) -> dict[str, Estimate]:
    """The metrics of a line of evaluation.jsonl."""
    metrics = evaluation.get("metrics") or {}
    return {key: Estimate(**{name: to_float(x) for name, x in metric.items()}) for key, metric in metrics.items()}


def _sample(row: Json) -> Json:
    """A line of samples.jsonl as the report takes it, whatever else it holds."""
    features = {name: to_float(value) for name, value in (row.get("features") or {}).items()}
    numbers = {"round": int(row.get("round", 0)), "features": features, "log_score": to_float(row.get("log_score"))}
    return row | numbers | {"prompt": str(row.get("prompt", ""))}


def read_config(run_dir: str | Path, overrides: dict[str, str] | None = None) -> TrainConfig:
    """The config of an existing run; raises UserError where there is none, or more than what is RESUMABLE changes."""
    for key in overrides or {}:
        if key not in RESUMABLE:
            raise UserError(f"--{key}: a resumed run keeps its config; only {', '.join(RESUMABLE)} may change")
    given = {**(overrides or {}), "run_dir": str(run_dir)}
    if "engine.kind" in given:  # what was set for the engine before has no effect on another
        fields = {key: field.default for key, field in EngineConfig.model_fields.items() if key not in EVERY_ENGINE}
        given = {f"engine.{key}": json.dumps(default) for key, default in fields.items()} | given
    return load_config(_config_path(run_dir), given)


def _config_path(run_dir: str | Path) -> Path:
    path = Path(run_dir) / "config.yaml"
    if not os.path.exists(path):  # which no name makes raise
        within = Path(run_dir).parent
        of = f"; give its run, {str(within.parent)!r}: the newest is taken" if within.name == "checkpoints" else ""
        raise UserError(f"{str(run_dir)!r} is not the folder of a run: it has no config.yaml{of}")
    return path


def read_jsonl(path: Path, parse: Callable[[Json], Parsed]) -> list[Parsed]:
    """What `parse` makes of each object of a file, if there is one; without a last line that a kill has cut short.

    Raises:
        UserError: another line is damaged; it is named.
    """
    rows = []
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []  # not splitlines: a text may hold U+2028
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                rows.append(parse({**json.loads(line)}))
        except Exception as error:  # of JSON that is none, or of what `parse` does not find in it
            if number < len(lines):  # behind the last \n nothing was finished
                fault = f"{path}:{number}: not a JSON object of this kind of file ({one_line(error)})"
                raise UserError(f"{fault}; remove the damaged line") from None
    return rows


def to_json(row: Json) -> str:
    """One line of JSON."""
    plain = json.loads(json.dumps(row), parse_constant=NO_NUMBERS.get)
    return json.dumps(plain, ensure_ascii=False, allow_nan=False)


def to_float(value: float | str | None) -> float:
    """A number as `to_json` wrote it; one that is not there at all, None like null, is NaN."""
    return math.nan if value is None else float(value)


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
