"""Run the suites and keep their raw numbers in one JSON file.

python benchmarks/run.py --output benchmarks/results/NAME.json [pytest options, e.g. -k tiny]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

FOLDER = Path(__file__).resolve().parent


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=FOLDER, capture_output=True, text=True).stdout
    return {
        "chip": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit.strip(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_", "MKL_", "ONEDNN_"))},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average_before": os.getloadavg(),
    }


def compact(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of pytest-benchmark's records what a reader needs, seconds; `seconds` holds every single round."""
    return [
        {
            "group": record["group"],
            "name": record["name"],
            "median": record["stats"]["median"],
            "seconds": record["stats"]["data"],
            **record["extra_info"],
        }
        for record in benchmarks
    ]


def table(results: list[dict[str, Any]]) -> str:
    lines, group = [], None
    for record in sorted(results, key=lambda record: record["group"]):
        if record["group"] != group:
            group = record["group"]
            lines.append(group)
        notes = {key: value for key, value in record.items() if key.endswith("bytes") or key == "max_error"}
        lines.append(f"  {record['median'] * 1e3:>12,.1f} ms  {record['name']}  {notes or ''}".rstrip())
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments, pytest_options = parser.parse_known_args()
    found = machine()
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "benchmark.json"
        # the comparison of our medians with the targets is printed by conftest.py, the rest by `table`
        command = ["-m", "pytest", str(FOLDER), "-q", "--benchmark-quiet", "--benchmark-columns=median"]
        command += [f"--benchmark-json={raw}", "--benchmark-save-data", *pytest_options]
        status = subprocess.run([sys.executable, *command], cwd=FOLDER.parent).returncode
        if not raw.exists() or not raw.stat().st_size:
            return status or 1
        results = compact(json.loads(raw.read_text())["benchmarks"])
    found["load_average_after"] = os.getloadavg()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": found, "results": results}, indent=1) + "\n")
    print(table(results))
    return status


if __name__ == "__main__":
    sys.exit(main())
