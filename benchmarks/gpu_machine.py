"""What the numbers depend on besides the code: chip, versions, and the clocks and heat along the way."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import threading
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_process import Lines

ROOT = Path(__file__).resolve().parents[1]
PEER_PACKAGES = ("liger-kernel", "cut-cross-entropy", "trl", "quack-kernels", "nvidia-cutlass-dsl", "transformers")
SAMPLED = {"clocks.sm": "sm_mhz", "power.draw": "watts", "temperature.gpu": "celsius"}
REASONS = {"clocks_event_reasons.active": "held_back_by"}  # a bit mask of nvidia-smi's; older drivers lack the name
EVERY_MS = 500
# dense bfloat16 products by NVIDIA's data sheets, TFLOP/s
PEAKS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}


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


def machine(device: torch.device) -> dict[str, Any]:
    """Chip, driver, versions, commit and time."""
    found: dict[str, Any] = {"chip": f"cpu {platform.machine()}", "peak_tflops": None, "nvidia_smi": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
        uuid = f"GPU-{properties.uuid}"
        query = output("nvidia-smi", "-i", uuid, f"--query-gpu={fields}", "--format=csv,noheader")
        found = {
            "chip": properties.name,
            "uuid": uuid,
            "peak_tflops": next((peak for name, peak in PEAKS.items() if name in properties.name), None),
            "capability": 10 * properties.major + properties.minor,
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


class Samples:
    """Clocks, power and temperature as lines of their own, twice a second while the block runs."""

    def __init__(self, lines: Lines, uuid: str = "0"):
        self.lines, self.uuid, self.is_over = lines, uuid, False
        self.source: subprocess.Popen | None = None

    def __enter__(self) -> None:
        threading.Thread(target=self._follow, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.is_over = True
        if self.source is not None:
            self.source.kill()

    def _follow(self) -> None:
        for fields in (SAMPLED | REASONS, SAMPLED):
            query = ["nvidia-smi", "-i", self.uuid, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
            try:
                self.source = subprocess.Popen([*query, "-lms", str(EVERY_MS)], stdout=subprocess.PIPE, text=True)
            except OSError:
                return  # no nvidia-smi, no samples
            any_seen = False
            for line in self.source.stdout or ():
                values = [_number(value) for value in line.strip().split(", ")]
                if len(values) == len(fields):
                    self.lines.add("sample", **dict(zip(fields.values(), values, strict=True)))
                    any_seen = True
            if any_seen or self.is_over:
                return


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
