"""All faults, and a table of what was tried and what went wrong: `make faults`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from conftest import save_model

from . import Tally, fuzz, inputs, kills, servers


def tallies(folder: Path, share: float, seed: int) -> Iterator[Tally]:
    """Of everything, or of a share of it."""
    models = {"tiny": folder / "tiny", "vllm": folder / "vllm"}
    save_model(models["tiny"]), save_model(models["vllm"], head_dim=32)
    yield inputs.refusals(models["tiny"], inputs.inputs()[:: max(1, round(1 / share))])
    yield servers.misbehaviours(models["tiny"], share)
    yield from fuzz.fuzz(models["tiny"], round(share * 12_000), seed)
    yield from kills.signals(models, round(share * 20), seed)
    yield from kills.kills(models, share, seed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of what is tried")
    parser.add_argument("--seed", type=int, default=0, help="of moments and examples")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    rows, started = [], time.monotonic()
    print(f"{'what':<36}{'tried':>7}{'wrong':>7}{'s':>7}")
    with tempfile.TemporaryDirectory() as name:
        for tally in tallies(Path(name), options.share, options.seed):
            seconds, started = time.monotonic() - started, time.monotonic()
            print(f"{tally.what:<36}{tally.tried:>7}{len(tally.wrong):>7}{seconds:>7.0f}", flush=True)
            print("".join(f"    {line}\n" for line in tally.wrong), end="")
            rows.append({**asdict(tally), "seconds": round(seconds, 1)})
            if options.output is not None:
                versions = {"torch": torch.__version__, "transformers": transformers.__version__}
                machine = {"cores": os.cpu_count(), "python": platform.python_version(), **versions}
                options.output.write_text(
                    json.dumps({"machine": machine, "seed": options.seed, "rows": rows}, indent=1)
                )
    return any(row["wrong"] for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
