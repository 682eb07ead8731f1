"""The real vLLM, on a CPU, beside a learner whose layers have windows and soft caps, on texts far longer than those.

Gemma 2's head is tied too, and vLLM has no module for it.
"""

import contextlib

import pytest
import torch
import transformers as hf

from fdpg_fast.models.load import load_model
from support.architectures import ARCHITECTURES
from support.vllm_cases import CONFIG_EOS, CONTEXTS, TOLERANCE, VOCABULARY, gap, perturb, vllm_engine

SIZES = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "eos_token_id": CONFIG_EOS,
    "pad_token_id": CONFIG_EOS,
}


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral"])
def test_log_probs_past_the_window_are_the_learners_after_every_sync(tmp_path, name):
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(kind(**settings | SIZES | {"sliding_window": 16})).save_pretrained(tmp_path)
    policy = load_model(str(tmp_path), "float32", "cpu", trust_remote_code=False)
    with contextlib.closing(vllm_engine(policy, tmp_path, max_new_tokens=40)) as engine:
        for version in range(2):
            engine.sync_weights(policy, version)
            rollouts = engine.sample(CONTEXTS, 4, seed=1)
            assert int(rollouts.lengths.max()) > 16
            assert gap(policy, rollouts).max() < TOLERANCE
            perturb(policy, version)
            assert gap(policy, rollouts).max() > 0.1
