"""Rows of data sets, by the kind of file; what is refused, with its place."""

import csv
import json
import sys

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fdpg_fast.data import READERS, read_rows
from fdpg_fast.errors import UserError

ROWS = [
    {"prompt": "one", "answer": "1"},
    {"prompt": 'two\n"lines", é\u2028', "answer": ""},
    {"prompt": " three ", "answer": "x,y"},
]
CHAT = [
    [{"role": "user", "content": "hi"}],
    [{"role": "assistant", "content": "A", "tool_calls": [{"name": "add"}]}, {"role": "tool", "content": "3"}],
]


def write(path, rows=ROWS):
    """A file of the kind of its suffix."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == ".csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".txt":
        path.write_text("\n".join(row["prompt"] for row in rows))
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("\n\n".join(map(json.dumps, rows)))
    return str(path)


def read(path):
    return [row for _, row in read_rows(str(path))]


@pytest.mark.parametrize("name", ["p.jsonl", "p.JSONL", "p.ndjson", "p.json", "P.Json", "p.csv", "p.CSV", "p.parquet"])
def test_every_kind_of_file_holds_the_same_rows(name, tmp_path):
    assert read(write(tmp_path / name)) == ROWS


@pytest.mark.parametrize("name", ["p.txt", "p.TXT"])
def test_text_files_hold_a_prompt_a_line(name, tmp_path):
    assert read(write(tmp_path / name, [{"prompt": "[1]"}, {"prompt": "b"}])) == [{"prompt": "[1]"}, {"prompt": "b"}]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1))
@settings(max_examples=60, deadline=None)
def test_csv_comes_back_as_it_was_written(tmp_path_factory, prompts):
    rows = [{"prompt": prompt, "n": str(n)} for n, prompt in enumerate(prompts)]
    assert read(write(tmp_path_factory.mktemp("csv") / "p.csv", rows)) == rows


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet"])
def test_chats_are_what_they_were_before_arrow_gave_all_messages_the_same_keys(name, tmp_path):
    rows = [{"prompt": prompt, "level": None, "tags": ["a", None]} for prompt in CHAT]
    assert read(write(tmp_path / name, rows)) == rows


def test_places_are_lines_items_and_rows(tmp_path):
    places = {
        "p.jsonl": ["p.jsonl:1", "p.jsonl:3", "p.jsonl:5"],
        "p.json": ["p.json: item 1", "p.json: item 2", "p.json: item 3"],
        "p.csv": ["p.csv:2", "p.csv:3", "p.csv:5"],  # the second takes two lines
        "p.parquet": ["p.parquet: row 1", "p.parquet: row 2", "p.parquet: row 3"],
    }
    for name, expected in places.items():
        found = [place for place, _ in read_rows(write(tmp_path / name))]
        assert found == [f"contexts: {tmp_path}/{place}" for place in expected]


def test_folders_and_their_splits_are_read_by_datasets(tmp_path):
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    train.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl")
    write(tmp_path / "files" / "test.jsonl", ROWS[:2])
    assert read(tmp_path / "saved") == ROWS
    assert read(f"{tmp_path}/both:test") == ROWS[:1]
    assert read(f"{tmp_path}/files:test") == ROWS[:2] and read(f"{tmp_path}/files:train[1:]") == ROWS[1:]
    both = {name: f"{tmp_path}/{name}:train, {tmp_path}/{name}:test" for name in ("both", "files")}
    known = {"both": both["both"], "files:": both["files"], "both:dev": both["both"], "saved:x": f"{tmp_path}/saved"}
    for name, ways in known.items():
        with pytest.raises(UserError, match=f"there is no such split; write {ways}$"):
            read_rows(f"{tmp_path}/{name}")
    with pytest.raises(UserError, match='Unknown split "dev"'):
        read_rows(f"{tmp_path}/files:dev")


def test_names_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(*source, split):
        asked.append((*source, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("openai/gsm8k/main:train", "trl-lib/tldr", "a/b.json-v1.0:test[:5%]"):
        assert read(name) == ROWS
    assert asked == [
        ("openai/gsm8k", "main", "train"),
        ("trl-lib/tldr", None),
        ("a/b.json-v1.0", "test[:5%]"),
    ]


DEEP = '{"prompt": "a", "x": ' + 100_000 * "[" + 100_000 * "]" + "}"
BAD = {
    "unknown kind": ("p.yaml", "a", r"p\.yaml' is of no known kind; these are known: \.jsonl, \.ndjson"),
    "no suffix": ("prompts", "a", "prompts' is of no known kind"),
    "table": ("p.tsv", "prompt\ta", "no known kind"),
    "compressed": ("p.jsonl.gz", b"\x1f\x8b\x08", r"p\.jsonl\.gz' is of no known kind"),
    "compressed, misnamed": ("p.jsonl", b"\x1f\x8b\x08\x00", "it is not UTF-8 text"),
    "UTF-16": ("p.txt", "text".encode("utf-16"), "it is not UTF-8 text"),
    "UTF-16 without a mark": ("p.txt", "text".encode("utf-16-le"), "it is not UTF-8 text"),
    "Latin-1": ("p.csv", "prompt\nGruß".encode("latin-1"), "it is not UTF-8 text"),
    "pointer": ("p.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "not JSON": ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl:2 is not JSON: .*column 12"),
    "no JSON list": ("p.json", '{"prompt": ["a"]}', r"p\.json must hold one list of objects"),
    "lines in .json": ("p.json", '{"prompt": "a"}\n{"prompt": "b"}', r"p\.json is not JSON: Extra data: line 2"),
    "deep": ("p.jsonl", DEEP, r"p\.jsonl:1 is not JSON: .*recursion"),
    "deep .json": ("p.json", f"[{DEEP}]", r"p\.json is not JSON: .*recursion"),
    "key twice": ("p.jsonl", '{"prompt": "a", "prompt": "b"}', r"p\.jsonl:1 is not JSON: a key is there twice"),
    "key twice inside": ("p.json", '[{"prompt": [{"role": 1, "role": 2}]}]', "a key is there twice among role, role"),
    "open quotes in the header": ("p.csv", '"prompt\na\n', r"p\.csv:1 is not CSV: unexpected end"),
    "digits": ("p.jsonl", '{"prompt": "a", "n": ' + 5000 * "1" + "}", r"p\.jsonl:1 is not JSON: .*digits"),
    "open quotes": ("p.csv", 'prompt,n\na,1\n"b,2\n', r"p\.csv:3 is not CSV: unexpected end"),
    "quotes inside": ("p.csv", 'prompt\n"a"b\n', r"p\.csv:2 is not CSV: ',' expected after"),
    "fields too many": ("p.csv", "prompt,n\n\na,b,c\n", r"p\.csv:3 is not CSV: 3 fields, but 2 in the header"),
    "fields too few": ("p.csv", "prompt,n\na\n", r"p\.csv:2 is not CSV: 1 fields, but 2"),
    "column twice": ("p.csv", "prompt,prompt\na,b\n", r"p\.csv:2 is not CSV: 2 fields, but 1 in the header"),
    "not Parquet": ("p.parquet", "PAR1", "cannot read .*Parquet"),
    "cut Parquet": ("p.parquet", b"PAR1" + 20 * b"x", "cannot read .*Parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_of_its_kind_is_refused_in_one_line(name, tmp_path):
    file, content, complaint = BAD[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=complaint) as refusal:
        read_rows(str(tmp_path / file))
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "path", ["absent.txt", "./absent", "/absent/data", "absent", "here/absent", "../a/b", "a/b/c/d"]
)
def test_what_is_not_there_is_not_looked_for_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(UserError, match=f"cannot read '{path}': No such file or directory"):
        read_rows(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read") as refusal:
        read_rows(str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("name", "package"), [("p.parquet", "pyarrow"), ("folder", "datasets"), ("a/b", "datasets")])
def test_what_is_not_installed_is_named(name, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.parquet")
    (tmp_path / "folder").mkdir()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'{package} is not installed; pip install "fdpg-fast\[datasets\]"'):
        read_rows(name)


def test_known_kinds_are_those_of_the_documentation():
    from fdpg_fast.config.load import config_keys

    assert all(suffix in config_keys()["contexts.train"] for suffix in READERS)
