"""What a run has measured, as plain tables for the terminal; how a number and a metric are written everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.cells import cell_len, set_cell_size

from fdpg_kernels import divergences

from ..by_context import LEAST_ESS, LEAST_PER_CONTEXT
from ..errors import printable
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
    **{f"distinct_{n}": f"Distinct-{n}" for n in (1, 2, 3)},
    "self_bleu_5": "Self-BLEU-5",
    "perplexity_under_base": "perplexity under base",
    "log_z": "log Z",
    "contexts_left_out": "contexts without support",
    **{f"divergence/{name}": label for name, label in _DIVERGENCES},
}
EXACT = "on exact samples of p"  # all else is from the policy's
LABELS |= {
    f"target_samples/{key.removeprefix('divergence/')}": f"{label}, {EXACT}"
    for key, label in LABELS.items()
    if key.endswith(("/forward_kl", "/jensen_shannon", "/jensen_shannon_half", "kl_of_target_to_base", "left_out"))
}
# of what features have, in the order of the tables: their name, and k
FEATURE_LABELS = {
    **{"feature": "E[{}]", "pass": "pass@{1} of {0}", "majority": "majority@{1} of {0}"},
    **{"feature_of_target": "E[{}] under the target", "exponent": "λ of {}"},
}
BY_K = ("pass@", "majority@")
SUMMARY = ("kl_to_base", "entropy_per_token", "distinct_2", "self_bleu_5")
MATRIX = ("forward_kl", "reverse_kl", "total_variation", "jensen_shannon")
WIDTH = 100  # columns of a terminal that tables may take
DOUBT = f"?: fewer than {LEAST_ESS:g} effective samples or {LEAST_PER_CONTEXT:g} a context: biased, blind to parts of p"
UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def text_of(estimate: Estimate, key: str = "") -> str:
    """A metric and the half-width of its 95 % interval; – where unknown, ? behind it where it is doubtful."""
    return with_error(estimate.value, 1.96 * estimate.standard_error) + "?" * doubtful(estimate, key)


def doubtful(estimate: Estimate, key: str = "") -> bool:
    """Whether a metric rests on so few samples that it means little; KL(π‖p) and χ²(π‖p) need no p/π."""
    looks_at_p = key.startswith(("divergence/", "feature_of_target/", "kl_of_target_to_base", "target_samples/"))
    looks_at_p &= key not in ("divergence/reverse_kl", "divergence/neyman_chi2")
    few = (looks_at_p and estimate.ess < LEAST_ESS) or estimate.per_context < LEAST_PER_CONTEXT
    return few and math.isfinite(estimate.value)


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
    kind, k, name = _parts(key)
    if name and kind in FEATURE_LABELS:
        return FEATURE_LABELS[kind].format(name if len(name) <= 36 else name[:35] + "…", k)
    return LABELS.get(key, name or key)


def metric_keys(runs: Iterable[Run], prefix: str | tuple[str, ...] = "") -> list[str]:
    """Evaluation metrics that any of the runs has, in the order of the tables; of a curve over k as `in_short`."""
    return in_short(dict.fromkeys(key for run in runs for key in [*run.before, *run.after] if key.startswith(prefix)))


def in_short(keys: Iterable[str]) -> list[str]:
    """Metrics in the order of the tables: of pass@k and majority@k those of the middle k and of the largest."""
    keys = sorted(keys, key=_place)
    curves = [[*curve.values()] for curve in curves_by_k(keys).values()]
    kept = {key for curve in curves for key in (curve[len(curve) // 2], curve[-1])}
    return [key for key in keys if key in kept or not key.startswith(BY_K)]


def curves_by_k(keys: Iterable[str]) -> dict[str, dict[int, str]]:
    """The keys of each curve of pass@k or majority@k, by its name in words; k grows."""
    curves: dict[str, dict[int, str]] = {}
    for key in keys:
        kind, k, name = _parts(key)
        if key.startswith(BY_K):
            curves.setdefault(FEATURE_LABELS[kind].format(name, "k"), {})[int(k)] = key
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def is_of_feature(key: str) -> bool:
    """Whether a metric is one of those that every feature has."""
    return _parts(key)[0] in FEATURE_LABELS


def _parts(key: str) -> tuple[str, str, str]:
    """Kind, k and name of a metric that is called kind/name or kind@k/name."""
    kind, _, name = key.partition("/")
    kind, _, k = kind.partition("@")
    return kind, k, name


def _place(key: str) -> int:
    """Features come first, under the policy and under the target, then what LABELS has, then the rest."""
    return [*FEATURE_LABELS, *LABELS, key].index(_parts(key)[0] if is_of_feature(key) else key)


def of_target(run: Run, key: str) -> Estimate:
    """What a metric of the policy would be if it were the target; unknown of most."""
    measured = run.before | run.after
    keys = [key.replace("feature/", "feature_of_target/")] if key.startswith("feature/") else []
    if key == "kl_to_base":
        keys = ["target_samples/kl_of_target_to_base", "kl_of_target_to_base"]
    return next((measured[key] for key in keys if key in measured), UNKNOWN)


def before_after_table(run_dir: str | Path) -> str:
    """What training changed, with 95 % intervals, and what the target has; raises UserError as `read_run`."""
    return text_table(before_after_rows(read_run(run_dir)))


def before_after_rows(run: Run) -> list[list[str]]:
    """The cells of that table, the first row its header."""
    columns = (run.before, run.after)
    rows = [["", "before", "after", "target"]]
    for key in [*metric_keys([run], ("feature/", *BY_K)), *SUMMARY]:
        own = of_target(run, key)
        cells = [text_of(x.get(key, UNKNOWN), key) for x in columns]
        rows.append([label_of(key), *cells, "" if own is UNKNOWN else text_of(own, "feature_of_target/")])
    names = dict.fromkeys([run.trained, *MATRIX])
    exact = [name for name in names if any(f"target_samples/{name}" in x for x in columns)]
    others = [name for name in names if name not in exact]
    for kind, heading, group in (
        ("target_samples", f"to target p, {EXACT}", exact),
        ("divergence", "to target p, by reweighting", others),
    ):
        rows += [[heading, "", "", ""]] if group else []
        for name in group:
            key, label = f"{kind}/{name}", label_of(f"divergence/{name}") + " (trained)" * (name == run.trained)
            rows.append([f"  {label}", *(text_of(x.get(key, UNKNOWN), key) for x in columns), ""])
    return rows


def evaluation_line(done: int, rounds: int, metrics: Mapping[str, Estimate], keys: Iterable[str]) -> str:
    """The features of an evaluation, and what else of it, in a line beside those of the rounds."""
    shown = [*(key for key in metrics if key.startswith("feature/")), *keys]
    values = [f"{label_of(key)} {text_of(metrics[key], key)}" for key in shown]
    return "  ".join([f"round {done:>{len(str(rounds))}}/{rounds}", "evaluated:", *values])


def evaluation_table(row: Json) -> str:
    """One evaluation, an object as in evaluation.jsonl."""
    estimates = estimates_of(row)
    rows = [[label_of(key), text_of(estimates[key], key)] for key in in_short(estimates)]
    return text_table([["", f"round {row.get('round', '?')}"], *rows])


def quality_table(quality: Sequence[Quality]) -> str:
    """What each β of quasi-rejection sampling costs and buys, for a person who chooses one."""
    rows = [[f"{q.beta:g}", *map(text_of, (q.acceptance, q.total_variation, q.forward_kl))] for q in quality]
    return text_table([["β", "acceptance", "TV to target", "KL(p‖p_β) (nats)"], *rows])


def advice(kept: Kept, count: int, beta: float, max_draws: int) -> str:
    """Why fewer than `count` were kept, and what would change it, in a sentence."""
    outcome = f"kept {len(kept.items)} of {count} completions in {kept.draws} draws"
    rates = {q.beta: q.acceptance.value for q in kept.quality if math.isfinite(q.acceptance.value)}
    if not rates:
        return f"{outcome}: no draw satisfies the target; train longer, or towards a softer target"
    easier = [other for other, rate in rates.items() if other < beta and rate * max_draws > 2 * count]
    hint = f"; β {easier[-1]:g} would accept {rates[easier[-1]]:.3g}" if easier else ""
    more = f"a larger --max-draws than {max_draws} gets on at this β"
    return f"{outcome}, acceptance rate {rates[beta]:.3g} at β {beta:g}{hint}; {more}"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Labels to the left, the rest to the right, in blocks of as many columns as WIDTH holds; below, what ? means."""
    labels, *columns = zip(*(map(printable, row) for row in rows), strict=True)
    label_width = max(map(cell_len, labels))
    aligned = [_aligned(column) for column in columns]
    for side_by_side in range(len(columns), 0, -1):
        blocks = [aligned[first : first + side_by_side] for first in range(0, len(columns), side_by_side)]
        if max(label_width + sum(2 + cell_len(column[0]) for column in block) for block in blocks) <= WIDTH:
            break
    left = [set_cell_size(label, label_width) for label in labels]
    texts = ["\n".join("  ".join(cells).rstrip() for cells in zip(left, *block, strict=True)) for block in blocks]
    return "\n\n".join([*texts, DOUBT] if any(re.search(r"[\d∞]\?$", cell) for row in rows for cell in row) else texts)


def _aligned(column: Sequence[str]) -> list[str]:
    """The cells of a column to the right, as wide as each other, the ± of its numbers below each other."""
    errors = [len("".join(cell.partition(" ± ")[1:])) for cell in column]
    gaps = [max(errors) - error if is_number(cell) else 0 for cell, error in zip(column, errors, strict=True)]
    cells = [cell + " " * gap for cell, gap in zip(column, gaps, strict=True)]
    width = max(map(cell_len, cells))
    return [" " * (width - cell_len(cell)) + cell for cell in cells]


def is_number(cell: str) -> bool:
    """Whether a cell of a table holds a number, or says that there is none."""
    return re.match(r"\*?-?[\d∞–]", cell) is not None
