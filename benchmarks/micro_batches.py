"""Seconds of an update and peak memory against trainer.micro_batch_tokens: where its default comes from.

python benchmarks/micro_batches.py --output FILE.json [--setting smollm2-135m] [--tokens 194 512 1024]

Every size is a process of its own, in turns; the first round of each warms up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from run import machine

ROOT = Path(__file__).resolve().parents[1]
TURN = """
import json, sys, tempfile
from pathlib import Path
import rounds, torch
setting, tokens, count = rounds.SETTINGS[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    config = rounds.make_config(setting, Path(folder))
    sized = config.trainer.model_copy(update={"micro_batch_tokens": tokens})
    running = rounds.Ours(config.model_copy(update={"trainer": sized}))
    found = [running.round(index)[0] for index in range(count)]
print(json.dumps({"update": [p["forward+backward"] for p in found[1:]], "peak_bytes": rounds.peak_memory()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--setting", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[194, 384, 768, 1024, 1700, 3400])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of each turn; the first warms up")
    options = parser.parse_args()
    found: dict[str, dict] = {str(tokens): {"update": [], "peak_bytes": 0} for tokens in options.tokens}
    for _ in range(options.turns):
        for tokens in options.tokens:
            command = [sys.executable, "-c", TURN, options.setting, str(tokens), str(options.rounds)]
            done = subprocess.run(command, cwd=ROOT / "benchmarks", check=True, stdout=subprocess.PIPE, text=True)
            one, kept = json.loads(done.stdout.splitlines()[-1]), found[str(tokens)]
            kept["update"] += one["update"]
            kept["peak_bytes"] = max(kept["peak_bytes"], one["peak_bytes"])
    for tokens, kept in found.items():
        seconds = statistics.median(kept["update"])
        print(f"{tokens:>6} tokens: update {seconds:.2f} s, peak {kept['peak_bytes'] / 2**30:.2f} GiB", flush=True)
    record = {"machine": machine(), "setting": options.setting, "tokens": found}
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
