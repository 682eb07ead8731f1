"""BOND's target (arXiv 2407.14622): the best of N samples of the base, by a reward; and Jeffreys' divergence."""

import math
from pathlib import Path

import torch
import transformers
from torch import Tensor

from fdpg_fast.features import feature
from fdpg_fast.targets import Target, rlhf
from fdpg_kernels import Divergence

N, DRAWS, BETA = 4, 256, 0.5
BASE, PROMPTS, MAX_NEW_TOKENS = "examples/tiny-python-lm", "examples/papers/signatures.txt", 32  # as in bond.yaml

jeffreys = Divergence("jeffreys", lambda t: BETA * t * t.log() - (1 - BETA) * t.log(), f_prime_at_infinity=math.inf)


def reward(text: str) -> float:
    return -float(len(text))


def best_of(below: Tensor, up_to: Tensor) -> Tensor:
    """φ of completions for whose reward the base has P(less) = `below` and P(less or as much) = `up_to`.

    The best of N has a(x)·Σ up_to^(N−1−i)·below^i over i < N: N·P(less)^(N−1) where no two rewards are alike.
    """
    return sum(up_to ** (N - 1 - i) * below**i for i in range(N))


def rewards_of_base() -> dict[str, Tensor]:
    """Rewards of DRAWS completions of each prompt, sampled as the run samples."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    found = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for prompt in Path(PROMPTS).read_text().splitlines():
            tokens = tokenizer(prompt, return_tensors="pt")
            options = {"do_sample": True, "top_k": 0, "max_new_tokens": MAX_NEW_TOKENS}
            drawn = model.generate(**tokens, **options, num_return_sequences=DRAWS)[:, tokens["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
            found[prompt] = torch.tensor([reward(text) for text in texts], dtype=torch.float64)
    return found


def target() -> Target:
    of_base = rewards_of_base()

    @feature
    def log_best_of(prompt_texts, completion_texts):
        values = []
        for prompt, text in zip(prompt_texts, completion_texts, strict=True):
            drawn, own = of_base[prompt], reward(text)
            below, alike = int((drawn < own).sum()), int((drawn == own).sum()) + 1  # with the completion itself
            share = torch.tensor([below, below + alike], dtype=torch.float64) / (len(drawn) + 1)
            values.append(float(best_of(*share).log()))
        return values

    return rlhf(log_best_of, beta=1.0)
