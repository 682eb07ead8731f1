"""Train the tiny arithmetic model in this folder, on problems that are made up while it learns.

    python examples/tiny-arithmetic/train.py

Writes model, tokenizer, prompts/ (problems never learned from) and training.json into this folder or another (--out).
problems.py makes problems, features.py judges derivations, measure.py says how good the model is.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from problems import DERIVATIONS, TASKS, different, is_asked, problems
from tokenizers import Tokenizer, decoders, models, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as HFTokenizer

SEED = 0
END = "<|end|>"  # bos, eos and pad at once: every document is END problem derivation END
SYMBOLS = "0123456789+-*=(),:> "
HEAD_WIDTH = 32  # inference engines' attention kernels know few other sizes
BATCH, WARMUP = 64, 0.02
MUON = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}  # of matrices
ADAMW = {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.9, 0.95)}  # of embeddings and gains
PROMPTS = {"eval": 128, "train": 256}  # of a task


def make_tokenizer() -> HFTokenizer:
    """A token for each symbol."""
    vocabulary = {END: 0, **{symbol: place for place, symbol in enumerate(SYMBOLS, 1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Fuse()
    # a prompt without it is a text that the model has never seen: add it as Llama's tokenizer does
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    special = {"bos_token": END, "eos_token": END, "pad_token": END}
    return HFTokenizer(tokenizer_object=tokenizer, model_max_length=64, clean_up_tokenization_spaces=False, **special)


def make_model(width: int, layers: int) -> LlamaForCausalLM:
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=1 + len(SYMBOLS),
        hidden_size=width,
        intermediate_size=width * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        num_key_value_heads=width // HEAD_WIDTH,
        head_dim=HEAD_WIDTH,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special)
    return model


def batches(tokenizer: HFTokenizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids [B, T] and labels [B, T] of what is learned, the tasks in turn; labels of problems and padding are -100."""
    streams = [problems(task, held_out=False, seed=SEED) for task in TASKS]
    while True:
        for stream in streams:
            rows = [next(stream) for _ in range(BATCH)]
            asked = tokenizer([row.prompt for row in rows])["input_ids"]
            # the tokenizer has put END in front, and it belongs behind as well
            answers = [[*ids[1:], 0] for ids in tokenizer([row.derivation for row in rows])["input_ids"]]
            width = max(len(a) + len(b) for a, b in zip(asked, answers, strict=True))
            pairs = [(a, b, width - len(a) - len(b)) for a, b in zip(asked, answers, strict=True)]
            ids = [a + b + [0] * padding for a, b, padding in pairs]
            labels = [[-100] * len(a) + b + [-100] * padding for a, b, padding in pairs]
            yield torch.tensor(ids), torch.tensor(labels)


def train(model: LlamaForCausalLM, tokenizer: HFTokenizer, steps: int) -> dict[str, Any]:
    """Learn from so many batches; what is worth telling of it."""
    is_matrix = {name: p.ndim == 2 and "embed" not in name for name, p in model.named_parameters()}
    matrices = [p for name, p in model.named_parameters() if is_matrix[name]]
    others = [p for name, p in model.named_parameters() if not is_matrix[name]]
    optimizers = [torch.optim.Muon(matrices, **MUON), torch.optim.AdamW(others, **ADAMW)]
    start, cpu_start, tokens, losses = time.monotonic(), time.process_time(), 0, []
    for step, (ids, labels) in zip(range(1, steps + 1), batches(tokenizer), strict=False):
        share = min(step / steps / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer, peak in zip(optimizers, (MUON["lr"], ADAMW["lr"]), strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
        # Padding is on the right, where causal attention never looks from a real token: no mask is needed.
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [B, T-1, V]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += ids.numel()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            nats = [f"{task} {sum(losses[i::2]) / len(losses[i::2]):.3f}" for i, task in enumerate(TASKS)]
            print(f"{time.monotonic() - start:5.0f} s  step {step}  nats a token:", *nats, flush=True)
            losses.clear()
    minutes = (time.process_time() - cpu_start) / 60
    return {"steps": steps, "problems": steps * BATCH, "tokens": tokens, "core_minutes": round(minutes, 1)}


def write_prompts(out: Path) -> None:
    """Held-out problems with several derivations, each in exactly one file, with what their verifier asks for."""
    out.mkdir(parents=True, exist_ok=True)
    for task, derivations in DERIVATIONS.items():
        drawn = ((problem, derivations(**problem.columns)) for problem in different(problems(task, True, SEED)))
        chosen = ((problem, len(found)) for problem, found in drawn if is_asked(task, found))
        for split, size in PROMPTS.items():
            rows = [
                json.dumps({"prompt": problem.prompt, **problem.columns, "derivations": count}) + "\n"
                for problem, count in itertools.islice(chosen, size)
            ]
            (out / f"{task}-{split}.jsonl").write_text("".join(rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600, help=f"batches of {BATCH} problems to learn from")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=96, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    if args.steps < 2 or args.layers < 1 or args.width < HEAD_WIDTH or args.width % HEAD_WIDTH:
        parser.error(f"at least two steps and one layer, and a width that is a multiple of {HEAD_WIDTH}")
    torch.manual_seed(SEED)
    write_prompts(args.out / "prompts")
    tokenizer, model = make_tokenizer(), make_model(args.width, args.layers)
    tokenizer.save_pretrained(args.out)
    # transformers 5 writes a class that version 4 does not know; both know this one.
    settings = args.out / "tokenizer_config.json"
    named = json.loads(settings.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    facts = train(model, tokenizer, args.steps)
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
