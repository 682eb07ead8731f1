"""Train the tiny summariser in this folder, from nothing but docstrings of packages that fdpg-fast needs anyway.

    python examples/tiny-summariser/train.py --minutes 8.5

A docstring's first line says in short what the rest says at length (PEP 257): name, parameters and the rest are the
source, the first line is the summary. Trains a BPE tokenizer and a small T5 on the CPU, and writes everything else in
this folder: model, tokenizer, prompts/, training.json and README.md.
"""

import argparse
import ast
import copy
import hashlib
import json
import math
import platform
import random
import re
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers import PreTrainedTokenizerFast as HFTokenizer

from fdpg_fast.features.entities import named

SEED = 0
PACKAGES = ("torch", "numpy", "transformers")
HELD_OUT = 0.1
PAD, END = "<pad>", "</s>"
VOCAB, BATCH_TOKENS, SOURCE_TOKENS, NEW_TOKENS = 4096, 1536, 64, 32
# The learning rate of a matrix is PEAK_LR times the root mean square of its initial entries: T5's differ by a
# factor of 100 (its attention has no 1/sqrt(d), the queries' weights hold it instead).
PEAK_LR, WARMUP, WEIGHT_DECAY = 1e-2, 0.05, 0.01
SENTENCE_END = re.compile(r"(?<=\.) (?=[A-Z`])")
MOST_CHARACTERS = 240  # of a source, before its tokens are counted
SAVE_SECONDS = 60
PIECES = r" ?[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]+|\s+"


class Pair(NamedTuple):
    module: str
    source: str
    summary: str
    gap: bool  # a sentence out of the middle, to train on only


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented() -> Iterator[tuple[str, Documented, str]]:
    """(module, definition, docstring) of everything in the standard library and PACKAGES that has one."""
    paths = sysconfig.get_paths()
    for root in (Path(paths["stdlib"]), *(Path(paths["purelib"]) / package for package in PACKAGES)):
        parent = root if root == Path(paths["stdlib"]) else root.parent
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(parent).with_suffix("").parts
            if parts[0] in ("site-packages", "idlelib", "lib2to3") or parts[0].startswith("config-"):
                continue
            # models of transformers and parts of torch are as separate as modules of the standard library
            module = ".".join(parts[: 3 if parts[:2] == ("transformers", "models") else 2])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError, RecursionError):
                continue  # some of the tests' data files are wrong on purpose
            for node in ast.walk(tree):
                if isinstance(node, Documented) and (text := ast.get_docstring(node)):
                    yield module, node, text


def signature(node: Documented) -> str:
    """`class Name` or `name(first, second)`, without self and cls."""
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return f"{node.name}({', '.join(name for name in names if name not in ('self', 'cls'))})"


def can_be_drawn(summary: str, source: str) -> bool:
    """Whether the source holds every name in the summary and half of its words: only such a summary can be learnt."""
    words, known = (set(re.findall(r"[a-z]{4,}", text.lower())) for text in (summary, source))
    return named(summary) <= named(source, first_words=True) and 2 * len(words & known) >= len(words)


def collect() -> list[Pair]:
    """Sources as one line of text, and their summaries; neither occurs twice.

    There are too few first lines to learn from. So other sentences that name something stand in for summaries as well,
    with the rest of the docstring as their source.
    """
    pairs, seen = [], set()
    for module, node, text in documented():
        first, _, rest = text.partition("\n")
        body = " ".join(rest.split())
        sentences = SENTENCE_END.split(body)[:6]
        gaps = [i for i, sentence in enumerate(sentences) if named(sentence)][:3]
        for i in (None, *gaps):
            summary = first.strip() if i is None else sentences[i]
            rest = body if i is None else " ".join(sentences[:i] + sentences[i + 1 :])
            source = f"{signature(node)}: {rest}"[:MOST_CHARACTERS]
            # PEP 257: a sentence on a line of its own
            well_formed = len(rest) >= 20 and re.fullmatch(r"[A-Z`].{10,88}\.", summary)
            known = bool({summary, source} & seen)
            if well_formed and (summary + source).isascii() and not known and can_be_drawn(summary, source):
                seen |= {summary, source}
                pairs.append(Pair(module, source, summary, i is not None))
    return pairs


def held_out_modules(pairs: list[Pair]) -> set[str]:
    """Whole modules in the order of their hash, until they hold HELD_OUT of all pairs."""
    sizes = Counter(p.module for p in pairs if not p.gap)
    held: set[str] = set()
    for module in sorted(sizes, key=stable_hash):
        if sum(sizes[m] for m in held) < HELD_OUT * sizes.total():
            held.add(module)
    return held


def train_tokenizer(texts: list[str]) -> HFTokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return HFTokenizer(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def shorten(tokenizer: HFTokenizer, pairs: list[Pair]) -> list[Pair]:
    """The sources' first words, of SOURCE_TOKENS tokens at most, END included."""
    short = []
    for pair, code in zip(pairs, tokenizer([p.source for p in pairs]).encodings, strict=True):
        source = pair.source
        if len(code.ids) > SOURCE_TOKENS:
            source = source[: code.offsets[SOURCE_TOKENS - 1][0] + 1].rpartition(" ")[0]
        short.append(pair._replace(source=source))
    return short


Row = tuple[list[int], list[int]]  # source and target, each with END


def encode(tokenizer: HFTokenizer, sources: list[str], targets: list[str]) -> list[Row]:
    return list(zip(tokenizer(sources)["input_ids"], tokenizer(targets)["input_ids"], strict=True))


def write_prompts(out: Path, held: list[Pair]) -> None:
    files: dict[str, list[str]] = {"train": [], "eval": []}
    for pair in sorted(held, key=lambda p: stable_hash(p.source)):
        rows = files["train" if stable_hash("split " + pair.source) % 2 else "eval"]
        if len(rows) < 512:
            row = {"prompt": pair.source, "summary": pair.summary, "module": pair.module}
            rows.append(json.dumps(row) + "\n")
    (out / "prompts").mkdir(exist_ok=True)
    for split, rows in files.items():
        (out / "prompts" / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
        print(f"prompts/{split}.jsonl: {len(rows)} sources")


def batches(rows: list[Row], rng: random.Random) -> list[list[Row]]:
    """Sources of nearly equal length together, at most BATCH_TOKENS with padding, in random order."""
    groups: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda r: len(r[0]) * rng.uniform(0.95, 1.05)):
        longest = max(len(source) for source, _ in [row, *groups[-1]])
        if longest * (len(groups[-1]) + 1) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    return groups


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def nll(model: T5ForConditionalGeneration, rows: list[Row], fast: bool, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of the targets, their closing END included."""
    sources = padded([source for source, _ in rows], 0)  # [B, S]
    mask = padded([[1] * len(source) for source, _ in rows], 0)
    labels = padded([target for _, target in rows], -100)  # [B, T]
    with torch.autocast("cpu", torch.bfloat16) if fast else nullcontext():
        logits = model(input_ids=sources, attention_mask=mask, labels=labels).logits  # [B, T, V]
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction=reduction)


@torch.no_grad()
def held_out_nats(model: T5ForConditionalGeneration, rows: list[Row], fast: bool = False) -> float:
    """Nats per token of the summaries, the closing END included."""
    model.eval()
    total = sum(nll(model, b, fast, "sum").item() for b in batches(rows, random.Random(SEED)))
    return total / sum(len(target) for _, target in rows)


def bfloat16_is_faster(model: T5ForConditionalGeneration, batch: list[Row]) -> bool:
    """Several times faster on a CPU with AMX, slower on one that has to emulate it."""
    seconds = []
    for fast in (False, True):
        for repeat in range(4):
            if repeat == 1:
                start = time.monotonic()  # the first one warms up
            nll(model, batch, fast).backward()
        seconds.append((time.monotonic() - start) / 3)
    model.zero_grad()
    print(f"forward+backward: {seconds[0]:.2f} s in float32, {seconds[1]:.2f} s with bfloat16 autocast")
    return seconds[1] < seconds[0]


@torch.no_grad()
def start_as_copier(model: T5ForConditionalGeneration) -> None:
    """Initial weights that go on copying from the source what the decoder has begun to write there.

    From random matrices, minutes of training do not teach it to write a name of several tokens. The encoder's first
    attention looks at the token before. The decoder's, in each head, asks with its last token for positions whose
    token before was the same, finds them because its keys undo what the encoder did, and adds what stands there.
    """
    before = model.encoder.block[0].layer[0].SelfAttention
    before.relative_attention_bias.weight[1] = 8.0  # the bucket of distance -1
    for number, block in enumerate(model.decoder.block):
        across = block.layer[1].EncDecAttention
        torch.nn.init.eye_(across.v.weight)
        torch.nn.init.eye_(across.o.weight)
        if number == 0:
            across.q.weight.copy_(0.1 * before.v.weight)
            heads = before.o.weight.split(model.config.d_kv, dim=1)  # [D, d] each
            across.k.weight.copy_(torch.cat([torch.linalg.pinv(head) for head in heads]))


def train(
    model: T5ForConditionalGeneration,
    rows: list[Row],
    held: list[Row],
    args: argparse.Namespace,
    facts: dict[str, Any],
) -> None:
    rng = random.Random(SEED)
    fast = bfloat16_is_faster(model, batches(rows, rng)[0])
    groups = [
        {"params": [p], "scale": float(p.detach().square().mean().sqrt()), "weight_decay": WEIGHT_DECAY * (p.ndim > 1)}
        for p in model.parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    facts |= {"asked_minutes": args.minutes, "autocast": fast, "held_out": []}
    queue: list[list[Row]] = []
    start = saved = time.monotonic()
    step = seen = 0
    progress = 0.0
    while progress < 1:
        queue = queue or batches(rows, rng)
        batch = queue.pop()
        lr = PEAK_LR * min(progress / WARMUP + 0.01, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        loss = nll(model.train(), batch, fast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seen, now = step + 1, seen + len(batch), time.monotonic()
        # The schedule follows the clock, so that it ends with full decay however fast the machine is.
        progress = step / args.steps if args.steps else (now - start) / (60 * args.minutes)
        if now - saved > SAVE_SECONDS or progress >= 1:
            saved = now
            nats = held_out_nats(model, held, fast)
            facts["held_out"].append({"step": step, "pairs": seen, "nats": nats})
            facts |= {"steps": step, "pairs_seen": seen, "seconds": round(now - start)}
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(args.out)
            (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            print(f"{now - start:5.0f} s  step {step}  {seen / len(rows):.2f} epochs  ", end="")
            print(f"train {loss.item():.3f}  held-out {nats:.3f}", flush=True)


class Sample(NamedTuple):
    source: str
    reference: str
    text: str
    ended: bool

    def overlap(self) -> float:
        """F1 of the words that sample and reference have in common: ROUGE-1 without stemming."""
        ours, theirs = (Counter(re.findall(r"\w+", text.lower())) for text in (self.text, self.reference))
        return 2 * (ours & theirs).total() / max(1, ours.total() + theirs.total())

    def faithful(self, least: int) -> bool:
        names = named(self.text)
        return self.ended and len(names) >= least and names <= named(self.source, first_words=True)


@torch.no_grad()
def summarise(model: T5ForConditionalGeneration, tokenizer: HFTokenizer, rows: list[dict[str, str]]) -> list[Sample]:
    """One sample per source at temperature 1."""
    torch.manual_seed(SEED)
    done = []
    for first in range(0, len(rows), 64):
        part = rows[first : first + 64]
        inputs = tokenizer([row["prompt"] for row in part], padding=True, return_tensors="pt")
        out = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=NEW_TOKENS)
        for row, ids in zip(part, out[:, 1:].tolist(), strict=True):
            ended = tokenizer.eos_token_id in ids
            text = tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)] if ended else ids)
            done.append(Sample(row["prompt"], row["summary"], text, ended))
    return done


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: summarization
tags: [python, docstrings]
---

# tiny-summariser

An encoder-decoder of {parameters:,} parameters that reads a Python docstring without its first line and writes that
line. It is small enough to lie in a source repository and to run anywhere; it is meant for demonstrations, tests and
small experiments, and for nothing else: what it writes has the form of a summary, but is often made up.
`train.py` in this folder makes it, and wrote this card.

| | |
|---|---|
| Architecture | T5, {layers} + {decoder_layers} layers of width {width}, {heads} heads of {head_width}, tied head |
| Vocabulary | {vocab:,} tokens, byte-level BPE; `<pad>` starts the decoder, `</s>` ends source and summary |
| Data | {pairs:,} pairs, {gaps:,} of them gaps (below); {source_tokens:,} + {target_tokens:,} tokens |
| Training | {steps:,} steps, {pairs_seen:,} pairs ({epochs:.1f} epochs) |
| Time | {minutes:.0f} minutes on {cores} CPU core(s), {arithmetic} |
| Held out | {held_count} of {modules} modules, {held_pairs:,} docstrings |
| Held-out loss | {nats:.3f} nats per token, {nats_char:.3f} per character; at its best {least:.3f}, step {best:,} |
| Words in common with the true line | {overlap:.3f} (F1); {shuffled:.3f} with the line of another docstring |
| Names only what the source names | {faithful_1:.1%} with one name at least, {faithful_2:.1%} with two |

All numbers are measured on the saved bfloat16 weights, computing in float32. The last two rows come from {samples:,}
samples: one for each source in `prompts/*.jsonl`, at temperature 1, {new_tokens} new tokens, of which {unfinished:.1%}
did not end in time. What a name is: `fdpg_fast/features/entities.py`. Of the true first lines {true_faithful_1:.1%}
name something, and only what stands in the source.

## Use

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder = "examples/tiny-summariser"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="float32")
source = tokenizer("size(items): Raises TypeError if `items` has no length.", return_tensors="pt")
print(tokenizer.decode(model.generate(**source, max_new_tokens={new_tokens})[0], skip_special_tokens=True))
```

A source is one line of at most {most_tokens} tokens: the name, the parameters and, after a colon, what follows the
docstring's first line, with single spaces.
`generation_config.json` asks for plain sampling at temperature 1, without top-k or top-p.

## Samples

The first four sources of `prompts/eval.jsonl`, one sample each, unedited.

{sample_text}

## Data and licence

Training data: docstrings of the standard library of Python {python} and of {packages}, whose first line is a sentence
of its own that can be drawn from the rest (it names nothing else, and half of its words stand there), ASCII only,
without duplicates; and gaps: other sentences of a docstring that name something, with the rest of it as the source.
The held-out docstrings belong to modules of which nothing was trained on:
{held_list}. The sources in `prompts/train.jsonl` and `prompts/eval.jsonl` are theirs; none is in both files.

The docstrings are copyright of the Python Software Foundation (PSF-2.0), of the PyTorch contributors (BSD-3-Clause),
of the NumPy developers (BSD-3-Clause) and of the Hugging Face team and contributors (Apache-2.0), and come under these
licences. The model's weights are distributed under Apache-2.0, with this notice of the data's origin. The model may
reproduce pieces of its training data.

## Reproduce

```
python examples/tiny-summariser/train.py --minutes {asked_minutes:g} --threads {cores}
```

The seed fixes the data's order and the initial weights, some of which are no chance but made to copy from the source
(`start_as_copier`). The learning rate follows the clock, so that the schedule ends in
time on any machine; with `--steps {steps}` it follows the count of steps instead, which comes closest to these
weights. Other versions of the packages have other docstrings, and give another model.
"""


def evaluate(out: Path, facts: dict[str, Any], held: list[Pair]) -> None:
    """Measure what was saved, not what was trained, and write the card."""
    tokenizer = HFTokenizer.from_pretrained(out)
    model = AutoModelForSeq2SeqLM.from_pretrained(out, dtype=torch.float32).eval()
    rows = encode(tokenizer, [p.source for p in held], [p.summary for p in held])
    nats = held_out_nats(model, rows)
    files = [out / "prompts" / f"{split}.jsonl" for split in ("eval", "train")]
    prompts = [json.loads(line) for f in files for line in f.read_text("utf-8").splitlines()]
    samples = summarise(model, tokenizer, prompts)
    turned = [s._replace(reference=t.reference) for s, t in zip(samples, samples[1:] + samples[:1], strict=True)]
    true = [s._replace(text=s.reference, ended=True) for s in samples]

    def share(values: Any) -> float:
        return sum(values) / len(samples)

    facts["measured"] = {
        "nats": nats,
        "nats_char": nats * sum(len(t) for _, t in rows) / sum(len(p.summary) for p in held),
        "samples": len(samples),
        "unfinished": share(not s.ended for s in samples),
        "overlap": share(s.overlap() for s in samples),
        "shuffled": share(s.overlap() for s in turned),
        "faithful_1": share(s.faithful(1) for s in samples),
        "faithful_2": share(s.faithful(2) for s in samples),
        "true_faithful_1": share(s.faithful(1) for s in true),
    }
    blocks = [
        f"> {s.source}\n\n- sampled: {s.text}{'' if s.ended else ' (not finished)'}\n- true: {s.reference}"
        for s in samples[:4]
    ]
    c = model.config
    card = CARD.format(
        **(facts | facts["measured"]),
        least=min(saved["nats"] for saved in facts["held_out"]),
        best=min(facts["held_out"], key=lambda saved: saved["nats"])["step"],
        parameters=sum(p.numel() for p in model.parameters()),
        arithmetic="bfloat16 autocast" if facts["autocast"] else "float32",
        held_list=", ".join(f"`{m}`" for m in facts["held_modules"]),
        held_count=len(facts["held_modules"]),
        packages=", ".join(f"{name} {number}" for name, number in facts["packages_used"].items()),
        minutes=facts["seconds"] / 60,
        epochs=facts["pairs_seen"] / facts["pairs"],
        layers=c.num_layers,
        decoder_layers=c.num_decoder_layers,
        width=c.d_model,
        heads=c.num_heads,
        head_width=c.d_kv,
        vocab=len(tokenizer),
        new_tokens=NEW_TOKENS,
        most_tokens=SOURCE_TOKENS,
        sample_text="\n\n".join(blocks),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts["measured"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="how long to train")
    parser.add_argument("--steps", type=int, help="train this many steps, however long they take")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU cores to use")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--evaluate-only", action="store_true", help="measure the saved model, rewrite the card")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(args.threads)

    pairs = collect()
    held_modules = held_out_modules(pairs)
    if args.evaluate_only:
        tokenizer = HFTokenizer.from_pretrained(args.out)
    else:
        known = [p for p in pairs if p.module not in held_modules]
        tokenizer = train_tokenizer([text for p in known for text in (p.source, p.summary)])
        tokenizer.save_pretrained(args.out)
        # transformers 5 writes a class that version 4 does not know; both know this one.
        settings = args.out / "tokenizer_config.json"
        saved = json.loads(settings.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    pairs = shorten(tokenizer, pairs)
    held = [p for p in pairs if p.module in held_modules and not p.gap]
    if args.evaluate_only:
        evaluate(args.out, json.loads((args.out / "training.json").read_text("utf-8")), held)
        return

    known = [p for p in pairs if p.module not in held_modules]
    write_prompts(args.out, held)
    rows, held_rows = (encode(tokenizer, [p.source for p in s], [p.summary for p in s]) for s in (known, held))
    for pair, (_, target) in zip(held, held_rows, strict=True):
        assert tokenizer.decode(target[:-1]) == pair.summary

    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    special["decoder_start_token_id"] = tokenizer.pad_token_id
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=256,
        d_kv=64,
        d_ff=512,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        **special,
    )
    model = T5ForConditionalGeneration(config)
    start_as_copier(model)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special)
    facts = {
        "python": platform.python_version(),
        "packages_used": {name: version(name).partition("+")[0] for name in PACKAGES},
        "cores": torch.get_num_threads(),
        "modules": len({p.module for p in pairs}),
        "held_modules": sorted(held_modules),
        "held_pairs": len(held),
        "pairs": len(rows),
        "gaps": sum(p.gap for p in known),
        "source_tokens": sum(len(source) for source, _ in rows),
        "target_tokens": sum(len(target) for _, target in rows),
    }
    print(facts, flush=True)
    train(model, rows, held_rows, args, facts)
    evaluate(args.out, facts, held)


if __name__ == "__main__":
    main()
