"""Seconds, bytes and peak memory of handing a learner's weights over, against the size of the model.

python benchmarks/sync.py --output FILE.json [--sizes 39M 135M 468M] [--ways gathered folder server adapter vllm]

Random Llamas in float32, by one process and by two; each measurement in processes of its own. `gathered`: whole
tensors, dropped; `folder`: written for servers; `server`: that, read by a vLLM server; `adapter`: a LoRA adapter alone,
read by one; `vllm`: into vLLM in each process.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from process_memory import memory, restart_peak

from run import machine

ROOT = Path(__file__).resolve().parents[1]
SIZES = {  # of Llama's config
    "39M": dict(vocab_size=32000, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6),
    "135M": dict(  # SmolLM2-135M's
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9
    ),
    "468M": dict(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    ),
}
HEADS = {"39M": 6, "135M": 3, "468M": 16}  # of keys and values
TIED = ("135M",)
RANK = 16
TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--ways", nargs="+", default=["gathered", "folder", "server", "adapter", "vllm"])
    parser.add_argument("--turn", nargs=2, metavar=("SIZE", "WAY"), help="one measurement, in a process of torchrun's")
    options = parser.parse_args()
    if options.turn:
        print("\n" + json.dumps(turn(*options.turn)))
        return
    found, about = [], machine()
    for size in options.sizes:
        for way in options.ways:
            for processes in (1, 2):
                found.append(start(size, way, processes))
                print(row(found[-1]), flush=True)
                if options.output:
                    record = json.dumps({"machine": about, "found": found}, indent=1)
                    options.output.write_text(record + "\n", encoding="utf-8")


def start(size: str, way: str, processes: int) -> dict:
    """A measurement, by so many processes; peaks in their order."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), str(ROOT / "benchmarks")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, *torchrun, "--nproc-per-node", str(processes), str(Path(__file__)), "--turn", size, way]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    rows.sort(key=lambda row: row["rank"])
    return {"size": size, "way": way, "processes": processes} | rows[0] | {"peaks": [row["peak"] for row in rows]}


def row(found: dict) -> str:
    peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in found["peaks"])
    return (
        f"{found['size']} {found['way']}, {found['processes']} processes: {statistics.median(found['seconds']):.2f} s, "
        f"{found['bytes'] / 2**20:.0f} MiB in {found['tensors']} tensors; peak above what was there {peaks} MiB "
        f"(a block and the largest tensor: {(found['block'] + found['largest']) / 2**20:.0f})"
    )


def turn(size: str, way: str) -> dict:
    """The same sync, several times; what it took in this process, the largest peak of memory too."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fdpg_fast import ranks
    from fdpg_fast.cli import prepare_environment
    from fdpg_fast.config.schema import LoRAConfig
    from fdpg_fast.models.language_model import LanguageModel
    from fdpg_fast.models.lora import LoRAPolicy

    prepare_environment()
    ranks.join("cpu")
    torch.manual_seed(0)
    settings = SIZES[size] | {"num_key_value_heads": HEADS[size], "tie_word_embeddings": size in TIED}
    config = LlamaConfig(**settings, max_position_embeddings=2048, architectures=["LlamaForCausalLM"])
    policy = LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(ranks.by_first(lambda: name))
        policy.save(folder)
        if way == "adapter":
            policy = LoRAPolicy(policy, LoRAConfig(rank=RANK), seed=1)
        policy.divide(None)
        sync, close = WAYS[way](policy, folder)
        sync()  # what is allocated or compiled once
        seconds, peak = [], 0
        for _ in range(TURNS):
            ranks.gathered(None)
            before, began = memory("VmRSS"), time.perf_counter()
            restart_peak()
            sync()
            ranks.gathered(None)
            seconds.append(time.perf_counter() - began)
            peak = max(peak, memory("VmHWM") - before)
        close()
        blocks = [[x.nbytes for x in block.values()] for block in policy.blocks(repeat_tied=False)]
        if way == "adapter":
            blocks = [[x.nbytes for name, x in policy.model.named_parameters() if ".lora_" in name]]
    sizes = [nbytes for block in blocks for nbytes in block]
    about = {"bytes": sum(sizes), "tensors": len(sizes), "largest": max(sizes), "block": max(map(sum, blocks))}
    return {"rank": ranks.rank(), "seconds": seconds, "peak": peak} | about


def gathered(policy, folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    from fdpg_fast import ranks

    def drop(tensors) -> None:
        for name, tensor in tensors:
            del name, tensor

    return lambda: ranks.for_first(policy.weights(repeat_tied=False), drop), lambda: None


def written(policy, folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    from fdpg_fast.engines.vllm_folder import weights_folder

    def sync() -> None:
        with weights_folder(policy, folder, "weights"):
            pass

    return sync, lambda: None


def server(policy, folder: Path, lora_rank: int = 0) -> tuple[Callable[[], None], Callable[[], None]]:
    from fdpg_fast import ranks
    from fdpg_fast.engines import VLLMServerEngine
    from support.vllm_cases import Server

    def begin() -> str:
        started.append(Server(folder, folder / "server.log", lora_rank=lora_rank))
        started[0].wait_until_ready(240)
        return started[0].url

    started: list[Server] = []
    atexit.register(lambda: [each.kill() for each in started])
    settings = {"weight_transfer": "disk", "weights_dir": folder / "weights"}
    engine = VLLMServerEngine([ranks.by_first(begin)], [2], max_new_tokens=8, **settings)
    return lambda: engine.sync_weights(policy, 1), engine.close


def in_process(policy, folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    from support.vllm_cases import vllm_engine

    engine = vllm_engine(policy, folder, (2,))
    return lambda: engine.sync_weights(policy, 1), engine.close


WAYS = {
    "gathered": gathered,
    "folder": written,
    "server": server,
    "adapter": partial(server, lora_rank=RANK),
    "vllm": in_process,
}

if __name__ == "__main__":
    main()
