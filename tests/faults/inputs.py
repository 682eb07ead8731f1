"""Bad input: exit status 2, one line that names what is wrong, and nothing written.

Each table maps what is given to a word that the line must hold.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from support import runs

from . import Tally, tried

A = "{kind: pointwise, feature: {kind: word, word: a}}"
KEYS = {
    # names
    "--modle=x": "model",
    "--Model=x": "model",
    "--trainer.round=3": "trainer.rounds",
    "--trainer.rounds.x=3": "trainer.rounds",
    "--rounds=3": "trainer.rounds",
    "--engine.temperature=0.7": "temperature",
    "--engine.top_k=5": "top_k",
    "--top_p=0.9": "top_p",
    "--target.0.feature.patern=x": "pattern",
    "--target.7.feature.name=x": "target",
    "--target.x.feature.name=x": "target",
    "--contexts=prompts.jsonl": "contexts",
    "--lora.r=4": "lora",
    "--optimizer.lr=1": "optimizer",
    "--optimizer.kind=sgd": "optimizer.kind",
    # numbers
    "--trainer.rounds=many": "trainer.rounds",
    "--trainer.rounds=0": "trainer.rounds",
    "--trainer.rounds=-3": "trainer.rounds",
    "--trainer.rounds=2.5": "trainer.rounds",
    "--trainer.rounds=null": "trainer.rounds",
    "--trainer.rounds=true": "rounds",
    "--trainer.rounds=[3]": "trainer.rounds",
    "--trainer.rounds=2024-13-45": "trainer.rounds",
    "--trainer.rounds=2024-10-05": "trainer.rounds",
    "--trainer.rounds=!!int x": "trainer.rounds",
    "--trainer.rounds=!!timestamp x": "trainer.rounds",
    "--trainer.rounds=" + "9" * 5000: "trainer.rounds",
    "--trainer.rounds=" + "[" * 3000: "trainer.rounds",
    "--trainer.seed=-1": "trainer.seed",
    "--trainer.seed=4294967296": "trainer.seed",
    "--trainer.seed=1e3000": "trainer.seed",
    "--trainer.samples_per_context=1": "leave_one_out",
    "--trainer.samples_per_context=1000000000000": "samples_per_context",
    "--evaluation.samples_per_context=1": "evaluation.samples_per_context",
    "--evaluation.samples_per_context=1000000000000": "evaluation.samples_per_context",
    "--trainer.pipeline_depth=-1": "pipeline_depth",
    "--trainer.micro_batch_tokens=0": "micro_batch_tokens",
    "--trainer.checkpoint_every=0": "checkpoint_every",
    "--engine.max_new_tokens=0": "max_new_tokens",
    "--engine.max_new_tokens=96": "max_new_tokens",
    "--engine.max_new_tokens=1000000000000000000000": "max_new_tokens",
    "--engine.max_sequences=0": "max_sequences",
    "--engine.gap_limit=0": "gap_limit",
    "--engine.gap_limit=nan": "gap_limit",
    "--engine.request_timeout=0": "request_timeout",
    "--engine.request_timeout=inf": "request_timeout",
    "--engine.request_timeout=1e10": "request_timeout",
    "--optimizer.learning_rate=inf": "learning_rate",
    "--optimizer.learning_rate=nan": "learning_rate",
    "--optimizer.learning_rate=0": "learning_rate",
    "--optimizer.learning_rate=-1e-4": "learning_rate",
    "--optimizer.learning_rate=1e-4 or so": "learning_rate",
    "--optimizer.warmup_rounds=-1": "warmup_rounds",
    "--optimizer.weight_decay=-0.1": "weight_decay",
    "--optimizer.max_grad_norm=0": "max_grad_norm",
    "--optimizer.schedule=exponential": "schedule",
    "--loss.ratio_cap=0": "ratio_cap",
    "--loss.ratio_drop=1": "ratio_drop",
    "--loss={ratio_drop: 2, ratio_cap: 2}": "ratio_drop",
    "--loss.reward_cap=-1": "reward_cap",
    "--loss.baseline=mean": "baseline",
    "--loss.ratio=token": "ratio",
    "--partition.kind=exact": "partition.kind",
    "--partition.per_context=maybe": "per_context",
    "--target_fit_samples=0": "target_fit_samples",
    "--lora={rank: 0}": "lora.rank",
    "--lora={rank: 2, alpha: 0}": "lora.alpha",
    "--lora={rank: 2, target_modules: attention}": "target_modules",
    "--lora={rank: 2, target_modules: [nowhere]}": "nowhere",
    "--lora={rank: 2, target_modules: []}": "target_modules",
    "--lora=4": "lora",
    "--base=./nowhere": "base.model",
    "--base=[a]": "base",
    "--base={refresh_every: 0}": "base.refresh_every",
    "--target.0={kind: base_power, kappa: -1}": "kappa",
    "--target.0={kind: base_power, kappa: .inf}": "kappa",
    # values that exclude each other
    "--divergence=kl": "divergence",
    "--divergence=": "divergence",
    "--divergence=alpha:2": "alpha:2",
    "--divergence=alpha:0": "alpha:0",
    "--divergence=alpha:x": "alpha:x",
    "--divergence=alpha:0.2..1.5": "alpha",
    "--divergence=reverse_kl": "divergence",
    "--divergence=absent.py:mine": "absent.py",
    "--divergence=own.py:ones": "own.py",
    "--dtype=float16": "dtype",
    "--device=abacus": "abacus",
    "--device=cuda:99": "cuda:99",
    "--device=": "device",
    "--engine.kind=vllm_server": "engine.urls",
    "--engine={kind: vllm_server, urls: ['gpu-box:8000'], weight_transfer: disk, weights_dir: w}": "gpu-box:8000",
    "--engine={kind: vllm_server, urls: ['http://'], weight_transfer: disk, weights_dir: w}": "engine.urls",
    "--engine={kind: vllm_server, urls: ['http://a:b'], weight_transfer: disk, weights_dir: w}": "http://a:b",
    "--engine={kind: vllm_server, urls: ['http://a:99999'], weight_transfer: disk, weights_dir: w}": "http://a:99999",
    "--engine={kind: vllm_server, urls: ['http://me:pw@a:1'], weight_transfer: disk, weights_dir: w}": "engine.urls",
    "--engine={kind: vllm_server, urls: ['http://a:1'], weight_transfer: disk}": "weights_dir",
    "--engine={kind: vllm_server, urls: ['http://a:1'], weight_transfer: carrier}": "weight_transfer",
    "--engine.kind=sglang": "engine.kind",
    "--tracking=[paper]": "paper",
    "--tracking=wandb": "tracking",
    "--trainer=5": "trainer",
    "--trainer=null": "trainer",
    "--evaluation=[]": "evaluation",
    # targets
    "--target=[]": "target",
    "--target={}": "target",
    "--target.0={kind: pointwise}": "target.0.feature",
    "--target.0={kind: prompted}": "prompted",
    "--target.0.feature={word: tea}": "kind",
    "--target.0.feature.kind=wrod": "wrod",
    "--target.0.feature={kind: word}": "word",
    "--target.0.feature={kind: word, word: ''}": "word",
    "--target.0.feature={kind: regex, pattern: '('}": "(",
    "--target.0.feature={kind: regex, pattern: 'a{99999999999}'}": "regex",
    "--target.0.feature={kind: regex, pattern: '" + "(" * 2000 + "'}": "regex",
    "--target.0.feature={kind: regex, pattern: 'x', timeout: 0}": "timeout",
    "--target.0.feature={kind: regex, pattern: 'x', timeout: -1}": "timeout",
    "--target.0.feature={kind: classifier, model: ./absent, label: joy}": "./absent",
    "--target.0.feature={kind: classifier, model: hollow, label: joy}": "hollow",
    "--target.0.feature={kind: classifier, model: tiny, label: joy}": "tiny",
    "--target.0.feature={kind: import, path: own.ones}": "own.ones",
    "--target.0.feature={kind: import, path: 'nowhere:ones'}": "nowhere",
    "--target.0.feature={kind: import, path: 'own.py:twos'}": "twos",
    "--target.0.feature={kind: import, path: 'own.py:'}": "own.py",
    "--target.0.feature={kind: import, path: 'own.py:NUMBER'}": "NUMBER",
    "--target.0.feature={kind: import, path: 'absent.py:ones'}": "absent.py",
    "--target.0.feature={kind: import, path: 'raises.py:ones'}": "ZeroDivisionError",
    "--target.0.feature={kind: import, path: 'exits.py:ones'}": "SystemExit",
    "--target.0.feature={kind: import, path: 'syntax.py:ones'}": "syntax.py",
    "--target.0.feature={kind: import, path: 'needs.py:ones'}": "no_such_library",
    "--target.0.feature={kind: import, path: 'own.py:needs_answer'}": "answer",
    "--target.0.feature={kind: import, path: 'own.py:keyword_only'}": "",
    '--target.0.feature={kind: regex, pattern: x, name: "a\\e[2Jb"}': "name",
    '--target.0.feature={kind: regex, pattern: x, name: "two\\nlines"}': "name",
    "--target.0.feature={kind: regex, pattern: x, name: ''}": "name",
    "--target.0.feature.name=ess": "ess",
    f"--target=[{A}, {A}]": "word:a",
    "--target.0={kind: rlhf, beta: 0, feature: {kind: word, word: x}}": "beta",
    "--target.0={kind: rlhf, beta: -1, feature: {kind: word, word: x}}": "beta",
    "--target.0={kind: rlhf, beta: .nan, feature: {kind: word, word: x}}": "beta",
    "--target=[{kind: distributional, features: [{kind: word, word: a}], moments: [0.5, 0.5]}]": "moments",
    "--target=[{kind: distributional, features: [], moments: []}]": "features",
    "--target=[{kind: distributional, features: [{kind: regex, pattern: '.'}], moments: [2.5]}]": "target",
    "--target.0={kind: import, path: 'own.py:ones'}": "own.py",
    "--target.0={kind: import, path: 'own.py:raising_target'}": "ValueError",
    "--target.0={kind: import, path: 'own.py:NUMBER'}": "own.py",
    # paths
    "--model=./absent": "./absent",
    "--model=nobody/nothing": "nobody/nothing",
    "--model=": "model",
    "--model=" + "m" * 300: "model",
    "--model=a\\0b": "model",
    "--model=hollow": "hollow",
    "--model=own.py": "own.py",
    "--contexts.train=absent.txt": "absent.txt",
    "--contexts.train=hollow": "hollow",
    "--contexts.train=" + "c" * 300 + ".txt": "contexts",
    "--contexts.eval=absent.jsonl": "absent.jsonl",
    "--contexts.train=own.py": "own.py",
    "--run_dir=own.py": "own.py",
    "--run_dir=own.py/inside": "own.py",
    "--run_dir=" + "r" * 300: "run_dir",
    "--run_dir=": "run_dir",
    "--run_dir=taken": "taken",
    "--run_dir=half": "half",
    "--trainer.rounds": "trainer.rounds",
    "trainer.rounds=5": "trainer.rounds=5",
    "--dry-run=yes": "--dry-run",
}

CONTEXTS: dict[str, bytes] = {
    "empty.txt": b"\n \n",
    "nothing.jsonl": b"",
    "blank.jsonl": b'{"prompt": "fine"}\n{"prompt": " "}\n',
    "long.txt": b"fine\n" + 91 * b"x" + b"\n",
    "huge.txt": b"fine\n" + 2_000_000 * b"x " + b"\n",
    "broken.jsonl": b'{"prompt": "fine"}\n{"prompt": \n',
    "two.jsonl": b'{"prompt": "a"}{"prompt": "b"}\n',
    "other.jsonl": b'{"text": "no prompt"}\n',
    "list.jsonl": b'["a", "b"]\n',
    "number.jsonl": b'{"prompt": 5}\n',
    "null.jsonl": b'{"prompt": null}\n',
    "ids.jsonl": b'{"prompt": [1, 2, 3]}\n',
    "deep.jsonl": b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "digits.jsonl": b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}\n",
    "surrogate.jsonl": b'{"prompt": "\\ud800"}\n',
    "chat.jsonl": b'{"prompt": [{"role": "user", "content": "hello"}]}\n',
    "nochat.jsonl": b'{"prompt": []}\n',
    "own.jsonl": b'{"prompt": "a", "completions": 1, "completion_ids": 2, "prompts": 3}\n',
    "latin.txt": b"caf\xe9\n",
    "latin.jsonl": b'{"prompt": "caf\xe9"}\n',
    "utf16.txt": "prompt".encode("utf-16"),
    "zip.jsonl": b"PK\x03\x04" + bytes(range(256)),
    "page.jsonl": b"<!DOCTYPE html><html></html>\n",
    "pointer.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n",
    "prompts.xml": b"<prompt>a</prompt>\n",
    "prompts.yaml": b"- prompt: a\n",
    "prompts.md": b"a\n",
    "prompts.pkl": b"\x80\x04K\x01.",
    "noheader.csv": b"tea,coffee\na,b\n",
    "empty.csv": b"",
    "headeronly.csv": b"prompt,answer\n",
    "ragged.csv": b"prompt,answer\na,b,c,d\n",
    "quote.csv": b'prompt\n"never closed\n',
    "object.json": b'{"train": 5}',
    "broken.json": b'[{"prompt": "a"}',
    "strings.json": b"[1, 2]",
    "empty.json": b"[]",
    "not.parquet": b"PAR1 this is not parquet",
}

CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "config"),
    "a list": (b"- model\n", "config"),
    "a word": (b"model\n", "config"),
    "not YAML": (b"model: [\n", "line"),
    "a tab": (b"model: x\n\trun_dir: y\n", "line"),
    "latin-1": (b"model: caf\xe9\n", "given.yaml"),
    "NUL": (b"model: \x00\n", "given.yaml"),
    "no run_dir": (b"model: m\n", "run_dir"),
    "no target": (b"run_dir: r\nmodel: m\n", "target"),
    "a number as key": (b"run_dir: r\nmodel: m\ntarget: [{kind: import, path: a.py:b}]\n1: 2\n", "1"),
    "null as key": (b"run_dir: r\nmodel: m\ntarget: [{kind: import, path: a.py:b}]\n~: 2\n", ""),
    "a list as key": (b"run_dir: r\nmodel: m\n? [a, b]\n: 2\n", ""),
    "a tag that makes objects": (b"model: !!python/object/apply:os.system ['touch owned']\n", "given.yaml"),
    "an unknown tag": (b"model: !mine x\n", "given.yaml"),
    "a key twice": (b"model: a\nrun_dir: r\nmodel: b\n", "model"),
    "an alias of nothing": (b"model: *nothing\n", "given.yaml"),
    "an alias of itself": (b"model: &a [*a]\nrun_dir: r\n", ""),
    "brackets": (b"model: " + b"[" * 3000 + b"\n", "given.yaml"),
    "digits": (b"model: m\nrun_dir: r\ntarget_fit_samples: " + b"9" * 5000 + b"\n", ""),
    "two documents": (b"model: a\n---\nmodel: b\n", "given.yaml"),
    "JSON that is cut": (b'{"model": "a", "run_dir":', "given.yaml"),
    "a page": (b"<!DOCTYPE html>\n<html><body>404: no</body></html>\n", "given.yaml"),
}

COMMANDS = {
    "": "COMMAND",
    "trian config.yaml": "trian",
    "train": "CONFIG.yaml",
    "train absent.yaml": "absent.yaml",
    "train hollow": "hollow",
    "train config.yaml more.yaml": "more.yaml",
    "train --resume": "--resume",
    "train --resume nowhere": "nowhere",
    "train --resume hollow": "hollow",
    "train --resume own.py": "own.py",
    "train config.yaml --resume taken": "--resume",
    "train --resume taken --optimizer.learning_rate=1": "optimizer.learning_rate",
    "train --resume taken --trainer.rounds 0": "trainer.rounds",
    "evaluate nowhere": "nowhere",
    "evaluate taken": "taken",
    "evaluate taken --samples 0": "--samples",
    "evaluate taken --samples many": "--samples",
    "evaluate taken --seed x": "--seed",
    "evaluate taken --bogus": "--bogus",
    "evaluate": "RUN",
    "sample nowhere": "nowhere",
    "sample taken --count=-1": "--count",
    "sample taken --max-draws 5": "--max-draws",
    "compare": "RUN",
    "compare nowhere taken": "nowhere",
    "experiment": "NAME",
    "experiment nowhere": "nowhere",
    "experiment lexical --budget none": "lexical",
    "doctor absent.yaml": "absent.yaml",
    "doctor --trainer.rounds=3": "trainer.rounds",
}

OWN = """
NUMBER = 5

def ones(completions):
    return [1.0] * len(completions)

def needs_answer(completions, answer):
    return [1.0] * len(completions)

def keyword_only(*, nothing_that_is_there):
    return []

def raising_target():
    raise ValueError("no")
"""


def _json(name: str, **changes: Any) -> Callable[[Path], None]:
    """Keys of a JSON file of the model; None takes one away."""

    def damage(model: Path) -> None:
        content = json.loads((model / name).read_text())
        content.update(changes)
        (model / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return damage


def _bytes(name: str, content: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        made = content(model.joinpath(name).read_bytes()) if callable(content) else content
        (model / name).write_bytes(made)

    return damage


def _tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        save_file(change(tensors) or tensors, model / "model.safetensors", metadata={"format": "pt"})

    return damage


def _folder(name: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()

    return damage


def _gone(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


# where the line names something else than the file or the model
SAYS = {
    "own.jsonl": "completion_ids",
    "model: positions 0": "positions",
    "model: a token that is forced": "forced_bos_token_id",
    "run: config gone": "it has no config.yaml",
    "run: config empty": "'run/config.yaml' must hold keys",
    "run: config cut": "'run/config.yaml' is not YAML",
    "run: another target": "target has changed",
    "run: another divergence": "divergence has changed",
    "run: another learning rate": "optimizer.learning_rate has changed from 0.001 to 0.002",
    "run: another dtype": "dtype has changed",
    "run: an adapter now": "lora has changed",
    "run: an unknown key": "wish: there is no such key",
    "run: metrics damaged": "metrics.jsonl:1",
    "run: a checkpoint without weights": "model.safetensors is not there",
    "run: a checkpoint with other weights": "model.safetensors has changed",
    "run: a checkpoint without sums": "SHA256SUMS",
    "run: a checkpoint without its config": "config.json is not there",
    "resumed with prompts in another order": "contexts.train has changed",
    "resumed with other prompts": "contexts.train has changed",
    "resumed with a prompt less": "contexts.train has changed",
    "resumed with prompts gone": "cannot read 'contexts.jsonl'",
    "resumed with another base": "the model's weights",
    "resumed with another tokenizer": "tokenizer",
    "resumed with another feature": "own.py has changed",
}
LAYER = "model.layers.1.mlp.up_proj.weight"
PAGE, POINTER = (
    b"<!DOCTYPE html><html>404</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
)

MODELS: dict[str, Callable[[Path], None]] = {
    "weights gone": _gone("model.safetensors"),
    "weights empty": _bytes("model.safetensors", b""),
    "weights cut": _bytes("model.safetensors", lambda content: content[:-100]),
    "weights cut in the header": _bytes("model.safetensors", lambda content: content[:50]),
    "weights a page": _bytes("model.safetensors", PAGE),
    "weights a pointer": _bytes("model.safetensors", POINTER),
    "weights a folder": _folder("model.safetensors"),
    "weights of numbers": _bytes("model.safetensors", bytes(range(256)) * 40),
    "a tensor gone": _tensors(lambda tensors: tensors.pop(LAYER) is None),
    "the embedding gone": _tensors(lambda tensors: tensors.pop("model.embed_tokens.weight") is None),
    "a tensor renamed": _tensors(lambda t: {("x." + name if name == LAYER else name): t[name] for name in t}),
    "every tensor renamed": _tensors(lambda tensors: {"lm." + name: tensors[name] for name in tensors}),
    "a tensor cut": _tensors(lambda tensors: {**tensors, LAYER: tensors[LAYER][:-1].contiguous()}),
    "a tensor turned": _tensors(lambda tensors: {**tensors, LAYER: tensors[LAYER].T.contiguous()}),
    "NaN in a tensor": _tensors(lambda tensors: tensors[LAYER].view(-1)[3:4].fill_(float("nan")) is None),
    "infinity in a tensor": _tensors(lambda tensors: tensors[LAYER].view(-1)[3:4].fill_(float("inf")) is None),
    "config gone": _gone("config.json"),
    "config empty": _bytes("config.json", b""),
    "config cut": _bytes("config.json", lambda content: content[:40]),
    "config a page": _bytes("config.json", PAGE),
    "config a list": _bytes("config.json", b"[]"),
    "config a folder": _folder("config.json"),
    "config not UTF-8": _bytes("config.json", b'{"model_type": "caf\xe9"}'),
    "no model_type": _json("config.json", model_type=None, architectures=None),
    "unknown model_type": _json("config.json", model_type="lama"),
    "a BERT": _json("config.json", model_type="bert", architectures=["BertForMaskedLM"]),
    "a vision model": _json("config.json", model_type="vit", architectures=["ViTForImageClassification"]),
    "custom code": _json(
        "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    ),
    "one layer more": _json("config.json", num_hidden_layers=3),
    "one layer less": _json("config.json", num_hidden_layers=1),
    "no layers": _json("config.json", num_hidden_layers=-1),
    "layers a word": _json("config.json", num_hidden_layers="two"),
    "another width": _json("config.json", hidden_size=64),
    "width 0": _json("config.json", hidden_size=0),
    "heads 0": _json("config.json", num_attention_heads=0),
    "heads that do not divide": _json("config.json", num_attention_heads=3, num_key_value_heads=2),
    "another vocabulary": _json("config.json", vocab_size=300),
    "vocabulary a word": _json("config.json", vocab_size="many"),
    "untied, without a head": _json("config.json", tie_word_embeddings=False),
    "an unknown activation": _json("config.json", hidden_act="wish"),
    "an unknown rope": _json("config.json", rope_parameters={"rope_type": "wish", "rope_theta": 1e4}),
    "positions 0": _json("config.json", max_position_embeddings=0),
    "an unknown dtype": _json("config.json", dtype="float13"),
    "quantised by bitsandbytes": _json(
        "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    "quantised by GPTQ": _json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    "quantised by AWQ": _json("config.json", quantization_config={"quant_method": "awq", "bits": 4}),
    "quantised to FP8": _json("config.json", quantization_config={"quant_method": "fp8"}),
    "quantised in an unknown way": _json("config.json", quantization_config={"quant_method": "wish"}),
    "a token that is forced": _json("generation_config.json", forced_bos_token_id=5),
    "tokenizer gone": lambda model: [path.unlink() for path in model.glob("tokenizer*")] and None,
    "tokenizer empty": _bytes("tokenizer.json", b""),
    "tokenizer cut": _bytes("tokenizer.json", lambda content: content[:300]),
    "tokenizer a page": _bytes("tokenizer.json", PAGE),
    "tokenizer a pointer": _bytes("tokenizer.json", POINTER),
    "tokenizer {}": _bytes("tokenizer.json", b"{}"),
    "tokenizer settings cut": _bytes("tokenizer_config.json", lambda content: content[:30]),
    "generation settings cut": _bytes("generation_config.json", lambda content: content[:20]),
    "an adapter": lambda model: _adapter(model),
}


def _adapter(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x", "r": 2}')
    (model / "adapter_model.safetensors").write_bytes(b"")


RUNS: dict[str, Callable[[Path], None]] = {
    "config gone": _gone("config.yaml"),
    "config empty": _bytes("config.yaml", b""),
    "config cut": _bytes("config.yaml", lambda content: content[:60] + b"["),
    "another target": _bytes("config.yaml", lambda content: content.replace(b"a-zA-Z", b"a-z")),
    "another divergence": _bytes("config.yaml", lambda content: content.replace(b"jensen_shannon", b"forward_kl")),
    "another learning rate": _bytes("config.yaml", lambda content: content.replace(b"0.001", b"0.002")),
    "another dtype": _bytes("config.yaml", lambda content: content.replace(b"float32", b"bfloat16")),
    "an adapter now": _bytes("config.yaml", lambda content: content.replace(b"lora: null", b"lora: {rank: 2}")),
    "an unknown key": _bytes("config.yaml", lambda content: content + b"\nwish: 1\n"),
    "metrics damaged": _bytes("metrics.jsonl", lambda content: b"{]\n" + content),
    "a checkpoint without weights": _gone("checkpoints/round-000002/model.safetensors"),
    "a checkpoint with other weights": _bytes(
        "checkpoints/round-000002/model.safetensors", lambda content: content[:-9]
    ),
    "a checkpoint without sums": _gone("checkpoints/round-000002/SHA256SUMS"),
    "a checkpoint without its config": _gone("checkpoints/round-000002/config.json"),
}
# what is not a fault of the run's folder but of what it was started with
AROUND: dict[str, Callable[[Path], None]] = {
    "prompts in another order": lambda folder: _prompts(folder, "b", "a"),
    "other prompts": lambda folder: _prompts(folder, "x", "y"),
    "a prompt less": lambda folder: _prompts(folder, "a"),
    "prompts gone": lambda folder: (folder / "contexts.jsonl").unlink(),
    "another base": lambda folder: _tensors(lambda t: t[LAYER].mul_(1.5) is None)(folder / "tiny"),
    "another tokenizer": lambda folder: _bytes(
        "tokenizer.json", lambda content: content.replace(b'"a":', b'"\xc4\xbf":', 1).replace(b'"b":', b'"a":', 1)
    )(folder / "tiny"),
    "another feature": lambda folder: _bytes("own.py", lambda content: content + b"\n# changed\n")(folder),
}


def _prompts(folder: Path, *prompts: str) -> None:
    runs.write_contexts(folder, *prompts)


@dataclass(frozen=True)
class Input:
    """One bad input: what is done to a working directory, what is run there, and a word of the right answer."""

    name: str
    arguments: list[str]
    word: str = ""
    damage: Callable[[Path], Any] = lambda folder: None
    trained: bool = False  # the directory of a finished run, else of one that has not begun

    def __str__(self) -> str:
        return self.name


RESUME = ["train", "--resume", "run", "--trainer.rounds=3"]


def inputs() -> list[Input]:
    """All of them."""
    found = [Input(key[:80], ["train", "config.yaml", key.replace("\\0", "\0")], KEYS[key]) for key in KEYS]
    found += [
        Input(
            name,
            ["train", "config.yaml", f"--contexts.train={name}"],
            SAYS.get(name, name),
            lambda f, n=name: _write(f, n),
        )
        for name in CONTEXTS
    ]
    found += [
        Input(
            f"config: {name}",
            ["train", "given.yaml"],
            word,
            lambda folder, content=content: (folder / "given.yaml").write_bytes(content),
        )
        for name, (content, word) in CONFIGS.items()
    ]
    found += [Input(f"fdpg-fast {line}", line.split(), word) for line, word in COMMANDS.items()]
    found += [
        Input(
            f"model: {name}",
            ["train", "config.yaml"],
            SAYS.get(f"model: {name}", "tiny"),
            lambda folder, do=do: do(folder / "tiny"),
        )
        for name, do in MODELS.items()
    ]
    damages = {f"run: {name}": lambda folder, do=do: do(folder / "run") for name, do in RUNS.items()}
    damages |= {f"resumed with {name}": do for name, do in AROUND.items()}
    return found + [Input(name, RESUME, SAYS[name], damages[name], True) for name in damages]


def _write(folder: Path, name: str) -> None:
    (folder / name).write_bytes(CONTEXTS[name])


def refusals(model: Path, chosen: list[Input]) -> Tally:
    """What the command line makes of each, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        fresh, trained = Path(name, "fresh"), Path(name, "trained")
        _directory(fresh, model)
        shutil.copytree(fresh, trained)
        _accepted(runs.run(trained, "train", "config.yaml"))
        shutil.copytree(trained, undamaged := Path(name, "undamaged"))
        _accepted(runs.run(undamaged, *RESUME))  # or the refusals would say nothing of the damages
        return tried("bad input", chosen, lambda bad: _refusal(bad, trained if bad.trained else fresh, Path(name)))


def _accepted(ended: runs.Ended) -> None:
    assert ended.status == 0, ended.stderr


def _directory(folder: Path, model: Path) -> None:
    """A working directory with a config that is right, and what the tables point to."""
    shutil.copytree(model, folder / "tiny")
    (folder / "hollow").mkdir()
    for name in ("taken", "half"):
        (folder / name).mkdir()
    (folder / "half/checkpoints/round-000006").mkdir(parents=True)
    (folder / "half/metrics.jsonl").write_text('{"round": 5}\n')
    runs.write_config(folder / "taken", runs.settings(Path("tiny"), "taken"))
    (folder / "own.py").write_text(OWN)
    (folder / "raises.py").write_text("1 / 0\n")
    (folder / "exits.py").write_text("raise SystemExit(0)\n")
    (folder / "syntax.py").write_text("def ones(:\n")
    (folder / "needs.py").write_text("import no_such_library\n")
    own = {"kind": "pointwise", "feature": {"kind": "import", "path": "own.py:ones"}}
    contexts = {"train": runs.write_contexts(folder, "a", "b").name}
    config = runs.settings(Path("tiny"), "run", target=[runs.LETTERS, own], contexts=contexts)
    runs.write_config(folder, config)


def _refusal(bad: Input, template: Path, parent: Path) -> list[str]:
    folder = Path(tempfile.mkdtemp(dir=parent))
    shutil.copytree(template, folder, dirs_exist_ok=True)
    bad.damage(folder)
    before = runs.contents(folder)
    try:
        ended = runs.start(folder, *bad.arguments).wait(30)
    except AssertionError as error:
        return [str(error)]
    faults = [] if ended.status == 2 else [f"status {ended.status}"]
    lines = ended.stderr.splitlines()
    if len(lines) != 1 or not lines[0].startswith("fdpg-fast: "):
        faults.append(f"{len(lines)} lines: {' | '.join(lines)[-300:]}")
    elif bad.word not in lines[0]:
        faults.append(f"no word of {bad.word!r}: {lines[0][:300]}")
    elif len(lines[0]) > 700:
        faults.append(f"a line of {len(lines[0])} characters")
    if ended.stdout:
        faults.append(f"printed {ended.stdout[:100]!r}")
    if (after := runs.contents(folder)) != before:
        faults.append(
            f"changed {sorted(name for name in {*before, *after} if before.get(name) != after.get(name))[:5]}"
        )
    shutil.rmtree(folder)
    return faults
