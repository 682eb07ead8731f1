"""The plain rule for how many tokens a forward and backward pass takes."""

import pytest
from transformers import AutoModelForCausalLM

from fdpg_fast.models.language_model import LanguageModel, default_micro_batch_tokens


@pytest.mark.parametrize(("layers", "low", "high"), [(2, 6_000, 7_000), (8, 1_500, 1_700), (80, 447, 449)])
def test_micro_batches_are_planned_from_layers_and_width(layers, low, high, tiny_model):
    model = LanguageModel(AutoModelForCausalLM.from_pretrained(tiny_model))
    model.model.config.num_hidden_layers, model.model.config.hidden_size = layers, 256
    assert low < default_micro_batch_tokens(model) < high
