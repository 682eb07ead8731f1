"""A run is resumed with what it began with: anything else is refused by name, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fdpg_fast.runs.origin import _content
from support import runs

FEATURE = "def short(completions):\n    return [float(len(text) < 9) for text in completions]\n"
ROWS = [{"prompt": prompt, "topic": topic} for prompt, topic in (("a", 1), ("tea ", 2), ("def f(", 3))]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def begun(tiny_model, tmp_path_factory):
    """A folder with a run of two rounds and all that it was made from."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(tiny_model, folder / "model")
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "eval.jsonl", ROWS[:2])
    (folder / "short.py").write_text(FEATURE)
    (folder / "package").mkdir()
    (folder / "package/long.py").write_text(FEATURE.replace("short", "long").replace("< 9", "> 2"))
    target = [
        {"kind": "rlhf", "beta": 1.0, "feature": {"kind": "import", "path": path}}
        for path in ("short.py:short", "package.long:long")
    ]
    settings = runs.settings(Path("model"), "run", target=target, optimizer={"learning_rate": 1e-3})
    settings["contexts"] = {"train": "train.jsonl", "eval": "eval.jsonl"}
    ended = runs.run(folder, "train", runs.write_config(folder, settings))
    assert ended.status == 0, ended.stderr
    return folder


def edit_config(key: str, value):
    def edit(folder: Path) -> None:
        path = folder / "run/config.yaml"
        data = yaml.safe_load(path.read_text())
        *sections, last = key.split(".")
        place = data
        for section in sections:
            place = place[section]
        place[last] = value
        path.write_text(yaml.safe_dump(data))

    return edit


def edit_rows(name: str, change):
    return lambda folder: write_rows(folder / name, change([dict(row) for row in ROWS]))


def edit_json(name: str, **changes):
    def edit(folder: Path) -> None:
        path = folder / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def nudge_a_weight(folder: Path) -> None:
    path = folder / "model/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def swap_two_rows(folder: Path) -> None:
    path = folder / "model/model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = embedding[[*range(100), *range(256, 99, -1)]].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def append(name: str, text: str):
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


def swap_tokens(folder: Path) -> None:
    path = folder / "model/tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["Q"], vocabulary["Z"] = vocabulary["Z"], vocabulary["Q"]  # of no prompt
    path.write_text(json.dumps(data))


CHANGES = {
    "other prompt": (edit_rows("train.jsonl", lambda rows: [*rows[:2], {"prompt": "if ", "topic": 3}]), "train"),
    "prompts in another order": (edit_rows("train.jsonl", lambda rows: rows[::-1]), "train"),
    "a prompt more": (edit_rows("train.jsonl", lambda rows: [*rows, {"prompt": "b", "topic": 4}]), "train"),
    "a prompt less": (edit_rows("train.jsonl", lambda rows: rows[:2]), "train"),
    "another value of a column": (edit_rows("train.jsonl", lambda rows: [rows[0] | {"topic": 9}, *rows[1:]]), "train"),
    "another evaluation": (edit_rows("eval.jsonl", lambda rows: rows[1:]), "contexts.eval"),
    "one weight": (nudge_a_weight, "the model's weights"),
    "weights in another order": (swap_two_rows, "the model's weights"),
    "settings of the model": (edit_json("config.json", rms_norm_eps=1e-3), "the model's config"),
    "tokens": (swap_tokens, "the tokenizer"),
    "code in a file": (append("short.py", "# softer\n"), "the code of short.py"),
    "code in a module": (append("package/long.py", "# softer\n"), "the code of package.long"),
    "learning rate": (
        edit_config("optimizer.learning_rate", 1e-2),
        "optimizer.learning_rate has changed from 0.001 to",
    ),
    "lora": (edit_config("lora", {"rank": 2}), "lora has changed since the run began"),
    "dtype": (edit_config("dtype", "bfloat16"), "dtype has changed from 'float32' to 'bfloat16'"),
    "proposal": (edit_config("proposal.kind", "adaptive"), "proposal.kind has changed from 'policy' to 'adaptive'"),
    "target": (edit_config("target", [runs.LETTERS]), "target has changed from "),
    "seed": (edit_config("trainer.seed", 5), "trainer.seed has changed from 0 to 5"),
    "damaged": (lambda folder: (folder / "run/.origin.json").write_text("[1]"), ".origin.json is damaged"),
}


@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES.keys())
def test_a_run_is_not_resumed_with_something_else(change, named, begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "copy")
    change(folder)
    config, before = (folder / "run/config.yaml").read_text(), runs.record(folder / "run")
    ended = runs.run(folder, "train", "--resume", "run", "--trainer.rounds=3")
    assert ended.status == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("fdpg-fast: --resume: ") and named in ended.stderr, ended.stderr
    assert (folder / "run/config.yaml").read_text() == config
    runs.assert_equal(runs.record(folder / "run"), before)

    (folder / "run/.origin.json").unlink()  # as the line says
    ended = runs.run(folder, "train", "--resume", "run", "--trainer.rounds=3")
    if len((folder / "train.jsonl").read_text().splitlines()) != len(ROWS):  # Z is of each prompt, by its place
        assert ended.status == 2 and "does not fit this run: ValueError: it has Z of 3 contexts" in ended.stderr
    else:
        assert ended.status == 0 or named.split()[0] in ("lora", "dtype", "proposal.kind", "target", "the data")


def move_all(folder: Path) -> None:
    for name in ("model", "train.jsonl", "eval.jsonl"):
        (folder / name).rename(folder / f"moved-{name}")
    for key, name in (("model", "model"), ("contexts.train", "train.jsonl"), ("contexts.eval", "eval.jsonl")):
        edit_config(key, f"moved-{name}")(folder)
    (folder / "run").rename(folder / "elsewhere")
    (folder / "elsewhere").rename(folder / "run")


HARMLESS = {
    "nothing": lambda folder: None,
    "moved": move_all,
    "more rounds": edit_config("trainer.rounds", 3),
    "checkpoints": edit_config("trainer.checkpoint_every", 7),
    "saved by another version": edit_json("config.json", transformers_version="5.99.0"),
    "columns in another order": edit_rows("train.jsonl", lambda rows: [dict(reversed(row.items())) for row in rows]),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_changes_no_number_is_not_in_the_way(change, begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "copy")
    change(folder)
    ended = runs.run(folder, "train", "--resume", "run")
    assert ended.status == 0, ended.stderr


def lose(name: str, tensor: str):
    def damage(folder: Path) -> None:
        path = folder / name
        tensors = load_file(path)
        kept = {key: value for key, value in tensors.items() if not key.endswith(tensor)}
        assert len(kept) < len(tensors)
        save_file(kept, path, metadata={"format": "pt"})

    return damage


def forget(name: str, key: str):
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        del content[key]
        (folder / name).write_text(json.dumps(content))

    return damage


LOSSES = {
    "estimates": (lose("trainer/state.tensors", "estimates.log_sum"), "log_sum", {}),
    "generators": (forget("trainer/state.json", "generators"), "generators", {}),
    "adapter": (lose("adapter_model.safetensors", "0.self_attn.q_proj.lora_B.weight"), "lora_B", {"lora": {"rank": 2}}),
    "weights": (lose("model.safetensors", "0.self_attn.q_proj.weight"), "q_proj", {}),
}


@pytest.mark.parametrize(("damage", "named", "sections"), LOSSES.values(), ids=LOSSES.keys())
def test_a_checkpoint_that_lacks_something_is_refused_though_its_sums_are_right(
    damage, named, sections, tiny_model, tmp_path, capsys
):
    run_dir = runs.train(tiny_model, tmp_path, **sections)
    folder = run_dir / "checkpoints/round-000002"
    damage(folder)
    from fdpg_fast.runs.checkpoint import _sha256

    names = [line.split("  ", 1)[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    (folder / "SHA256SUMS").write_text("".join(f"{_sha256(folder / name)}  {name}\n" for name in names))
    capsys.readouterr()
    assert runs.call("train", "--resume", run_dir, "--trainer.rounds=3") == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and named in complaint and "round-000002" in complaint, complaint


def test_weights_are_the_same_wherever_they_lie_in_memory():
    for dtype in (torch.bfloat16, torch.float32, torch.int8, torch.float64):
        storage = torch.arange(40).to(dtype)
        part = storage[3:21].view(3, 6)  # no multiple of eight bytes from the start
        assert _content(("w", part)) == _content(("w", part.clone())) == _content(("w", part.T.contiguous().T))
        assert _content(("w", part)) != _content(("w", part.flip(0)))
        assert _content(("w", part)) != _content(("w", part.view(6, 3)))
