"""An experiment as examples/experiments/NAME/experiment.yaml describes it, and the cases that follow from it."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config.load import read_yaml, set_key
from ..errors import UserError
from .findings import Finding

FOLDER = Path("examples/experiments")
TRAIN = "fdpg_fast.experiments.training:run_case"

Settings = dict[str, Any]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Study(_Part):
    """A full product of its axes."""

    run: Settings = {}
    """Dotted or nested keys over the experiment's."""
    runner: str | None = None
    """package.module:function or file.py:function instead of the experiment's."""
    axes: dict[str, list[str] | dict[str, Settings]] = {}
    """Labels with the keys that they set; a list is of values of the key that the axis is called by."""

    def options(self, axis: str) -> dict[str, Settings]:
        """What each label of an axis sets."""
        labels = self.axes[axis]
        return {label: {axis: label} for label in labels} if isinstance(labels, list) else labels


class Budget(_Part):
    """How much of an experiment to run."""

    seeds: int = Field(ge=1)
    run: Settings = {}
    """Dotted or nested keys over the studies'."""
    studies: dict[str, Literal[False] | dict[str, list[str]]] = {}
    """False leaves a study out; otherwise the labels of an axis that are run."""


class Experiment(_Part):
    """experiment.yaml."""

    claim: str
    """What it shows."""
    fairness: str
    """What is equal for all runs, and what was tuned on what."""
    runner: str = TRAIN
    run: Settings
    studies: dict[str, Study] = Field(min_length=1)
    budgets: dict[str, Budget] = Field(min_length=1)
    findings: list[Finding]


@dataclass(frozen=True)
class Case:
    """One run of an experiment: where it belongs, and all that it depends on."""

    labels: dict[str, str]
    seed: int
    settings: Settings
    runner: str

    @property
    def name(self) -> str:
        """The name of its folder."""
        parts = [*self.labels.values(), f"seed-{self.seed}"]
        return "_".join("".join(c if c.isalnum() or c in ".-" else "-" for c in part) for part in parts)

    @property
    def fingerprint(self) -> str:
        """A hash of all that the result depends on besides the code."""
        return hashlib.sha256(json.dumps([self.settings, self.runner], sort_keys=True).encode()).hexdigest()[:12]


def find_folder(name: str) -> Path:
    """The folder of an experiment: one of ours by name, or any with an experiment.yaml.

    Raises:
        UserError: there is none; names those that there are.
    """
    for folder in (Path(name), FOLDER / name):
        if (folder / "experiment.yaml").exists():
            return folder
    known = ", ".join(sorted(path.parent.name for path in FOLDER.glob("*/experiment.yaml")))
    hint = f"one of {known}, or" if known else f"(there is no {FOLDER} here: run it in a clone of the repository)"
    raise UserError(f"experiment: {name!r} is not an experiment; give {hint} a folder with an experiment.yaml")


def load_experiment(folder: Path) -> Experiment:
    """Read and check experiment.yaml.

    Raises:
        UserError: one line with the key and what is wrong with it.
    """
    path = folder / "experiment.yaml"
    try:
        return Experiment.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def cases(
    experiment: Experiment, budget_name: str, seeds: int | None = None, divergences: list[str] | None = None
) -> list[Case]:
    """Every run of a budget, seed by seed, so that what is there when it is stopped is balanced.

    Args:
        seeds: how many, instead of the budget's number.
        divergences: only these, where a study has an axis `divergence`.

    Raises:
        UserError: the budget or a divergence is not one of the experiment's.
    """
    if budget_name not in experiment.budgets:
        raise UserError(f"--budget: {budget_name!r} is not one of {', '.join(experiment.budgets)}")
    budget = experiment.budgets[budget_name]
    chosen = [
        _case(experiment, study_name, labels, seed, budget)
        for seed in range(seeds or budget.seeds)
        for study_name, study in experiment.studies.items()
        if (only := budget.studies.get(study_name, {})) is not False
        for labels in _products(study, only)
        if divergences is None or labels.get("divergence", divergences[0]) in divergences
    ]
    known = {label for study in experiment.studies.values() for label in study.axes.get("divergence", ())}
    for name in divergences or ():
        if name not in known:
            raise UserError(f"--divergences: {name!r} is not one of this experiment's: {', '.join(sorted(known))}")
    return chosen


def _products(study: Study, only: dict[str, list[str]]) -> list[dict[str, str]]:
    columns = [[label for label in labels if label in only.get(axis, labels)] for axis, labels in study.axes.items()]
    return [dict(zip(study.axes, labels, strict=True)) for labels in itertools.product(*columns)]


def _case(experiment: Experiment, study_name: str, labels: dict[str, str], seed: int, budget: Budget) -> Case:
    study = experiment.studies[study_name]
    settings: Settings = {}
    by_label = [study.options(axis)[label] for axis, label in labels.items()]
    for layer in (experiment.run, study.run, *by_label, budget.run):
        _merge(settings, layer)
    return Case({"study": study_name, **labels}, seed, settings, study.runner or experiment.runner)


def _merge(settings: Settings, layer: Settings) -> None:
    """Set nested or dotted keys; lists and plain values are replaced."""
    for key, value in layer.items():
        if "." in key or not isinstance(value, dict):
            set_key(settings, key, json.loads(json.dumps(value)))  # a copy: later layers reach into it
        elif isinstance(settings.get(key), dict):
            _merge(settings[key], value)
        else:
            settings[key] = {}
            _merge(settings[key], value)
