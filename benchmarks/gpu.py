"""Our ops beside PyTorch's and other libraries' on one NVIDIA GPU: correctness first, then time and memory.

python -m benchmarks.gpu --out DIR            from the repository root; at most 8 minutes
python -m benchmarks.gpu --out DIR --smoke    tiny shapes, the only ones that --device cpu runs

Writes DIR/<chip>-<date>.json (every single repeat) and a Markdown table after each case, and a figure at the end.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))  # last: an installed fdpg_kernels comes first
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # methods of very different sizes take turns

import torch

from benchmarks import gpu_cases, gpu_report
from benchmarks.gpu_cases import Case, Method, Shape
from benchmarks.gpu_methods import EAGER, PEERS, own_methods
from benchmarks.gpu_options import make_parser, result_path, why_not, write

SECONDS_PER_METHOD = 0.6  # of timed repeats in one mode: slow methods get fewer

Record = dict[str, Any]


class Timer:
    """Seconds of one call: CUDA events behind a queued matrix product, which hides launch latency as a step would."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        size = 8192 if self.cuda else 128
        self.square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        self.product = torch.empty_like(self.square)

    def multiply(self) -> None:
        torch.mm(self.square, self.square, out=self.product)

    def __call__(self, step: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.multiply()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def median(self, step: Callable[[], Any], repeats: int) -> float:
        step()
        return statistics.median(self(step) for _ in range(repeats))

    def extra_bytes(self, step: Callable[[], Any]) -> int | None:
        """Peak memory of a call beyond what was allocated before it, its results included."""
        if not self.cuda:
            step()
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def ceilings(timer: Timer, repeats: int) -> dict[str, float]:
    """What this chip reaches on a large square product and on a plain copy."""
    source = torch.empty(2**30 if timer.cuda else 2**20, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return {
        "gemm_tflops": 2e-12 * len(timer.square) ** 3 / timer.median(timer.multiply, repeats),
        "copy_gbytes_per_s": 2e-9 * len(source) / timer.median(lambda: target.copy_(source), repeats),
    }


def gemm_tflops(case: Case, timer: Timer, repeats: int) -> dict[str, float]:
    """Each of the case's three products alone."""
    logits = torch.mm(case.hidden, case.weight.T)
    products = {
        "logits": lambda: torch.mm(case.hidden, case.weight.T),
        "hidden_grad": lambda: torch.mm(logits, case.weight),
        "weight_grad": lambda: torch.mm(logits.T, case.hidden),
    }
    return {name: 2e-12 * case.shape.ndv / timer.median(product, repeats) for name, product in products.items()}


def attempt(record: Record, call: Callable[[], Any], timer: Timer, *, peer: bool = False) -> Any:
    """The call's result; where it raises, None, and the reason goes into the record."""
    try:
        return call()
    except torch.OutOfMemoryError:
        record.update(status="out of memory", reason="out of memory")
    except Exception as error:  # whatever a method raises is a result of this benchmark
        message = next(iter(str(error).strip().splitlines()), "")
        record.update(status="skipped" if peer else "failed", reason=f"{type(error).__name__}: {message}"[:300])
    gc.collect()
    if timer.cuda:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            name = record["method"]
            raise SystemExit(f'{name} broke the CUDA context; run again with --without "{name}"') from error
        torch.cuda.empty_cache()
    return None


def passes(case: Case, method: Method, record: Record, step: Callable[[], Any], eager: dict, timer: Timer) -> bool:
    """Run once, and compare with float64: only what is right is timed."""
    found = attempt(record, lambda: gpu_cases.errors(case, method, step()), timer, peer=not method.ours)
    if found is None:
        return False
    bounds = {key: bound for key, bound in gpu_cases.limits(method, record["mode"], eager).items() if key in found}
    beyond = [f"{key} error {found[key]:.2g} > {bound:.2g}" for key, bound in bounds.items() if not found[key] <= bound]
    record["limits"] = bounds
    record["errors"] = {key: error if math.isfinite(error) else None for key, error in found.items()}
    if beyond:
        record.update(status="wrong", reason=", ".join(beyond))
    return not beyond


def measure(
    case: Case, mode: str, methods: list[Method], wrong: dict[str, str], timer: Timer, repeats: int
) -> list[Record]:
    """Check every method in this mode, then time those that passed, turn by turn."""

    def new_record(name: str) -> Record:
        records.append({"method": name, "mode": mode, "status": "ok", "reason": None, "seconds": []})
        return records[-1]

    records: list[Record] = []
    ready = [(new_record("bare GEMMs"), partial(gpu_cases.bare_gemms, case, mode), False)]
    eager: dict[str, float | None] = {}
    for method in methods:
        if mode.startswith("loss") and not method.per_token:
            continue  # no f-DPG loss without per-token log-probs
        record, step = new_record(method.name), partial(gpu_cases.run, case, method, mode)
        if mode.startswith("loss") and method.loss is None and method.name in wrong:
            record.update(status="wrong", reason=wrong[method.name])
        elif passes(case, method, record, step, eager, timer):
            ready.append((record, step, not method.ours))
        if record["status"] == "wrong":
            wrong[method.name] = record["reason"]
        if method is EAGER:
            eager = record.get("errors", {})
    for record, step, peer in ready:
        record["extra_bytes"] = attempt(record, partial(timer.extra_bytes, step), timer, peer=peer)
    for turn in range(repeats):
        first = turn % len(ready)
        for record, step, peer in ready[first:] + ready[:first]:
            if record["status"] == "ok" and sum(record["seconds"]) < SECONDS_PER_METHOD:
                seconds = attempt(record, partial(timer, step), timer, peer=peer)
                record["seconds"] += [] if seconds is None else [seconds]
    return records


def collect(own: list[Method], peers: dict[str, Callable[[], Method]], without: list[str], timer: Timer):
    """The methods to compare, and why each peer that is missing is missing."""
    methods, skipped = [method for method in own if method.name not in without], []
    for name, build in peers.items():
        record: Record = {"method": name, "reason": "--without"}
        if name not in without and (method := attempt(record, build, timer, peer=True)):
            methods.append(method)
        else:
            skipped.append({"method": name, "reason": record["reason"]})
            print(f"SKIPPED {name}: {record['reason']}", flush=True)
    return methods, skipped


def measure_case(shape: Shape, methods: list[Method], result: dict[str, Any], timer: Timer, repeats: int) -> None:
    """Add one shape to the result, mode by mode."""
    torch.compiler.reset()  # dynamo's limit of recompilations counts over shapes
    title, record = f"{shape.name}, {shape.tokens} tokens", {"method": "making the inputs"}
    case = attempt(record, lambda: gpu_cases.make_case(shape, timer.device), timer)
    if case is None:
        result["left_out"].append({**asdict(shape), "reason": record["reason"]})
        return
    entry: dict[str, Any] = {**asdict(shape), "results": []}
    entry["gemm_tflops"] = attempt({"method": "bare GEMMs"}, lambda: gemm_tflops(case, timer, repeats), timer)
    result["cases"].append(entry)
    wrong: dict[str, str] = {}
    for mode in gpu_cases.MODES:
        print(f"{title}: {mode}", flush=True)
        records = measure(case, mode, methods, wrong, timer, repeats)
        gpu_report.summarise(records, shape.ndv, result["ceilings"]["gemm_tflops"])
        entry["results"] += records
        print("\n".join(f"    {gpu_report.line(record)}" for record in records), flush=True)


def main(argv: list[str] | None = None, peers: dict[str, Callable[[], Method]] = PEERS) -> int:
    parser = make_parser("benchmarks.gpu", str(__doc__), minutes=7, repeats=10)
    parser.add_argument("--without", action="append", default=[], metavar="METHOD", help="leave this one out")
    options, started = parser.parse_args(argv), time.monotonic()
    if reason := why_not(options):
        print(reason, file=sys.stderr)
        return 2

    timer = Timer(torch.device(options.device))
    methods, skipped = collect(own_methods(timer.device), peers, options.without, timer)
    result: dict[str, Any] = {"ceilings": ceilings(timer, 5 * options.repeats), "limits": gpu_cases.LIMITS}
    result |= {"machine": gpu_report.machine(timer.device), "skipped": skipped, "left_out": [], "cases": []}
    path = result_path(options.out, result["machine"])
    longest, ours = 0.0, {method.name for method in methods if method.ours}
    for shape in gpu_cases.SMOKE_SHAPES if options.smoke else gpu_cases.SHAPES:
        begun = time.monotonic()
        if begun - started + longest > 60 * options.minutes:
            result["left_out"].append({**asdict(shape), "reason": f"would not fit into --minutes {options.minutes:g}"})
            continue
        try:
            measure_case(shape, methods, result, timer, options.repeats)
        finally:
            write(result, gpu_report.markdown(result), path)
        longest = max(longest, time.monotonic() - begun)
    write(result, gpu_report.markdown(result), path)
    for left_out in result["left_out"]:
        print(f"LEFT OUT {left_out['name']}, {left_out['tokens']} tokens: {left_out['reason']}")
    print(gpu_report.plot(result, path.with_suffix(".png")))
    print(f"wrote {path} and {path.with_suffix('.md').name} in {time.monotonic() - started:.0f} s")
    records = [record for case in result["cases"] for record in case["results"] if record["method"] in ours]
    return int(any(record["status"] in ("wrong", "failed") for record in records))


if __name__ == "__main__":
    sys.exit(main())
