"""Chats: what reaches the template, where the model goes on, and what the template would leave out."""

import json

import pytest
from transformers import AutoTokenizer

from fdpg_fast.chats import ContextsConfig
from fdpg_fast.contexts import Prompting, load_contexts
from fdpg_fast.errors import UserError

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
ANSWER = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = TURNS + ANSWER
THINKING = TURNS + ANSWER + "{% if enable_thinking is defined and not enable_thinking %}<no think>{% endif %}"
TOOLS = "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}" + PLAIN
DOCUMENTS = "{% for d in documents %}({{ d.title }}){% endfor %}" + PLAIN
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN
LEAVES_SYSTEM_OUT = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
THOUGHTFUL = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}" + ANSWER

HI = {"role": "user", "content": "hi"}
BE_BRIEF = {"role": "system", "content": "be brief"}
SEARCH, ADD = ({"type": "function", "function": {"name": name}} for name in ("search", "add"))


@pytest.fixture
def render(tiny_model, tmp_path):
    """The one context of a chat, or of a row of a data set."""

    def render(template, prompt, *, columns=None, **settings):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = template
        path = tmp_path / "p.jsonl"
        path.write_text(json.dumps({"prompt": prompt, **(columns or {})}))
        return load_contexts(str(path), Prompting(tokenizer, 300, 300, True, ContextsConfig(**settings)))[0]

    return render


@pytest.mark.parametrize(
    ("template", "prompt", "settings", "text"),
    {
        "plain": (PLAIN, [HI], {}, "<user>hi</><assistant>"),
        "system prompt": (PLAIN, [HI], {"system_prompt": "be brief"}, "<system>be brief</><user>hi</><assistant>"),
        "its own system message": (
            *(PLAIN, [BE_BRIEF, HI], {"system_prompt": "be long"}),
            "<system>be brief</><user>hi</><assistant>",
        ),
        "developer is a system": (
            *(PLAIN, [{"role": "developer", "content": "x"}, HI], {"system_prompt": "y"}),
            "<developer>x</><user>hi</><assistant>",
        ),
        "variable": (
            *(THINKING, [HI], {"chat_template_kwargs": {"enable_thinking": False}}),
            "<user>hi</><assistant><no think>",
        ),
        "tools": (TOOLS, [HI], {"tools": [SEARCH, ADD]}, "[search][add]<user>hi</><assistant>"),
        "documents": (
            *(DOCUMENTS, [HI], {"chat_template_kwargs": {"documents": [{"title": "t", "text": "x"}]}}),
            "(t)<user>hi</><assistant>",
        ),
        "default of several": ({"default": PLAIN, "rag": "no {{ messages }}"}, [HI], {}, "<user>hi</><assistant>"),
        "another of several": (
            *({"default": "no {{ messages }}", "short": PLAIN}, [HI]),
            *({"chat_template_kwargs": {"chat_template": "short"}}, "<user>hi</><assistant>"),
        ),
        "the one for tools": (
            *({"default": "no {{ messages }}", "tool_use": TOOLS}, [HI], {"tools": [ADD]}),
            "[add]<user>hi</><assistant>",
        ),
        "begun answer": (PLAIN, [HI, {"role": "assistant", "content": "So"}], {}, "<user>hi</><assistant>So"),
        "answer that ends in a space": (
            *(PLAIN, [HI, {"role": "assistant", "content": "So "}], {}),
            "<user>hi</><assistant>So ",
        ),
        "earlier answer": (
            *(PLAIN, [HI, {"role": "assistant", "content": "A"}, HI], {}),
            "<user>hi</><assistant>A</><user>hi</><assistant>",
        ),
    }.values(),
)
def test_what_the_model_continues(template, prompt, settings, text, render):
    context = render(template, prompt, **settings)
    assert context.text == text and bytes(context.text, "utf-8").decode() == text
    assert len(context.token_ids) == len(text)  # the byte-level tokenizer adds nothing
    assert context.messages[-len(prompt) :] == tuple(prompt)


def test_messages_of_a_context_begin_with_the_system_prompt(render):
    assert render(PLAIN, [HI], system_prompt="be brief").messages == (BE_BRIEF, HI)
    assert render(None, "no chat").messages is None


@pytest.mark.parametrize("tools", [[ADD], json.dumps([ADD])], ids=["list", "JSON"])
def test_columns_of_a_row_go_before_the_config(tools, render):
    context = render(TOOLS, [HI], columns={"tools": tools, "answer": 1}, tools=[SEARCH])
    assert context.text.startswith("[add]<user>") and context.columns == {"tools": tools, "answer": 1}
    columns = {"chat_template_kwargs": {"enable_thinking": False}}
    context = render(THINKING, [HI], columns=columns, chat_template_kwargs={"enable_thinking": True})
    assert context.text.endswith("<no think>")
    assert render(TOOLS, [HI], columns={"tools": None}, tools=[SEARCH]).text.startswith("[search]")


def test_messages_that_call_tools_need_no_content(render):
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    template = "{% for m in messages %}{{ m.content or m.tool_calls[0].function.name }};{% endfor %}"
    assert render(template, [HI, called, {"role": "tool", "content": "3"}]).text == "hi;add;3;"


PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
OF_PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"


def test_parts_are_for_templates_that_take_parts(render):
    assert render(OF_PARTS, PARTS).text == "hi"
    with pytest.raises(UserError, match=r"p\.jsonl:1: the chat template takes no lists of parts"):
        render(PLAIN, PARTS)  # it would write Python's brackets
    for part in ({"type": "text", "text": "So"}, {"text": "So", "type": "text"}):  # cut off behind "So"
        with pytest.raises(UserError, match=r"p\.jsonl:1: the chat template takes no lists of parts"):
            render(PLAIN, [HI, {"role": "assistant", "content": [part]}])
    assert render(OF_PARTS, [*PARTS, {"role": "assistant", "content": [{"text": "So"}]}]).text == "hiSo"
    with pytest.raises(UserError, match=r"p\.jsonl:1: the chat template refuses these messages: .*str"):
        render("{{ '>' + messages[0].content }}", PARTS)


@pytest.mark.parametrize(
    ("template", "prompt", "settings", "complaint"),
    {
        "raises": (NO_SYSTEM, [BE_BRIEF, HI], {}, "p.jsonl:1: .*refuses these messages: no system role"),
        "raises on ours": (NO_SYSTEM, [HI], {"system_prompt": "x"}, "p.jsonl:1: .*refuses .*: no system role"),
        "no Jinja": ("{% for %}", [HI], {}, "p.jsonl:1: the chat template refuses"),
        "leaves it out": (LEAVES_SYSTEM_OUT, [HI], {"system_prompt": "x"}, "leaves the system message out"),
        "unknown variable": (PLAIN, [HI], {"chat_template_kwargs": {"thinking": True}}, "does not look at thinking"),
        "unknown tools": (PLAIN, [HI], {"tools": [ADD]}, "does not look at tools"),
        "unknown name": (
            *({"default": PLAIN}, [HI], {"chat_template_kwargs": {"chat_template": "rag"}}),
            "template 'rag'… does not look at messages",
        ),
        "none is the default": ({"a": PLAIN, "b": PLAIN}, [HI], {}, r"template names are \['a', 'b'\]"),
        "our own argument": (PLAIN, [HI], {"chat_template_kwargs": {"tokenize": True}}, "refuses .*'tokenize'"),
        "their argument": (PLAIN, [HI], {"chat_template_kwargs": {"truncation": True}}, "not look at truncation"),
        "plain text": (PLAIN, "hi", {"system_prompt": "x"}, "p.jsonl:1 is plain text, but contexts.system_prompt"),
        "plain text, tools": (None, "hi", {"tools": [ADD]}, "is plain text, but contexts.tools"),
        "plain text, variables": (None, "hi", {"chat_template_kwargs": {"a": 1}}, "but contexts.chat_template_kwargs"),
        "nothing to continue": (
            *(PLAIN, [HI, {"role": "assistant", "tool_calls": [1]}], {}),
            'refuses .*has no "content" to continue',
        ),
        "answer is left out": (
            *("{{ messages[0].content }}", [HI, {"role": "assistant", "content": "So"}], {}),
            "refuses .*does not appear",
        ),
        "no messages": (PLAIN, [], {}, 'p.jsonl:1: "prompt" must be a string or a list'),
        "no parts": (PLAIN, [{"role": "user", "content": []}], {}, 'p.jsonl:1: "prompt" must be'),
        "role is a number": (PLAIN, [{"role": 1, "content": "x"}], {}, 'p.jsonl:1: "prompt" must be'),
        "image": (PLAIN, [{"role": "user", "content": [{"type": "image", "url": "x"}]}], {}, "messages of text"),
        "tools that are no JSON": (TOOLS, [HI], {"columns": {"tools": "search"}}, "p.jsonl:1: .*refuses"),
        "variables that are none": (TOOLS, [HI], {"columns": {"chat_template_kwargs": 3}}, "p.jsonl:1: .*refuses"),
    }.values(),
)
def test_what_would_be_left_out_is_refused_in_one_line(template, prompt, settings, complaint, render):
    with pytest.raises(UserError, match=complaint) as refusal:
        render(template, prompt, **settings)
    assert "\n" not in str(refusal.value)


def test_keys_for_chats_are_refused_without_contexts(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(UserError, match="contexts.train is left out, but contexts.system_prompt reaches"):
        load_contexts(None, Prompting(tokenizer, 9, 300, True, ContextsConfig(system_prompt="x")))


def test_a_thought_that_the_template_removes_is_not_continued_in_silence(render):
    begun = {"role": "assistant", "content": "<think>so</think>then"}
    with pytest.raises(UserError, match="refuses these messages"):
        render(THOUGHTFUL, [HI, begun])
