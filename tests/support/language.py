"""Models, contexts, rollouts and counts that the tests of models and engines share."""

from __future__ import annotations

import torch
import transformers as hf

from fdpg_fast.contexts import Context
from fdpg_fast.rollouts import Rollouts

VOCABULARY, EOS = 61, 0
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,  # pad == EOS == BOS, as in GPT-2: nothing may be recognised by its id
}
GROUPED = {**COMMON, "num_key_value_heads": 2}


def contexts_of(*lengths):
    """Prompts of these lengths; every one but the first holds EOS tokens too."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]
    for prompt in prompts[1:]:
        prompt[::3] = EOS
    return [Context(i, "", tuple(prompt.tolist())) for i, prompt in enumerate(prompts)]


def rollouts_of(contexts, completions):
    """Given completions, a list of token lists for each context."""
    flat = [completion for group in completions for completion in group]
    lengths = torch.tensor([len(completion) for completion in flat])
    return Rollouts(
        contexts=tuple(contexts),
        context_index=torch.repeat_interleave(
            torch.arange(len(contexts)), torch.tensor([len(group) for group in completions])
        ),
        token_ids=torch.tensor([token for completion in flat for token in completion]),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        behavior_logprob=torch.zeros(int(lengths.sum())),
        finished=torch.tensor([completion[-1] == EOS for completion in flat]),
    )


def split(rollouts, values):
    return [part.tolist() for part in values.split(rollouts.lengths.tolist())]


def p_value(counts, probability):
    """Of Pearson's χ², cells that expect fewer than 5 pooled into one."""
    expected = probability * counts.sum()
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts.double(), expected))
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2))


def build(config, dtype=torch.float32):
    """A random model, the same for equal configs."""
    torch.manual_seed(0)
    config._experts_implementation = "eager"  # the default multiplies experts in float32 only
    model = hf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at 0, where a forgotten one would not show
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def plain_logprobs(model, rollouts):
    """Log-probs of the completions' tokens from the model's own forward pass, one sequence at a time, [N]."""
    ends, context_index = rollouts.cu_seqlens.tolist(), rollouts.context_index.tolist()
    parts = []
    for start, end, context in zip(ends, ends[1:], context_index, strict=False):
        prompt = torch.tensor(rollouts.contexts[context].token_ids)
        completion = rollouts.token_ids[start:end]
        logits = model(torch.cat([prompt, completion])[None], use_cache=False).logits[0]
        table = logits[len(prompt) - 1 : -1].log_softmax(-1)
        parts.append(table.gather(1, completion[:, None])[:, 0])
    return torch.cat(parts)
