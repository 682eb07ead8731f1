"""Prompts from files, the errors that name file and line, and the order in which rounds visit them."""

import json
import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from fdpg_fast.chats import ContextsConfig
from fdpg_fast.contexts import Prompting
from fdpg_fast.contexts import load_contexts as load
from fdpg_fast.errors import UserError
from fdpg_fast.seeds import schedule

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<bot>{% endif %}"
CHAT = [{"role": "user", "content": "hi"}]
END = "<|end|>"


def load_contexts(path, tokenizer, max_tokens=50, rows=1000, continues_prompt=True, **settings):
    return load(path, Prompting(tokenizer, max_tokens, rows, continues_prompt, ContextsConfig(**settings)))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def chat_tokenizer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def write(tmp_path):
    def write(name, *lines):
        path = tmp_path / name
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
        return str(path)

    return write


def test_text_file_one_prompt_a_line(tokenizer, write):
    path = write("prompts.txt", "def f(x):", "", "  indented, trailing  ", "   ", "é 漢")
    contexts = load_contexts(path, tokenizer, 50)
    assert [c.text for c in contexts] == ["def f(x):", "  indented, trailing  ", "é 漢"]
    assert [c.index for c in contexts] == [0, 1, 2]
    assert [tokenizer.decode(c.token_ids) for c in contexts] == [c.text for c in contexts]
    assert all(c.columns == {} for c in contexts)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_what_windows_editors_add_is_no_part_of_a_prompt(start, tokenizer, tmp_path):
    text, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_bytes(start + b"one\r\ntwo\r\n")
    rows.write_bytes(start + b'{"prompt": "one"}\r\n{"prompt": "two"}\r\n')
    for path in (text, rows):
        assert [c.text for c in load_contexts(str(path), tokenizer, 50)] == ["one", "two"]


def test_only_line_feeds_separate_prompts(tokenizer, write):
    """A form feed in Python source, or U+2028 inside a JSON string, is part of the prompt."""
    lines = ["a\x0cb", "c\u2028d"]
    assert [c.text for c in load_contexts(write("p.txt", *lines), tokenizer, 50)] == lines
    row = json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False)
    assert [c.text for c in load_contexts(write("p.jsonl", row), tokenizer, 50)] == ["a\u2028b\x85c"]


def test_jsonl_columns_reach_the_context(tokenizer, write):
    rows = {"prompt": "1+1=", "answer": 2, "tags": ["sum"]}, "", {"prompt": "two\nlines", "level": None}
    contexts = load_contexts(write("p.jsonl", *rows), tokenizer, 50)
    assert [(c.text, dict(c.columns)) for c in contexts] == [
        ("1+1=", {"answer": 2, "tags": ["sum"], "level": None}),  # columns are those of the whole data set
        ("two\nlines", {"answer": None, "tags": None, "level": None}),
    ]


def test_chat_messages_go_through_the_template(chat_tokenizer, write):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    (context,) = load_contexts(write("p.jsonl", {"prompt": messages, "id": 7}), chat_tokenizer, 50)
    assert context.text == "<system>be brief<user>hi<bot>"
    assert chat_tokenizer.decode(context.token_ids) == context.text and dict(context.columns) == {"id": 7}


def byte_level(tokenizer, single=f"{END} $A </s>"):
    """The tokenizer, with what a post-processor puts around a text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["</s>"])
    ids = [(token, backend.token_to_id(token)) for token in (END, "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token="</s>")


def sentencepiece(**keys):
    """Llama's, of single characters and bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127))]
    return LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], **keys)


def wordpiece():
    """BERT's, as Chinese GPT-2 models have it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hi", "there", "##s"]
    return BertTokenizer(
        vocab={word: i for i, word in enumerate(words)}, bos_token="[CLS]", eos_token="[SEP]", sep_token="[SEP]"
    )


TOKENIZERS = {
    "byte-level with BOS and EOS": byte_level,
    "byte-level with EOS": lambda tokenizer: byte_level(tokenizer, "$A </s>"),
    "byte-level, EOS twice": lambda tokenizer: byte_level(tokenizer, f"{END} $A </s> </s>"),
    "sentencepiece with BOS": lambda _: sentencepiece(add_bos_token=True),
    "sentencepiece with EOS": lambda _: sentencepiece(add_bos_token=False, add_eos_token=True),
    "sentencepiece with both": lambda _: sentencepiece(add_bos_token=True, add_eos_token=True),
    "wordpiece": lambda _: wordpiece(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_a_tokenizer_puts_around_a_text(name, tokenizer, write):
    """Its BOS once, whether or not the text begins with it; its EOS behind the prompt of an encoder-decoder only."""
    tokenizer = TOKENIZERS[name](tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    own = tokenizer("hi there")["input_ids"]
    before, body = ([bos], own[1:]) if own[0] == bos else ([], own)
    body = [token_id for token_id in body if token_id != eos]
    path = write("p.txt", "hi there", tokenizer.bos_token + "hi there")
    plain, begun = load_contexts(path, tokenizer)
    assert list(plain.token_ids) == before + body
    assert begun.token_ids[0] == bos and begun.token_ids[1] != bos and eos not in begun.token_ids
    answered, _ = load_contexts(path, tokenizer, continues_prompt=False)
    assert list(answered.token_ids) == own
    # an encoder-decoder's text that already ends with EOS gets no second one
    (ended,) = load_contexts(write("p.txt", "hi there" + tokenizer.eos_token), tokenizer, continues_prompt=False)
    assert ended.token_ids[-1] == eos and ended.token_ids[-2] != eos


def test_a_template_writes_its_own_special_tokens(tokenizer, write):
    tokenizer = byte_level(tokenizer)
    for template in ("{{ bos_token }}" + TEMPLATE, TEMPLATE):  # one that writes no BOS is not to have any
        tokenizer.chat_template = template
        (context,) = load_contexts(write("p.jsonl", {"prompt": CHAT}), tokenizer)
        assert list(context.token_ids) == tokenizer.apply_chat_template(
            CHAT, add_generation_prompt=True, return_dict=False
        )


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_are_what_the_tokenizer_makes_of_each_prompt_alone(tokenizer, write, prompts):
    path = write("p.jsonl", *({"prompt": prompt} for prompt in prompts))
    assert [list(c.token_ids) for c in load_contexts(path, tokenizer, 10_000)] == [
        tokenizer(prompt)["input_ids"] for prompt in prompts
    ]


def test_a_token_without_an_embedding_is_refused_with_the_remedy(tokenizer, write):
    tokenizer = byte_level(tokenizer)
    tokenizer.add_tokens(["<think>"])
    path = write("p.jsonl", {"prompt": "hi"}, {"prompt": "so: <think>"})
    assert len(load_contexts(path, tokenizer, rows=len(tokenizer))) == 2
    rows = len(tokenizer) - 1
    message = rf"p\.jsonl:2 has the token '<think>', number {rows}, but the model has only {rows} embeddings"
    with pytest.raises(UserError, match=message + rf".*resize_token_embeddings\({len(tokenizer)}\)"):
        load_contexts(path, tokenizer, rows=rows)
    with pytest.raises(UserError, match="the start has the token"):
        load_contexts(None, tokenizer, rows=tokenizer.bos_token_id)


def test_a_prompt_that_makes_no_token_is_refused(write):
    path = write("p.txt", "a", "b")
    drops = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(UserError, match=r"p\.txt:2: the tokenizer makes no token"):
        load_contexts(path, drops)
    raises = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "[UNK]")))
    with pytest.raises(UserError, match=r"p\.txt:1 or after: the tokenizer fails: .*Missing \[UNK\]"):
        load_contexts(path, raises)


@pytest.mark.parametrize("unit", ["x", "x ", " ", "é", "def f(x):\n    return x\n"])
def test_a_prompt_of_megabytes_is_refused_without_tokenizing_it_all(unit, tokenizer, write, monkeypatch):
    seen = []
    path = write("p.jsonl", {"prompt": "a" + unit * (4_000_000 // len(unit))})
    whole = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *a, **k: seen.append(len(a[1][0])) or whole(*a, **k))
    with pytest.raises(UserError, match=r"p\.jsonl:1 has more than 100 tokens but the model has room for 50"):
        load_contexts(path, tokenizer, 50)
    assert max(seen) <= 64 * 51


def test_a_long_prompt_of_few_tokens_is_taken(write):
    """Many spaces may be one token, and much text may be none: what counts is the tokens."""
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    text = "x" * 40 + " " * 4000 + "y z"
    assert len(load_contexts(write("p.jsonl", {"prompt": text}), tokenizer, 3)[0].token_ids) == 3
    with pytest.raises(UserError, match="has 3 tokens but the model has room for 2"):
        load_contexts(write("p.jsonl", {"prompt": text}), tokenizer, 2)


def test_many_prompts_are_made_in_batches_with_progress(tokenizer, write, monkeypatch):
    counts, calls = [], []
    monkeypatch.setattr("fdpg_fast.contexts.advance", counts.append)
    whole = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *a, **k: calls.append(a) or whole(*a, **k))
    contexts = load_contexts(write("p.txt", *map(str, range(3500))), tokenizer)
    assert [c.text for c in contexts] == [str(i) for i in range(3500)] and [c.index for c in contexts] == [*range(3500)]
    assert sum(counts) == 3500 and len(counts) > 1 and len(calls) < 20
    # equal tokens of a data set are one object: 8 bytes for each place instead of 36
    assert len({id(token) for c in contexts for token in c.token_ids}) == 10


def test_without_a_file_sampling_starts_from_bos_or_else_eos(tokenizer):
    (context,) = load_contexts(None, tokenizer, 50)
    assert (context.index, context.text, context.token_ids) == (0, "", (tokenizer.bos_token_id,))

    class Tokenizer:
        bos_token_id, eos_token_id = None, 9

    assert load_contexts(None, Tokenizer(), 50)[0].token_ids == (9,)
    Tokenizer.bos_token_id = 0  # id 0 is an id
    assert load_contexts(None, Tokenizer(), 50)[0].token_ids == (0,)
    Tokenizer.bos_token_id = Tokenizer.eos_token_id = None
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        load_contexts(None, Tokenizer(), 50)


def test_prompt_length_is_bounded_inclusively(tokenizer, write):
    assert len(load_contexts(write("p.txt", "x" * 10), tokenizer, 10)[0].token_ids) == 10
    with pytest.raises(UserError, match=r"p\.txt:2 has 11 tokens .* room for 10 .*max_new_tokens"):
        load_contexts(write("p.txt", "ok", "x" * 11), tokenizer, 10)


BAD_FILES = {
    "empty file": ("p.txt", [""], r"p\.txt' holds no prompt"),
    "blank lines only": ("p.txt", ["", "   ", "\t"], r"p\.txt' holds no prompt"),
    "empty prompt": ("p.jsonl", [{"prompt": "a"}, {"prompt": ""}], r"p\.jsonl:2 is an empty prompt"),
    "blank prompt": ("p.jsonl", [{"prompt": " \n"}], r"p\.jsonl:1 is an empty prompt"),
    "not JSON": ("p.jsonl", [{"prompt": "a"}, "{'prompt': 1}"], r"p\.jsonl:2 is not JSON"),
    "text in a .jsonl": ("p.jsonl", ["def f():"], r"p\.jsonl:1 is not JSON"),
    "an empty text in a .jsonl": ("p.jsonl", ['""'], r"needs an object with .*, not ''$"),
    "not an object": ("p.jsonl", ['"a"'], r'p\.jsonl:1 needs an object with "prompt"'),
    "no prompt": ("p.jsonl", ["", {"question": "a"}], r'p\.jsonl:2 needs an object with "prompt"'),
    "prompt is a number": ("p.jsonl", [{"prompt": 3}], r'p\.jsonl:1: "prompt" must be a string or a list'),
    "message lacks its role": ("p.jsonl", [{"prompt": [{"content": "a"}]}], r'p\.jsonl:1: "prompt" must be'),
    "chat without a template": ("p.jsonl", [{"prompt": CHAT}], r"p\.jsonl:1 .*no chat template"),
    "chat as a text": ("p.jsonl", [{"prompt": json.dumps(CHAT)}], r"p\.jsonl:1 holds chat messages as one text"),
    "chat as Python prints it": ("p.txt", ["ok", repr(CHAT)], r"p\.txt:2 holds chat messages as one text"),
    "half a character": ("p.jsonl", ['{"prompt": "a\\ud800"}'], r"p\.jsonl:1 is no text: '\\ud800' is half"),
    "image": ("p.jsonl", [{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], "messages of text"),
    "BOS twice": ("p.txt", [f"{END}{END}x"], r"p\.txt:1 begins with BOS twice"),
    "ended": ("p.txt", ["ok", f"x{END}"], rf"p\.txt:2 ends with EOS, '{re.escape(END)}'"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_one_line_that_names_the_place(name, tokenizer, write):
    file, lines, message = BAD_FILES[name]
    with pytest.raises(UserError, match=message) as refusal:
        load_contexts(write(file, *lines), tokenizer, 50)
    assert "\n" not in str(refusal.value)


# --- schedule ---


@pytest.mark.parametrize(("contexts", "per_round"), [(6, 2), (6, 3), (5, 5), (7, 1)])
def test_every_epoch_is_a_permutation(contexts, per_round):
    rounds = [schedule(contexts, per_round, i, seed=3) for i in range(3 * contexts // per_round)]
    in_epoch = contexts // per_round
    epochs = [sum(rounds[e * in_epoch : (e + 1) * in_epoch], []) for e in range(3)]
    assert all(sorted(epoch) == list(range(contexts)) for epoch in epochs)
    if in_epoch > 1:  # shuffled, and differently every time
        assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(chosen == sorted(chosen) for chosen in rounds)


def test_rounds_that_cross_an_epoch_s_end_visit_all_contexts_equally_often():
    counts = Counter(i for r in range(7) for i in schedule(7, 4, r, seed=0))
    assert counts == dict.fromkeys(range(7), 4)


def test_a_round_can_be_recomputed_alone():
    forward = [schedule(10, 4, i, seed=1) for i in range(20)]
    assert [schedule(10, 4, i, seed=1) for i in reversed(range(20))] == forward[::-1]
    assert [schedule(10, 4, i, seed=2) for i in range(20)] != forward
