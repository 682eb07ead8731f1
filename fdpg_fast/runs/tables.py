"""What runs have measured, as plain tables for the terminal; how a number and a metric are written everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from fdpg_kernels import divergences

from ..measure.estimators import Estimate
from ..measure.quasi_rejection import Kept, Quality
from .folder import Json, Run, estimates_of, read_run

_DIVERGENCES = [(name, divergences.get(name).label) for name in divergences.NAMES]
_DIVERGENCES.insert(divergences.NAMES.index("jensen_shannon") + 1, ("jensen_shannon_half", "Jensen–Shannon, ½–½"))
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
    **{f"divergence/{name}": label for name, label in _DIVERGENCES},
}
# of what every feature has, in the order of the tables
FEATURE_LABELS = {"feature": "E[{}]", "feature_of_target": "E[{}] under the target", "exponent": "λ of {}"}
SUMMARY = ("kl_to_base", "entropy_per_token", "distinct_2", "self_bleu_5")
COMPARED = (
    *("kl_to_base", "kl_of_target_to_base", "entropy_per_token", "distinct_1", "distinct_2", "distinct_3"),
    *("self_bleu_5", "perplexity_under_base"),
)
NO_BETTER_SIDE = ("kl_of_target_to_base", "perplexity_under_base")
MATRIX = tuple(f"divergence/{x}" for x in ("forward_kl", "reverse_kl", "total_variation", "jensen_shannon"))

WIDTH = 100  # columns of a terminal that tables may take
UNKNOWN = Estimate(math.nan, math.nan, math.nan)
LEAST_ESS = 50.0
DOUBT = f"?: rests on fewer than {LEAST_ESS:g} effective samples; the policy may miss parts of the target unseen"


def text_of(estimate: Estimate) -> str:
    """A number and the half-width of its 95 % interval; – where unknown."""
    return with_error(estimate.value, 1.96 * estimate.standard_error)


def with_error(value: float, error: float) -> str:
    """A number ± an error, to two digits of the error, or three of the number where the error is not known."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞" if value > 0 else "-∞"
    has_error = math.isfinite(error)
    if abs(value) >= 1e6:
        return f"{value:.2e}" + (f" ± {error:.0e}" if has_error else "")
    if not has_error and value == round(value):
        return f"{value:,.0f}"
    leading, digits = (error, 1) if has_error and error > 0 else (value, 2)
    places = min(max(digits - math.floor(math.log10(abs(leading) or 1.0)), 0), 4)
    value = round(value, places) + 0.0  # no "-0.000"
    return f"{value:,.{places}f}" + (f" ± {error:,.{places}f}" if has_error else "")


def label_of(key: str) -> str:
    """A metric in words."""
    kind, _, name = key.partition("/")
    if name and kind in FEATURE_LABELS:
        return FEATURE_LABELS[kind].format(name if len(name) <= 36 else name[:35] + "…")
    return LABELS.get(key, name or key)


def metric_keys(runs: Iterable[Run], prefix: str = "") -> list[str]:
    """Evaluation metrics that any of the runs has, in the order of the tables."""
    keys = dict.fromkeys(key for run in runs for key in [*run.before, *run.after] if key.startswith(prefix))
    return sorted(keys, key=_place)


def _place(key: str) -> int:
    """Features come first, under the policy and under the target, then what LABELS has, then the rest."""
    kind = key.partition("/")[0]
    return [*FEATURE_LABELS, *LABELS, key].index(kind if kind in FEATURE_LABELS else key)


def table_rows(keys: Iterable[str], *columns: dict[str, Estimate]) -> list[list[str]]:
    """A line for each metric: its label, and its value in each column."""
    return [[label_of(key), *(text_of(column.get(key, UNKNOWN)) for column in columns)] for key in keys]


def before_after_table(run_dir: str | Path) -> str:
    """What training changed, with 95 % intervals; raises UserError as `read_run`."""
    run = read_run(run_dir)
    trained = f"divergence/{run.trained}"
    rows = table_rows([*metric_keys([run], "feature/"), *SUMMARY], run.before, run.after)
    for key in dict.fromkeys([trained, *MATRIX]):
        label, *cells = table_rows([key], run.before, run.after)[0]
        rows.append([f"to target: {label}{' (trained)' if key == trained else ''}", *cells])
    return _text_table([["", "before", "after"], *rows])


def evaluation_table(row: Json) -> str:
    """One evaluation, an object as in evaluation.jsonl."""
    estimates = estimates_of(row)
    rows = table_rows(sorted(estimates, key=_place), estimates)
    return _text_table([["", f"round {row.get('round', '?')}"], *rows])


def compare_table(runs: Sequence[Run]) -> str:
    """Runs as columns, as many side by side as there is room for; * marks the best of a row, ? what to doubt."""
    header, quality, matrix = comparison_rows(runs)
    table = _text_table([header, *quality, ["divergence to target"] + [""] * len(runs), *matrix])
    return table + (f"\n\n{DOUBT}" if any("?" in cell for row in matrix for cell in row) else "")


def comparison_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Header; rows of what the runs are and do; rows of how far they end from their target."""
    header = ["", *(run.path.resolve().name[-20:] for run in runs)]
    identity = [["trained", *(run.divergence for run in runs)], ["seed", *(run.seed for run in runs)]]
    quality = [_ranked_row(runs, key) for key in [*metric_keys(runs, "feature/"), *COMPARED]]
    return header, identity + quality, [_ranked_row(runs, key) for key in metric_keys(runs, "divergence/")]


def _ranked_row(runs: Sequence[Run], key: str) -> list[str]:
    """A row with * before its best value, where there is a better side: a prescribed mean has none."""
    sign = 1 if key.startswith(("feature/", "entropy", "distinct")) else -1
    estimates = [run.after.get(key, UNKNOWN) for run in runs]
    values = [sign * estimate.value for estimate in estimates if math.isfinite(estimate.value)]
    prescribed = key.startswith("feature/") and any("moments" in str(run.config.get("target")) for run in runs)
    best = sign * max(values) if len(values) > 1 and not prescribed and key not in NO_BETTER_SIDE else None
    return [label_of(key), *("*" * (e.value == best) + text_of(e) + "?" * doubtful(key, e) for e in estimates)]


def doubtful(key: str, estimate: Estimate) -> bool:
    """Whether a value rests on so few samples that it means little; KL(π‖p) and χ²(π‖p) need no p/π."""
    looks_at_p = key.startswith(("divergence/", "feature_of_target/", "kl_of_target_to_base"))
    looks_at_p &= key not in ("divergence/reverse_kl", "divergence/neyman_chi2")
    return looks_at_p and math.isfinite(estimate.value) and estimate.ess < LEAST_ESS


def quality_table(quality: Sequence[Quality]) -> str:
    """What each β of quasi-rejection sampling costs and buys, for a person who chooses one."""
    columns = [(q.acceptance, q.total_variation, q.forward_kl) for q in quality]
    rows = [[f"{q.beta:g}", *map(text_of, estimates)] for q, estimates in zip(quality, columns, strict=True)]
    return _text_table([["β", "acceptance", "TV to target", "KL(p‖p_β) (nats)"], *rows])


def advice(kept: Kept, count: int, beta: float, max_draws: int) -> str:
    """Why fewer than `count` were kept, and what would change it, in a sentence."""
    outcome = f"kept {len(kept.items)} of {count} completions in {kept.draws} draws"
    usable = [q for q in kept.quality if math.isfinite(q.acceptance.value)]
    if not usable:
        return f"{outcome}: no draw satisfies the target; train longer, or towards a softer target"
    (own,) = (q for q in usable if q.beta == beta)
    outcome += f", acceptance rate {own.acceptance.value:.3g} at β {beta:g}"
    easier = [q for q in usable if q.beta < beta and q.acceptance.value * max_draws > 2 * count]
    if easier:
        outcome += f"; β {easier[-1].beta:g} would accept {easier[-1].acceptance.value:.3g}"
    return f"{outcome}; a larger --max-draws than {max_draws} gets on at this β"


def _text_table(rows: Sequence[Sequence[str]]) -> str:
    """Labels to the left, the rest to the right, in blocks of as many columns as WIDTH holds."""
    console = Console(width=WIDTH, color_system=None)
    unlimited = console.options.update(width=10 * WIDTH * len(rows[0]))
    for columns in range(len(rows[0]) - 1, 0, -1):
        firsts = range(1, len(rows[0]), columns)
        blocks = [_grid([[row[0], *row[first : first + columns]] for row in rows]) for first in firsts]
        if all(console.measure(block, options=unlimited).maximum <= WIDTH for block in blocks):
            break
    with console.capture() as capture:
        for block in blocks:
            console.print(block, "")
    return "\n".join(line.rstrip() for line in capture.get().split("\n")).rstrip()


def _grid(rows: Sequence[Sequence[str]]) -> Table:
    table = Table.grid("", *(Column(justify="right", no_wrap=True) for _ in rows[0][1:]), padding=(0, 2))
    for cells in zip(*map(_aligned, zip(*rows, strict=True)), strict=True):
        table.add_row(*cells)
    return table


def _aligned(column: Sequence[str]) -> list[Padding]:
    """The cells of a column that is justified to the right, the ± of its numbers below each other."""
    errors = [len("".join(cell.partition(" ± ")[1:])) for cell in column]
    gaps = [max(errors) - error if is_number(cell) else 0 for cell, error in zip(column, errors, strict=True)]
    return [Padding(Text(cell), (0, gap, 0, 0)) for cell, gap in zip(column, gaps, strict=True)]


def is_number(cell: str) -> bool:
    """Whether a cell of a table holds a number, or says that there is none."""
    return re.match(r"\*?-?[\d∞–]", cell) is not None
