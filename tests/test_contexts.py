"""Prompts from files, the errors that name file and line, and the order in which rounds visit them."""

import json
from collections import Counter

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fdpg_fast.contexts import load_contexts
from fdpg_fast.errors import UserError
from fdpg_fast.seeds import schedule

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<bot>{% endif %}"
CHAT = [{"role": "user", "content": "hi"}]
END = "<|end|>"
STRICT_TEMPLATE = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"


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
        ("1+1=", {"answer": 2, "tags": ["sum"]}),
        ("two\nlines", {"level": None}),
    ]


def test_chat_messages_go_through_the_template(chat_tokenizer, write):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    (context,) = load_contexts(write("p.jsonl", {"prompt": messages, "id": 7}), chat_tokenizer, 50)
    assert context.text == "<system>be brief<user>hi<bot>"
    assert chat_tokenizer.decode(context.token_ids) == context.text and dict(context.columns) == {"id": 7}


def test_special_tokens_are_added_once(chat_tokenizer, write):
    """A plain prompt gets the tokenizer's BOS; a template writes its own."""
    backend = Tokenizer.from_str(chat_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    path = write("p.jsonl", {"prompt": "hi"}, {"prompt": CHAT})
    for context in load_contexts(path, tokenizer, 50):
        assert context.token_ids[0] == 0 and context.token_ids.count(0) == 1


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
    "not an object": ("p.jsonl", ['"a"'], r'p\.jsonl:1 needs an object with "prompt"'),
    "no prompt": ("p.jsonl", ["", {"question": "a"}], r'p\.jsonl:2 needs an object with "prompt"'),
    "prompt is a number": ("p.jsonl", [{"prompt": 3}], r'p\.jsonl:1: "prompt" must be a string or a list'),
    "message lacks its role": ("p.jsonl", [{"prompt": [{"content": "a"}]}], r'p\.jsonl:1: "prompt" must be'),
    "chat without a template": ("p.jsonl", [{"prompt": CHAT}], r"p\.jsonl:1 .*no chat template"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_one_line_that_names_the_place(name, tokenizer, write):
    file, lines, message = BAD_FILES[name]
    with pytest.raises(UserError, match=message) as refusal:
        load_contexts(write(file, *lines), tokenizer, 50)
    assert "\n" not in str(refusal.value)


def test_missing_folder_and_binary_files_are_refused(tokenizer, tmp_path):
    binary = tmp_path / "latin.txt"
    binary.write_bytes("ein Gruß\n".encode("latin-1"))
    for path, reason in ((tmp_path / "no.txt", "No such file"), (tmp_path, "directory"), (binary, "not UTF-8 text")):
        with pytest.raises(UserError, match=reason) as refusal:
            load_contexts(str(path), tokenizer, 50)
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_template_that_refuses_the_messages_is_the_file_s_fault(chat_tokenizer, write):
    """Gemma's template, for one, raises on a system message."""
    chat_tokenizer.chat_template = STRICT_TEMPLATE
    path = write("p.jsonl", {"prompt": CHAT}, {"prompt": [{"role": "system", "content": "be brief"}]})
    with pytest.raises(UserError, match=r"p\.jsonl:2.*no system role"):
        load_contexts(path, chat_tokenizer, 50)
    chat_tokenizer.chat_template = "{{ '>' + messages[0].content }}"
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]  # as multimodal templates want it
    with pytest.raises(UserError, match=r"p\.jsonl:1"):
        load_contexts(write("p.jsonl", {"prompt": parts}), chat_tokenizer, 50)


def test_a_chat_without_messages_is_refused(chat_tokenizer, write):
    with pytest.raises(UserError, match=r"p\.jsonl:1"):
        load_contexts(write("p.jsonl", {"prompt": []}), chat_tokenizer, 50)


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
