"""TRL's own GRPOTrainer and the one of examples/trl_grpo.py: the same numbers from less memory."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from support.examples import load_example
from support.storages import Storages

pytest.importorskip("trl")
VOCABULARY, WIDTH = 8192, 32
BATCH, PROMPT, COMPLETION = 8, 8, 192
TEMPERATURE = 0.7
LOGGED = "loss", "grad_norm", "reward", "entropy", "completions/mean_length", "num_tokens"


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.3,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """TRL's and ours, each with a model of the same weights."""
    example = load_example("trl_grpo")
    options = dict(temperature=TEMPERATURE, entropy_coef=0.05, loss_type="dapo", beta=0.0)
    made = []
    for number, kind in enumerate((example.GRPOTrainer, example.FusedGRPOTrainer)):
        trainer = example.make_trainer(kind, str(tmp_path_factory.mktemp(f"trl{number}")), make_model(), **options)
        trainer.current_gradient_accumulation_steps = 1  # `train` sets it
        made.append(trainer)
    return made


@pytest.fixture
def inputs():
    rng = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, COMPLETION + 1, (BATCH, 1), generator=rng)
    mask = (torch.arange(COMPLETION) < lengths).long()
    prompt_mask = (torch.arange(PROMPT) >= torch.randint(PROMPT - 1, (BATCH, 1), generator=rng)).long()
    return dict(
        prompt_ids=torch.randint(1, VOCABULARY, (BATCH, PROMPT), generator=rng),
        prompt_mask=prompt_mask,  # padded on the left
        completion_ids=torch.randint(1, VOCABULARY, (BATCH, COMPLETION), generator=rng),
        completion_mask=mask,
        advantages=torch.randn(BATCH, generator=rng),
        old_per_token_logps=torch.full((BATCH, COMPLETION), -9.0) + torch.rand(BATCH, COMPLETION, generator=rng),
        num_items_in_batch=mask.sum(),
    )


def whole(inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    return ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1), COMPLETION


def test_log_probs_and_entropies(trainers, inputs):
    found = []
    for trainer in trainers:
        with torch.no_grad():
            found.append(
                trainer._get_per_token_logps_and_entropies(trainer.model, *whole(inputs), compute_entropy=True)[:2]
            )
    mask = inputs["completion_mask"]
    assert found[0][0][mask == 1].max() < 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_loss_and_gradients(trainers, inputs):
    losses, gradients = [], []
    for trainer in trainers:
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, copy.deepcopy(inputs))
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for name, theirs in gradients[0].items():
        assert theirs.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()), msg=name)


def test_memory(trainers, inputs):
    """TRL's fused head tiles 4,096 tokens and 32,768 vocabulary entries: here that is all logits."""
    logits = BATCH * (PROMPT + COMPLETION - 1) * VOCABULARY * 4
    seen = []
    for trainer in trainers:
        with Storages(*trainer.model.parameters()) as watch:
            trainer._compute_loss(trainer.model, copy.deepcopy(inputs)).backward()
        seen.append(watch)
    theirs, ours = seen
    assert max(theirs.sizes) >= logits
    assert max(ours.sizes) <= logits / 4
    assert ours.peak() <= theirs.peak() / 4


def test_training(tmp_path):
    """Two steps, sampling and updates: TRL's trainer and ours write the same texts and log the same figures."""
    example = load_example("trl_grpo")
    logs = []
    for kind in (example.GRPOTrainer, example.FusedGRPOTrainer):
        trainer = example.make_trainer(kind, str(tmp_path), max_steps=2, max_completion_length=8, entropy_coef=0.05)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "reward" in row]
        logs.append([{key: float(row[key]) for key in LOGGED} for row in rows])
    assert len(logs[0]) == 2
    for ours, theirs in zip(*logs[::-1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
