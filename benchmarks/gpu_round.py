"""Whole rounds on one NVIDIA GPU with each engine, and what they are made of: tokens/s, syncs, gaps, memory.

python -m benchmarks.gpu_round --out DIR                        from the repository root; at most 8 minutes
python -m benchmarks.gpu_round --out DIR --smoke --device cpu   a tiny model: does it run?

Every engine has a process of its own, since vLLM gives its memory back only at the end of one; what fails there is
recorded, and the others go on. Engines are checked before they are timed. Writes DIR/round-<chip>-<date>.json (every
single repeat) and a Markdown table after each engine, and a figure at the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))  # last: an installed fdpg_kernels comes first

import torch

from benchmarks import gpu_report, gpu_round_report
from benchmarks.gpu_options import make_parser, result_path, why_not, write
from benchmarks.gpu_round_cases import CASES, SMOKE_CASES, VARIANTS, Case, Variant, make_model
from benchmarks.gpu_round_variant import Job, Record, run

SECONDS_PER_VARIANT = 180  # after that it hangs: vLLM takes one to two minutes for a model that it never compiled
SHORTEST = 30  # seconds in which a variant may come to something
PROCESSES = multiprocessing.get_context("forkserver")
# on a CPU a server imports these once, and all are forks of it; a fork of what has touched CUDA would be useless
CPU_PRELOAD = [
    "benchmarks.gpu_round_variant",
    "transformers.models.llama.modeling_llama",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
]


def measure(job: Job, seconds: float) -> Record:
    """The variant's record, from a process of its own that has so many seconds."""
    process = PROCESSES.Process(target=run, args=(job,))
    process.start()
    # everything on the device, seen from outside: PyTorch's peak misses what vLLM's sleeping pool holds, and a process
    # that asks while it captures CUDA graphs may spoil them
    peak, deadline = 0, time.monotonic() + seconds
    while process.exitcode is None and time.monotonic() < deadline:
        process.join(0.05)
        if job.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            peak = max(peak, total - free)
    hung = process.exitcode is None
    if hung:
        process.kill()
        process.join()
    record: Record = {"variant": job.variant.name, "status": "failed", "reason": "it never started"}
    if job.result.exists():
        record = json.loads(job.result.read_text())
    if peak:
        record["peak_device_bytes"] = peak
    log = job.log.read_text(errors="replace").strip().splitlines() if job.log.exists() else []
    log = [re.sub(r'(?<=File ")/.*/(?=[^/]+/[^/]+")', "", line) for line in log]  # two names say enough of a path
    if hung:
        record.update(status="failed", reason=f"stopped after {seconds:.0f} s")
    elif process.exitcode != 0:
        record.update(status="failed", reason=f"ended with {process.exitcode}: {log[-1] if log else 'nothing said'}")
    if record["status"] != "ok":
        record["log"] = log[-30:]
        print("\n".join(f"    {line}" for line in record["log"]), flush=True)
    return record


def attempt(case: Case, variant: Variant, scratch: Path, options: argparse.Namespace, left: float) -> Record:
    """The record of a variant, also of one that this machine cannot run or has no time for."""
    skipped: Record = {"variant": variant.name, "status": "skipped"}
    if variant.needs is not None and importlib.util.find_spec(variant.needs) is None:
        return skipped | {"reason": f"{variant.needs} is not installed"}
    if left < SHORTEST:
        return skipped | {"reason": f"would not fit into --minutes {options.minutes:g}"}
    began = time.monotonic()
    try:
        model = make_model(case, scratch / case.name, options.device)
    except (OSError, RuntimeError) as error:
        return skipped | {"status": "failed", "reason": f"making the model: {type(error).__name__}: {error}"[:500]}
    folder = scratch / f"{case.name}, {variant.name}"
    folder.mkdir()
    job = Job(case, variant, model, folder, options.device, options.repeats)
    random_weights = Path(model).is_relative_to(scratch)
    limit = min(left - (time.monotonic() - began), SECONDS_PER_VARIANT)
    return {"random_weights": random_weights, **measure(job, limit), "seconds": time.monotonic() - began}


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.gpu_round", str(__doc__), minutes=7.5, repeats=3)
    options, started = parser.parse_args(argv), time.monotonic()
    if reason := why_not(options):
        print(reason, file=sys.stderr)
        return 2

    cases = SMOKE_CASES if options.smoke else CASES
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when it is imported
    if options.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # for the server: a fork must not inherit a thread pool
    PROCESSES.set_forkserver_preload(CPU_PRELOAD if options.device == "cpu" else [])
    result: dict[str, Any] = {"machine": gpu_report.machine(torch.device(options.device)) | {"vllm": None}}
    result |= {"smoke": options.smoke, "cases": [{**asdict(case), "results": []} for case in cases]}
    path = result_path(options.out, result["machine"], prefix="round-")
    with tempfile.TemporaryDirectory() as scratch:
        for variant, (case, entry) in itertools.product(VARIANTS, zip(cases, result["cases"], strict=True)):
            print(f"{case.name}: {variant.name}", flush=True)
            left = 60 * options.minutes - (time.monotonic() - started)
            record = attempt(case, variant, Path(scratch), options, left)
            gpu_round_report.summarise(record)
            print(f"    {gpu_round_report.line(record)}", flush=True)
            entry["results"].append(record)
            result["machine"]["vllm"] = result["machine"]["vllm"] or record.get("vllm")
            write(result, gpu_round_report.markdown(result), path)
    print(gpu_round_report.plot(result, path.with_suffix(".png")))
    print(f"wrote {path} and {path.with_suffix('.md').name} in {time.monotonic() - started:.0f} s")
    return int(any(r["status"] in ("failed", "wrong") for case in result["cases"] for r in case["results"]))


if __name__ == "__main__":
    sys.exit(main())
