"""What a generation config wants: kept, refused, or said, but never dropped in silence."""

import json
import shutil

import pytest
import torch
import transformers as hf

from fdpg_fast.contexts import Context
from fdpg_fast.models.load import load_model
from support import runs

REFUSED = {
    "forced_bos_token_id": 5,
    "suppress_tokens": [7, 8],
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[3]],
    "sequence_bias": [[[3], -10.0]],
    "stop_strings": ["\n\n"],
}
ADVISED = {
    "temperature": 0.6,
    "top_k": 1,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.9,
    "repetition_penalty": 1.05,
    "no_repeat_ngram_size": 3,
    "num_beams": 4,
    "length_penalty": 2.0,
    "min_length": 56,
    "min_new_tokens": 2,
    "forced_eos_token_id": 0,
}
NEUTRAL = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_beams": 1, "repetition_penalty": 1.0}


@pytest.fixture
def dry_run(tiny_model, tmp_path, capsys):
    def call(wanted):
        folder = shutil.copytree(tiny_model, tmp_path / "m")
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **wanted}))
        config = runs.write_config(tmp_path, runs.settings(folder, tmp_path / "run"))
        return runs.call("train", config, "--dry-run"), *capsys.readouterr()

    return call


@pytest.mark.parametrize("key", REFUSED)
def test_what_decides_which_texts_there_are_is_refused(key, dry_run):
    status, _, errors = dry_run({key: REFUSED[key]})
    assert status == 2 and errors.count("\n") == 1
    assert errors.startswith(f"fdpg-fast: model: its generation config has {key}: ")


@pytest.mark.parametrize("key", ADVISED)
def test_advice_that_is_not_taken_is_said(key, dry_run):
    status, output, _ = dry_run({key: ADVISED[key]})
    assert status == 0
    assert f"own module (there is no GPU), without the model's {key} {ADVISED[key]}\n" in output


def test_nothing_is_said_where_nothing_is_left_out(dry_run):
    status, output, errors = dry_run(NEUTRAL)
    assert status == 0 and "without the model's" not in output and "generation" not in errors


def test_a_forced_first_token_is_where_an_encoder_decoder_starts(tmp_path):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 24, "init_std": 0.3}
    torch.manual_seed(0)
    config = hf.MBartConfig(vocab_size=61, **sizes, **heads, decoder_start_token_id=2)
    plain = hf.MBartForConditionalGeneration(config).eval()
    plain.generation_config.forced_bos_token_id = 40
    plain.save_pretrained(tmp_path)
    prompt = torch.tensor([[5, 6, 7, 2]])
    greedy = plain.generate(prompt, max_new_tokens=6, do_sample=False, num_beams=1)[0].tolist()
    assert greedy[:2] == [2, 40]
    model = load_model(str(tmp_path), "float32", "cpu", False)
    assert (model.prompt_room(23), model.prompt_room(24)) == (24, 0)  # the forced token takes a position
    decoding = model.start([Context(0, "", tuple(prompt[0].tolist()))], torch.tensor([0]), 5)
    states, ours = decoding.first, []
    for _ in range(5):
        ours.append(int(model.head.logits(states).argmax()))
        states = decoding.run(torch.tensor([ours[-1:]]))[:, 0]
    assert ours[:4] == greedy[2:6]  # the last is an end that `generate` forces where it cuts off
