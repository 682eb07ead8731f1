"""Files of a model: whatever is wrong with them ends in one line of ours, whole ones load without a word."""

import ast
import builtins
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import fdpg_fast
from fdpg_fast.errors import UserError
from fdpg_fast.models.load import load_model, load_tokenizer
from support import runs

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 123456\n"
PAGE = "\n<!DOCTYPE html><html><body>Access denied</body></html>"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
WEIGHTS = "model.safetensors"


def written(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def config(**settings):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return change


def weights(change):
    def write(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return write


def broken_number(number):
    return weights(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(number))


def renamed(old, new):
    return weights(lambda tensors: tensors.update({new: tensors.pop(old)}))


def saved(kind, **settings):
    return lambda folder: kind(hf.AutoConfig.from_pretrained(folder, **settings)).save_pretrained(folder)


def of_config(config_class):
    return lambda folder: hf.AutoModel.from_config(config_class(**SMALL)).save_pretrained(folder)


def missing_shard(folder):
    names = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def own_head(folder):
    head = torch.randn(257, 32)
    weights(lambda tensors: tensors.update({"lm_head.weight": head}))(folder)


def adapter(folder):
    """As peft writes it."""
    without("config.json", WEIGHTS)(folder)
    settings = {"base_model_name_or_path": "somebody/base", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def quantised(**settings):
    return config(quantization_config=settings)


CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
DAMAGES = {
    # weights
    "cut": (cut(WEIGHTS), "model.safetensors is damaged or cut short"),
    "without bytes": (written(WEIGHTS, ""), "model.safetensors is damaged or cut short"),
    "noise": (written(WEIGHTS, bytes(range(256)) * 20), "model.safetensors is damaged or cut short"),
    "LFS pointer": (written(WEIGHTS, LFS), "model.safetensors is a Git LFS pointer.*git lfs pull"),
    "web page": (written(WEIGHTS, PAGE), "model.safetensors is a web page"),
    "only .bin": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "holds no .safetensors file"),
    "a shard is missing": (missing_shard, "model-00002-of-00002.safetensors"),
    "index is a page": (lambda f: (missing_shard(f), written(f"{WEIGHTS}.index.json", PAGE)(f)), "index.json is a web"),
    "wider": (config(hidden_size=64), r"is \[.*32.*\] in the file, \[.*64.*\] by config.json"),
    "more tokens": (config(vocab_size=300), r"embed_tokens.weight is \[257, 32\] in the file, \[300, 32\]"),
    "far more tokens": (config(vocab_size=10**12), r"embed_tokens.weight is \[257, 32\] in the file"),
    "a layer more": (config(num_hidden_layers=3), "would be random: model.layers.2.*and 6 more"),
    "a layer less": (config(num_hidden_layers=1), "no layer takes model.layers.1.*and 6 more"),
    "no layers": (config(num_hidden_layers=-1), "no layer takes model.layers.0"),
    "biases wanted": (config(attention_bias=True), r"would be random: model.layers.0.self_attn.k_proj.bias"),
    "biases not taken": (
        weights(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})),
        "no layer takes model.layers.0.self_attn.q_proj.bias",
    ),
    "norms not taken": (
        weights(lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
        "no layer takes model.layers.0.self_attn.q_norm.weight",
    ),
    "scales, and no word of them": (
        weights(lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)})),
        "no layer takes model.layers.0.mlp.up_proj.weight_scale_inv",
    ),
    "renamed": (renamed("model.norm.weight", "model.final_norm.weight"), "would be random: model.norm.weight"),
    "without a head": (config(tie_word_embeddings=False), "would be random: lm_head.weight"),
    "AutoModel": (saved(hf.LlamaModel, tie_word_embeddings=False), "would be random: lm_head.weight"),
    "a head that is not the embedding": (own_head, "set tie_word_embeddings: false"),
    "classifier": (saved(hf.LlamaForSequenceClassification, tie_word_embeddings=False), "no language model"),
    "classifier, tied": (saved(hf.LlamaForSequenceClassification), "no language model but .*SequenceClassification"),
    "token classifier": (saved(hf.LlamaForTokenClassification), "no language model"),
    "NaN": (broken_number(float("nan")), "NaN or infinity in its weights: model.layers.1.mlp.up_proj.weight"),
    "infinity": (broken_number(float("-inf")), "NaN or infinity in its weights: model.layers.1.mlp.up_proj.weight"),
    # what cannot be trained
    "bitsandbytes": (quantised(quant_method="bitsandbytes", load_in_4bit=True), r"quantised \(bitsandbytes\).*unquant"),
    "GPTQ": (quantised(quant_method="gptq", bits=4), r"quantised \(gptq\)"),
    "AWQ": (quantised(quant_method="awq", bits=4), r"quantised \(awq\)"),
    "fp8": (quantised(quant_method="fp8"), r"quantised \(fp8\)"),
    "compressed tensors": (quantised(quant_method="compressed-tensors"), r"quantised \(compressed-tensors\)"),
    "mxfp4": (quantised(quant_method="mxfp4"), r"quantised \(mxfp4\)"),
    "of an unknown method": (quantised(quant_method="nonesuch"), r"quantised \(nonesuch\)"),
    "MLX": (config(quantization={"bits": 4, "group_size": 64}), r"quantised \(quantization\)"),
    "nested": (config(text_config={"quantization_config": {"quant_method": "awq"}}), r"quantised \(awq\)"),
    "adapter": (adapter, "an adapter, not a model: merge it.*--resume"),
    "adapter beside a model": (written("adapter_config.json", "{}"), "an adapter, not a model"),
    "BERT": (of_config(hf.BertConfig), "lacks weights of a BertLMHeadModel"),
    "ViT": (of_config(hf.ViTConfig), "ViTConfig"),
    # config.json
    "no config.json": (without("config.json"), "model_type"),
    "config is empty": (written("config.json", ""), "config.json is damaged"),
    "config is a list": (written("config.json", "[]"), "must be a mapping"),
    "config is null": (written("config.json", "null"), "NoneType"),
    "config is a page": (written("config.json", PAGE), "config.json is a web page"),
    "config is a pointer": (written("config.json", LFS), "config.json is a Git LFS pointer"),
    "width is a word": (config(hidden_size="wide"), "'hidden_size' expected int"),
    "width is null": (config(hidden_size=None), "'hidden_size' expected int"),
    "width is 0": (config(hidden_size=0), "in the file"),
    "heads are 0": (config(num_attention_heads=0), "ZeroDivisionError"),
    "heads are 5": (config(num_attention_heads=5), "not a multiple"),
    "vocabulary is 0": (config(vocab_size=0), "out of bounds"),
    "unknown activation": (config(hidden_act="nonesuch"), "nonesuch"),
    "unknown rope": (config(rope_parameters={"rope_type": "nonesuch", "rope_theta": 1e4}), "nonesuch"),
    "rope lacks a factor": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "factor"),
    "unknown dtype": (config(dtype="nonesuch"), "nonesuch"),
    "unknown type": (config(model_type="nonesuch"), "model type `nonesuch`"),
    "custom code": (config(model_type="nonesuch", auto_map=CODE), "set trust_remote_code: true"),
    "a kernel of the hub": (config(attn_implementation="somebody/attention"), "would run code from the hub"),
    "a kernel of the hub, nested": (config(text_config={"attn_implementation": "some/body"}), "would run code"),
    # generation_config.json
    "generation is a page": (written("generation_config.json", PAGE), "generation_config.json is a web page"),
    "generation is cut": (cut("generation_config.json"), "generation_config.json is damaged"),
    "generation is a list": (written("generation_config.json", "[]"), "generation_config.json holds no object"),
    "EOS is a word": (written("generation_config.json", '{"eos_token_id": "end"}'), "EOS token 'end' has no row"),
    "EOS out of range": (written("generation_config.json", '{"eos_token_id": [0, 300]}'), "EOS token 300 has no row"),
    # tokenizer
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "tokenizer is cut": (cut("tokenizer.json"), "tokenizer.json is damaged"),
    "tokenizer is a pointer": (written("tokenizer.json", LFS), "tokenizer.json is a Git LFS pointer"),
    "tokenizer is a page": (written("tokenizer_config.json", PAGE), "tokenizer_config.json is a web page"),
    "tokenizer is empty": (written("tokenizer.json", "{}"), "the tokenizer of"),
    "all is gone": (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no .safetensors"),
}


@pytest.fixture
def train(tiny_model, tmp_path, monkeypatch, capfd):
    """The status and the lines of a run of the model in folder `m`; nobody is there to be asked."""
    monkeypatch.setattr(builtins, "input", lambda question: pytest.fail(question))
    shutil.copytree(tiny_model, tmp_path / "m")
    run_config = runs.write_config(tmp_path, runs.settings(tmp_path / "m", tmp_path / "run"))

    def call(*arguments):
        status = runs.call("train", run_config, *arguments)
        output, errors = capfd.readouterr()
        return status, output + errors

    return call


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_one_line(name, train, tmp_path):
    damage, complaint = DAMAGES[name]
    damage(tmp_path / "m")
    status, said = train()
    assert status == 2
    assert re.fullmatch(rf"fdpg-fast: model: [^\n\x1b]*{complaint}[^\n\x1b]*\n", said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: None,
        saved(hf.LlamaModel),  # tied: the embedding is the head, and it is there
        config(quantization_config=None, auto_map=CODE),  # a type that transformers knows: the code is not needed
        lambda folder: (folder / "custom_generate").mkdir() or written("custom_generate/generate.py", "1 / 0")(folder),
        weights(lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})),
    ],
)
def test_a_whole_model_loads_without_a_word(change, train, tmp_path):
    change(tmp_path / "m")
    status, said = train("--dry-run")
    assert status == 0 and said.startswith("model: ") and "\x1b" not in said and "LOAD REPORT" not in said


def test_weights_of_another_head_are_said_once(train, tmp_path):
    value_head = {"v_head.summary.weight": torch.zeros(1, 32), "model.layers.0.attn.masked_bias": torch.zeros(())}
    weights(lambda tensors: tensors.update(value_head))(tmp_path / "m")
    status, said = train("--dry-run")
    line = "weights that a LlamaForCausalLM does not use are left out: model.layers.0.attn.masked_bias, v_head"
    assert status == 0 and said.count(line) == 1


def test_an_adapter_of_ours_is_refused_and_a_checkpoint_of_ours_is_a_model(tiny_model, tmp_path, capfd):
    for name, sections in {"lora": {"lora": {"rank": 2}}, "full": {}}.items():
        run = runs.train(tiny_model, tmp_path, name, **sections)
        again = runs.write_config(tmp_path, runs.settings(run / "checkpoints/round-000002", tmp_path / f"{name}-2"))
        capfd.readouterr()
        assert runs.call("train", again, "--trainer.rounds=1") == (2 if name == "lora" else 0)
        assert ("an adapter, not a model" in capfd.readouterr().err) == (name == "lora")


PLACES = {
    "nobody/nothing": "no folder 'nobody/nothing' here, and the hub does not give it: .*",
    "https://huggingface.co/gpt2": "Repo id must be",
    "a/b/c": "Repo id must be",
    "one\0two": r"'one\\x00two'",
    "": "Repo id must",
    300 * "x": "Repo id must",
    "./absent": "there is no folder './absent' here",
    "~/absent": "there is no folder '~/absent' here",
    __file__: "is a file; give the folder that holds it",
}


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("load", [load_tokenizer, lambda path, trust: load_model(path, "float32", "cpu", trust)])
def test_a_place_without_a_model_is_named_at_once(path, load, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")  # nobody listens there
    start = time.monotonic()
    with pytest.raises(UserError, match=f"^model: .*{PLACES[path]}") as refusal:
        load(path, False)
    assert time.monotonic() - start < 5 and "\n" not in str(refusal.value)


def test_every_call_that_could_run_a_repositorys_code_says_whether_it_may():
    calls = {}
    for path in Path(fdpg_fast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                keys = [keyword.arg for keyword in node.keywords]
                calls[f"{path.name}:{node.lineno}"] = "trust_remote_code" in keys
    assert len(calls) >= 5 and all(calls.values()), calls
