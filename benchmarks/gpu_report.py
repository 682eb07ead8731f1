"""The GPU benchmark's results as files: raw JSON, a Markdown table and a figure; and what machine they come from."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import MODES

ROOT = Path(__file__).resolve().parents[1]
PEER_PACKAGES = ("liger-kernel", "cut-cross-entropy", "trl", "quack-kernels", "nvidia-cutlass-dsl", "transformers")
COLUMNS = (
    "ms", "TFLOP/s", "% of GEMM ceiling", "× bare GEMMs", "extra MiB",
    "log-prob error", "hidden-gradient error", "weight-gradient error",
)  # fmt: skip
EXPLANATION = """\
Medians. TFLOP/s count useful work only: 2NDV forward, 6NDV with the head trained, 4NDV with it frozen. Extra MiB:
peak memory beyond the inputs, gradients included. Errors against float64: the largest of any log-prob, in nats;
relative of both gradients, on sampled rows. A method beyond a limit gets no time, nor does an op of ours whose error
is more than twice that of PyTorch eager. A loss composed of log-probs and plain PyTorch has no limit of its own: its
gradient error shows what rounded log-probs do to the weights of sequences.
"""
TALLEST = 6.0  # times the bare products; taller bars are cut and carry their number


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on besides the code."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def output(*command: str) -> str | None:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    found: dict[str, Any] = {"chip": f"cpu {platform.machine()}", "nvidia_smi": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
        query = output("nvidia-smi", "-i", f"GPU-{properties.uuid}", f"--query-gpu={fields}", "--format=csv,noheader")
        found = {
            "chip": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "nvidia_smi": query and dict(zip(fields.split(","), query.split(", "), strict=True)),
        }
    return found | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "peers": {package: version(package) for package in PEER_PACKAGES},
        "python": platform.python_version(),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def summarise(records: list[dict[str, Any]], ndv: float, gemm_ceiling: float) -> None:
    """Median, rate of the useful work, and how far from the bare products: added to each timed record."""
    floor = statistics.median(records[0]["seconds"]) if records[0]["seconds"] else None
    for record in records:
        if record["status"] != "ok":
            record["seconds"] = []  # half a measurement is none
            continue
        record["median"] = statistics.median(record["seconds"])
        record["tflops"] = 1e-12 * MODES[record["mode"]] * ndv / record["median"]
        record["percent_of_gemm_ceiling"] = 100 * record["tflops"] / gemm_ceiling
        record["ratio_to_gemms"] = None if floor is None else record["median"] / floor


def line(record: dict[str, Any]) -> str:
    """One result, for the terminal."""
    name = f"{record['method']:<28}"
    if record["status"] != "ok":
        return f"{name} {record['status'].upper()}: {record['reason']}"
    ms, tflops, percent, ratio, memory = _cells(record)[:5]
    return f"{name} {ms:>9} ms {tflops:>6} TFLOP/s {percent:>5} % {ratio:>6} x GEMMs {memory:>8} MiB"


def _cells(record: dict[str, Any]) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    memory, found = record.get("extra_bytes"), record.get("errors", {})
    return [
        number(1e3 * record["median"], ".3f" if record["median"] < 0.01 else ".1f"),
        number(record["tflops"], ".0f"),
        number(record["percent_of_gemm_ceiling"], ".0f"),
        number(record["ratio_to_gemms"], ".2f"),
        number(None if memory is None else memory / 2**20, ".0f"),
        *(number(found.get(key), ".1e") for key in ("logprob", "hidden_grad", "weight_grad")),
    ]


def _title(case: dict[str, Any]) -> str:
    return f"{case['name']}: N={case['tokens']:,} D={case['width']:,} V={case['vocabulary']:,}"


def markdown(result: dict[str, Any]) -> Iterator[str]:
    """The tables, line by line."""
    found, ceilings = result["machine"], result["ceilings"]
    yield f"# {found['chip']}, {found['date'][:10]}\n"
    yield f"torch {found['torch']}, triton {found['triton']}, CUDA {found['cuda']}, commit {found['commit']}. Measured"
    yield f"ceilings: bfloat16 GEMM {ceilings['gemm_tflops']:.0f} TFLOP/s (large square),"
    yield f"copy {ceilings['copy_gbytes_per_s']:.0f} GB/s (read + written).\n"
    yield EXPLANATION
    yield f"Limits: {', '.join(f'{key} {limit:g}' for key, limit in result['limits'].items())}.\n"
    for record in result["skipped"]:
        yield f"- **{record['method']} skipped**: {record['reason']}"
    for shape in result["left_out"]:
        yield f"- **{_title(shape)} left out**: {shape['reason']}"
    for case in result["cases"]:
        yield f"\n## {_title(case)}"
        rates = case["gemm_tflops"] or {}
        yield "\nGEMMs alone, TFLOP/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        for mode in dict.fromkeys(record["mode"] for record in case["results"]):
            yield f"\n### {mode}\n"
            yield f"| method | {' | '.join(COLUMNS)} |"
            yield "|---" * (1 + len(COLUMNS)) + "|"
            for record in (record for record in case["results"] if record["mode"] == mode):
                if record["status"] == "ok":
                    yield f"| {record['method']} | {' | '.join(_cells(record))} |"
                else:
                    reason = str(record["reason"]).replace("|", "/")
                    yield f"| {record['method']} | **{record['status'].upper()}** {reason}" + " |" * len(COLUMNS)


def plot(result: dict[str, Any], path: Path) -> str:
    """Grouped bars, one panel a mode: time over that of the bare products. Returns what to tell the user."""
    try:
        import matplotlib
    except ImportError:
        return "PNG SKIPPED: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = result["cases"]
    modes = list(dict.fromkeys(record["mode"] for case in cases for record in case["results"]))
    methods = list(dict.fromkeys(record["method"] for case in cases for record in case["results"]))[1:]  # bare: 1
    if not methods:
        return "PNG SKIPPED: nothing was measured"
    figure, panels = pyplot.subplots(len(modes), figsize=(4 + 2 * len(cases), 3 * len(modes)), squeeze=False)
    width, colors = 0.85 / len(methods), pyplot.get_cmap("tab20").colors
    for mode, panel in zip(modes, panels[:, 0], strict=True):
        for index, name in enumerate(methods):
            places, heights = [], []
            for place, case in enumerate(cases):
                for record in case["results"]:
                    if (record["mode"], record["method"]) == (mode, name):
                        places.append(place + (index - (len(methods) - 1) / 2) * width)
                        heights.append(record.get("ratio_to_gemms") or 0.0)
                        note = "" if record["status"] == "ok" else record["status"]
                        note = f"{heights[-1]:.1f}" if heights[-1] > TALLEST else note
                        panel.text(places[-1], 0.1, note, rotation=90, ha="center", va="bottom", fontsize=6)
            color = colors[index % len(colors)]
            panel.bar(places, [min(height, TALLEST) for height in heights], width, label=name, color=color)
        panel.axhline(1, color="black", linewidth=0.6)
        panel.set(ylabel="× bare GEMMs", title=mode, xticks=range(len(cases)), xticklabels=[_title(c) for c in cases])
        panel.tick_params(axis="x", labelsize=6)
    panels[-1, 0].legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.suptitle(f"{result['machine']['chip']}, {result['machine']['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return f"wrote {path}"
