"""JSON by a schema, and instructions of IFEval and IFBench: what holds, what does not, and damaged texts and data."""

import json

import pytest

from fdpg_fast.config.load import dump_config, load_config, parse_config
from fdpg_fast.contexts import Context
from fdpg_fast.errors import UserError
from fdpg_fast.features import Completions, check_columns
from fdpg_fast.features.formats import InstructionsFeature, JSONSchemaFeature
from support import runs

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}, "child": {"$ref": "#"}},
    "required": ["name"],
    "additionalProperties": False,
}


def batch_of(texts, prompts=None, **columns):
    count = len(texts)
    return Completions([*texts], prompts or [""] * count, [[]] * count, [True] * count, columns)


def values(feature, *texts, **options):
    return feature(batch_of(texts, **options)).nan_to_num(-1).tolist()


def by_schema(**keys):
    return JSONSchemaFeature(kind="json_schema", **keys).build("cpu")


NESTED = '{"name": "a", "child": ' * 5000 + "1" + "}" * 5000
TEXTS = [
    ('{"name": "é"}', 1),
    (' \n{"name": "a", "age": 3, "child": {"name": "b"}}\n', 1),
    ('```json\n{"name": "a"}\n```', 1),
    ('```\n{"name": "a"}\n```\n', 1),
    ('{"name": "a", "age": -1}', 0),
    ('{"name": "a", "child": {}}', 0),
    ('{"name": "a", "other": 1}', 0),
    ('{"name": "a"', 0),
    ('{"name": "a"} and more', 0),
    ('Here: ```json\n{"name": "a"}\n```', 0),
    ('```json\n{"name": "a"}', 0),
    ('{"name": "a", "age": NaN}', 0),
    ('{"name": "a", "age": 1' + "0" * 10_000 + "}", 0),
    ('{"name": "\ud800"}', 1),
    ("", 0),
    ("null", 0),
    ("[" * 100_000, 0),
    (NESTED, 0),
    ("`" * 100_000, 0),
    ("```\n" * 20_000, 0),
    ("```\n" + " " * 300_000, 0),
    ("```\n" + " " * 300_000 + "1```", 0),
    ("```", 0),
    ("``````", 0),
]


def test_json_by_a_schema():
    assert values(by_schema(definition=SCHEMA), *(text for text, _ in TEXTS)) == [right for _, right in TEXTS]


def test_schemas_in_a_column():
    feature, text = by_schema(column="schema"), '{"name": 1}'
    schemas = [json.dumps(SCHEMA), SCHEMA, '{"required": ["name"]}', None, "false"]
    assert values(feature, *[text] * 5, schema=schemas) == [0, 0, 1, -1, 0]


def test_a_schema_of_a_file_is_kept_in_the_config(tmp_path):
    (path := tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    feature = {"kind": "json_schema", "definition": str(path)}
    config = parse_config({"model": "m", "run_dir": "r", "target": [{"kind": "pointwise", "feature": feature}]})
    path.unlink()
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml").target[0].feature.definition == SCHEMA


@pytest.mark.parametrize(
    ("written", "message"),
    [(None, "No such file"), ("{", "cannot be read"), ("[1]", "must hold an object"), ("[" * 10_000, "cannot be read")],
)
def test_files_that_hold_no_schema_are_refused(written, message, tmp_path):
    path = tmp_path / "schema.json"
    if written is not None:
        path.write_text(written)
    feature = {"kind": "json_schema", "definition": str(path)}
    with pytest.raises(UserError, match=rf"^target\.0\.feature\.definition: .*{message}") as refusal:
        parse_config({"model": "m", "run_dir": "r", "target": [{"kind": "pointwise", "feature": feature}]})
    assert "\n" not in str(refusal.value)


def test_schemas_that_are_none_are_refused():
    with pytest.raises(UserError, match="feature json_schema: definition is no JSON Schema: .*'wrong' is not valid"):
        by_schema(definition={"type": "wrong"})
    for keys in ({}, {"definition": {}, "column": "schema"}):
        with pytest.raises(ValueError, match="needs either definition or column"):
            by_schema(**keys)
    check = by_schema(column="schema").check
    assert check({"other": "{}"}) == "there is no column 'schema', only other"
    assert "schema is not JSON: " in check({"schema": "{"})
    assert check({"schema": "3"}) == "schema is no JSON Schema: it is not an object"
    assert "schema is no JSON Schema: " in check({"schema": {"type": 3}})
    assert check({"schema": None}) is check({"schema": "true"}) is None


def test_references_are_not_looked_up_in_the_net(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("a schema is fetched"))
    with pytest.raises(Exception, match="Unresolvable"):
        by_schema(definition={"$ref": "http://example.com/schema.json"})(batch_of(["{}"]))


# --- instructions ---

FOLLOWED = [
    ("punctuation:no_comma", {}, "No comma here.", "One, two."),
    ("keywords:existence", {"keywords": ["wind", "sea"]}, "Wind over the sea", "Wind"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one"),
    ("change_case:english_lowercase", {}, "all of this is lower case", "This is NOT"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "[" * 100_000),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. I do.", "I do."),
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, "two words", "one"),
    ("format:no_whitespace", {}, "none", "some here"),
    ("language:response_language", {"language": "de"}, "Das ist ein ganz gewöhnlicher Satz.", "An ordinary sentence."),
]
NULLS = {"num_words": None, "language": None, "keywords": None, "relation": None}


def instructions(**keys):
    return InstructionsFeature(kind="instructions", **keys).build("cpu")


@pytest.mark.parametrize(("name", "kwargs", "yes", "no"), FOLLOWED)
def test_instructions_are_followed_or_not(name, kwargs, yes, no):
    columns = {
        "instruction_id_list": [[name]] * 4,
        "kwargs": [[{**NULLS, **kwargs}], [kwargs], json.dumps([kwargs]), [kwargs]],
    }
    feature = instructions()
    assert feature.check({name: rows[0] for name, rows in columns.items()}) is None
    assert values(feature, yes, no, yes, "", **columns) == [1, 0, 1, 0]


def test_all_of_them_or_their_share():
    columns = {
        "instruction_id_list": [["punctuation:no_comma", "format:no_whitespace"]] * 3 + [[], None],
        "kwargs": [[None, {}]] * 3 + [[], None],
    }
    texts = ["none", "some here", "one, two", "x", "x"]
    assert values(instructions(), *texts, **columns) == [1, 0, 0, -1, -1]
    assert values(instructions(score="fraction"), *texts, **columns) == [1, 0.5, 0, -1, -1]


DAMAGED = [
    (["no:such"], [{}], "'no:such' is no instruction of IFEval or IFBench"),
    (["keywords:existence"], [{}], "kwargs have no keywords"),
    (["keywords:existence"], [{"keywords": 3}], "keywords:existence cannot be checked with"),
    (["punctuation:no_comma"], [{"what": 1}], "cannot be checked with .* unexpected keyword"),
    (["punctuation:no_comma"], [], "and kwargs 0 objects"),
    ("punctuation:no_comma", [{}], "instruction_id_list has 'punct"),
    (["punctuation:no_comma"], "[", r"kwargs is '\[', not a list"),
    (["punctuation:no_comma"], None, "kwargs is None, not a list"),
    ([["x"]], [{}], "cannot be checked"),
]


@pytest.mark.parametrize(("names", "kwargs", "message"), DAMAGED)
def test_columns_that_cannot_be_checked_are_refused_at_the_start(names, kwargs, message):
    contexts = [Context(0, "a", (1,), {"instruction_id_list": names, "kwargs": kwargs})]
    with pytest.raises(UserError, match=f"contexts.train, prompt 1: .*{message}") as refusal:
        check_columns([instructions()], contexts, "contexts.train")
    assert "\n" not in str(refusal.value)


def test_data_of_nltk_that_are_missing_are_named_at_the_start(monkeypatch):
    monkeypatch.setattr("nltk.data.path", [])
    kwargs = [{"num_sentences": 1, "relation": "at least"}]
    fault = instructions().check({"instruction_id_list": ["length_constraints:number_sentences"], "kwargs": kwargs})
    assert fault == "length_constraints:number_sentences needs data of NLTK: python -m nltk.downloader punkt_tab"


def test_a_run_by_forms_ends(tiny_model, tmp_path):
    row = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "schema": "true"}
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"prompt": prompt, **row}) for prompt in runs.PROMPTS))
    features = [{"kind": "instructions"}, {"kind": "json_schema", "column": "schema"}]
    target = [{"kind": "rlhf", "beta": 1.0, "feature": feature} for feature in features]
    run_dir = runs.train(tiny_model, tmp_path, target=target, contexts={"train": str(tmp_path / "data.jsonl")})
    for row in runs.rows(run_dir / "samples.jsonl"):
        assert row["features"]["instructions"] == float(
            "," not in row["completion"] and row["completion"].strip() != ""
        )
