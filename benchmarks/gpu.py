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
from collections import deque
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))  # last: an installed fdpg_kernels comes first
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # methods of very different sizes take turns

import torch

from benchmarks import gpu_process, gpu_report
from benchmarks.gpu_machine import Samples, machine
from benchmarks.gpu_options import make_parser, result_path, why_not
from benchmarks.gpu_process import Lines, attend

REPORT_SECONDS = 5
# by a server whose forks the processes are
PRELOAD = ["torch._dynamo", "triton", "fdpg_kernels.triton.launch", "benchmarks.gpu_plan"]


def main(argv: list[str] | None = None, change: Callable[[list], list] = lambda plan: plan) -> int:
    parser = make_parser("benchmarks.gpu", str(__doc__), minutes=8, repeats=10)
    parser.add_argument("--without", action="append", default=[], metavar="METHOD", help="leave this one out")
    options, started = parser.parse_args(argv), time.monotonic()
    if reason := why_not(options):
        print(reason, file=sys.stderr)
        return 2
    # for the server: forks must inherit neither a thread pool nor a driver at work
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from benchmarks import gpu_plan

    gpu_process.PROCESSES.set_forkserver_preload(PRELOAD)
    found = machine(torch.device(options.device))
    path = result_path(options.out, found).with_suffix(".jsonl")
    lines = Lines(path)
    lines.add("machine", **found, minutes=options.minutes, smoke=options.smoke)
    end = started + 60 * options.minutes - REPORT_SECONDS
    with Samples(lines, found.get("uuid", "0")):
        phases = deque(change(gpu_plan.make_plan(options, found.get("capability", 0))))
        while phases:
            phase = phases.popleft()
            deadline = started + 60 * options.minutes * phase.share
            print(f"{time.monotonic() - started:.0f} s: {phase.name}", flush=True)
            for _ in attend(lines, phase.jobs, parallel=phase.parallel, deadline=deadline, end=end):
                result = gpu_report.write(path)
                last = result["steps"][-1]["status"] if result["steps"] else "not begun"
                if phase.name == "ceilings" and last in ("failed", "died", "hung"):
                    gpu_process.start_afresh()  # some import has touched the device after all
                    phases.appendleft(gpu_plan.afresh(phase))
    result = gpu_report.write(path, figure=True)
    print("\n".join(gpu_report.summary(result)))
    print(f"wrote {path} and what was made of it in {time.monotonic() - started:.0f} s")
    return int(any(step["status"] in gpu_report.BAD for step in result["steps"] if step["ours"]))


if __name__ == "__main__":
    sys.exit(main())
