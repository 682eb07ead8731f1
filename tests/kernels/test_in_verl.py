"""examples/verl_loss.py: verl's shapes, losses and engine with the fused head, against logits formed in full."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from support.examples import load_example

VOCABULARY, WIDTH = 257, 32
PROMPTS, RESPONSES = [3, 5, 2, 1], [4, 1, 7, 30]

example = load_example("verl_loss")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def data():
    """What an actor of verl is given, as a dict of jagged tensors."""
    rng = torch.Generator().manual_seed(1)
    jagged = example.jagged
    whole = [torch.randint(VOCABULARY, (p + r,), generator=rng) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    return dict(
        input_ids=jagged(whole),
        position_ids=jagged([torch.arange(len(row)) for row in whole]),
        prompts=jagged([row[:p] for row, p in zip(whole, PROMPTS, strict=True)]),
        responses=jagged([row[p:] for row, p in zip(whole, PROMPTS, strict=True)]),
        response_mask=jagged([torch.ones(r) for r in RESPONSES]),
        old_log_probs=jagged([-6 + torch.rand(r, generator=rng) for r in RESPONSES]),
        advantages=jagged([torch.randn(r, generator=rng) for r in RESPONSES]),
        temperature=torch.tensor([0.5, 1.0, 1.3, 0.9]),
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_near(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def test_packed_sequences_score_as_each_alone(model, data):
    """Log-probs, entropies and gradients, with a temperature of each sample."""
    wanted_logprob, wanted_entropy = [], []
    for ids, temperature in zip(data["input_ids"].unbind(), data["temperature"], strict=True):
        log_pi = (model(ids[None]).logits[0] / temperature).log_softmax(-1)
        wanted_logprob.append(log_pi[:-1].gather(1, ids[1:, None])[:, 0])
        wanted_entropy.append(-(log_pi.exp() * log_pi).sum(1))
    wanted_logprob, wanted_entropy = torch.cat(wanted_logprob), torch.cat(wanted_entropy)
    example.use_fused_head(model)
    output = example.actor_output(model, data)
    logprob = torch.cat([row[:-1] for row in output["log_probs"].unbind()])  # the last scores the next sequence's first
    entropy = output["entropy"].values()
    torch.testing.assert_close((logprob, entropy), (wanted_logprob, wanted_entropy), rtol=1e-5, atol=1e-5)
    weight = torch.linspace(-1, 2, len(logprob))
    found = gradients(model, (weight * logprob).sum() - 0.1 * entropy.sum())
    assert_near(found, gradients(model, (weight * wanted_logprob).sum() - 0.1 * wanted_entropy.sum()))


def test_other_calls_are_answered_as_before(model, data):
    ids = data["input_ids"].values()[None]
    wanted = model(ids).logits
    example.use_fused_head(model)
    assert torch.equal(model(ids).logits, wanted)


def test_verls_engine_and_loss(model, data):
    """verl's FSDP engine prepares inputs and reads outputs: its own logits or the fused head, then its PPO loss."""
    pytest.importorskip("verl")
    from verl.utils import tensordict_utils, torch_functional
    from verl.workers.config import ActorConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.utils.losses import ppo_loss

    engine = FSDPEngineWithLMHead.__new__(FSDPEngineWithLMHead)  # one process: none of what its constructor sets up
    engine.use_ulysses_sp, engine.ulysses_sequence_parallel_size, engine.pad_to_length = False, 1, None
    engine.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    engine.compute_entropy_from_logits = torch_functional.entropy_from_logits
    config = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=4, entropy_coeff=0.02)
    settings = dict(dp_size=1, batch_num_tokens=sum(RESPONSES), global_batch_size=4, calculate_entropy=True)
    settings |= dict(temperature=0.7)  # one of all: verl refuses another of each with any fused head
    del data["temperature"]
    losses, all_gradients = [], []
    for fused in (False, True):
        if fused:
            example.use_fused_head(model)
        batch = tensordict_utils.get_tensordict(data, settings | dict(use_fused_kernels=fused))
        inputs, rest = engine.prepare_model_inputs(micro_batch=batch)
        output = engine.prepare_model_outputs(model(**inputs, use_cache=False), rest, batch, None)
        loss, _ = ppo_loss(config, output, batch)
        all_gradients.append(gradients(model, loss))
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    assert_near(all_gradients[1], all_gradients[0])
