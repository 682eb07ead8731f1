"""LoRA: the adapter alone is trained, saved and resumed; engines get it merged; with it off the policy is the base."""

import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fdpg_fast import Trainer
from fdpg_fast.config.load import parse_config
from fdpg_fast.config.schema import LoRAConfig
from fdpg_fast.engines.embedded import TransformersEngine
from fdpg_fast.engines.vllm_folder import weights_folder
from fdpg_fast.engines.vllm_replica import kinds_of, weight_source
from fdpg_fast.errors import UserError
from fdpg_fast.experiments.compare import frozen_base_sample
from fdpg_fast.models.load import load_model
from fdpg_fast.models.lora import LoRAPolicy
from fdpg_fast.runs.finished import evaluate_checkpoint
from fdpg_fast.session import Session
from support import runs
from support.runs import Moment
from support.vllm_cases import CONTEXTS, EOS, TOLERANCE, gap, save_model, vllm_engine

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {tied: save_model(root / f"tied-{tied}", tied=tied) for tied in (True, False)}


def load(folder, dtype="float32"):
    return load_model(str(folder), dtype, "cpu", trust_remote_code=False)


def make(folder, dtype="float32", **settings):
    """A policy whose adapter does something, as after training."""
    policy = LoRAPolicy(load(folder, dtype), LoRAConfig(**{**LORA, **settings}), seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def rollouts(policy):
    return TransformersEngine(policy, EOS, max_new_tokens=12).sample(CONTEXTS, 4, seed=1)


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_the_policy(tied, modules, folders):
    policy, merged = make(folders[tied], target_modules=modules), load(folders[tied])
    samples = rollouts(policy)
    before = policy.token_logprobs(samples, 4096)
    weights = dict(policy.weights())
    assert weights.keys() == merged.model.state_dict().keys()  # a tied head included
    merged.model.load_state_dict(weights)
    gaps = (merged.token_logprobs(samples, 4096) - before).abs()
    assert gaps.mean() < 1e-5 and gaps.max() < TOLERANCE  # rounding: the sums are the same, in another order
    torch.testing.assert_close(policy.token_logprobs(samples, 4096), before, atol=0, rtol=0)  # nothing was done to it
    assert (load(folders[tied]).token_logprobs(samples, 4096) - before).abs().max() > 0.1
    policy.model.double(), merged.model.double().load_state_dict(dict(policy.weights()))
    row = torch.tensor([CONTEXTS[3].token_ids])
    torch.testing.assert_close(merged.model(row).logits, policy.model(row).logits, atol=1e-9, rtol=1e-9)


def test_scale_is_alpha_over_rank(folders):
    def moved(**settings):
        weights = dict(make(folders[True], **settings).weights())
        return (
            weights["model.layers.1.mlp.up_proj.weight"] - load(folders[True]).model.model.layers[1].mlp.up_proj.weight
        )

    torch.testing.assert_close(moved(alpha=8.0), 2 * moved(alpha=None))
    torch.testing.assert_close(moved(alpha=4.0), moved(alpha=None))


def test_base_is_the_untouched_model_and_the_policy_comes_back(folders):
    policy, untouched = make(folders[True]), load(folders[True])
    samples = rollouts(policy)
    before = policy.token_logprobs(samples, 4096)
    with policy.as_base() as base:
        assert base.model is policy.model  # no second set of weights
        assert torch.equal(base.token_logprobs(samples, 4096), untouched.token_logprobs(samples, 4096))
        own, theirs = dict(untouched.weights()), dict(base.weights())
        assert list(own) == list(theirs) and all(torch.equal(own[name], theirs[name]) for name in own)
    assert torch.equal(policy.token_logprobs(samples, 4096), before)
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all(".lora_" in name for name in trained)
    fresh = LoRAPolicy(load(folders[True]), LoRAConfig(**LORA), seed=1)
    assert torch.equal(fresh.token_logprobs(samples, 4096), untouched.token_logprobs(samples, 4096))


def test_the_adapter_comes_back_after_an_error_and_after_the_outer_of_two(folders):
    policy = make(folders[True])
    samples = rollouts(policy)
    before = policy.token_logprobs(samples, 4096)
    with pytest.raises(RuntimeError, match="amid"), policy.as_base():
        raise RuntimeError("amid")
    assert torch.equal(policy.token_logprobs(samples, 4096), before)
    with policy.as_base() as base, base.as_base():
        off = base.token_logprobs(samples, 4096)
        with base.as_base():
            pass
        assert torch.equal(base.token_logprobs(samples, 4096), off) and not torch.equal(off, before)
    assert torch.equal(policy.token_logprobs(samples, 4096), before)
    assert all(parameter.requires_grad == (".lora_" in name) for name, parameter in policy.model.named_parameters())
    model = load(folders[True])
    with model.as_base() as base:
        assert base is model  # nothing to switch off


def test_samples_of_the_base_are_drawn_with_the_adapter_off(finished, tiny_model, tmp_path):
    session = Session(parse_config(runs.yaml.safe_load((finished / "config.yaml").read_text())), resume=True)
    drawn = frozen_base_sample(session, 4, 1, tmp_path)
    expected, of_policy = (m.token_logprobs(drawn, 4096) for m in (load(tiny_model), session.state.learner.policy))
    torch.testing.assert_close(drawn.behavior_logprob, expected, atol=TOLERANCE, rtol=0)
    assert (drawn.behavior_logprob - of_policy).abs().max() > 1e-3


def test_adapter_of_a_bfloat16_model_is_float32(folders, tmp_path):
    policy = make(folders[True], "bfloat16")
    assert {p.dtype for p in policy.model.parameters() if p.requires_grad} == {torch.float32}
    assert {tensor.dtype for _, tensor in policy.weights()} == {policy.model.dtype} == {torch.bfloat16}
    policy.save(tmp_path)
    again = LoRAPolicy(load(folders[True], "bfloat16"), LoRAConfig(**LORA), seed=3, checkpoint=tmp_path)
    ours, theirs = policy.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_vllm_samples_from_the_merged_weights_after_a_sync_and_only_then(folders):
    policy = LoRAPolicy(load(folders[True]), LoRAConfig(**LORA), seed=1)
    engine = vllm_engine(policy, folders[True])
    engine.sync_weights(policy, 0)
    assert gap(policy, engine.sample(CONTEXTS, 8, seed=1)).max() < TOLERANCE
    for version, layer in enumerate(("q_proj.lora_B", "gate_proj.lora_B", "down_proj.lora_B"), start=1):
        for name, parameter in policy.model.named_parameters():
            if layer in name:
                parameter.data += 0.3
        assert gap(policy, engine.sample(CONTEXTS, 8, seed=1)).max() > 0.01
        engine.sync_weights(policy, version)
        assert gap(policy, engine.sample(CONTEXTS, 8, seed=1)).max() < TOLERANCE
    engine.close()


@pytest.mark.parametrize("tied", [True, False])
def test_servers_are_given_the_merged_weights(tied, folders, tmp_path):
    policy = make(folders[tied])
    expected = dict(policy.weights())
    with weights_folder(policy, tmp_path, "weights") as folder:
        written = {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}
    assert written.keys() == expected.keys() and all(torch.equal(written[n], expected[n]) for n in written)
    source = weight_source(policy.weights(repeat_tied=False), kinds_of(policy))
    sent = list(source)
    assert [name for name, _ in sent] == [name for name in expected if not (tied and name == "lm_head.weight")]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sent)
    assert [(m.name, m.dtype, tuple(m.shape)) for m in source.metadata()] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent
    ]


def settings(model, folder, **sections):
    contexts = {"train": str(runs.write_contexts(folder, *runs.PROMPTS))}
    trainer = {"rounds": 6, "checkpoint_every": 2}
    return runs.settings(model, folder / "run", contexts=contexts, lora=LORA, trainer=trainer, **sections)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A run undisturbed, in a process of its own."""
    folder = tmp_path_factory.mktemp("finished")
    ended = runs.run(folder, "train", runs.write_config(folder, settings(tiny_model, folder)))
    assert ended.status == 0, ended.stderr
    return folder / "run"


MOMENTS = {
    "between two checkpoints": Moment("open", "metrics.jsonl", 4),
    "between a checkpoint's adapter and the trainer": Moment("open", ".writing-round-000004/trainer/state.tensors"),
    "before a checkpoint's rename": Moment("os.rename", ".writing-round-000004"),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_killed_and_resumed_run_equals_an_uninterrupted_one(moment, finished, tiny_model, tmp_path):
    assert (
        runs.run(tmp_path, "train", runs.write_config(tmp_path, settings(tiny_model, tmp_path)), at=moment).status < 0
    )
    resumed = runs.run(tmp_path, "train", "--resume", "run")
    assert resumed.status == 0, resumed.stderr
    runs.assert_equal(runs.record(tmp_path / "run"), runs.record(finished))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_moves_the_adapter_and_nothing_else(dtype, tiny_model, tmp_path):
    trainer = Trainer(parse_config(settings(tiny_model, tmp_path, dtype=dtype)))
    policy, learner = trainer.session.state.learner.policy, trainer.session.state.learner
    assert trainer.session.base.model is policy.model and learner.masters == []
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    result = trainer.train()
    assert result.before.metrics["kl_to_base"].value == pytest.approx(0, abs=1e-4 if dtype == "float32" else 0.5)
    after = policy.model.state_dict()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == {name for name in before if ".lora_" in name}


def test_checkpoint_is_an_adapter_that_peft_and_transformers_open(finished, tiny_model):
    folder = finished / "checkpoints/round-000006"
    assert not (folder / "model.safetensors").exists()
    row = torch.tensor([[5, 80, 33, 7, 66, 72]])
    with torch.no_grad():
        policy = LoRAPolicy(load(tiny_model), LoRAConfig(**LORA), seed=3, checkpoint=folder)
        expected, base = policy.model(row).logits, load(tiny_model).model(row).logits
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(row).logits
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(row).logits
    torch.testing.assert_close(theirs, expected)
    torch.testing.assert_close(plain, expected)
    assert (base - expected).abs().max() > 1e-3


def test_evaluate_and_sample_take_the_adapter_from_the_checkpoint(finished, capsys):
    session = Session(parse_config(runs.yaml.safe_load((finished / "config.yaml").read_text())), resume=True)
    assert evaluate_checkpoint(session, 8, 1).metrics["kl_to_base"].value > 1e-3
    assert runs.call("evaluate", finished) == 0 and runs.call("sample", finished, "--count=2") == 0
    assert len(capsys.readouterr().out.splitlines()) > 2


def test_dry_run_says_how_much_is_trained(tiny_model, tmp_path, capsys):
    assert runs.call("train", runs.write_config(tmp_path, settings(tiny_model, tmp_path)), "--dry-run") == 0
    policy = LoRAPolicy(load(tiny_model), LoRAConfig(**LORA), seed=0)
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    assert f"M parameters, of which {trained / 1e6:.3g} M are trained, float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "--lora.target_modules=[q_proj, qproj]",
            "lora.target_modules: 'qproj' is no linear layer inside LlamaForCausal",
        ),
        (
            "--lora.target_modules=[lm_head]",
            "lora.target_modules: 'lm_head' is no linear layer inside LlamaForCausalLM; ",
        ),
        ("--lora.target_modules=[embed_tokens]", "lora.target_modules: 'embed_tokens' is no linear layer inside Llama"),
        (
            "--lora.target_modules=q_proj",
            "lora.target_modules: 'q_proj': write all-linear, or a list of names such as ",
        ),
        (
            "--lora.target_modules=[]",
            "lora.target_modules: write all-linear, or a list of names such as [q_proj, v_proj]",
        ),
        ("--lora.rank=0", "lora.rank: 0: Input should be greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(override, complaint, tiny_model, tmp_path, capsys):
    assert runs.call("train", runs.write_config(tmp_path, settings(tiny_model, tmp_path)), override) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fdpg-fast: {complaint}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_peft_it_is_said_how_to_get_it(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^lora: peft is not installed; pip install 'fdpg-fast\[lora\]'$"):
        LoRAPolicy(load(folders[True]), LoRAConfig(**LORA), seed=1)


def test_a_section_that_was_left_out_can_be_overridden(tiny_model, tmp_path, capsys):
    data = runs.settings(tiny_model, tmp_path / "run", lora=None)
    assert runs.call("train", runs.write_config(tmp_path, data), "--lora.rank=2", "--dry-run") == 0
    assert "are trained" in capsys.readouterr().out
