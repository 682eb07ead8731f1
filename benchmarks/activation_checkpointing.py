"""Peak memory and processor time of one forward and backward pass, with activation checkpointing and without.

python benchmarks/activation_checkpointing.py --output FILE.json [--turns 2] [--sequences 4] [--tokens 1024]

A random model of SmolLM2-135M's shape, all completions in one micro-batch, float32. Every turn is a process of its own;
memory is what the pass adds to the process with the model loaded, gradients (0.5 GiB) included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from process_memory import restart_peak
from transformers import AutoModelForCausalLM, LlamaConfig

from fdpg_fast.config.schema import LossConfig, OptimizerConfig
from fdpg_fast.contexts import Context
from fdpg_fast.engines.memory import peak_memory
from fdpg_fast.learner import Learner
from fdpg_fast.models import activations, pages
from fdpg_fast.models.language_model import LanguageModel
from fdpg_fast.rollouts import pack
from fdpg_kernels import divergences
from run import machine

WAYS = ("off", "on", "on, pages kept")
TARGETS = {"GiB": 1.0, "of the time without": 1.3}


def measure(way: str, sequences: int, tokens: int) -> dict[str, float]:
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(
        vocab_size=49152, num_hidden_layers=30, max_position_embeddings=8192, tie_word_embeddings=True, **shape
    )
    torch.manual_seed(0)
    policy = LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    if way == "on, pages kept":  # by glibc, as it does by itself
        pages.give_back = lambda: None
    if way != "off":
        activations.recompute(policy.model)
    learner = Learner(policy, LossConfig(ratio="none"), OptimizerConfig(), rounds=1, micro_batch_tokens=10**9)
    drawn = torch.randint(config.vocab_size, (sequences + 1, tokens)).tolist()
    completions = [(ids, [-10.8] * tokens, False) for ids in drawn[1:]]
    rollouts = pack([Context(0, "", tuple(drawn[0][:8]))], [completions])
    log_q, zeros = torch.full((sequences,), -10.8 * tokens).double(), torch.zeros(sequences).double()
    restart_peak()
    before, cpu, wall = peak_memory(), time.process_time(), time.perf_counter()
    loss, _ = learner.backward(rollouts, log_q, zeros, zeros, divergences.get("jensen_shannon"))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in policy.model.parameters()]))
    added = peak_memory() - before
    return {"added_bytes": added, "cpu_seconds": cpu, "seconds": wall, "loss": float(loss), "gradient_norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--alone", choices=WAYS, help="measure this way in this process, and print it")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(options.alone, options.sequences, options.tokens)))
        return
    size = ["--sequences", str(options.sequences), "--tokens", str(options.tokens)]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
    for _ in range(options.turns):
        for way, turns in found.items():
            command = [sys.executable, __file__, *size, "--alone", way]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            turns.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{way}: {turns[-1]}", flush=True)
    plain = statistics.median(turn["cpu_seconds"] for turn in found["off"]) if "off" in found else float("nan")
    for way, turns in found.items():
        gib, cpu = max(t["added_bytes"] for t in turns) / 2**30, statistics.median(t["cpu_seconds"] for t in turns)
        print(f"{way}: +{gib:.2f} GiB, {cpu:.1f} s of the processor, {cpu / plain:.2f} of the time without")
    if options.output:
        record = {"machine": machine(), "sequences": options.sequences, "tokens": options.tokens, "turns": found}
        options.output.write_text(json.dumps(record | {"targets": TARGETS}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
