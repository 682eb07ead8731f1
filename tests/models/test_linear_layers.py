"""A model whose layers multiply in another way is the same model."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fdpg_fast.models import onednn
from fdpg_fast.models.linear_layers import use_fast_products

SIZES = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            attention_bias=True,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=32)),
}  # fmt: skip


@pytest.mark.parametrize("kind", SIZES)
def test_logits_gradients_and_names_stay(kind, monkeypatch):
    monkeypatch.setattr(onednn, "AVAILABLE", True)
    monkeypatch.setattr(onednn, "SUITS_LAYERS", True)
    monkeypatch.setattr(onednn, "SMALLEST", 0)
    torch.manual_seed(0)
    model = SIZES[kind]().eval()
    ours = copy.deepcopy(model)
    use_fast_products(ours)
    changed = [type(a) is not type(b) for a, b in zip(ours.modules(), model.modules(), strict=True)]
    assert sum(changed) == {"llama": 2 * 7 + 1, "gpt2": 2 * 4 + 1}[kind]
    assert all(isinstance(a, type(b)) for a, b in zip(ours.modules(), model.modules(), strict=True))
    assert [*ours.state_dict()] == [*model.state_dict()]

    ids = torch.randint(96, (3, 11))
    for one in (model, ours):
        one(ids, labels=ids).loss.backward()
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_nothing_changes_where_pytorch_is_as_fast(monkeypatch):
    monkeypatch.setattr(onednn, "SUITS_LAYERS", False)
    model = SIZES["llama"]()
    before = [type(module) for module in model.modules()]
    use_fast_products(model)
    assert [type(module) for module in model.modules()] == before
