"""Every engine of gpu_round.py on every model, each in a process of its own."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_round_report
from benchmarks.gpu_machine import machine
from benchmarks.gpu_options import result_path, write
from benchmarks.gpu_process import POLL, PROCESSES, Child
from benchmarks.gpu_round_cases import CASES, SMOKE_CASES, VARIANTS, Case, Variant, make_model
from benchmarks.gpu_round_variant import Job, Record, run

SECONDS_PER_VARIANT = 180  # after that it hangs: vLLM takes one to two minutes for a model that it never compiled
SHORTEST = 30  # seconds in which a variant may come to something
# on a CPU a server imports these once, and all are forks of it; a fork of what has touched CUDA would be useless
CPU_PRELOAD = [
    "benchmarks.gpu_round_variant",
    "transformers.models.llama.modeling_llama",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
]


def measure(job: Job, seconds: float, note: Callable[[Record], None]) -> Record:
    """The variant's record, from a process of its own that has so many seconds; noted whenever there is more of it."""
    child = Child(run, (job,), job.log)
    # everything on the device, seen from outside: PyTorch's peak misses what vLLM's sleeping pool holds, and a process
    # that asks while it captures CUDA graphs may spoil them
    peak, deadline = 0, time.monotonic() + seconds
    record: Record = {"variant": job.variant.name, "status": "failed", "reason": "it never started"}
    while not (ended := child.ended) and time.monotonic() < deadline:
        time.sleep(POLL)
        if job.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            peak = max(peak, total - free)
        if job.result.exists() and (found := json.loads(job.result.read_text())) != record:
            note(record := found)
    if not ended:
        child.kill()
    if job.result.exists():
        record = json.loads(job.result.read_text())
    if peak:
        record["peak_device_bytes"] = peak
    if not ended:
        record.update(status="failed", reason=f"stopped after {seconds:.0f} s")
    elif child.process.exitcode != 0:
        record.update(status="failed", reason=child.obituary)
    if record["status"] != "ok":
        # two names say enough of a path
        record["log"] = [re.sub(r'(?<=File ")/.*/(?=[^/]+/[^/]+")', "", line) for line in child.last_words(30)]
        print("\n".join(f"    {line}" for line in record["log"]), flush=True)
    return record


def attempt(
    case: Case,
    variant: Variant,
    scratch: Path,
    options: argparse.Namespace,
    left: float,
    note: Callable[[Record], None],
) -> Record:
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
    return {"random_weights": random_weights, **measure(job, limit, note), "seconds": time.monotonic() - began}


def run_all(options: argparse.Namespace) -> int:
    """The exit status of the command: 1 where an engine failed or was wrong."""
    started = time.monotonic()
    cases = SMOKE_CASES if options.smoke else CASES
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when it is imported
    if options.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # for the server: a fork must not inherit a thread pool
    PROCESSES.set_forkserver_preload(CPU_PRELOAD if options.device == "cpu" else [])
    result: dict[str, Any] = {"machine": machine(torch.device(options.device)) | {"vllm": None}}
    result |= {"smoke": options.smoke, "cases": [{**asdict(case), "results": []} for case in cases]}
    path = result_path(options.out, result["machine"], prefix="round-")
    with tempfile.TemporaryDirectory() as scratch:
        for variant, (case, entry) in itertools.product(VARIANTS, zip(cases, result["cases"], strict=True)):
            print(f"{case.name}: {variant.name}", flush=True)
            earlier = entry["results"]

            def note(record: Record, entry: dict[str, Any] = entry, earlier: list[Record] = earlier) -> None:
                gpu_round_report.summarise(record)
                entry["results"] = [*earlier, record]
                result["machine"]["vllm"] = result["machine"]["vllm"] or record.get("vllm")
                write(result, gpu_round_report.markdown(result), path)

            left = 60 * options.minutes - (time.monotonic() - started)
            record = attempt(case, variant, Path(scratch), options, left, note)
            note(record)
            print(f"    {gpu_round_report.line(record)}", flush=True)
    print(gpu_round_report.plot(result, path.with_suffix(".png")))
    print(f"wrote {path} and {path.with_suffix('.md').name} in {time.monotonic() - started:.0f} s")
    return int(any(r["status"] in ("failed", "wrong") for case in result["cases"] for r in case["results"]))
