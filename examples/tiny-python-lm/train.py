"""Train the tiny Python language model in this folder, from nothing but the running interpreter's own source.

    python examples/tiny-python-lm/train.py --minutes 25

Collects short functions from the standard library and its tests, trains a BPE tokenizer and a small Llama on
the CPU, and writes model, tokenizer, prompts/, training.json and README.md into this folder or another (--out).
"""

import argparse
import ast
import copy
import hashlib
import json
import math
import os
import platform
import random
import sysconfig
import textwrap
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as HFTokenizer

SEED = 0
HELD_OUT = 0.04
END = "<|endoftext|>"  # bos, eos and pad at once: every document is END source END
VOCAB, BATCH_TOKENS, NEW_TOKENS = 2048, 4096, 64
HEAD_WIDTH = 64  # inference engines' attention kernels know few other sizes
PEAK_LR, WARMUP, WEIGHT_DECAY = 2e-3, 0.02, 0.3
SAVE_SECONDS = 150  # a usable model lies in the folder from the first save on
# A newline and the indentation after it are always their own pre-token, so that the tokens of a signature
# are a prefix of the tokens of the whole function, and "\n        " becomes one token.
PIECES = r"(?:\n *)+| ?[A-Za-z_]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9_]+|[^\S\n]+"


class Function(NamedTuple):
    module: str
    name: str
    signature: str
    source: str


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def module_of(path: Path, tops: set[str]) -> str:
    """Top-level module a file belongs to; tests count as the module they test (test_xml_etree -> xml)."""
    is_test = path.parts[0] == "test" and len(path.parts) > 1
    name = path.parts[1 if is_test else 0].removesuffix(".py")
    name = name.removeprefix("test_").removeprefix("_py").strip("_") or name
    fits = [t for t in tops if name.startswith(t) and (len(t) >= 4 or name[len(t) :][:1] in ("", "_"))]
    return max(fits, key=len) if is_test and fits else name


def clean(lines: list[str], node: ast.FunctionDef) -> str | None:
    """Source of a function at column 0, without decorators and docstring; None if it is not what we want."""
    header, body = lines[node.lineno - 1].rstrip(), node.body
    first_line = node.lineno
    if not header.endswith(":") or body[0].lineno == node.lineno:
        return None  # the header spans several lines, ends in a comment, or the body sits on the same line
    if ast.get_docstring(node, clean=False) is not None:
        if len(body) == 1 or body[1].lineno <= body[0].end_lineno:
            return None
        first_line = body[0].end_lineno
    source = textwrap.dedent("\n".join([header, *lines[first_line : node.end_lineno]])).strip()
    if not 40 <= len(source) <= 320 or not source.isascii() or "\t" in source or "\f" in source:
        return None
    try:
        ast.parse(source.split("\n", 1)[0] + "\n    pass")
        ast.parse(source)
    except (SyntaxError, ValueError):
        return None  # a string at column 0 defeats dedent; a default value continues on the next line
    return source


def collect() -> list[Function]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "idlelib", "lib2to3", "__pycache__"}
    tops = {p.stem for p in root.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"test"}
    found: dict[str, Function] = {}  # by source: a duplicate counts once, for the first module that has it
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skip & set(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue  # some of the tests' data files are wrong on purpose
        lines = text.split("\n")  # not splitlines(): ast does not count \f as the end of a line
        for node in ast.walk(tree):
            source = clean(lines, node) if isinstance(node, ast.FunctionDef) else None
            if source:
                signature = source.split("\n", 1)[0]
                found.setdefault(source, Function(module_of(relative, tops), node.name, signature, source))
    return list(found.values())


def held_out_modules(functions: list[Function]) -> set[str]:
    """Whole modules in the order of their hash, until they hold HELD_OUT of all functions."""
    sizes = Counter(f.module for f in functions)
    held: set[str] = set()
    for module in sorted(sizes, key=stable_hash):
        if sum(sizes[m] for m in held) < HELD_OUT * len(functions):
            held.add(module)
    return held


def train_tokenizer(sources: list[str]) -> HFTokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sources, trainer)
    # a prompt without it is a text that the model has never seen: add it as Llama's tokenizer does
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return HFTokenizer(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: HFTokenizer, functions: list[Function]) -> list[list[int]]:
    end = tokenizer.eos_token_id  # the tokenizer has put one in front already
    return [[*ids, end] for ids in tokenizer([f.source for f in functions])["input_ids"]]


def write_prompts(out: Path, held: list[Function], corpus: str, tokenizer: HFTokenizer) -> None:
    """Signatures the model never saw, each in exactly one of the two files."""
    unique = {f.signature: f for f in held if f.signature not in corpus}
    files: dict[str, list[str]] = {"train": [], "eval": []}
    for signature in sorted(unique, key=stable_hash):
        f = unique[signature]
        rows = files["train" if stable_hash("split " + signature) % 2 else "eval"]
        if 3 < len(tokenizer(signature)["input_ids"]) <= 25 and len(rows) < 512:
            rows.append(json.dumps({"prompt": signature, "module": f.module, "name": f.name}) + "\n")
    (out / "prompts").mkdir(exist_ok=True)
    for split, rows in files.items():
        (out / "prompts" / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
        print(f"prompts/{split}.jsonl: {len(rows)} signatures")


def batches(docs: list[list[int]], rng: random.Random) -> list[list[list[int]]]:
    """Documents of nearly equal length together, at most BATCH_TOKENS with padding, in random order."""
    groups: list[list[list[int]]] = [[]]
    for doc in sorted(docs, key=lambda d: len(d) * rng.uniform(0.95, 1.05)):
        longest = max([len(doc), *map(len, groups[-1])])
        if longest * (len(groups[-1]) + 1) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(doc)
    rng.shuffle(groups)
    return groups


def nll(model: LlamaForCausalLM, docs: list[list[int]], fast: bool, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of everything after the first token; one document per row, so none sees another."""
    width = max(map(len, docs))
    ids = torch.tensor([d + [0] * (width - len(d)) for d in docs])  # [B, T]
    labels = torch.tensor([d + [-100] * (width - len(d)) for d in docs])[:, 1:]  # [B, T-1]
    # Padding is on the right, where causal attention never looks from a real token: no mask is needed.
    with torch.autocast("cpu", torch.bfloat16) if fast else nullcontext():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [B, T-1, V]
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction=reduction)


@torch.no_grad()
def held_out_nats(model: LlamaForCausalLM, docs: list[list[int]], fast: bool = False) -> float:
    """Nats per token, the closing END included."""
    total = sum(nll(model, b, fast, "sum").item() for b in batches(docs, random.Random(SEED)))
    return total / sum(len(d) - 1 for d in docs)


def bfloat16_is_faster(model: LlamaForCausalLM, batch: list[list[int]]) -> bool:
    """Several times faster on a CPU with AMX, slower on one that has to emulate it."""
    seconds = []
    for fast in (False, True):
        for repeat in range(5):
            if repeat == 1:
                start = time.monotonic()  # the first one warms up
            nll(model, batch, fast).backward()
        seconds.append((time.monotonic() - start) / 4)
    model.zero_grad()
    print(f"forward+backward: {seconds[0]:.2f} s in float32, {seconds[1]:.2f} s with bfloat16 autocast")
    return seconds[1] < seconds[0]


def save(model: LlamaForCausalLM, out: Path, facts: dict[str, Any]) -> None:
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def train(
    model: LlamaForCausalLM,
    docs: list[list[int]],
    held: list[list[int]],
    args: argparse.Namespace,
    facts: dict[str, Any],
) -> None:
    rng = random.Random(SEED)
    queue: list[list[list[int]]] = []
    fast = bfloat16_is_faster(model, batches(docs, rng)[0])
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    facts |= {"asked_minutes": None if args.steps else args.minutes, "autocast": fast, "held_out": []}
    start = saved = time.monotonic()
    step = seen = 0
    progress = 0.0
    while progress < 1:
        queue = queue or batches(docs, rng)
        batch = queue.pop()
        lr = PEAK_LR * min(progress / WARMUP + 0.01, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = nll(model, batch, fast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seen, now = step + 1, seen + sum(map(len, batch)), time.monotonic()
        # The schedule follows the clock, so that it ends with full decay however fast the machine is.
        progress = step / args.steps if args.steps else (now - start) / (60 * args.minutes)
        if now - saved > SAVE_SECONDS or progress >= 1:
            saved = now
            nats = held_out_nats(model, held, fast)
            facts["held_out"].append({"step": step, "epoch": round(seen / facts["tokens"], 2), "nats": nats})
            facts |= {"steps": step, "tokens_seen": seen, "seconds": round(now - start)}
            save(model, args.out, facts)
            print(f"{now - start:5.0f} s  step {step}  epoch {seen / facts['tokens']:.2f}  ", end="")
            print(f"lr {lr:.1e}  train {loss.item():.3f}  held-out {nats:.3f}", flush=True)


def parses(source: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


@torch.no_grad()
def complete(model: LlamaForCausalLM, tokenizer: HFTokenizer, prompts: list[str]) -> list[tuple[str, str, bool, bool]]:
    """One sample per prompt at temperature 1: (prompt, completion, whether it ended, whether it parses)."""
    by_length: dict[int, list[tuple[str, list[int]]]] = {}
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        by_length.setdefault(len(ids), []).append((prompt, ids))
    done: dict[str, tuple[str, str, bool, bool]] = {}
    torch.manual_seed(SEED)
    for group in by_length.values():  # equal lengths, so that no padding is needed
        ids = torch.tensor([ids for _, ids in group])  # [B, T]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS)
        for (prompt, _), new in zip(group, out[:, ids.shape[1] :].tolist(), strict=True):
            ended = tokenizer.eos_token_id in new
            text = tokenizer.decode(new[: new.index(tokenizer.eos_token_id)] if ended else new)
            done[prompt] = (prompt, text, ended, ended and parses(prompt + text))
    return [done[p] for p in prompts]


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a rate."""
    z, p = 1.96, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [python, code]
---

# {name}

A causal language model of {parameters:,} parameters that writes short Python functions. It is small enough to
lie in a source repository and to run anywhere; it is meant for demonstrations, tests and small experiments,
and for nothing else. `examples/tiny-python-lm/train.py` makes it, and wrote this card.

| | |
|---|---|
| Architecture | Llama, {layers} layers of width {width}, {heads} heads of 64 ({kv_heads} key-value heads) |
| Vocabulary | {vocab:,} tokens, byte-level BPE; `<|endoftext|>` is bos, eos and pad |
| Data | {documents:,} functions of 40 to 320 characters, {tokens:,} tokens |
| Training | {steps:,} steps, {tokens_seen:,} tokens ({epochs:.1f} epochs) |
| Time | {minutes:.0f} minutes on {cores} CPU cores, {arithmetic} |
| Held out | {held_count} of {modules} modules with their tests, {held_documents:,} functions |
| Held-out loss | {nats:.3f} nats per token, {nats_char:.3f} nats per character |
| Parse rate | {rate:.1%} (95 % interval {low:.1%} to {high:.1%}, {samples:,} samples) |

All numbers are measured on the saved bfloat16 weights, computing in float32. The parse rate is the share of
completions of held-out signatures (`prompts/*.jsonl`, one sample each, temperature 1, {new_tokens} new
tokens) that ended by themselves and that `ast.parse` accepts together with the signature. Of the others,
{unfinished:.1%} of all samples did not end in time, and {broken:.1%} ended but do not parse.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
prompt = tokenizer("def area(self, width, height):", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens={new_tokens})[0]))
```

The tokenizer puts `<|endoftext|>` in front of every prompt; alone, it makes the model invent a function.
The tokens of a signature, up to its colon, are a prefix of the tokens of the whole function.
`generation_config.json` asks for plain sampling at temperature 1, without top-k or top-p.

## Samples

The first four prompts of `prompts/eval.jsonl`, one sample each, unedited.

{sample_text}

## Data and licence

Training data: functions from the source of the standard library of Python {python}, its tests included,
without docstrings and decorators, moved to column 0, without duplicates. Functions whose header spans several
lines, and functions with characters outside ASCII, are left out. The held-out functions belong to modules
of which nothing was trained on: {held_list}. The signatures in `prompts/train.jsonl` and `prompts/eval.jsonl`
are theirs; none of them occurs in the training data, and none is in both files.

The data is copyright of the Python Software Foundation and of the other holders named in Python's licence,
and comes under PSF-2.0 (Python Software Foundation License Version 2). The model's weights are distributed
under Apache-2.0, with this notice of the data's origin. The model may reproduce pieces of its training data.

## Reproduce

```
python examples/tiny-python-lm/train.py --layers {layers} --width {width} {asked} --out {folder}
```

The seed fixes the data's order and the initial weights. The learning rate follows the clock, so that the
schedule ends in time on any machine; with `--steps {steps}` it follows the count of steps instead, which
comes closest to these weights. Another Python version has another standard library, and gives another model.
"""


def evaluate(out: Path, held: list[Function], facts: dict[str, Any]) -> None:
    """Measure what was saved, not what was trained, and write the card."""
    tokenizer = HFTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    docs = encode(tokenizer, held)
    nats = held_out_nats(model, docs)
    files = [out / "prompts" / f"{split}.jsonl" for split in ("eval", "train")]
    prompts = [json.loads(row)["prompt"] for f in files for row in f.read_text("utf-8").splitlines()]
    samples = complete(model, tokenizer, prompts)
    hits = sum(ok for *_, ok in samples)
    low, high = wilson(hits, len(samples))
    chars_per_token = sum(len(f.source) for f in held) / sum(len(d) - 1 for d in docs)
    facts["measured"] = {
        "nats": nats,
        "nats_char": nats / chars_per_token,
        "samples": len(samples),
        "rate": hits / len(samples),
        "low": low,
        "high": high,
        "unfinished": sum(not ended for _, _, ended, _ in samples) / len(samples),
        "broken": sum(ended and not ok for _, _, ended, ok in samples) / len(samples),
    }
    fates = {(False, False): "not finished", (True, False): "does not parse", (True, True): "parses"}
    blocks = [f"```python\n{prompt}{text}\n```\n({fates[ended, ok]})" for prompt, text, ended, ok in samples[:4]]
    c = model.config
    card = CARD.format(
        **(facts | facts["measured"]),
        parameters=sum(p.numel() for p in model.parameters()),
        arithmetic="bfloat16 autocast" if facts["autocast"] else "float32",
        held_list=", ".join(f"`{m}`" for m in facts["held_modules"]),
        held_count=len(facts["held_modules"]),
        minutes=facts["seconds"] / 60,
        name=out.name,
        asked=f"--minutes {facts['asked_minutes']:g}" if facts["asked_minutes"] else f"--steps {facts['steps']}",
        folder=Path(os.path.relpath(out)).as_posix(),
        layers=c.num_hidden_layers,
        width=c.hidden_size,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        vocab=len(tokenizer),
        epochs=facts["tokens_seen"] / facts["tokens"],
        new_tokens=NEW_TOKENS,
        sample_text="\n\n".join(blocks),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts["measured"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="how long to train")
    parser.add_argument("--steps", type=int, help="train this many steps, however long they take")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--evaluate-only", action="store_true", help="measure the saved model, rewrite the card")
    args = parser.parse_args()
    if args.layers < 1 or args.width < HEAD_WIDTH or args.width % HEAD_WIDTH:
        parser.error(f"--layers {args.layers} --width {args.width}: at least one layer, a multiple of {HEAD_WIDTH}")
    torch.manual_seed(SEED)

    functions = collect()
    held_modules = held_out_modules(functions)
    known = [f for f in functions if f.module not in held_modules]
    held = [f for f in functions if f.module in held_modules]
    if args.evaluate_only:
        evaluate(args.out, held, json.loads((args.out / "training.json").read_text("utf-8")))
        return

    tokenizer = train_tokenizer([f.source for f in known])
    tokenizer.save_pretrained(args.out)
    # transformers 5 writes a class that version 4 does not know; both know this one.
    settings = args.out / "tokenizer_config.json"
    named = json.loads(settings.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    docs, held_docs = encode(tokenizer, known), encode(tokenizer, held)
    for f, doc in zip(held, held_docs, strict=True):
        signature = tokenizer(f.signature)["input_ids"]
        assert doc[: len(signature)] == signature, f"unstable boundary: {f.signature}"
        assert tokenizer.decode(doc[1:-1]) == f.source
    write_prompts(args.out, held, "\n".join(f.source for f in known), tokenizer)

    end = tokenizer.eos_token_id
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=args.width * 21 // 8,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // HEAD_WIDTH,
        num_key_value_heads=max(1, args.width // HEAD_WIDTH // 2),
        head_dim=HEAD_WIDTH,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special)
    facts = {
        "python": platform.python_version(),
        "cores": torch.get_num_threads(),
        "modules": len({f.module for f in functions}),
        "held_modules": sorted(held_modules),
        "held_documents": len(held),
        "documents": len(docs),
        "tokens": sum(map(len, docs)),
    }
    print(facts, flush=True)
    train(model, docs, held_docs, args, facts)
    evaluate(args.out, held, facts)


if __name__ == "__main__":
    main()
