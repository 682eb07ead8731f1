"""verl's actor loss on the fused ops: needs verl and fdpg_kernels, runs on a CPU in half a minute.

    python examples/verl_loss.py

Written against verl 0.9.1. With `use_fused_kernels` its FSDP engine gives the model packed sequences, `shift_labels`
and a temperature, and reads `log_probs` and `entropy` from what comes back; its losses take it from there.
`use_fused_head(model)`, before FSDP wraps the model, answers such calls with `linear_logprob`, which also takes what
verl's own fused heads do not: a temperature of each sample.

verl pins an older transformers than stands here, but what this needs of it runs beside a newer one:

    pip install --no-deps verl==0.9.1 tensordict==0.10.0 pyvers omegaconf==2.3.1 hydra-core \\
        antlr4-python3-runtime==4.9.3 codetiming ray msgpack orjson
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import ModelOutput

from fdpg_kernels import linear_logprob

FOLDER = Path(__file__).resolve().parent / "tiny-python-lm"
PROMPT, SAMPLES, LENGTH, TEMPERATURE, STEPS = "def area(self, width, height):", 32, 32, 0.9, 12


@dataclass
class TokenScores(ModelOutput):
    """What verl reads: log-prob of each label and entropy of each prediction in nats, float32 [1, total_nnz]."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None


def use_fused_head(model: PreTrainedModel) -> None:
    """A call with `shift_labels` gives TokenScores; any other is answered as before."""
    other_calls = model.forward

    @functools.wraps(other_calls)  # `generate` reads the signature
    def forward(self, *args, shift_labels=None, temperature=1.0, **kwargs):
        if shift_labels is None:
            return other_calls(*args, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state  # [1, total_nnz, D]
        scores = linear_logprob(hidden, self.lm_head.weight, shift_labels, temperature=temperature, return_entropy=True)
        return TokenScores(scores.logprob, scores.entropy)

    model.forward = MethodType(forward, model)


def actor_output(model: PreTrainedModel, data: Any) -> dict[str, Tensor]:
    """Log-probs and entropies of B sequences, jagged [B, j]: what verl's losses take."""
    ids, lengths = data["input_ids"], data["input_ids"].offsets().diff()
    packed = ids.values().unsqueeze(0)  # [1, total_nnz]
    output = model(
        input_ids=packed,
        attention_mask=None,  # positions say where sequences begin
        position_ids=data["position_ids"].values().unsqueeze(0),
        shift_labels=packed.roll(-1, 1),
        temperature=data["temperature"].repeat_interleave(lengths).unsqueeze(0),
        use_cache=False,
    )
    return {
        name: torch.nested.nested_tensor_from_jagged(output[name].squeeze(0), ids.offsets())
        for name in ("log_probs", "entropy")
    }


def jagged(tensors: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)


@torch.no_grad()
def rollouts(model: PreTrainedModel, tokenizer: Any) -> tuple[Any, float]:
    """A micro-batch as verl hands to its actor, rewarded for ending within two lines, and the mean reward."""
    from verl.utils.tensordict_utils import get_tensordict

    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids[0]
    prompts = prompt.repeat(SAMPLES, 1)
    options = dict(do_sample=True, temperature=TEMPERATURE, max_new_tokens=LENGTH)
    written = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, len(prompt) :]
    end = tokenizer.eos_token_id
    responses = [row[: int((row == end).int().argmax()) + 1] if end in row else row for row in written]
    reward = torch.tensor([float(row[-1] == end and tokenizer.decode(row).count("\n") < 3) for row in responses])
    advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
    whole = [torch.cat([prompt, row]) for row in responses]
    data = get_tensordict(
        dict(
            input_ids=jagged(whole),
            position_ids=jagged([torch.arange(len(row)) for row in whole]),
            prompts=jagged([prompt] * SAMPLES),
            responses=jagged(responses),
            temperature=torch.full((SAMPLES,), TEMPERATURE),
            response_mask=jagged([torch.ones(len(row)) for row in responses]),
            advantages=jagged([a.repeat(len(row)) for a, row in zip(advantage, responses, strict=True)]),
        ),
        dict(dp_size=1, batch_num_tokens=sum(map(len, responses)), global_batch_size=SAMPLES),
    )
    scores = actor_output(model, data)["log_probs"].unbind()  # of the token after each
    data["old_log_probs"] = jagged([row[len(prompt) - 1 : -1].clone() for row in scores])
    return data, float(reward.mean())


def main() -> None:
    from verl.workers.config import ActorConfig
    from verl.workers.utils.losses import ppo_loss

    torch.manual_seed(0)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32"),
        AutoTokenizer.from_pretrained(FOLDER),
    )
    use_fused_head(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    config = ActorConfig(strategy="fsdp2", rollout_n=SAMPLES, ppo_micro_batch_size_per_gpu=SAMPLES, entropy_coeff=0.01)
    for step in range(STEPS):
        data, reward = rollouts(model, tokenizer)
        output = actor_output(model, data)
        loss, metrics = ppo_loss(config, output, data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 4 == 0 or step == STEPS - 1:
            print(f"step {step}: {100 * reward:.0f} % end in time, entropy {output['entropy'].values().mean():.2f}")


if __name__ == "__main__":
    main()
