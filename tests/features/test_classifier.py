"""A classifier with fewer positions than a text has tokens reads its beginning, and says so."""

import pytest
import torch
import transformers as hf

from fdpg_fast.errors import RunError, UserError
from fdpg_fast.features import Completions, classifier

SIZES = {
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
PLACES = {"max_position_embeddings": 24, "initializer_range": 0.5, "pad_token_id": 0}
CONFIGS = {
    "BERT": (lambda: hf.BertConfig(**SIZES, **PLACES), 24),
    "RoBERTa: texts begin behind the padding": (lambda: hf.RobertaConfig(**SIZES, **{**PLACES, "pad_token_id": 1}), 22),
    "DistilBERT": (
        lambda: hf.DistilBertConfig(vocab_size=257, dim=16, hidden_dim=16, n_layers=1, n_heads=2, **PLACES),
        24,
    ),
    "GPT-2": (
        lambda: hf.GPT2Config(vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=24, pad_token_id=0),
        24,
    ),
}


def saved(config, tiny_model, folder, **options):
    torch.manual_seed(0)
    network = hf.AutoModelForSequenceClassification.from_config(config).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model, **options)
    for part in (network, tokenizer):
        part.save_pretrained(folder)
    return network, tokenizer


def ours(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("fdpg_fast")]


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_longer_than_its_positions_are_cut_and_that_is_said(name, tiny_model, tmp_path, caplog):
    config, places = CONFIGS[name]
    network, tokenizer = saved(config(), tiny_model, tmp_path)  # the tokenizer knows no limit
    scores = classifier(str(tmp_path), "LABEL_1")
    assert ours(caplog) == []
    texts = ["short", "abcdefgh" * 9]
    assert len(tokenizer(texts[1])["input_ids"]) == 72
    with torch.no_grad():
        alone = [network(**tokenizer(text[:places], return_tensors="pt")).logits.softmax(-1)[0, 1] for text in texts]
    given = scores(Completions(texts, ["", ""], [[1], [1]], [True, True], {}))
    torch.testing.assert_close(given.float(), torch.stack(alone), atol=1e-5, rtol=0)
    assert [f"reads the first {places} tokens" in message for message in ours(caplog)] == [True]


def test_a_classifier_that_cannot_score_is_refused_when_it_is_made(tiny_model, tmp_path):
    _, tokenizer = saved(CONFIGS["BERT"][0](), tiny_model, tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot score two texts: .*pad"):
        classifier(str(tmp_path), "LABEL_1")


UNBOUNDED = {
    "BLOOM": lambda: hf.BloomConfig(vocab_size=257, hidden_size=16, n_layer=1, n_head=2, pad_token_id=0),
    "XLNet": lambda: hf.XLNetConfig(vocab_size=257, d_model=16, n_layer=1, n_head=2, d_inner=16),
    "Llama": lambda: hf.LlamaConfig(**SIZES, pad_token_id=0),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_a_classifier_without_a_limit_reads_all(name, tiny_model, tmp_path, caplog):
    network, tokenizer = saved(UNBOUNDED[name](), tiny_model, tmp_path)
    text = "abcdefgh" * 9
    with torch.no_grad():
        alone = network(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 1]
    given = classifier(str(tmp_path), "LABEL_1")(Completions([text], [""], [[1]], [True]))
    assert given.tolist() == pytest.approx([float(alone)], abs=1e-5) and ours(caplog) == []


def test_a_classifier_of_nan_is_refused_when_it_is_made(tiny_model, tmp_path):
    network, _ = saved(CONFIGS["BERT"][0](), tiny_model, tmp_path)
    network.classifier.weight.data.fill_(torch.nan)
    network.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot score two texts: what it returns is not finite"):
        classifier(str(tmp_path), "LABEL_1")


def test_a_token_without_an_embedding_is_named(tiny_model, tmp_path):
    _, tokenizer = saved(CONFIGS["BERT"][0](), tiny_model, tmp_path)
    tokenizer.add_tokens(["<late>"])
    tokenizer.save_pretrained(tmp_path)
    scores = classifier(str(tmp_path), "LABEL_1")
    with pytest.raises(RunError, match="the tokenizer of .* has tokens without an embedding"):
        scores(Completions(["a<late>"], [""], [[1]], [True]))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("spiece.model", "version https://git-lfs.github.com/spec/v1\n", "spiece.model is a Git LFS pointer"),
        (
            "config.json",
            '{"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}',
            "code .* which a feature never runs$",
        ),
    ],
)
def test_what_is_said_of_a_damaged_classifier_can_be_done(name, text, message, tiny_model, tmp_path):
    saved(CONFIGS["BERT"][0](), tiny_model, tmp_path)
    (tmp_path / name).write_text(text)
    if name == "spiece.model":
        for path in tmp_path.glob("tokenizer*"):
            path.unlink()
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(UserError, match=message):
        classifier(str(tmp_path), "LABEL_1")
