"""Seconds and bytes of a call on a device, and the kernels that it is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch

SECONDS = 0.6  # of timed repeats of one step: slow ones get fewer
FEWEST = 3
LONGEST_COVER = 30  # products queued before a call at most

Call = Callable[[], Any]


class Timer:
    """Times by CUDA events; large products queued before a call hide what the host needs to launch it, and flush L2."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        size = 8192 if self.cuda else 128
        self.square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        self.product = torch.empty_like(self.square)
        self.square_seconds = statistics.median(self(self.multiply) for _ in range(5))

    def multiply(self) -> None:
        torch.mm(self.square, self.square, out=self.product)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def __call__(self, call: Call, cover: int = 1) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(cover):
            self.multiply()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def host_seconds(self, call: Call) -> float:
        """What the host needs until the call comes back."""
        self.synchronize()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        self.synchronize()
        return seconds

    def turns(self, calls: dict[str, Call], repeats: int) -> dict[str, dict[str, Any]]:
        """Of each call its seconds, turn by turn with the others', and those of the host."""
        found: dict[str, dict[str, Any]] = {}
        for name, call in calls.items():
            call()
            found[name] = {"seconds": [], "host_seconds": min(self.host_seconds(call) for _ in range(2))}
        for turn in range(repeats):
            for name, call in calls.items():
                cover = min(LONGEST_COVER, 1 + int(found[name]["host_seconds"] / self.square_seconds))
                found[name]["seconds"].append(self(call, cover))
            if turn + 1 >= FEWEST and sum(sum(timed["seconds"]) for timed in found.values()) > SECONDS:
                break
        return found

    def extra_bytes(self, call: Call) -> int | None:
        """Peak memory of a call beyond what was allocated before it, its results included."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kernels(self, call: Call) -> list[dict[str, Any]]:
        """The kernels of one call with the microseconds of each launch (on a CPU: its operators), longest first."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        call()
        self.synchronize()
        kind = DeviceType.CUDA if self.cuda else DeviceType.CPU
        with profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU]) as taken:
            call()
            self.synchronize()
        launches: dict[str, list[float]] = {}
        for event in taken.events() or ():
            if event.device_type == kind:
                took = event.time_range.elapsed_us() if self.cuda else event.self_cpu_time_total
                launches.setdefault(event.name[:100], []).append(round(took, 2))
        rows = [{"kernel": name, "microseconds": times} for name, times in launches.items()]
        return sorted(rows, key=lambda row: -sum(row["microseconds"]))[:25]


@lru_cache
def timer(device: str) -> Timer:
    return Timer(torch.device(device))


def ceilings(device: str, repeats: int) -> Iterator[dict[str, float]]:
    """What this chip reaches on a large square product and on a plain copy."""
    timing = timer(device)
    source = torch.empty(2**30 if timing.cuda else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = timing.turns({"gemm": timing.multiply, "copy": lambda: target.copy_(source)}, repeats)
    gemm, copy = (statistics.median(found[name]["seconds"]) for name in ("gemm", "copy"))
    yield {
        "gemm_tflops": 2e-12 * len(timing.square) ** 3 / gemm,
        "copy_gbytes_per_s": 2e-9 * len(source) / copy,
    }
