"""Weights leave as they lie in a checkpoint, whatever transformers calls them in memory, and come back the same."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fdpg_fast.config.schema import LoRAConfig
from fdpg_fast.contexts import Context
from fdpg_fast.engines.embedded import TransformersEngine
from fdpg_fast.engines.vllm_folder import weights_folder
from fdpg_fast.errors import UserError
from fdpg_fast.models.files import write_weights
from fdpg_fast.models.load import load_model
from fdpg_fast.models.lora import LoRAPolicy
from support import runs
from support.architectures import ARCHITECTURES, MIXTURES, save_architecture

CONTEXTS = tuple(Context(i, "", prompt) for i, prompt in enumerate([(3,), (40, 33, 7, 6, 12)]))
ROW = torch.tensor([[40, 33, 7, 6, 12]])
ADAPTED = [*MIXTURES, "llama, tied", "gpt2", "gpt_neox"]  # with fused experts, tied, transposed and renamed


def load(folder, dtype="float32"):
    return load_model(str(folder), dtype, "cpu", trust_remote_code=False)


def files(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []  # shapes too


def logprobs(model, rollouts):
    return model.token_logprobs(rollouts, 4096)


def rollouts(policy):
    return TransformersEngine(policy, (7,), max_new_tokens=8).sample(CONTEXTS, 4, seed=1)


def adapted(folder, dtype="float32", **settings):
    """A policy whose adapter does something, as after training."""
    policy = LoRAPolicy(load(folder, dtype), LoRAConfig(rank=2, **settings), seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of random models by architecture, each written once."""
    root = tmp_path_factory.mktemp("architectures")
    return lambda name: root / name if (root / name).exists() else save_architecture(name, root / name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_and_tensors_are_those_of_the_files(name, folders, tmp_path):
    model, expected = load(folders(name)), files(folders(name))
    assert_same(dict(model.weights(repeat_tied=False)), expected)
    weights = dict(model.weights())
    repeated = {weights.pop(key).data_ptr() for key in weights.keys() - expected.keys()}
    assert_same(weights, expected)
    assert repeated <= {tensor.data_ptr() for tensor in weights.values()}
    assert bool(repeated) == (model.head.weight is model.model.get_input_embeddings().weight)
    model.save(tmp_path)
    assert_same(files(tmp_path), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_model_is_the_model_and_says_nothing_of_us(name, folders, tmp_path):
    model = load(folders(name), "bfloat16")
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == [type(model.model).__name__]
    assert sum(x.dtype != torch.bfloat16 for x in files(tmp_path).values()) <= 1  # a router bias of GLM 4
    for path in tmp_path.glob("*.json"):
        assert not [word for word in ("fdpg", "_attn_implementation", str(tmp_path.parent)) if word in path.read_text()]
    kind = AutoModelForSeq2SeqLM if model.model.config.is_encoder_decoder else AutoModelForCausalLM
    again, found = kind.from_pretrained(tmp_path, output_loading_info=True)  # in the dtype that it has
    assert not any(found.values())
    assert_same(dict(again.state_dict()), model.model.state_dict())


@pytest.mark.parametrize("name", ["llama, tied", "mixtral"])
@pytest.mark.parametrize("file_bytes", [1, 2**31])
def test_blocks_are_written_as_files_of_a_model(name, file_bytes, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("fdpg_fast.models.files.FILE_BYTES", file_bytes)
    model = load(folders(name))
    model.model.config.save_pretrained(tmp_path)
    write_weights(tmp_path, model.blocks(repeat_tied=False))
    assert (tmp_path / "model.safetensors.index.json").exists() == (file_bytes == 1)
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert_same(dict(again.state_dict()), model.model.state_dict())


GENERATION = {
    "sampling flags without sampling, as of Llama 2": {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
    "flags of a beam search without one": {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    "no pad token": {"pad_token_id": -1},
    "nothing odd": {"do_sample": True, "temperature": 0.6, "max_new_tokens": 5},
}


@pytest.mark.parametrize("settings", GENERATION.values(), ids=GENERATION.keys())
def test_the_generation_config_is_kept_whatever_it_says(settings, folders, tmp_path):
    folder = shutil.copytree(folders("llama"), tmp_path / "model")
    before = json.loads((folder / "generation_config.json").read_text()) | settings
    (folder / "generation_config.json").write_text(json.dumps(before))
    (tmp_path / "saved").mkdir()
    model = load(folder)
    model.save(tmp_path / "saved")
    after = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert after.items() >= settings.items() and after["eos_token_id"] == before["eos_token_id"]
    assert model.model.generation_config.to_dict().items() >= settings.items()


def test_a_model_without_a_generation_config_and_with_keys_of_one_in_its_config(folders, tmp_path):
    folder = shutil.copytree(folders("llama"), tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"temperature": 0.6, "_name_or_path": "/home/me"}
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "saved").mkdir()
    load(folder).save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["temperature"] == 0.6
    assert "/home/me" not in (tmp_path / "saved/config.json").read_text()


@pytest.mark.parametrize("name", ["llama, tied", "mixtral"])
def test_a_model_in_several_files_is_one_in_one(name, folders, tmp_path):
    sharded = save_architecture(name, tmp_path / "sharded", max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_same(dict(load(sharded).weights()), dict(load(folders(name)).weights()))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_neox, tied"])
def test_servers_read_the_same_from_a_folder(name, folders, tmp_path):
    model = load(folders(name))
    with weights_folder(model, tmp_path, "weights") as folder:
        assert_same(files(folder), dict(model.weights()))
        written = list(folder.glob("*.safetensors"))
        assert len(written) == len(list(model.blocks())) > 2  # a block at a time
        assert all(path.stat().st_mode & 0o777 == folder.stat().st_mode & 0o666 for path in written)
    assert not folder.exists()


@pytest.mark.parametrize("name", ADAPTED)
def test_merged_weights_in_a_file_are_the_policy_and_a_copy_takes_them(name, folders, tmp_path):
    policy, untouched = adapted(folders(name)), load(folders(name))
    samples = rollouts(policy)
    before = logprobs(policy, samples)
    weights = {key: tensor.contiguous() for key, tensor in policy.weights(repeat_tied=False)}
    assert [(key, x.shape) for key, x in weights.items()] == [
        (key, x.shape) for key, x in untouched.weights(repeat_tied=False)
    ]
    folder = shutil.copytree(folders(name), tmp_path / "merged")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logprobs(load(folder), samples), before, atol=1e-4, rtol=0)
    assert (logprobs(untouched, samples) - before).abs().max() > 0.1
    with policy.as_base() as base:
        assert_same(dict(base.weights()), dict(untouched.weights()))
    untouched.take_weights(policy)
    torch.testing.assert_close(logprobs(untouched, samples), before, atol=1e-4, rtol=0)
    assert torch.equal(logprobs(policy, samples), before)


@pytest.mark.parametrize("name", ADAPTED)
def test_a_saved_adapter_opens_in_peft_and_here(name, folders, tmp_path):
    policy = adapted(folders(name))
    policy.save(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for targets in ("target_modules", "target_parameters"):  # of a set, which equal runs write in other orders
        assert settings[targets] == sorted(settings[targets] or [])
    again = LoRAPolicy(load(folders(name)), LoRAConfig(rank=2), seed=3, checkpoint=tmp_path)
    with torch.no_grad():
        expected = policy.model(ROW).logits
        # with our attention, or products of another order would differ in the last bits, as on two threads
        ours = {"attn_implementation": policy.model.config._attn_implementation, "dtype": torch.float32}
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, **ours)
        beside = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders(name), **ours), tmp_path)
        for model in (again.model, theirs, beside):
            torch.testing.assert_close(model(ROW).logits, expected, atol=0, rtol=0)
        merged = beside.merge_and_unload()
        torch.testing.assert_close(merged(ROW).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_all_linear_reaches_the_experts_and_each_gets_a_gradient(name, folders):
    policy = adapted(folders(name), "bfloat16")
    trained = {key: p for key, p in policy.model.named_parameters() if p.requires_grad}
    assert any(".experts." in key for key in trained) and {p.dtype for p in trained.values()} == {torch.float32}
    samples = rollouts(policy)
    policy.head.logprob(policy.hidden(samples), samples.token_ids).sum().backward()
    assert [key for key, p in trained.items() if p.grad is None or not p.grad.any()] == []


def test_part_of_fused_experts_is_refused_in_a_line(folders):
    with pytest.raises(UserError, match=r"^lora.target_modules: .*gate_proj.*up_proj.*$"):
        adapted(folders("deepseek_v2"), target_modules=["q_proj", "gate_proj"])


@pytest.mark.parametrize(
    "section", [{"trainer": {"pipeline_depth": 1}}, {"proposal": {"kind": "adaptive", "every": 1}}], ids=str
)
@pytest.mark.parametrize("lora", [{"rank": 2}, None], ids=str)
def test_runs_of_mixtures_sample_from_older_weights_and_go_on(lora, section, tiny_model, tmp_path):
    model = save_architecture("mixtral", tmp_path / "model", tokenizer=tiny_model)
    for run_dir, rounds in (("long", 4), ("short", 2)):
        data = runs.settings(model, tmp_path / run_dir, lora=lora, **section)
        assert runs.call("train", runs.write_config(tmp_path, data), f"--trainer.rounds={rounds}") == 0
    assert runs.call("train", "--resume", tmp_path / "short", "--trainer.rounds=4") == 0
    rows = runs.rows(tmp_path / "short/metrics.jsonl")
    assert len(rows) == 4 and all(row["policy/skipped"] == 0 for row in rows)
    assert max(row.get("engine/logprob_gap_max", 0) for row in rows) < 1e-4
    assert rows[-1]["policy/kl_to_base"] != rows[0]["policy/kl_to_base"]
    if "proposal" in section:  # a run that samples ahead was sampled for as many rounds as it was to have
        runs.assert_equal(runs.record(tmp_path / "short"), runs.record(tmp_path / "long"))
    assert runs.call("evaluate", tmp_path / "short") == 0 and runs.call("sample", tmp_path / "short", "--count=1") == 0
