"""Time and memory of a round against lengths, samples, vocabulary and contexts, beside the plain pipeline.

python benchmarks/curves.py --output benchmarks/results/NAME.json [--axes completion …]     # and NAME.png

Axes that are in the file already stay there, unless they are asked for.

A random model, small, so that the sweep takes minutes, whose completions never end by themselves. One thread. Every
point is a process of its own, a fork of one that has imported everything: seconds of the processor, the lesser of two
rounds (of long ones there is one), and the peak of its memory above that of the imports. A slope is that of a curve's
last three points in logarithms: 1 where twice as much takes twice as long.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PhiConfig, PreTrainedTokenizerFast

import rounds
from fdpg_fast.config.load import parse_config
from fdpg_fast.engines.memory import peak_memory
from run import machine

USUAL = {"completion": 64, "prompt": 32, "samples": 4, "vocabulary": 2048, "contexts": 2}
AXES = {
    "vocabulary": [2048, 8192, 32768, 131072],
    "contexts": [2, 8, 32, 128],
    "samples": [4, 16, 64, 256],
    "prompt": [64, 128, 256, 512, 1024, 2048, 4096],
    "completion": [64, 128, 256, 512, 1024, 2048, 4096],
}
LONG = 3.0  # seconds of a round that one is enough of
CONTEXT = multiprocessing.get_context("fork")


def save_model(folder: Path, vocabulary: int) -> None:
    """A Phi, for its head has a bias: the end token is one that is never drawn."""
    words = {"end": 0} | {f"w{i}": i for i in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="end"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="end", pad_token="end").save_pretrained(folder)
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        PhiConfig(vocab_size=vocabulary, max_position_embeddings=8192, **shape, **ends)
    )
    model.lm_head.bias.data[0] = -1e4
    model.save_pretrained(folder)


def measure(pipeline: str, point: dict[str, int], folder: Path) -> dict[str, Any]:
    """Seconds of a round by phase, of the processor, and bytes."""
    before = peak_memory()
    save_model(folder, point["vocabulary"])
    prompts = [" ".join(f"w{1 + (i + j) % 1000}" for j in range(point["prompt"])) for i in range(point["contexts"])]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    config = {
        "model": str(folder),
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "target": [
            {"kind": "pointwise", "feature": {"kind": "regex", "name": "even", "pattern": "^ ?w[0-9]*[02468] "}}
        ],
        "contexts": {"train": str(folder / "prompts.txt")},
        "engine": {"max_new_tokens": point["completion"]},
        "trainer": {"contexts_per_round": point["contexts"], "samples_per_context": point["samples"]},
    }
    running = rounds.PIPELINES[pipeline](parse_config(config))
    time.perf_counter = time.process_time  # in this process alone: others run beside it
    found = []
    for index in range(2):
        if found and found[0]["whole"] > LONG:
            break
        start = time.process_time()
        phases, tokens = running.round(index)
        found.append(phases | {"whole": time.process_time() - start})
        assert tokens == point["contexts"] * point["samples"] * point["completion"]
    least = {phase: min(one[phase] for one in found) for phase in found[0]}
    return {"seconds": least, "bytes": peak_memory() - before}


def measure_apart(pipeline: str, point: dict[str, int]) -> dict[str, Any]:
    """The same, in a process of its own."""
    receiving, sending = CONTEXT.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        process = CONTEXT.Process(target=lambda: sending.send(measure(pipeline, point, Path(folder))))
        process.start()
        sending.close()
        found = receiving.recv()
        process.join()
    return found


def slopes(sizes: list[int], points: list[dict[str, Any]]) -> dict[str, float]:
    """By least squares; phases that take less than a hundredth of the longest round are left out."""
    last = points[-1]["seconds"]
    curves = {phase: [p["seconds"][phase] for p in points] for phase, x in last.items() if x > 0.01 * last["whole"]}
    curves["bytes"] = [p["bytes"] for p in points]
    x = [math.log(size) for size in sizes[-3:]]
    return {
        name: round(statistics.linear_regression(x, [math.log(y) for y in curve[-3:]]).slope, 2)
        for name, curve in curves.items()
    }


def draw(found: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(3.2 * len(found), 6), layout="constrained")
    panels = figure.subplots(2, len(found))
    for column, (axis, curves) in enumerate(found.items()):
        for pipeline, points in curves["points"].items():
            colour = {"ours": "tab:blue", "plain": "tab:gray"}[pipeline]
            values = [p["seconds"]["whole"] for p in points], [p["bytes"] / 2**20 for p in points]
            for panel, of_points in zip(panels[:, column], values, strict=True):
                panel.loglog(curves["sizes"], of_points, "o-", base=2, color=colour, label=pipeline, markersize=3)
        panels[0, column].set_title({"samples": "samples a context"}.get(axis, axis), fontsize=10)
        for panel in panels[:, column]:
            panel.grid(alpha=0.2)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("a round, seconds of one core")
    panels[1, 0].set_ylabel("peak memory, MiB")
    panels[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--axes", nargs="+", choices=AXES, help="those that the file lacks if left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(options.output.read_text()) if options.output.exists() else {"axes": {}}
    found: dict[str, Any] = kept["axes"]
    for axis in options.axes or [axis for axis in AXES if axis not in found]:
        before, curves = machine(), {"ours": [], "plain": []}
        for size in AXES[axis]:
            for pipeline, points in curves.items():
                points.append(measure_apart(pipeline, USUAL | {axis: size}))
                whole, used = points[-1]["seconds"]["whole"], points[-1]["bytes"] / 2**20
                print(f"{axis} {size}, {pipeline}: {whole:.2f} s, {used:.0f} MiB", flush=True)
        found[axis] = {
            "machine": before,
            "load_average_after": os.getloadavg(),
            "sizes": AXES[axis],
            "points": curves,
            "slopes": {pipeline: slopes(AXES[axis], points) for pipeline, points in curves.items()},
        }
        print(axis, found[axis]["slopes"], flush=True)
        options.output.write_text(json.dumps({"usual": USUAL, "axes": found}, indent=1) + "\n", encoding="utf-8")
    draw(found, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
