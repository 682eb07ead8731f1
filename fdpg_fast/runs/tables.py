"""What runs have written, read back, and as plain tables for the terminal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fdpg_kernels import divergences

from ..divergence import last_divergence
from ..errors import UserError

Json = dict[str, Any]


def _divergence_labels() -> dict[str, str]:
    labels = {}
    for name in divergences.NAMES:
        labels[f"divergence/{name}"] = label = divergences.get(name).label
        if name == "jensen_shannon":
            labels["divergence/jensen_shannon_half"] = f"{label}, ½–½"
    return labels


LABELS = {  # in the order of the tables
    "kl_to_base": "KL to base (nats)",
    "kl_of_target_to_base": "KL of target to base (nats)",
    "entropy_per_token": "entropy per token (nats)",
    "entropy_per_sequence": "entropy per sequence (nats)",
    "length": "length (tokens)",
    "distinct_1": "Distinct-1",
    "distinct_2": "Distinct-2",
    "distinct_3": "Distinct-3",
    "self_bleu_5": "Self-BLEU-5",
    "perplexity_under_base": "perplexity under base",
    "log_z": "log Z",
    "contexts_left_out": "contexts without support",
} | _divergence_labels()
# of what every feature has, in the order of the tables
FEATURE_LABELS = {"feature": "E[{}]", "feature_of_target": "E[{}] under the target", "exponent": "λ of {}"}
SUMMARY = ("kl_to_base", "entropy_per_token", "distinct_2", "self_bleu_5")
COMPARED = (
    *("kl_to_base", "kl_of_target_to_base", "entropy_per_token", "distinct_1", "distinct_2", "distinct_3"),
    *("self_bleu_5", "perplexity_under_base"),
)
NO_BETTER_SIDE = ("kl_of_target_to_base", "perplexity_under_base")
MATRIX = tuple(f"divergence/{x}" for x in ("forward_kl", "reverse_kl", "total_variation", "jensen_shannon"))

LEAST_ESS = 50.0
DOUBT = f"?: rests on fewer than {LEAST_ESS:g} effective samples; the policy may miss parts of the target unseen"


@dataclass(frozen=True)
class Estimate:
    """A number, the half-width of its 95 % interval and its effective sample size; NaN where unknown."""

    value: float = math.nan
    error: float = math.nan
    ess: float = math.nan

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "–" if math.isnan(self.value) else "∞" if self.value > 0 else "-∞"
        known = math.isfinite(self.error)
        if abs(self.value) >= 1e6:
            return f"{self.value:.2e}" + (f" ± {self.error:.0e}" if known else "")
        if not known and self.value == round(self.value):
            return f"{self.value:,.0f}"
        # two digits of the error, else three of the value
        digits = 1 - _magnitude(self.error) if known and self.error > 0 else 2 - _magnitude(self.value)
        places = min(max(digits, 0), 4)
        value = round(self.value, places) + 0.0  # no "-0.000"
        return f"{value:,.{places}f}" + (f" ± {self.error:,.{places}f}" if known else "")


UNKNOWN = Estimate()


@dataclass(frozen=True)
class Run:
    """What a run folder holds; of a file that is not there, nothing."""

    path: Path
    config: Json
    metrics: list[Json]
    samples: list[Json]
    before: dict[str, Estimate]
    after: dict[str, Estimate]

    @property
    def divergence(self) -> str:
        return str(self.config.get("divergence", "?"))

    @property
    def seed(self) -> str:
        return str((self.config.get("trainer") or {}).get("seed", "?"))


def read_run(run_dir: str | Path) -> Run:
    """Read whatever a run has written so far.

    Raises:
        UserError: there is no run, or one of its files is damaged; names file and line.
    """
    path = Path(run_dir)
    if not (path / "config.yaml").exists():
        raise UserError(f"{str(run_dir)!r} is not the folder of a run: it has no config.yaml")
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path / 'config.yaml'} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path / 'config.yaml'} must hold keys and values")
    metrics, samples, rows = (_read_jsonl(path / f"{x}.jsonl") for x in ("metrics", "samples", "evaluation"))
    # a lone evaluation is the base model's if it says round 0
    has_before = len(rows) > 1 or (rows and rows[0].get("round") == 0)
    before, after = (rows[:1], rows[1:][-1:]) if has_before else ([], rows)
    return Run(path, config, metrics, samples, _estimates(before), _estimates(after))


def _read_jsonl(path: Path) -> list[Json]:
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a completion may hold U+2028
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error.msg}); remove the damaged line") from None
            if not isinstance(rows[-1], dict):
                raise UserError(f"{path}:{number}: {line[:40]!r} is not a JSON object; remove the damaged line")
    return rows


def _estimates(evaluation: list[Json]) -> dict[str, Estimate]:
    metrics = evaluation[0].get("metrics") or {} if evaluation else {}
    return {
        key: Estimate(number(m, "value"), 1.96 * number(m, "standard_error"), number(m, "ess"))
        for key, m in metrics.items()
    }


def number(row: Json, key: str) -> float:
    """A number of a JSON object: null and a missing key are NaN, "inf" and "-inf" what they say."""
    value = row.get(key)
    return math.nan if value is None else float(value)


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def before_after_table(run_dir: str | Path) -> str:
    """What training changed, with 95 % intervals, as plain text of at most 100 columns.

    Raises:
        UserError: as `read_run`.
    """
    run = read_run(run_dir)
    # of a path of α the last one is measured; a config may name no divergence at all
    measured = last_divergence(run.divergence).name if ".." in run.divergence else run.divergence
    trained = f"divergence/{measured}"
    rows = table_rows([*feature_keys([run]), *SUMMARY], run.before, run.after)
    for key in [trained, *(key for key in MATRIX if key != trained)]:
        label, *cells = table_rows([key], run.before, run.after)[0]
        rows.append([f"to target: {label}{' (trained)' if key == trained else ''}", *cells])
    return _text_table([["", "before", "after"], *rows])


def evaluation_table(row: Json) -> str:
    """One evaluation, an object as in evaluation.jsonl, as plain text."""
    estimates = _estimates([row])
    keys = sorted(estimates, key=_place)
    rows = [[label, value] for label, value in table_rows(keys, estimates)]
    return _text_table([["", f"round {row.get('round', '?')}"], *rows])


def compare_table(runs: Sequence[Run]) -> str:
    """Runs as columns of plain text, as many side by side as 100 columns hold; * marks the best of a row."""
    header, quality, matrix = comparison_rows(runs)
    table = [header, *quality, ["divergence to target"] + [""] * len(runs), *matrix]
    blocks, first = [], 1
    while first < len(header):
        for last in range(len(header), first, -1):
            block = _text_table([[row[0], *row[first:last]] for row in table])
            if max(map(len, block.splitlines())) <= 100:
                break
        blocks.append(block)
        first = last
    return "\n\n".join([*blocks, *([DOUBT] if any("?" in cell for row in matrix for cell in row) else [])])


def with_evaluations(runs: Sequence[Run], evaluations: Sequence[Json]) -> list[Run]:
    """The runs, each with another evaluation in the place of its last."""
    return [replace(run, after=_estimates([row])) for run, row in zip(runs, evaluations, strict=True)]


def read_runs(run_dirs: Sequence[str | Path]) -> list[Run]:
    """
    Raises:
        UserError: as `read_run`, or no run is given.
    """
    if not run_dirs:
        raise UserError("compare: no run given; name at least one run folder")
    return [read_run(run_dir) for run_dir in run_dirs]


def comparison_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Header; rows of what the runs are and do; rows of how far they end from their target."""
    header = ["", *(run.path.resolve().name[-20:] for run in runs)]
    identity = [["trained", *(run.divergence for run in runs)], ["seed", *(run.seed for run in runs)]]
    quality = [_ranked_row(runs, key) for key in [*feature_keys(runs), *COMPARED]]
    return header, identity + quality, [_ranked_row(runs, key) for key in divergence_keys(runs)]


def _ranked_row(runs: Sequence[Run], key: str) -> list[str]:
    """A row with * before its best value, where there is a better side: a prescribed mean has none."""
    sign = 1 if key.startswith(("feature/", "entropy", "distinct")) else -1
    values = [sign * run.after.get(key, UNKNOWN).value for run in runs]
    known = [value for value in values if math.isfinite(value)]
    prescribed = key.startswith("feature/") and any("moments" in str(run.config.get("target")) for run in runs)
    best = max(known) if len(known) > 1 and not prescribed and key not in NO_BETTER_SIDE else None
    label, *cells = table_rows([key], *(run.after for run in runs))[0]
    doubts = [doubtful(key, run.after.get(key, UNKNOWN)) for run in runs]
    return [label, *("*" * (v == best) + c + "?" * doubt for v, c, doubt in zip(values, cells, doubts, strict=True))]


def doubtful(key: str, estimate: Estimate) -> bool:
    """Whether a value rests on so few samples that it means little; KL(π‖p) and χ²(π‖p) need no p/π."""
    looks_at_p = key.startswith(("divergence/", "feature_of_target/", "kl_of_target_to_base"))
    looks_at_p &= key not in ("divergence/reverse_kl", "divergence/neyman_chi2")
    return looks_at_p and math.isfinite(estimate.value) and estimate.ess < LEAST_ESS


def table_rows(keys: Iterable[str], *columns: dict[str, Estimate]) -> list[list[str]]:
    return [[label_of(key), *(str(column.get(key, UNKNOWN)) for column in columns)] for key in keys]


def metric_keys(runs: Sequence[Run]) -> list[str]:
    """Evaluation metrics that any of the runs has."""
    return sorted(dict.fromkeys(key for run in runs for key in [*run.before, *run.after]), key=_place)


def _place(key: str) -> int:
    """Of a metric in the tables: features, under the policy and the target, then as LABELS has it, then the rest."""
    kind = key.partition("/")[0]
    return [*FEATURE_LABELS, *LABELS, key].index(kind if kind in FEATURE_LABELS else key)


def feature_keys(runs: Sequence[Run]) -> list[str]:
    return [key for key in metric_keys(runs) if key.startswith("feature/")]


def divergence_keys(runs: Sequence[Run]) -> list[str]:
    return [key for key in metric_keys(runs) if key.startswith("divergence/")]


def label_of(key: str) -> str:
    kind, _, name = key.partition("/")
    if name and kind in FEATURE_LABELS:
        return FEATURE_LABELS[kind].format(name if len(name) <= 36 else name[:35] + "…")
    return LABELS.get(key, name or key)


def _text_table(rows: list[list[str]]) -> str:
    """Labels to the left, the rest to the right, numbers and ± of a column below each other."""
    labels, *columns = zip(*rows, strict=True)
    aligned = [[label.ljust(max(map(len, labels))) for label in labels]]
    for column in columns:
        errors = [len("".join(cell.partition(" ± ")[1:])) for cell in column]
        room = [max(errors) - n if is_number(cell) else 0 for cell, n in zip(column, errors, strict=True)]
        cells = [cell + " " * n for cell, n in zip(column, room, strict=True)]
        aligned.append([cell.rjust(max(map(len, cells))) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def is_number(cell: str) -> bool:
    return re.match(r"\*?-?[\d∞–]", cell) is not None
