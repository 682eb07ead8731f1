"""What the lines of a run of gpu.py say: one JSON of all steps, tables, a figure.

python -m benchmarks.gpu_report FILE.jsonl    also where the run was killed
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import gpu_figure, gpu_tables
from benchmarks.gpu_options import write as write_files

Record = dict[str, Any]
BAD = ("wrong", "failed", "died", "hung", "out of memory")


def merge(path: Path) -> Record:
    """The run: its machine, every step with all that was found about it, and the samples of clocks and heat."""
    machine: Record = {}
    steps: dict[tuple[str, str], Record] = {}
    samples: list[Record] = []
    for text in path.read_bytes().splitlines():
        try:
            found = json.loads(text)
        except ValueError:
            continue  # the machine went down while it was written
        event, when = found.pop("event"), found.pop("time")
        if event == "machine":
            machine = found
        elif event == "sample":
            samples.append({"time": when, **found})
        else:
            step = steps.setdefault((found["phase"], found["step"]), {"began": when, "status": "unfinished"})
            step |= {**found, "ended": when}
    for step in steps.values():
        derive(step, machine, samples)
    return {"machine": machine, "steps": list(steps.values()), "samples": samples}


def derive(step: Record, machine: Record, samples: list[Record]) -> None:
    """Add medians and rates of what was timed, and the state of the chip meanwhile."""
    if step.get("seconds"):
        step["median"] = median = statistics.median(step["seconds"])
        if "flops" in step:
            step["tflops"] = 1e-12 * step["flops"] / median
            if machine.get("peak_tflops"):
                step["of_peak"] = step["tflops"] / machine["peak_tflops"]
        if "tokens" in step:
            step["tokens_per_second"] = step["tokens"] / median
        if step.get("bare_seconds"):
            step["over_bare"] = median / statistics.median(step["bare_seconds"])
    during = [sample for sample in samples if step["began"] <= sample["time"] <= step["ended"]]
    for name, pick in (("sm_mhz", statistics.median), ("watts", max), ("celsius", max)):
        if values := [sample[name] for sample in during if isinstance(sample.get(name), float)]:
            step[name] = pick(values)


def summary(result: Record) -> Iterator[str]:
    """What went how, and everything of ours that is not well."""
    for phase in dict.fromkeys(step["phase"] for step in result["steps"]):
        counts = Counter(step["status"] for step in result["steps"] if step["phase"] == phase)
        yield f"{phase}: {', '.join(f'{count} {status}' for status, count in counts.items())}"
    for step in result["steps"]:
        if step["ours"] and step["status"] in BAD:
            yield f"{step['status'].upper()} {step['phase']}, {step['step']}: {step['reason']}"
    for step in result["steps"]:
        if step["phase"] == "shapes" and "over_bare" in step and step["ours"]:
            yield f"{step['step']}: {1e3 * step['median']:.2f} ms, {step['over_bare']:.2f} × bare products"


def write(path: Path, figure: bool = False) -> Record:
    """JSON and tables beside the lines, and the figure if it is wanted."""
    result = merge(path)
    write_files(result, gpu_tables.markdown(result), path.with_suffix(".json"))
    if figure:
        print(gpu_figure.plot(result, path.with_suffix(".png")))
    return result


if __name__ == "__main__":
    print("\n".join(summary(write(Path(sys.argv[1]), figure=True))))
