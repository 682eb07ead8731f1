"""Encoder-decoders: the one scoring path holds for them too, start token, EOS and unequal prompts included.

The yardstick is the model's own forward pass on one prompt and one completion, the completion shifted right behind the
start token: no padding, no cache, no sharing of prompts.
"""

import copy
import math

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from fdpg_fast.config.schema import EngineConfig, LoRAConfig
from fdpg_fast.contexts import Prompting, load_contexts
from fdpg_fast.engines import TransformersEngine
from fdpg_fast.engines.build import choose_engine
from fdpg_fast.errors import UserError
from fdpg_fast.features import Completions, python_parses
from fdpg_fast.models.encoder_decoder import EncoderDecoderModel
from fdpg_fast.models.language_model import LanguageModel
from fdpg_fast.models.load import load_model
from fdpg_fast.models.lora import LoRAPolicy
from support import runs
from support.language import contexts_of, p_value, rollouts_of, split

F64 = torch.float64
VOCABULARY, PAD, EOS = 61, 0, 1
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": PAD}
BART = {"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 24, "init_std": 0.2}
BART |= {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 4))}
BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
CONFIGS = {
    "t5: tied and scaled head": lambda: hf.T5Config(**T5),
    "t5 1.1: gated, a head of its own": lambda: hf.T5Config(
        **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
    "umt5: scaled though its config does not say so": lambda: hf.UMT5Config(**T5),
    "mt5: tied and not scaled": lambda: hf.MT5Config(**T5, initializer_factor=0.3),
    "bart: positions, bias of the logits": lambda: hf.BartConfig(**BART, decoder_start_token_id=EOS),
    "mbart: the language as a forced first token": lambda: hf.MBartConfig(
        **BART, decoder_start_token_id=EOS, forced_bos_token_id=40
    ),
}


def build(config):
    torch.manual_seed(0)
    model = hf.AutoModelForSeq2SeqLM.from_config(config).eval()
    if getattr(config, "scale_decoder_outputs", True) is False:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 32) / 5)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    model.generation_config.forced_bos_token_id = getattr(config, "forced_bos_token_id", None)
    return model


@pytest.fixture(params=CONFIGS)
def plain(request):
    return build(CONFIGS[request.param]())


def start_of(plain):
    """What `generate` starts the decoder with."""
    forced = plain.generation_config.forced_bos_token_id
    return [plain.config.decoder_start_token_id, *([] if forced is None else [forced])]


def wrapped(plain):
    return EncoderDecoderModel(copy.deepcopy(plain))


def some_rollouts():
    """Unequal prompts, unequal completions: some are nothing but EOS, some hold pads, some are cut off."""
    return rollouts_of(
        contexts_of(3, 7, 1),
        [[[5, 9, 7, EOS], [EOS], [PAD, 8, 8, PAD, 60]], [[30, EOS], [4]], [[EOS], [PAD, PAD, EOS], [2] * 9]],
    )


def plain_logprobs(plain, rollouts):
    """Of each completion token, [N], from the model's own forward pass on the completion shifted right by hand."""
    parts = []
    tokens = rollouts.token_ids.split(rollouts.lengths.tolist())
    for completion, context in zip(tokens, rollouts.context_index.tolist(), strict=True):
        prompt = torch.tensor(rollouts.contexts[context].token_ids)
        shifted = torch.cat([torch.tensor(start_of(plain)), completion[:-1]])
        logits = plain(input_ids=prompt[None], decoder_input_ids=shifted[None], use_cache=False).logits[0]
        logits = logits[-len(completion) :]
        parts.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("micro_batch_tokens", [1, 12, 1000])
def test_every_token_has_the_log_prob_of_the_model_s_own_forward_pass(plain, micro_batch_tokens):
    rollouts = some_rollouts()
    with torch.no_grad():
        expected = plain_logprobs(plain, rollouts)
    assert float(expected.std()) > 0.5  # a wrong shift or start token would show
    ours = wrapped(plain).token_logprobs(rollouts, micro_batch_tokens)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def test_every_weight_gets_the_gradient_of_the_model_s_own_forward_pass(plain):
    """Through prompts that completions share, and through keys and values that come from the cache."""
    rollouts, ours = some_rollouts(), wrapped(plain)
    coefficients = torch.randn(rollouts.num_tokens, generator=torch.Generator().manual_seed(2))
    (plain_logprobs(plain, rollouts) * coefficients).sum().backward()
    logprobs = ours.head.logprob(ours.hidden(rollouts), rollouts.token_ids)
    (logprobs * coefficients).sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in ours.model.named_parameters():
        wanted = expected[name].grad
        if wanted is None:
            assert parameter.grad is None
            continue
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-4 * (1 + float(wanted.abs().max())), rtol=0)


def test_a_prompt_is_encoded_once_for_all_of_its_completions(plain):
    model, rows = wrapped(plain), []
    encoder = model.model.get_encoder()
    encoder.register_forward_hook(lambda module, inputs, output: rows.append(len(output.last_hidden_state)))
    model.hidden(some_rollouts())
    TransformersEngine(model, [EOS], max_new_tokens=5).sample(contexts_of(3, 7), 10, seed=0)
    assert rows == [3, 2]


def reference_completions(plain, contexts, samples, eos, max_new_tokens, seed):
    """One completion at a time with the model's own forward pass and the engine's uniforms: (tokens, log-probs)."""
    total = len(contexts) * samples
    uniform = torch.rand(max_new_tokens, total, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for i in range(total):
        prompt, tokens, logprobs = torch.tensor([contexts[i // samples].token_ids]), [], []
        while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in eos):
            ids = torch.tensor([[*start_of(plain), *tokens]])
            with torch.no_grad():
                logits = plain(input_ids=prompt, decoder_input_ids=ids, use_cache=False).logits[0, -1]
            logprob = logits.double().log_softmax(0)
            token = int(torch.searchsorted(logprob.exp().cumsum(0), uniform[len(tokens), i], right=True))
            tokens.append(token)
            logprobs.append(float(logprob[token]))
        yield tokens, logprobs


def test_the_engine_draws_what_the_model_draws_alone_and_reports_what_the_learner_computes(plain):
    """Neighbours, padding, the cache and dropping the finished change nothing."""
    model, contexts, eos = wrapped(plain), contexts_of(3, 7, 1), tuple(range(1, VOCABULARY, 7))
    rollouts = TransformersEngine(model, eos, max_new_tokens=9).sample(contexts, 6, seed=5)
    expected = list(reference_completions(plain, contexts, 6, eos, 9, seed=5))
    assert split(rollouts, rollouts.token_ids) == [tokens for tokens, _ in expected]
    assert {1, 9} <= {len(tokens) for tokens, _ in expected}  # one ends with its first token, one is cut off
    reported = torch.tensor([value for _, values in expected for value in values])
    torch.testing.assert_close(rollouts.behavior_logprob, reported, atol=2e-5, rtol=0)
    torch.testing.assert_close(model.token_logprobs(rollouts, 40), reported, atol=2e-5, rtol=0)


def test_first_tokens_follow_the_model_s_distribution(plain):
    """χ² over 20,000 completions a prompt, EOS included: p > 0.001, where 10 % of temperature gives < 1e-3."""
    contexts = contexts_of(3, 7)
    engine = TransformersEngine(wrapped(plain), [EOS], max_new_tokens=1, max_sequences=40_000)
    rollouts = engine.sample(contexts, 20_000, seed=0)
    assert bool((rollouts.finished == (rollouts.token_ids == EOS)).all()) and 0 < int(rollouts.finished.sum()) < 40_000
    for i, context in enumerate(contexts):
        start = torch.tensor([[plain.config.decoder_start_token_id]])
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([context.token_ids]), decoder_input_ids=start).logits[0, -1].double()
        counts = torch.bincount(rollouts.token_ids[rollouts.context_index == i], minlength=VOCABULARY)
        assert p_value(counts, logits.softmax(0)) > 1e-3
        assert p_value(counts, (logits / 1.1).softmax(0)) < 1e-3


def test_a_saved_model_is_scored_as_before(plain, tmp_path):
    wrapped(plain).save(tmp_path)
    loaded, rollouts = load_model(str(tmp_path), "float32", "cpu", trust_remote_code=False), some_rollouts()
    assert isinstance(loaded, EncoderDecoderModel)
    assert torch.equal(loaded.token_logprobs(rollouts, 1000), wrapped(plain).token_logprobs(rollouts, 1000))


# --- what does not fit is refused ---


def test_models_that_would_be_scored_wrongly_are_refused():
    nameless = hf.T5Config(**T5 | {"decoder_start_token_id": None})
    with pytest.raises(UserError, match="names no decoder_start_token_id"):
        EncoderDecoderModel(build(nameless))
    sizes = {f"num_{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    with pytest.raises(UserError, match="ProphetNetForConditionalGeneration cannot run as an encoder-decoder"):
        EncoderDecoderModel(build(hf.ProphetNetConfig(vocab_size=VOCABULARY, hidden_size=32, **sizes)))
    wrong = build(hf.T5Config(**T5))
    wrong.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    with pytest.raises(UserError, match="differ from the model's own by"):
        EncoderDecoderModel(wrong)


def test_only_the_embedded_engine_takes_an_encoder_decoder():
    device = torch.device("cpu")
    for kind in ("auto", "transformers"):
        assert choose_engine(EngineConfig(kind=kind), device, encoder_decoder=True)[0] == "transformers"
    for settings in (EngineConfig(kind="vllm"), EngineConfig(kind="vllm_server", urls=["http://localhost:1"])):
        with pytest.raises(UserError, match=f"{settings.kind} does not run encoder-decoders"):
            choose_engine(settings, device, encoder_decoder=True)


def test_lora_is_refused():
    with pytest.raises(UserError, match="T5ForConditionalGeneration is an encoder-decoder"):
        LoRAPolicy(EncoderDecoderModel(build(hf.T5Config(**T5))), LoRAConfig(rank=2), seed=0)


def test_prompt_and_completion_have_positions_of_their_own():
    bart = EncoderDecoderModel(build(CONFIGS["bart: positions, bias of the logits"]()))
    assert (bart.prompt_room(24), bart.prompt_room(25)) == (24, 0)
    full = rollouts_of(contexts_of(24), [[[5] * 24]])
    assert math.isfinite(float(bart.token_logprobs(full, 1000).sum()))
    assert EncoderDecoderModel(build(hf.T5Config(**T5))).prompt_room(10_000) > 10_000


# --- runs ---


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory):
    """A folder with a random T5 of the bytes and its tokenizer, which puts EOS behind a text."""
    folder = tmp_path_factory.mktemp("tiny-t5")
    symbols = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    wrapped = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    hf.T5ForConditionalGeneration(hf.T5Config(**T5 | {"vocab_size": len(symbols)})).save_pretrained(folder)
    return folder


def test_prompts_are_what_the_tokenizer_makes_of_them(tiny_t5, tmp_path):
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_t5)
    prompting = Prompting(tokenizer, 10, len(tokenizer), continues_prompt=False)
    (context,) = load_contexts(str(runs.write_contexts(tmp_path, "ab")), prompting)
    assert len(context.token_ids) == 3 and context.token_ids[-1] == EOS
    (nothing,) = load_contexts(None, prompting)
    assert nothing.token_ids == tuple(tokenizer("")["input_ids"]) == (EOS,)


def test_a_completion_that_answers_its_prompt_is_a_text_of_its_own():
    batch = Completions(["x = 1", "x = 1"], ["def f(", "y = 2\n"], [[1], [1]], [True, True])
    assert python_parses()(batch).tolist() == [0, 1]
    answers = Completions(batch.completions, batch.prompts, batch.completion_ids, batch.finished, {}, False)
    assert python_parses()(answers).tolist() == [1, 1]


def config(model, folder, run_dir):
    contexts = {"train": str(runs.write_contexts(folder, "a", "tea ", "def f(", "the end"))}
    return runs.settings(model, folder / run_dir, contexts=contexts, trainer={"rounds": 4})


@pytest.fixture(scope="module")
def uninterrupted(tiny_t5, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ended = runs.run(folder, "train", runs.write_config(folder, config(tiny_t5, folder, "run")))
    assert ended.status == 0, ended.stderr
    return folder / "run"


def test_a_run_trains_all_weights_and_engine_and_learner_agree(uninterrupted, tiny_t5):
    rows = runs.rows(uninterrupted / "metrics.jsonl")
    assert abs(rows[0]["policy/kl_to_base"]) < 1e-4 < rows[-1]["policy/kl_to_base"]
    assert all(row["engine/logprob_gap_max"] < 1e-4 and row["policy/skipped"] == 0 for row in rows)
    folder = uninterrupted / "checkpoints/round-000004"
    before, after = (load_file(path / "model.safetensors") for path in (tiny_t5, folder))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == before.keys()
    assert isinstance(hf.AutoModelForSeq2SeqLM.from_pretrained(folder), hf.T5ForConditionalGeneration)


def test_a_killed_run_goes_on_to_the_same_numbers(uninterrupted, tiny_t5, tmp_path):
    path = runs.write_config(tmp_path, config(tiny_t5, tmp_path, "run"))
    moment = runs.Moment("open", ".writing-round-000003/trainer/state.json")
    assert runs.run(tmp_path, "train", path, at=moment).status == -9
    ended = runs.run(tmp_path, "train", "--resume", "run")
    assert ended.status == 0, ended.stderr
    runs.assert_equal(runs.record(tmp_path / "run"), runs.record(uninterrupted))


def test_a_decoder_only_model_is_loaded_as_before(tiny_model):
    loaded = load_model(str(tiny_model), "float32", "cpu", trust_remote_code=False)
    assert type(loaded) is LanguageModel and loaded.continues_prompt
