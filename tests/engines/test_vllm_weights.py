"""The real vLLM on the CPU takes weights of all kinds as they are trained, and opens the checkpoints that runs leave.

Engines of their own: closing one ends the others.
"""

import gc

import pytest
import torch

from fdpg_fast.config.schema import LoRAConfig
from fdpg_fast.contexts import Context
from fdpg_fast.models.load import load_model
from fdpg_fast.models.lora import LoRAPolicy
from support import runs
from support.architectures import save_architecture
from support.vllm_cases import TOLERANCE, gap, perturb, vllm_engine

CONTEXTS = tuple(Context(i, "", prompt) for i, prompt in enumerate([(3,), (40, 33, 7, 6, 12), tuple(range(10, 60))]))
ROW = (40, 33, 7, 6, 12)


def load(folder):
    return load_model(str(folder), "float32", "cpu", trust_remote_code=False)


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("mixtral", LoRAConfig(rank=2)),  # renamed on their way, and with adapters of the experts merged
        ("qwen3_moe", None),
        ("olmo2", None),  # vLLM runs transformers' own class
    ],
)
def test_log_probs_are_the_learners_after_every_sync_and_only_then(name, lora, tmp_path):
    folder = save_architecture(name, tmp_path / "model")
    policy = load(folder) if lora is None else LoRAPolicy(load(folder), lora, seed=1)
    engine = vllm_engine(policy, folder, (7, 11), max_length=100)
    engine.sync_weights(policy, 0)
    assert gap(policy, engine.sample(CONTEXTS, 8, seed=1)).max() < TOLERANCE
    for version in (1, 2):
        perturb(policy, version)
        assert gap(policy, engine.sample(CONTEXTS, 8, seed=1)).max() > 0.1
        engine.sync_weights(policy, version)
        assert gap(policy, engine.sample(CONTEXTS, 8, seed=1)).max() < TOLERANCE
    engine.close()


def trained(folder, model, **sections):
    """The checkpoint of a run of a round that moves the weights far."""
    data = runs.settings(model, folder / "run", optimizer={"learning_rate": 0.03}, **sections)
    assert runs.call("train", runs.write_config(folder, data), "--trainer.rounds=1") == 0
    return folder / "run/checkpoints/round-000001"


def opened(folder, model, **options):
    """What vLLM, told only the folder, gives for the tokens of ROW behind its first."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    limits = {"max_model_len": 64, "kv_cache_memory_bytes": 2**26, "enforce_eager": True, "dtype": "float32"}
    llm = LLM(model=str(model), **limits, **options)
    settings = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    request = LoRARequest("trained", 1, str(folder)) if options else None
    (output,) = llm.generate([{"prompt_token_ids": list(ROW)}], settings, use_tqdm=False, lora_request=request)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return torch.tensor([step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ROW[1:], strict=True)])


@torch.no_grad()
def expected(model):
    logprobs = model(torch.tensor([ROW])).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(ROW[1:])[:, None])[:, 0]


@pytest.mark.parametrize("kind", ["tied", "qwen3_moe", "lora"])
def test_the_checkpoint_of_a_run_opens_in_vllm(kind, vllm_model, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    model = vllm_model if kind != "qwen3_moe" else save_architecture(kind, tmp_path / "model", tokenizer=vllm_model)
    sections, options = {}, {}
    if kind == "lora":
        sections, options = {"lora": {"rank": 4}}, {"enable_lora": True, "max_lora_rank": 8}
    folder = trained(tmp_path, model, **sections)
    ours = opened(folder, model if options else folder, **options)
    policy = LoRAPolicy(load(model), LoRAConfig(rank=4), 1, folder) if options else load(folder)
    torch.testing.assert_close(ours, expected(policy.model), atol=TOLERANCE, rtol=0)
    assert (ours - expected(load(model).model)).abs().max() > 0.01
