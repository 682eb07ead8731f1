"""Finished runs side by side: measured alike, then shown as a table for the terminal and as a page.

The Z that a run's own evaluation takes from its own sample differs from run to run and biases divergences (see
`estimators.divergence_matrix`). In a comparison every run of one base and one target is held against one Z, from one
large sample of the base.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..config.schema import TrainConfig
from ..contexts import load_contexts
from ..errors import UserError
from ..features import check_columns
from ..measure.estimators import Estimate
from ..measure.evaluate import Evaluation
from ..progress import activity
from ..rollouts import Rollouts
from ..runs.finished import evaluate_checkpoint, read_finished
from ..runs.folder import Run, read_run
from ..runs.plots import Drawing, coloured, curve, draw_by_k, drawing, new_axes
from ..runs.report import CURVES, write_page
from ..runs.tables import BY_K, UNKNOWN, is_of_feature, label_of, metric_keys, text_of, text_table
from ..runs.tensors import keep
from ..session import Session
from .pictures import draw_point

log = logging.getLogger(__name__)

COMPARED = (
    *("kl_to_base", "kl_of_target_to_base", "entropy_per_token", "distinct_1", "distinct_2", "distinct_3"),
    *("self_bleu_5", "perplexity_under_base"),
)
NO_DIVERGENCE = ("target_samples/kl_of_target_to_base", "target_samples/contexts_left_out")
NO_BETTER_SIDE = ("kl_of_target_to_base", "perplexity_under_base")


def read_runs(run_dirs: Sequence[str | Path]) -> list[Run]:
    """What several runs have written; raises UserError as `read_run`, or where no run is given."""
    if not run_dirs:
        raise UserError("compare: no run given; name at least one run folder")
    return [read_run(run_dir) for run_dir in run_dirs]


def measure_runs(run_dirs: Sequence[str | Path], samples: int, base_samples: int, seed: int) -> list[Evaluation]:
    """Evaluate the newest checkpoint of each run on the evaluation contexts of the first.

    Args:
        samples: completions a context from each policy.
        base_samples: completions a context from the base, kept in the first run's folder.

    Raises:
        UserError: a run has no checkpoint, or completions of another length than the first.
    """
    configs = [read_finished(run_dir) for run_dir in run_dirs]
    first = configs[0]
    for config in configs:
        if config.engine.max_new_tokens != first.engine.max_new_tokens:
            raise UserError(
                f"compare: completions of {config.run_dir!r} end after {config.engine.max_new_tokens} tokens and those "
                f"of {first.run_dir!r} after {first.engine.max_new_tokens}: distributions over different texts"
            )
    evaluations = []
    for number, config in enumerate(configs, start=1):
        log.info("measuring %d/%d: %s", number, len(configs), config.run_dir)
        evaluations.append(measure(config, samples, base_samples, seed, Path(first.run_dir), first))
    return evaluations


def measure(
    config: TrainConfig, samples: int, base_samples: int, seed: int, folder: Path, like: TrainConfig | None = None
) -> Evaluation:
    """Evaluate a run's newest checkpoint; the base's sample comes from `folder`, or is drawn and kept there.

    The evaluation contexts are those of another run, `like`, if there is one.
    """
    session = Session(config, resume=True)
    if session.state.base is not None:  # it is in the checkpoint
        session.restore()
    if like is not None:
        prompting = replace(session.prompting, settings=like.contexts)
        source = like.contexts.to_evaluate_on or like.contexts.to_train_on
        contexts = load_contexts(source, prompting)[: like.evaluation.contexts]
        for model in (session.base, session.state.learner.policy):
            model.refuse_lengths(contexts, config.engine.max_new_tokens)
        check_columns(session.scorer.target.features, contexts, f"what {like.run_dir} is evaluated on")
        session.eval_contexts = contexts
    return evaluate_checkpoint(session, samples, seed, frozen_base_sample(session, base_samples, seed, folder))


def frozen_base_sample(session: Session, samples: int, seed: int, folder: Path) -> Rollouts:
    """The sample of a run's base for its evaluation contexts; drawn once for all runs that share both."""
    config, contexts, moving = session.config, tuple(session.eval_contexts), session.state.base
    source = config.base.model or config.model
    if moving is not None and moving.version:
        source = f"{config.run_dir} before round {moving.version}"
    same = [source, config.dtype, [c.token_ids for c in contexts], config.engine.max_new_tokens, samples, seed]
    key = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:12]
    path = folder / f"base-sample-{key}.safetensors"
    with contextlib.suppress(FileNotFoundError, SafetensorError, TypeError):  # a damaged one is drawn again
        return Rollouts(contexts=contexts, **load_file(path))
    what = f"drawing {samples} completions of the base for each of {len(contexts)} contexts, for Z"
    with (
        session.base.as_base() as base,
        activity(what, samples * len(contexts)),
        contextlib.closing(session.start_engine(base, 0)) as engine,
    ):
        rollouts = engine.sample(contexts, samples, seed)
    keep(path, rollouts.tensors())
    return rollouts


def compare_table(runs: Sequence[Run]) -> str:
    """Runs as columns, as many side by side as there is room for; * marks the best of a row, ? what to doubt."""
    header, quality, divergences = _comparison_rows(runs)
    return text_table([header, *quality, ["divergence to target"] + [""] * len(runs), *divergences])


def write_comparison(runs: Sequence[Run], path: str | Path) -> Path:
    """Make a page with the trade-offs and learning curves of several runs and the tables of `compare_table`."""
    header, quality, divergences = _comparison_rows(runs)
    trained, features = quality[0][1:], metric_keys(runs, "feature/")
    names = trained if len(set(trained)) > 1 else header[1:]  # what tells the runs apart
    colours = coloured(names)
    named = list(zip(names, runs, strict=True))
    ends = [(name, colours[name], run.after) for name, run in named]
    titles = {f"target/{key.removeprefix('feature/')}": label_of(key) for key in features}
    titles |= {key: CURVES[key] for key in ("policy/kl_to_base", "policy/entropy_per_token")}
    return write_page(
        Path(path),
        "experiments/comparison.html.j2",
        runs=runs,
        colours=colours,
        trade_offs=[_scatter(ends, x, y) for y in features for x in ("entropy_per_token", "kl_to_base")],
        by_k=draw_by_k([(metrics, colour) for _, colour, metrics in ends]),
        curves=[curve(titles[key], [(run.metrics, key, colours[name]) for name, run in named]) for key in titles],
        quality=list(zip(header, *quality, strict=True)),
        divergences=list(zip(header, *divergences, strict=True)),
    )


def _comparison_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Header; rows of what the runs are and do; rows of how far they end from their target."""
    header = ["", *(run.path.resolve().name[-20:] for run in runs)]
    trained = [str(run.config.get("divergence", "?")) for run in runs]
    seeds = [str((run.config.get("trainer") or {}).get("seed", "?")) for run in runs]
    quality = [_ranked_row(runs, key) for key in [*metric_keys(runs, ("feature/", *BY_K)), *COMPARED]]
    measured = [key for prefix in ("target_samples/", "divergence/") for key in metric_keys(runs, prefix)]
    divergences = [_ranked_row(runs, key) for key in measured if key not in NO_DIVERGENCE]
    return header, [["trained", *trained], ["seed", *seeds], *quality], divergences


def _ranked_row(runs: Sequence[Run], key: str) -> list[str]:
    """A row with * before its best value, where there is a better side: a prescribed mean has none."""
    sign = 1 if key.startswith(("feature/", *BY_K, "entropy", "distinct")) else -1
    estimates = [run.after.get(key, UNKNOWN) for run in runs]
    values = [sign * estimate.value for estimate in estimates if math.isfinite(estimate.value)]
    prescribed = is_of_feature(key) and any("moments" in str(run.config.get("target")) for run in runs)
    best = sign * max(values) if len(values) > 1 and not prescribed and key not in NO_BETTER_SIDE else None
    return [label_of(key), *("*" * (e.value == best) + text_of(e, key) for e in estimates)]


def _scatter(ends: Iterable[tuple[str, str, dict[str, Estimate]]], x_key: str, y_key: str) -> Drawing | None:
    """Where runs of some name and colour end, with error bars; runs of one name share their label."""
    axes = new_axes(label_of(x_key))
    labels: dict[tuple[str, str], tuple[float, float]] = {}
    for name, colour, estimates in ends:
        x, y = (estimates.get(key, UNKNOWN) for key in (x_key, y_key))
        if draw_point(axes, (x.value, 1.96 * x.standard_error), (y.value, 1.96 * y.standard_error), colour):
            point = (x.value, y.value)
            labels[name, colour] = max(labels.get((name, colour), point), point)  # at the rightmost
    axes.margins(x=0.2, y=0.15)
    style = {"textcoords": "offset points", "fontsize": 8, "parse_math": False}
    lowest = -math.inf
    for (name, colour), point in sorted(labels.items(), key=lambda item: item[1][1]):
        height = axes.transData.transform(point)[1] * 72 / axes.figure.dpi  # in points
        lowest = max(height + 6, lowest + 10)  # labels of neighbours are stacked
        axes.annotate(name, point, (6, lowest - height), color=colour, **style)
    return drawing(f"{label_of(y_key)} against {label_of(x_key)}", axes) if labels else None
