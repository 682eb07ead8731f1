"""Our ops on one NVIDIA GPU: is every path right, where does the time go, and how do others do on the same shapes?

python -m benchmarks.gpu --out DIR --minutes 10   from the repository root
python -m benchmarks.gpu --out DIR --smoke        tiny shapes, the only ones that --device cpu runs

Everything runs in processes of its own; one that hangs or dies costs what it was measuring. Each measurement is a line
of DIR/<chip>-<date>.jsonl as soon as it is made. One JSON, Markdown tables and a figure are made of the lines, after
every process and, where the run was killed, by `python -m benchmarks.gpu_report FILE.jsonl`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))  # last: an installed fdpg_kernels comes first
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # methods of very different sizes take turns

import torch

from benchmarks import gpu_report
from benchmarks.gpu_machine import Samples, machine
from benchmarks.gpu_options import make_parser, result_path, why_not
from benchmarks.gpu_process import PROCESSES, Lines, attend

REPORT_SECONDS = 5
PRELOAD = ["torch", "triton", "benchmarks.gpu_plan"]  # by a server without a device: children are its forks


def main(argv: list[str] | None = None, change: Callable[[list], list] = lambda plan: plan) -> int:
    parser = make_parser("benchmarks.gpu", str(__doc__), minutes=8, repeats=10)
    parser.add_argument("--without", action="append", default=[], metavar="METHOD", help="leave this one out")
    options, started = parser.parse_args(argv), time.monotonic()
    if reason := why_not(options):
        print(reason, file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"  # for the server: a fork must not inherit a thread pool
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from benchmarks.gpu_plan import make_plan

    PROCESSES.set_forkserver_preload(PRELOAD)
    found = machine(torch.device(options.device))
    path = result_path(options.out, found).with_suffix(".jsonl")
    lines = Lines(path)
    lines.add("machine", **found, minutes=options.minutes, smoke=options.smoke)
    end = started + 60 * options.minutes - REPORT_SECONDS
    with Samples(lines, found.get("uuid", "0")):
        for phase in change(make_plan(options, found.get("capability", 0))):
            deadline = started + 60 * options.minutes * phase.share
            print(f"{time.monotonic() - started:.0f} s: {phase.name}", flush=True)
            for _ in attend(lines, phase.jobs, parallel=phase.parallel, deadline=deadline, end=end):
                gpu_report.write(path)
    result = gpu_report.write(path, figure=True)
    print("\n".join(gpu_report.summary(result)))
    print(f"wrote {path} and what was made of it in {time.monotonic() - started:.0f} s")
    return int(any(step["status"] in gpu_report.BAD for step in result["steps"] if step["ours"]))


if __name__ == "__main__":
    sys.exit(main())
