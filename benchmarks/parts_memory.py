"""Memory of each of two processes that load and train a random Llama together, beside what a part should take.

python benchmarks/parts_memory.py --output FILE.json [--layers 16] [--width 1536] [--vocabulary 32000]

Anonymous memory, sampled every millisecond, above that of a process that has imported everything; pages of the model's
file, which the system may take back, are not in it. No engine is started: completions are made up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from process_memory import memory

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 2
ALLOWANCE = 1.15
TOKENS = 16  # of a micro-batch: activations are next to nothing
WORKER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), __file__]


class Peak:
    """Anonymous memory of this process in bytes: how much there is at most, until it is asked."""

    def __init__(self) -> None:
        self._most = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def so_far(self) -> int:
        most, self._most = max(self._most, memory("RssAnon")), 0
        return most

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, memory("RssAnon"))
            time.sleep(1e-3)


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """Random weights in bfloat16, and the tokenizer of the shipped model, whose ids are few."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=8 * options.width // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 128,
        num_key_value_heads=options.width // 384,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "examples/tiny-python-lm").save_pretrained(folder)


def work(folder: Path) -> None:
    """What one of the processes does: load, score, and step twice."""
    import torch

    import fdpg_fast.trainer  # noqa: F401
    from fdpg_fast import ranks
    from fdpg_fast.clock import Clock
    from fdpg_fast.config.load import parse_config
    from fdpg_fast.rollouts import pack
    from fdpg_fast.session import Session

    ranks.join("cpu")
    import torch.distributed.fsdp
    import torch.distributed.tensor
    from transformers import LlamaForCausalLM  # noqa: F401

    peak = Peak()
    start, found = memory("RssAnon"), {}

    def done(phase: str) -> None:
        found[phase] = {"peak": peak.so_far() - start, "left": memory("RssAnon") - start}

    (folder / "a.jsonl").write_text('{"prompt": "a"}\n')
    config = {
        "model": str(folder),
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "target": [{"kind": "rlhf", "beta": 1.0, "feature": {"kind": "regex", "name": "letters", "pattern": "[a-m]"}}],
        "contexts": {"train": str(folder / "a.jsonl")},
        "engine": {"kind": "transformers", "max_new_tokens": TOKENS // 2},
        "trainer": {"micro_batch_tokens": TOKENS},
    }
    session = Session(parse_config(config))
    done("load")
    learner, count = session.state.learner, TOKENS // 2
    tokens = torch.randint(257, (4, count), generator=torch.Generator().manual_seed(0)).tolist()
    rollouts = pack(session.contexts[:1], [[(ids, [0.0] * count, False) for ids in tokens]])
    rollouts = dataclasses.replace(rollouts, behavior_logprob=session.base.token_logprobs(rollouts, TOKENS))
    peak.so_far()
    scores = session.scorer(rollouts, Clock())
    done("score")
    log_z, baseline = session.state.estimates.update(rollouts, scores, session.divergence)
    for step in ("first", "second"):  # the first makes the optimizer's moments
        loss, weights = learner.backward(rollouts, scores.log_score, log_z, baseline, session.divergence)
        done(f"{step} passes")
        assert not learner.step(loss, weights, 0).skipped
        done(f"{step} step")
    everybodys = ranks.gathered(found)
    if ranks.is_first():
        print(json.dumps(everybodys))


def allowed(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of one process by arithmetic, float32: its part of all that is kept, two layers and the head whole."""
    width, inner, heads = options.width, 8 * options.width // 3, options.width // 128
    layer = width * width * (2 + 2 * (options.width // 384) / heads) + 3 * width * inner + 2 * width
    table = options.vocabulary * width
    parameters = options.layers * layer + 2 * table + width
    kept = {"base": 4, "masters": 4}
    trained = kept | {"moments": 8, "gradients": 4}
    whole = 4 * (2 * layer + table)  # of the head block what is summed up over all tokens comes on top: its gradient
    of = {
        name: sum(kinds.values()) * parameters / PROCESSES + whole
        for name, kinds in (("load", kept), ("step", trained))
    }
    of["step"] += 4 * table
    return {"parameters": int(parameters), "layer": int(4 * layer), "table": 4 * table} | {
        k: int(x) for k, x in of.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), options)
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [*WORKER, "--work", name]
        said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured, limits = json.loads(said.strip().splitlines()[-1]), allowed(options)
    peaks = {
        "load": max(found["load"]["peak"] for found in measured),
        "step": max(phase["peak"] for found in measured for phase in found.values()),
    }
    for name, peak in peaks.items():
        share = peak / limits[name]
        print(f"{name}: {peak / 2**30:.2f} GiB, {share:.2f} of {limits[name] / 2**30:.2f} (at most {ALLOWANCE})")
    for phase in measured[0]:
        print(phase, *(f"{f[phase]['peak'] / 2**30:.2f} left {f[phase]['left'] / 2**30:.2f}" for f in measured))
    if options.output:
        from run import machine

        shape = {name: value for name, value in vars(options).items() if name != "output"}
        result = {"machine": machine(), "shape": shape}
        result |= {"arithmetic": limits, "peaks": peaks}
        options.output.write_text(json.dumps(result | {"processes": measured}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]))
    else:
        main()
