"""The head: its forward is the loss, and it is the model's own output layer, tied or not, with its bias and scaling."""

import pytest
import torch
import transformers as hf

from fdpg_fast.models.encoder_decoder import EncoderDecoderModel
from fdpg_fast.models.head import FusedHead
from fdpg_fast.models.language_model import LanguageModel
from fdpg_kernels import fdpg_loss

ROWS, WIDTH, VOCABULARY = 7, 16, 30


@pytest.fixture
def head():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(WIDTH, VOCABULARY)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return FusedHead(layer, temperature=2.0, softcap=3.0)


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    return hidden, torch.randint(VOCABULARY, (ROWS,), generator=generator)


def test_logits_and_log_probs_are_one_distribution(head):
    hidden, token_ids = drawn(1)
    logits = 3 * torch.tanh((hidden @ head.layer.weight.T + head.layer.bias) / 3) / 2
    torch.testing.assert_close(head.logits(hidden), logits)
    expected = logits.log_softmax(1).gather(1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(head.logprob(hidden, token_ids), expected)
    assert FusedHead(head.layer.bfloat16()).logits(hidden.bfloat16()).dtype == torch.float32


def test_forward_is_the_loss_and_its_gradients_reach_the_layer(head):
    hidden, token_ids = drawn(2)
    sequences = [torch.tensor([0, 3, ROWS], dtype=torch.int32), torch.full((ROWS,), -3.0)]
    sequences += [torch.tensor([-9.0, -11.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    options = {"divergence": "forward_kl", "ratio_cap": 5.0}
    leaves = [hidden.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in head.parameters())]
    scaling = {"bias": leaves[2], "temperature": 2.0, "softcap": 3.0}
    expected = fdpg_loss(*leaves[:2], token_ids, *sequences, **scaling, **options)
    expected.loss.backward()
    found = head(hidden.requires_grad_(), token_ids, *sequences, **options)
    found.loss.backward()
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.weights.weight, expected.weights.weight)
    for ours, theirs in zip([hidden, *head.parameters()], leaves, strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_keeps_its_parameters_and_their_names(tied):
    sizes = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1)
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))
    t5 = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=8, num_layers=1, decoder_start_token_id=0)
    )
    for model, wrap in ((llama, LanguageModel), (t5, EncoderDecoderModel)):
        names, parameters = [*model.state_dict()], [*model.parameters()]
        head = wrap(model).head
        assert head.weight is model.get_output_embeddings().weight
        assert [*model.state_dict()] == names
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
