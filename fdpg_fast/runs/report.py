"""A run to look at: a page that needs nothing but itself, from the template beside this file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader

from ..measure.diagnostics import complaints
from .best import early_end
from .folder import Json, Run, read_run, to_float, write_whole
from .plots import PALETTE, Drawing, coloured, curve, draw_by_k, finite
from .tables import DOUBT, MATRIX, UNKNOWN, is_number, label_of, metric_keys, of_target, text_of, with_error

CURVES = {
    "policy/kl_to_base": "KL to base (nats)",
    "policy/entropy_per_token": "entropy per token (nats)",
    "z/log_z": "log Z",
    "z/ess": "effective samples behind log Z",
    "target/ess": "effective samples of the round",
    "loss": "surrogate loss",
    "policy/updates": "updates of the round",
    "time/tokens_per_second": "tokens per second",
}
MAX_SAMPLES = 8


def write_report(run_dir: str | Path) -> Path:
    """Make RUN/report.html from whatever the run has written so far; raises UserError as `read_run`."""
    run = read_run(run_dir)
    keys, features = (metric_keys([run], prefix) for prefix in ("", "feature/"))
    divergences = [key for prefix in ("target_samples/", "divergence/") for key in metric_keys([run], prefix)]
    trained = [key[7:-3] for row in run.metrics for key in row if key.startswith("target/") and key.endswith("_se")]
    colours = coloured([key.removeprefix("feature/") for key in features] + trained)
    title = "E[φ]" if len(colours) > 1 else f"E[{''.join(colours)}]"
    curves = [curve(title, [(run.metrics, f"target/{name}", colour) for name, colour in colours.items()])]
    curves += [curve(label, [(run.metrics, key, PALETTE[0])]) for key, label in CURVES.items()]
    return write_page(
        run.path / "report.html",
        "runs/report.html.j2",
        run=run,
        complaints=complaints(run.metrics[-1] if run.metrics else {}).values(),
        cards=(features, ["kl_to_base"], ["distinct_2"]),
        of_target={key: own for key in (*features, "kl_to_base") if (own := of_target(run, key)) is not UNKNOWN},
        colours=colours,
        curves=curves,
        ends=(ends := coloured(["after", "before"])),
        by_k=draw_by_k([(run.before, ends["before"]), (run.after, ends["after"])]),
        evaluated=_evaluated(run, keys) if len(run.evaluations) > 2 else [],
        early_end=early_end(
            run.config.get("early_stop"), run.evaluations, (run.config.get("trainer") or {}).get("rounds", 0)
        ),
        others=[key for key in keys if key not in divergences],
        divergences=divergences,
        phases=_phases(run.metrics),
        samples=_side_by_side(run.samples),
        config=(run.path / "config.yaml").read_text(encoding="utf-8"),
    )


def write_page(path: Path, template: str, **content: Any) -> Path:
    """Make a page from a template of this package, whole or not at all."""
    return write_whole(path, render(template, **content) + "\n")


def render(template: str, *, escapes: bool = True, **content: Any) -> str:
    """A template of this package, filled in; what the config does not say is undefined. escapes: texts, for HTML."""
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": ChainableUndefined}
    pages = Environment(loader=PackageLoader("fdpg_fast", "."), autoescape=escapes, **options)
    pages.tests["numeric"] = is_number
    pages.globals |= {"unknown": UNKNOWN, "doubt": DOUBT}
    pages.filters |= {"coloured": coloured, "label": label_of, "text": text_of, "number": _number, "term": _term}
    return pages.get_template(template).render(content)


def _evaluated(run: Run, keys: list[str]) -> list[Drawing | None]:
    """A curve of each metric that is one of its evaluations' to watch: of features, to the base and to the target."""
    rows = [
        {"round": float(done)}
        | {key: estimate.value for key, estimate in metrics.items()}
        | {f"{key}_se": estimate.standard_error for key, estimate in metrics.items()}
        for done, metrics in sorted(run.evaluations.items())
    ]
    beside = ("feature_of_target/", "exponent/")
    shown = [key for key in keys if key == "kl_to_base" or ("/" in key and not key.startswith(beside))]
    few = (*MATRIX, f"divergence/{run.trained}")
    shown = [key for key in shown if key in few or not key.startswith("divergence/")]
    return [curve(label_of(key), [(rows, key, PALETTE[0])]) for key in shown]


def _number(value: float | str | None) -> str:
    return with_error(to_float(value), math.nan)


def _phases(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Mean seconds of each phase of a round, and of what no phase has."""
    keys = dict.fromkeys(k for row in metrics for k in row if k.startswith("time/") and not k.endswith("_per_second"))
    phases = {key[5:]: sum(finite(row.get(key, 0.0), 0.0) for row in metrics) / len(metrics) for key in keys}
    other = phases.pop("round", 0.0) - sum(phases.values())
    return phases | ({"other": other} if other > 0.01 * sum(phases.values()) else {})


def _side_by_side(samples: list[Json]) -> list[tuple[Json | None, Json]]:
    """The earliest and the latest completions of the same prompts; where no prompt came up twice, the latest."""
    by_prompt: dict[str, dict[int, list[Json]]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.get("prompt", ""), {}).setdefault(sample.get("round", 0), []).append(sample)
    pairs: list[tuple[Json | None, Json]] = []
    for by_round in sorted(by_prompt.values(), key=lambda by_round: min(by_round) - max(by_round)):
        if len(by_round) > 1:
            pairs += zip(by_round[min(by_round)], by_round[max(by_round)], strict=False)
    return (pairs or [(None, sample) for sample in samples[-MAX_SAMPLES:]])[:MAX_SAMPLES]


def _term(term: Json) -> str:
    """A factor of φ in words."""
    names = [_feature(feature) for feature in [term.get("feature"), *(term.get("features") or [])] if feature]
    if "beta" in term:
        return f"exp({', '.join(names)} / {term['beta']})"
    if "kappa" in term:
        return f"base^({term['kappa']} − 1)"
    if "moments" in term:
        return ", ".join(f"E[{name}] = {mean}" for name, mean in zip(names, term["moments"], strict=False))
    return ", ".join(names) or str(term.get("path") or term.get("kind"))


def _feature(feature: Json) -> str:
    details = [feature.get(key) for key in ("kind", "word", "pattern", "label", "path")]
    return feature.get("name") or ":".join(str(detail) for detail in details if detail)
