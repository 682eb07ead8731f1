"""A run, or several, to look at: a page that needs nothing but itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..measure.diagnostics import complaints
from .folder import write_whole
from .plots import PALETTE, coloured, curve, legend, scatter
from .tables import (
    DOUBT,
    UNKNOWN,
    Estimate,
    Json,
    Run,
    comparison_rows,
    divergence_keys,
    feature_keys,
    is_number,
    label_of,
    metric_keys,
    number,
    read_run,
    table_rows,
)

CURVES = {
    "policy/kl_to_base": "KL to base (nats)",
    "policy/entropy_per_token": "entropy per token (nats)",
    "z/log_z": "log Z",
    "z/ess": "effective samples behind log Z",
    "target/ess": "effective samples of the round",
    "loss": "surrogate loss",
    "time/tokens_per_second": "tokens per second",
}

JS_NOTE = "Jensen–Shannon is KL(π‖m) + KL(p‖m), m = (π + p)/2; jensen_shannon_half is the usual ½–½ value."
MAX_SAMPLES = 8
CSS = """
:root{color-scheme:light dark;--ink:#1c2128;--soft:#68717d;--line:#e1e4e8;--card:#f6f7f9;--page:#fff}
@media(prefers-color-scheme:dark){
:root{--ink:#dde2e8;--soft:#929ba6;--line:#31363d;--card:#1c2025;--page:#131619}}
body{font:15px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:1000px;
margin:48px auto;padding:0 24px}h1{font-size:26px;line-height:1.25;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:18px;margin:48px 0 12px}p,figcaption,.soft{color:var(--soft)}p{margin:4px 0}small{font-size:13px}
.cards,.grid,.pair{display:grid;gap:16px;grid-template-columns:repeat(3,minmax(0,1fr));margin-top:28px}
.card{background:var(--card);border-radius:10px;padding:16px 18px;overflow-wrap:anywhere}
.card b{font-size:22px;display:block;font-weight:600;font-variant-numeric:tabular-nums}
.grid,.pair{grid-template-columns:repeat(2,minmax(0,1fr));gap:28px 32px;margin-top:16px}.pair{gap:16px}
figure{margin:0;min-width:0}figcaption{font-size:13px;margin-bottom:4px;overflow-wrap:anywhere}
svg{width:100%;height:auto;display:block}svg text{font-family:system-ui,sans-serif!important}
i{display:inline-block;width:10px;height:10px;border-radius:3px;margin:0 5px 0 14px}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;width:100%}
td,th{padding:6px 0 6px 13px;border-bottom:1px solid var(--line);text-align:right;vertical-align:bottom}
td{white-space:nowrap}th{font-weight:500;color:var(--soft)}.best{font-weight:700}
.warning{color:#b3541e}
td.error{text-align:left;color:var(--soft);padding-left:5px}
tr>:first-child{text-align:left;padding-left:0;width:99%;min-width:6em}.bar{display:flex;height:26px;border-radius:6px;
overflow:hidden;margin:12px 0}pre{font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere;margin:4px 0 0;background:var(--card);border-radius:8px;padding:12px;max-height:18em;
overflow-y:auto}summary{cursor:pointer}
@media(max-width:700px){.cards,.grid,.pair{grid-template-columns:minmax(0,1fr)}}
"""


def write_report(run_dir: str | Path) -> Path:
    """Make RUN/report.html, whole or not at all, from whatever the run has written so far.

    Raises:
        UserError: as `read_run`.
    """
    run = read_run(run_dir)
    model, target = escape(Path(str(run.config.get("model", "?"))).name), escape(_target(run.config))
    rounds = (run.config.get("trainer") or {}).get("rounds", "?")
    config = escape((run.path / "config.yaml").read_text(encoding="utf-8"))
    matrix = divergence_keys([run])
    others = [key for key in metric_keys([run]) if key not in matrix]
    body = [
        f"<p>Trained for {escape(str(rounds))} rounds, seed {escape(run.seed)}, to minimise "
        f"{escape(label_of(f'divergence/{run.divergence}'))} between the policy π and the target p ∝ base · φ, "
        f"with φ: {target}. Intervals are 95 %.</p>",
        *(f"<p class=warning>{escape(text)}.</p>" for text in _complaints(run)),
        _headline(run),
        _section("Over the rounds", _grid(_run_curves(run))),
        _section("Before and after", _before_after(run, others)),
        _section("Divergence to the target", _before_after(run, matrix), JS_NOTE),
        _section("Where the time of a round goes", _time_bar(run.metrics)),
        _section("Samples", _samples(run.samples)),
        _section("Config", f"<details><summary>config.yaml, as resolved</summary><pre>{config}</pre></details>"),
    ]
    return _write_page(run.path / "report.html", f"{model} → {target}", body)


def write_comparison(runs: Sequence[Run], path: str | Path) -> Path:
    """Make a page with the trade-offs and learning curves of several runs and the tables of `compare_table`."""
    header, quality, matrix = comparison_rows(runs)
    names = [run.divergence for run in runs]
    names = names if len(set(names)) > 1 else header[1:]  # what tells the runs apart
    colours = coloured(names)
    ends = [(name, colours[name], run.after) for name, run in zip(names, runs, strict=True)]
    scatters = [scatter(ends, x, y) for y in feature_keys(runs) for x in ("entropy_per_token", "kl_to_base")]
    curves = {f"target/{key[8:]}": label_of(key) for key in feature_keys(runs)} | dict(list(CURVES.items())[:2])
    lines = {key: [(run, key, colours[name]) for name, run in zip(names, runs, strict=True)] for key in curves}
    note = "Bold: best of its column."
    doubt = DOUBT if any("?" in cell for row in matrix for cell in row) else ""
    body = [
        f"<p>{len(runs)} runs; bars and bands are 95 % intervals. {legend(colours)}</p>",
        _section("Trade-offs after training", _grid(scatters)),
        _section("Learning curves", _grid([curve(title, lines[key]) for key, title in curves.items()])),
        _section("After training", _html_table(zip(header, *quality, strict=True)), note),
        _section("Divergence to the target", _html_table(zip(header, *matrix, strict=True)), f"{JS_NOTE} {doubt}"),
    ]
    return _write_page(Path(path), "Comparison of runs", body)


def _complaints(run: Run) -> Iterable[str]:
    """Of the last round."""
    last = run.metrics[-1] if run.metrics else {}
    return complaints({key: number(last, key) for key in last}).values()


def _target(config: Json) -> str:
    """φ in words, one factor a term."""
    return " · ".join(_term(term) for term in config.get("target") or []) or "?"


def _term(term: Any) -> str:
    if not isinstance(term, dict):
        return str(term)
    names = [_feature(feature) for feature in [term.get("feature"), *(term.get("features") or [])] if feature]
    if "beta" in term:
        return f"exp({', '.join(names)} / {term['beta']})"
    if "moments" in term:
        return ", ".join(f"E[{name}] = {mean}" for name, mean in zip(names, term["moments"], strict=False))
    return ", ".join(names) or str(term.get("path") or term.get("kind"))


def _feature(feature: Any) -> str:
    if not isinstance(feature, dict):
        return str(feature)
    details = [feature.get(key) for key in ("kind", "word", "pattern", "label", "path")]
    return feature.get("name") or ":".join(str(detail) for detail in details if detail)


def _headline(run: Run) -> str:
    cards = []
    for keys in (feature_keys([run]), ["kl_to_base"], ["distinct_2"]):
        lines = []
        for label, *cells in table_rows(keys, run.before, run.after):
            (old, _, old_error), (new, _, new_error) = (cell.partition(" ± ") for cell in cells)
            lines.append(f"<span class=soft>{escape(label)}</span><b>{old} → {new}</b>")
            if old_error or new_error:
                lines[-1] += f"<small class=soft>± {old_error or '–'} → ± {new_error or '–'}</small>"
        cards.append(f'<div class="card">{"<br>".join(lines) or "E[φ]: not evaluated"}</div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _before_after(run: Run, keys: list[str]) -> str:
    rows = [["", "before", "ESS", "after", "ESS"]]
    for key in keys:
        estimates = [run.before.get(key, UNKNOWN), run.after.get(key, UNKNOWN)]
        sizes = [f"{estimate.ess:,.0f}" if math.isfinite(estimate.ess) else "–" for estimate in estimates]
        rows.append([label_of(key), str(estimates[0]), sizes[0], str(estimates[1]), sizes[1]])
    return _html_table(rows)


def _html_table(rows: Iterable[Sequence[str]]) -> str:
    """The first row is the header; value and error have cells of their own, so that both line up."""
    head, *body = rows
    first, *others = (escape(cell.replace("-", "‑")) for cell in head)  # Self-BLEU-5 must not be broken
    lines = [f"<th>{first}</th>{''.join(f'<th colspan=2>{cell}</th>' for cell in others)}"]
    lines += [f"<td>{escape(label)}</td>{''.join(map(_html_cell, cells))}" for label, *cells in body]
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>{table}</table></div>' if body and len(head) > 1 else ""


def _html_cell(cell: str) -> str:
    value, _, error = escape(re.sub(r"-(?=[\d∞])", "−", cell.lstrip("*"))).partition(" ± ")
    best = ' class="best"' if cell.startswith("*") else ""
    if not is_number(cell):
        return f"<td colspan=2>{value}</td>"
    return f"<td{best}>{value}</td><td class=error>{'± ' + error if error else ''}</td>"


def _time_bar(metrics: list[Json]) -> str:
    """Mean seconds of each phase, to scale."""
    phases: dict[str, float] = {}
    for row in metrics:
        for key in row:
            seconds = number(row, key) if key.startswith("time/") else math.nan
            if math.isfinite(seconds) and key != "time/tokens_per_second":
                phases[key[5:]] = phases.get(key[5:], 0.0) + seconds / len(metrics)
    whole, known = phases.pop("round", 0.0), sum(phases.values())
    if whole > 1.01 * known:
        phases["other"] = whole - known
    if not phases or not (total := sum(phases.values())) > 0:
        return ""
    colours = coloured(phases)
    bar = "".join(f'<span style="flex:{phases[x] / total:.4f};background:{c}"></span>' for x, c in colours.items())
    names = legend({f"{x} {phases[x]:.2g} s ({phases[x] / total:.0%})": c for x, c in colours.items()})
    return f'<p>{total:.3g} s a round on average</p><div class="bar">{bar}</div><p>{names}</p>'


def _samples(samples: list[Json]) -> str:
    """The earliest and the latest completions of the same prompts, side by side."""
    by_prompt: dict[str, dict[int, list[Json]]] = {}
    for sample in samples:
        by_round = by_prompt.setdefault(sample.get("prompt", ""), {})
        by_round.setdefault(sample.get("round", 0), []).append(sample)
    pairs: list[tuple[Json | None, Json]] = []
    for by_round in sorted(by_prompt.values(), key=lambda by_round: min(by_round) - max(by_round)):
        if len(by_round) > 1:
            pairs += zip(by_round[min(by_round)], by_round[max(by_round)], strict=False)
    # where no prompt came up twice: the latest there are
    pairs = pairs or [(None, sample) for sample in samples[-MAX_SAMPLES:]]
    return "".join(f'<div class="pair">{_sample(a)}{_sample(b)}</div>' for a, b in pairs[:MAX_SAMPLES])


def _sample(sample: Json | None) -> str:
    if sample is None:
        return "<div class=soft>–</div>"
    values = {name: number(sample["features"], name) for name in sample.get("features") or {}}
    facts = [f"round {sample.get('round', '?')}"]
    facts += [f"{name} {f'{v:.3g}' if math.isfinite(v) else Estimate(v)}" for name, v in values.items()]
    facts += [f"log P {Estimate(number(sample, 'log_score'))}"]
    facts += ["cut off"] if sample.get("finished") is False else []
    prompt, completion = escape(sample.get("prompt", "")), escape(sample.get("completion", ""))
    # the spans keep HTML from eating a newline that comes first
    text = f"<pre><span class=soft>{prompt}</span><span>{completion}</span></pre>"
    return f"<div><small class=soft>{escape(' · '.join(facts))}</small>{text}</div>"


def _run_curves(run: Run) -> list[str]:
    keys = dict.fromkeys(key for row in run.metrics for key in row)
    trained = [key[7:-3] for key in keys if key.startswith("target/") and key.endswith("_se")]
    colours = coloured([key.removeprefix("feature/") for key in feature_keys([run])] + trained)
    title = "E[φ]" if len(colours) > 1 else f"E[{''.join(colours)}]"
    features = curve(title, [(run, f"target/{x}", c) for x, c in colours.items()], colours)
    return [features, *(curve(label, [(run, key, PALETTE[0])]) for key, label in CURVES.items())]


def _grid(figures: list[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>' if any(figures) else ""


def _section(title: str, content: str, note: str = "") -> str:
    note = f"<p><small>{note}</small></p>" if note and content else ""
    return f"<h2>{title}</h2>{content or '<p>Nothing recorded.</p>'}{note}"


def _write_page(path: Path, title: str, body: list[str]) -> Path:
    """`title` and `body` are HTML already."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    page = f'<!doctype html><html lang="en">{head}<title>{title}</title><style>{CSS}</style><h1>{title}</h1>\n'
    return write_whole(path, page + "\n".join(body) + "\n</html>\n")
