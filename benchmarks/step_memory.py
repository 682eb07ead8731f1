"""Memory of an update by two processes, measured on this CPU and held against the arithmetic of memory_table.py.

python benchmarks/step_memory.py --output benchmarks/results/NAME.json

Random models, each in processes of its own. What stays from update to update is resident memory beyond what a process
had before the session, and what it has there with a model of next to nothing; what an update adds is how far its peak,
reset beforehand, lies above that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from process_memory import give_back, memory, restart_peak

from memory_table import GIB, Run, Shape, peak, total

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "examples" / "tiny-python-lm"
WORLD, MICRO_BATCHES = 2, 2  # of each process
NOTHING = Shape("next to nothing", 1, 64, 64, 1, 1, 64, 2048)  # what such a session takes besides: code, mostly
CASES = (  # what dominates differs; tokens of a micro-batch, and whether activations are recomputed
    (NOTHING, 64, False),
    (Shape("tied", 12, 576, 1536, 9, 3, 64, 32_768, True), 256, False),
    (Shape("large head", 2, 512, 1536, 8, 4, 64, 65_536), 256, False),
    (Shape("wide layers", 2, 1536, 6144, 12, 4, 128, 2048), 256, False),
    (Shape("many tokens", 8, 256, 1024, 4, 2, 64, 2048), 4096, False),
    (Shape("more tokens, recomputed", 2, 256, 1024, 4, 2, 64, 2048), 16_384, True),
)
BLOCK = 32 * 2**20  # bytes of the loss's logits on a CPU


def allocated_by_pages() -> dict[str, str]:
    """What makes glibc give memory back at once: measured is what is used, not what it keeps."""
    return {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def resident() -> int:
    """Bytes of this process that are in use."""
    give_back()
    return memory("VmRSS")


def added(function: Any) -> int:
    """Bytes by which a call's peak lies above what was there."""
    before = resident()
    restart_peak()
    function()
    return memory("VmHWM") - before


def worker(config: str, tokens: str, output: str) -> None:
    """One of the processes: two updates of made-up completions, the second measured."""
    import torch

    from fdpg_fast import ranks
    from fdpg_fast.config.load import load_config
    from fdpg_fast.contexts import Context
    from fdpg_fast.rollouts import pack
    from fdpg_fast.session import Session

    ranks.join("cpu")
    ranks.total(torch.zeros(1 << 20))
    before = resident()
    with contextlib.closing(Session(load_config(config))) as session:
        learner, length = session.state.learner, 64
        count = WORLD * MICRO_BATCHES * int(tokens) // length
        completions = [([1] * length, [-1.0] * length, False)] * count
        rollouts = pack([Context(0, "", (1,))], [completions])
        assert len(list(rollouts.micro_batches(learner.micro_batch_tokens))) == WORLD * MICRO_BATCHES
        zeros = torch.zeros(len(rollouts), dtype=torch.float64)

        def update() -> None:
            gradient = learner.backward(rollouts, zeros + 1, zeros, zeros, session.divergence)
            assert not learner.step(*gradient, 0).skipped

        update()
        found = {"state": resident() - before, "added": added(update)}
        found["scoring"] = added(lambda: session.base.token_logprobs(rollouts, session.scorer.micro_batch_tokens))
    everybodys = ranks.gathered(found)
    if ranks.is_first():
        Path(output).write_text(json.dumps(everybodys))


def measure(shape: Shape, tokens: int, is_checkpointed: bool, folder: Path) -> list[dict[str, int]]:
    """Of each process: bytes of the state, and what an update and a pass of the base add."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not (folder / "model").exists():
        settings = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            tie_word_embeddings=shape.is_tied,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(settings).save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "model")
        (folder / "prompts.txt").write_text("a")
    config = {
        "model": str(folder / "model"),
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "target": [{"kind": "pointwise", "feature": {"kind": "regex", "name": "any", "pattern": "a"}}],
        "contexts": {"train": str(folder / "prompts.txt")},
        "loss": {"ratio": "none", "baseline": "none"},  # made-up completions are unlikely
        # and the prompt's one: micro-batches are full, and as many as they should be
        "trainer": {"micro_batch_tokens": tokens + 1, "activation_checkpointing": is_checkpointed},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    command += [__file__, "--worker", str(folder / "config.yaml"), str(tokens), str(folder / "found.json")]
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "benchmarks"))
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | allocated_by_pages()
    subprocess.run(command, check=True, env=os.environ | environment)
    return json.loads((folder / "found.json").read_text())


def compared(cases: list[dict[str, Any]]) -> dict[str, tuple[float, float, str]]:
    """Bytes at most of each measured case, by name: measured, reckoned, and in which moment."""
    (code,) = (min(one["state"] for one in case["measured"]) for case in cases if case["shape"] == asdict(NOTHING))
    found = {}
    for case in cases:
        shape, run = Shape(**case["shape"]), Run(**case["run"])
        measured = max(one["state"] + max(one["added"], one["scoring"]) for one in case["measured"])
        found[shape.name] = measured - code, total(shape, run), peak(shape, run)[0]
    return {name: found[name] for name in found if name != NOTHING.name}


def comparison(cases: list[dict[str, Any]]) -> str:
    """A table of measured cases, in Markdown."""
    rows = [["a model", "parameters", "tokens", "largest moment", "measured, GiB", "reckoned", "ratio"], ["---"] * 7]
    found = compared(cases)
    for case in (case for case in cases if case["shape"]["name"] in found):
        measured, reckoned, moment = found[case["shape"]["name"]]
        numbers = [f"{measured / GIB:.2f}", f"{reckoned / GIB:.2f}", f"{measured / reckoned:.2f}"]
        parameters = f"{Shape(**case['shape']).parameters / 1e6:.0f} M"
        rows.append([case["shape"]["name"], parameters, f"{case['run']['tokens']:,}", moment, *numbers])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    from run import machine

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write; what it has is not run again")
    output = parser.parse_args().output
    cases = json.loads(output.read_text())["cases"] if output.exists() else []
    for shape, tokens, is_checkpointed in CASES:
        if not any(case["shape"] == asdict(shape) for case in cases):
            with tempfile.TemporaryDirectory() as folder:
                ours = measure(shape, tokens, is_checkpointed, Path(folder))
            run = Run(WORLD, tokens, MICRO_BATCHES, 4, 4, is_checkpointed, logits=BLOCK, is_gloo=True)
            cases.append({"shape": asdict(shape), "run": asdict(run), "measured": ours})
            output.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=1) + "\n")
    print(comparison(cases))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
