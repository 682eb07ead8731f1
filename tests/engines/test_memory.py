"""What vLLM's cache may have: measured beside the learner on a GPU, a quarter of the machine on a CPU."""

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from fdpg_fast.engines import memory
from fdpg_fast.engines.memory import ENGINE_WORK, cache_bytes, kv_bytes_per_token, room_beside_learner
from fdpg_fast.errors import UserError

GIB = 2**30
QWEN = Qwen2Config(num_hidden_layers=1, num_attention_heads=14, num_key_value_heads=2, hidden_size=896)
LLAMA = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
TOKEN = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        (LLAMA, torch.float32, TOKEN),
        (LLAMA, torch.bfloat16, TOKEN // 2),
        (LlamaConfig(num_hidden_layers=3, num_attention_heads=2, hidden_size=32, head_dim=6), torch.float32, 288),
        (QWEN, torch.bfloat16, 512),
    ],
)
def test_keys_and_values_of_a_token(config, dtype, expected):
    assert kv_bytes_per_token(config, dtype) == expected


@pytest.mark.parametrize(("device", "block"), [("cpu", 128), ("cuda", 16)])
def test_the_cache_takes_whole_blocks_and_no_more_than_can_be_filled(device, block):
    def cache(room, sequences=3, length=block + 1):
        return cache_bytes(LLAMA, torch.float32, room, length, sequences, device)

    one_block = block * TOKEN  # a sequence takes two of them, and vLLM keeps one for itself
    assert cache(100 * one_block) == 7 * one_block
    assert cache(5 * one_block + 1) == 5 * one_block
    assert cache(3 * one_block) == 3 * one_block
    with pytest.raises(UserError, match=r"lower engine.max_new_tokens, train a LoRA adapter .*vllm_server") as refusal:
        cache(3 * one_block - 1)
    assert "\n" not in str(refusal.value)


class Card:
    """A GPU of 24 GiB as torch.cuda reports it; 4 are allocated before the step, which adds 6 at its peak."""

    def __init__(self, monkeypatch, total=24 * GIB, step=6 * GIB):
        self.total, self.peak, self.allocated, self.added = total, 0, 4 * GIB, step
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.total - self.allocated, self.total))

    def step(self):
        self.peak = self.allocated + self.added
        if self.peak > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("sleeps", [True, False])
def test_vllm_gets_what_is_free_beside_a_measured_step(sleeps, monkeypatch):
    card = Card(monkeypatch)
    room = room_beside_learner(torch.device("cuda"), card.step, 2 * GIB, 1 * GIB, sleeps)
    assert room == (24 - 4 - 2 - 1 - (0 if sleeps else 6)) * GIB - ENGINE_WORK


@pytest.mark.parametrize("step", [19 * GIB, 30 * GIB], ids=["beside the optimizer", "at all"])
def test_a_step_that_does_not_fit_is_refused_with_what_helps(step, monkeypatch):
    card = Card(monkeypatch, step=step)
    with pytest.raises(UserError, match="^trainer.micro_batch_tokens: .*dtype: bfloat16, or train a LoRA adapter"):
        room_beside_learner(torch.device("cuda"), card.step, 2 * GIB, 1 * GIB, True)


def test_peak_memory_is_that_of_this_process():
    before = memory.peak_memory()
    held = torch.ones(before // 4)  # as much again as there has ever been
    assert before + held.nbytes // 4 < memory.peak_memory() < memory.machine_memory()
