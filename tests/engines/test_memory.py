"""Memory: planned micro-batches, and frozen weights that leave and come back unchanged."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fdpg_fast.engines.memory import FrozenPages, plan_micro_batch_tokens

MODEL = Path(__file__).resolve().parents[2] / "examples/tiny-python-lm"


@pytest.fixture
def model(tmp_path):
    """In float32 in its file too, so that loading copies nothing."""
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path)


def resident(pages: FrozenPages) -> int:
    """Bytes of these address ranges that are in memory, by the kernel's own account."""
    mappings, held, inside = dict(pages._ranges), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key = line.split(maxsplit=1)[0]
        if not key.endswith(":"):
            first, last = (int(address, 16) for address in key.split("-"))
            inside = any(first <= start < last for start in mappings)
        elif key == "Rss:" and inside:
            held += int(line.split()[1]) * 1024
    return held


def test_frozen_weights_leave_memory_and_come_back(model):
    pages = FrozenPages(model)
    expected = {name: p.clone() for name, p in model.named_parameters()}  # reads every page
    total = sum(last - first for first, last in pages._ranges)
    assert total > 0.9 * sum(p.numel() * 4 for p in model.parameters())
    assert resident(pages) >= total
    pages.release()
    assert resident(pages) < 0.1 * total
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name]), name
    assert not any(p.requires_grad for p in model.parameters())


def test_weights_that_are_not_in_a_file_are_left_alone():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64)  # converted, so no longer the file's
    model.extra = nn.Linear(400, 400)
    expected = {name: p.clone() for name, p in model.named_parameters()}
    FrozenPages(model).release()
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name]), name


def test_a_mapping_that_was_written_to_is_left_alone(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    expected = model.lm_head.weight.clone()
    FrozenPages(model).release()
    assert torch.equal(model.lm_head.weight, expected)


@pytest.mark.parametrize(("layers", "low", "high"), [(2, 6_000, 7_000), (8, 1_500, 1_700)])
def test_micro_batches_are_planned_from_layers_and_width(layers, low, high, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.num_hidden_layers, model.config.hidden_size = layers, 256
    assert low < plan_micro_batch_tokens(model) < high
