"""gpu_round.py's results as files: raw JSON, a Markdown table and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engine_turns import PHASES
from benchmarks.gpu_round_variant import Record

BARE = ("bare vLLM", "bare vLLM, log-probs")
SAMPLING = ("tokens/s", *BARE, "of bare", "start, s", "sync, s", "GB/s", "sleep + sync, s", "gap, mean", "gap, max")
ROUND = (*PHASES, "rest", "whole", "tokens/s", "gap, mean", "peak device, GiB")
EXPLANATION = """\
Medians; seconds where nothing else is said. Tokens/s: of the engine with log-probs and packing, beside bare vLLM's
`LLM.generate` with the same weights and prompts, without and with log-probs. Start: of the engine, its first weights
included. Sync: handing the engine new weights; sleep + sync: giving its memory back, and taking it again with new
weights. Gap: |log q − log π| of a token in nats, while engine and learner should agree; perturbed weights were seen
to show, before and after a sync. Peak device: everything on the device, other processes too.
"""


def summarise(record: Record) -> None:
    """Add the medians of whatever the record got to."""
    medians: dict[str, Any] = {}
    if "sampling" in record:
        taken = record["sampling"]
        rates = {
            name: statistics.median(n / s for n, s in zip(taken["tokens"][name], seconds, strict=True))
            for name, seconds in taken["seconds"].items()
        }
        medians["tokens_per_second"] = {"engine" if name not in BARE else name: rate for name, rate in rates.items()}
    for kind in ("sync", "sleep_and_sync"):
        if kind in record:
            medians[f"{kind}_seconds"] = statistics.median(record[kind]["seconds"])
    if "sync" in record:
        medians["sync_bytes_per_second"] = record["sync"]["bytes"] / medians["sync_seconds"]
    if record.get("rounds"):
        for key in ("seconds", "gaps"):
            found = [row[key] for row in record["rounds"]]
            medians[f"round_{key}"] = {name: statistics.median(row[name] for row in found) for name in found[0]}
        medians["round_tokens_per_second"] = statistics.median(
            r["tokens"] / r["seconds"]["whole"] for r in record["rounds"]
        )
    record["medians"] = medians


def line(record: Record) -> str:
    """One result, for the terminal."""
    if record["status"] != "ok":
        return f"{record['status'].upper()}: {record['reason']}"
    medians = record["medians"]
    seconds = medians["round_seconds"]
    parts = ", ".join(f"{phase} {seconds[phase]:.3f}" for phase in PHASES)
    rate = medians["tokens_per_second"]["engine"]
    return (
        f"round {seconds['whole']:.3f} s ({parts}), {rate:,.0f} tokens/s sampled, sync {medians['sync_seconds']:.4f} s"
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _sampling_cells(record: Record) -> list[str]:
    medians, gaps = record["medians"], record.get("gaps", {})
    rates = medians.get("tokens_per_second", {})
    engine, bare = rates.get("engine"), rates.get(BARE[0])
    moved = medians.get("sync_bytes_per_second")
    agreeing = [gaps[key] for key in ("fresh", "synced") if key in gaps]
    return [
        *(_number(rates.get(name), ",.0f") for name in ("engine", *BARE)),
        _number(engine / bare if engine and bare else None, ".3f"),
        _number(record.get("start_seconds"), ".1f"),
        *(_number(medians.get("sync_seconds"), ".4f"), _number(moved and 1e-9 * moved, ".3g")),
        _number(medians.get("sleep_and_sync_seconds"), ".4f"),
        *(_number(max(agreeing, default=None), ".1e"), _number(gaps.get("max"), ".1e")),
    ]


def _round_cells(record: Record) -> list[str]:
    medians, peak = record["medians"], record.get("peak_device_bytes")
    seconds: dict[str, float] = medians.get("round_seconds", {})
    if seconds:
        seconds = {**seconds, "rest": seconds["whole"] - sum(seconds[phase] for phase in PHASES)}
    return [
        *(_number(seconds.get(phase), ".3f") for phase in (*PHASES, "rest", "whole")),
        _number(medians.get("round_tokens_per_second"), ",.0f"),
        _number(medians.get("round_gaps", {}).get("logprob_gap_mean"), ".1e"),
        _number(peak and peak / 2**30, ".1f"),
    ]


def markdown(result: dict[str, Any]) -> Iterator[str]:
    """The tables, line by line."""
    found = result["machine"]
    yield f"# Rounds on {found['chip']}, {found['date'][:10]}{', smoke' if result['smoke'] else ''}\n"
    yield f"torch {found['torch']}, CUDA {found['cuda']}, vLLM {found['vllm'] or 'none'}, commit {found['commit']}.\n"
    yield EXPLANATION
    for case in result["cases"]:
        measured = [record for record in case["results"] if record["medians"]]
        weights = "random" if any(record.get("random_weights") for record in case["results"]) else "real"
        size = f"{measured[0]['parameters'] / 1e6:,.0f} M parameters, {weights} weights, " if measured else ""
        work = f"{case['contexts']} × {case['samples']} samples of at most {case['max_new_tokens']} tokens"
        yield f"\n## {case['name']}\n\n{size}{case['dtype']}; {work}.\n"
        for record in case["results"]:
            if record["status"] != "ok":
                yield f"- **{record['variant']} {record['status'].upper()}**: {record['reason']}"
        for title, columns, cells in (
            ("Sampling and syncs", SAMPLING, _sampling_cells),
            ("Rounds", ROUND, _round_cells),
        ):
            yield f"\n### {title}\n\n| engine | {' | '.join(columns)} |"
            yield "|---" * (1 + len(columns)) + "|"
            for record in measured:
                yield f"| {record['variant']} | {' | '.join(cells(record))} |"


def plot(result: dict[str, Any], path: Path) -> str:
    """Each case a row: seconds of a round by phase, and tokens/s of sampling. Returns what to tell the user."""
    try:
        import matplotlib
    except ImportError:
        return "PNG SKIPPED: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in result["cases"] if any(record["medians"] for record in case["results"])]
    if not cases:
        return "PNG SKIPPED: nothing was measured"
    figure, panels = pyplot.subplots(len(cases), 2, figsize=(12, 0.6 + 2.4 * len(cases)), squeeze=False)
    for case, (left, right) in zip(cases, panels, strict=True):
        records = case["results"][::-1]  # bars are stacked from below
        starts = [0.0] * len(records)
        for phase in PHASES:
            widths = [record["medians"].get("round_seconds", {}).get(phase, 0.0) for record in records]
            left.barh(range(len(records)), widths, left=starts, label=phase)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        names = [r["variant"] + ("" if r["status"] == "ok" else f"\n({r['status']})") for r in records]
        left.set(title=f"{case['name']}: a round", xlabel="seconds", yticks=range(len(records)), yticklabels=names)
        for offset, name in enumerate(("engine", *BARE)):
            widths = [record["medians"].get("tokens_per_second", {}).get(name, 0.0) for record in records]
            right.barh([row + 0.25 * (1 - offset) for row in range(len(records))], widths, 0.25, label=name)
        right.set(title=f"{case['name']}: sampling", xlabel="tokens/s", yticks=[])
    for panel, columns in zip(panels[-1], (len(PHASES), 1 + len(BARE)), strict=True):
        panel.legend(fontsize=7, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.suptitle(f"{result['machine']['chip']}, {result['machine']['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return f"wrote {path}"
