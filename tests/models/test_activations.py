"""Activation checkpointing: the same gradients to the last bit, from a tenth of the memory; and when it is on."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fdpg_fast.config.schema import LoRAConfig, LossConfig, OptimizerConfig, RoundsConfig
from fdpg_fast.contexts import Context
from fdpg_fast.errors import UserError
from fdpg_fast.learner import Learner
from fdpg_fast.models.activations import plan_passes, recompute
from fdpg_fast.models.language_model import LanguageModel
from fdpg_fast.models.load import load_model
from fdpg_fast.models.lora import LoRAPolicy
from fdpg_fast.rollouts import pack
from fdpg_kernels import divergences, sum_by_sequence
from support import runs
from support.architectures import MIXTURES, save_architecture
from support.storages import Storages

ARCHITECTURES = ("llama, tied", "gpt2", "gemma2", "gemma3", "phi", "opt", "t5", "bart", *MIXTURES)
PROMPTS = tuple(Context(i, "", prompt) for i, prompt in enumerate([(3,), (40, 33, 7, 6, 12)]))


def rollouts_of(contexts, each, tokens):
    """Completions of 1 to so many tokens, without log q."""
    draw = torch.Generator().manual_seed(0)

    def completion(length):
        return torch.randint(1, 60, (length,), generator=draw).tolist(), [0.0] * length, False

    lengths = torch.linspace(tokens, 1, each).int().tolist()
    return pack(contexts, [[completion(length) for length in lengths] for _ in contexts])


def gradients(policy, rollouts):
    """By name, of a learner of several micro-batches; its loss; and how often the last block began to run."""
    runs_of_block = []
    *_, block = (m for m in policy.model.modules() if type(m).__name__ in policy.model._no_split_modules)
    first = next(module for module in block.modules() if not list(module.children()))
    first.register_forward_pre_hook(lambda *_: runs_of_block.append(1))
    learner = Learner(policy, LossConfig(), OptimizerConfig(), rounds=1, micro_batch_tokens=25)
    log_q, zeros = sum_by_sequence(rollouts.behavior_logprob, rollouts.cu_seqlens), torch.zeros(len(rollouts)).double()
    loss, _ = learner.backward(rollouts, log_q - 1, zeros, zeros, divergences.get("jensen_shannon"))
    found = {name: x.grad for name, x in policy.model.named_parameters() if x.grad is not None}
    found = {name: x.to_dense() if x.layout == torch.sparse_coo else x for name, x in found.items()}
    return found | {"loss": loss}, len(runs_of_block)


def assert_equal_gradients(make):
    plain, policy = make(), make()
    recompute(policy.model)
    assert dict(policy.weights()).keys() == dict(plain.weights()).keys()
    rollouts = rollouts_of(PROMPTS, 4, 9)
    rollouts = replace(rollouts, behavior_logprob=plain.token_logprobs(rollouts, 25))
    assert torch.equal(policy.token_logprobs(rollouts, 25), rollouts.behavior_logprob)
    (expected, once), (found, twice) = gradients(plain, rollouts), gradients(policy, rollouts)
    assert twice == 2 * once > 2 and found.keys() == expected.keys()
    assert [name for name, x in expected.items() if not torch.equal(x, found[name])] == []
    assert max(float(x.norm()) for x in expected.values()) > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_the_same(name, tmp_path):
    folder = save_architecture(name, tmp_path / "model")
    assert_equal_gradients(lambda: load_model(str(folder), "float32", "cpu", trust_remote_code=False))


@pytest.mark.parametrize("name", ["llama, tied", "mixtral"])
def test_gradients_of_an_adapter_are_the_same(name, tmp_path):
    folder = save_architecture(name, tmp_path / "model")

    def make():
        base = load_model(str(folder), "float32", "cpu", trust_remote_code=False)
        base.model.requires_grad_(False)
        policy = LoRAPolicy(base, LoRAConfig(rank=2), seed=1)
        for i, parameter in enumerate(p for p in policy.model.parameters() if p.requires_grad):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        return policy

    assert_equal_gradients(make)


def llama(layers):
    settings = {"hidden_size": 128, "intermediate_size": 336, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=layers, **settings)
    return LanguageModel(AutoModelForCausalLM.from_config(config))


def kept(layers, recomputes):
    """Numbers a hidden unit and token that are alive between the forward and the backward pass."""
    policy, rollouts = llama(layers), rollouts_of(PROMPTS[:1], 1, 1001)
    if recomputes:
        recompute(policy.model)
    zeros = torch.zeros(1, dtype=torch.float64)
    with Storages(*policy.model.parameters(), *policy.model.buffers()) as seen:
        result = policy.loss(rollouts, rollouts.behavior_logprob, zeros, zeros)
    assert result.loss.requires_grad
    return seen.alive / 4 / 128 / 1001


@pytest.mark.parametrize(("recomputes", "low", "high"), [(False, 15, 25), (True, 0.9, 1.1)])
def test_what_a_layer_keeps(recomputes, low, high):
    assert low < (kept(6, recomputes) - kept(2, recomputes)) / 4 < high


@pytest.mark.parametrize(
    ("layers", "wanted", "tokens", "recomputes"),
    [
        (2, "auto", 6_553, False),
        (8, "auto", 1_638, False),
        (80, "auto", 448, False),  # fewer would be slow
        (8, "on", 9_362, True),
        (80, "on", 2_621, True),
    ],
)
def test_passes_are_planned_from_layers_and_width(layers, wanted, tokens, recomputes, tiny_model):
    policy = LanguageModel(AutoModelForCausalLM.from_pretrained(tiny_model))
    policy.model.config.num_hidden_layers, policy.model.config.hidden_size = layers, 256
    settings = RoundsConfig(activation_checkpointing=wanted)
    assert plan_passes(policy, torch.float32, settings, longest=100) == (tokens, recomputes)


def test_blocks_run_twice_where_their_activations_are_more_than_the_weights():
    policy = llama(12)  # 2.1 M parameters, 9 MB
    token_bytes = 12 * 20 * 128 * 4

    def recomputes(longest=1, policy=policy, **settings):
        return plan_passes(policy, torch.float32, RoundsConfig(**settings), longest)[1]

    assert not recomputes() and not recomputes(2**28 // token_bytes) and recomputes(2**28 // token_bytes + 1)
    assert recomputes(micro_batch_tokens=2**28 // token_bytes + 1)
    policy.model.register_parameter("more", torch.nn.Parameter(torch.empty(2**27)))
    assert not recomputes(2**28 // token_bytes + 1) and recomputes(2**29 // token_bytes + 99)
    assert not recomputes(10**6, activation_checkpointing="off") and recomputes(activation_checkpointing="on")


def test_a_model_that_does_not_name_its_blocks():
    policy = llama(1)
    policy.model._no_split_modules = None
    assert plan_passes(policy, torch.float32, RoundsConfig(), longest=10**6)[1] is False
    with pytest.raises(UserError, match="^trainer.activation_checkpointing: LlamaForCausalLM does not name its blocks"):
        plan_passes(policy, torch.float32, RoundsConfig(activation_checkpointing="on"), longest=1)


@pytest.mark.parametrize("sections", [{}, {"lora": {"rank": 2}}], ids=["whole", "LoRA"])
def test_a_run_is_the_same_with_it_and_without(sections, tiny_model, tmp_path):
    records = []
    for wanted in ("on", "off"):
        trainer = {"activation_checkpointing": wanted, "micro_batch_tokens": 2000}
        run = runs.train(tiny_model, tmp_path, wanted, trainer=trainer, **sections)
        records.append({name: x for name, x in runs.record(run).items() if "origin" not in name})
    runs.assert_equal(*records)


def test_a_dry_run_says_it(tiny_model, tmp_path, capsys):
    path = runs.write_config(tmp_path, runs.settings(tiny_model, tmp_path / "run"))
    for wanted, said in (("on", True), ("off", False)):
        assert runs.call("train", path, "--dry-run", f"--trainer.activation_checkpointing={wanted}") == 0
        assert ("runs every block twice" in capsys.readouterr().out) is said
