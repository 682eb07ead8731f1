"""A checkpoint folder is a model's: what else reads it finds nothing of the trainer's in its way."""

import shutil
import subprocess

import pytest
from transformers import AutoTokenizer

from support import runs

TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """The last one of a run whose tokenizer has several chat templates, which are saved in a folder of their own."""
    folder = tmp_path_factory.mktemp("run")
    model = shutil.copytree(tiny_model, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(model)
    assert runs.call("train", runs.write_config(folder, runs.settings(model, folder / "run"))) == 0
    return folder / "run/checkpoints/round-000002"


def test_every_safetensors_file_in_it_is_the_models(checkpoint):
    assert [path.name for path in checkpoint.rglob("*.safetensors")] == ["model.safetensors"]
    # nor is it what loaders take where there are no safetensors, and one pattern leaves it out of an upload
    assert not [path for suffix in ("bin", "pt", "pth", "gguf") for path in checkpoint.rglob(f"*.{suffix}")]
    model = checkpoint.parents[2] / "model"
    ours, models = ({path.name for path in folder.iterdir()} for folder in (checkpoint, model))
    assert ours - models == {"trainer", "SHA256SUMS"}
    modes = {path.stat().st_mode & 0o777 for path in checkpoint.rglob("*") if path.is_file()}
    assert modes == {checkpoint.stat().st_mode & 0o666}  # as the umask has it, the weights not 0600


def test_sums_name_every_file_in_folders_too(checkpoint):
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=checkpoint, check=True)
    listed = {line.split("  ", 1)[1] for line in (checkpoint / "SHA256SUMS").read_text().splitlines()}
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert listed == files - {"SHA256SUMS"}
    assert {"trainer/state.json", "additional_chat_templates/rag.jinja"} <= listed
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template == TEMPLATES


def test_a_damaged_file_in_a_folder_is_noticed(checkpoint, tmp_path, capsys):
    run_dir = shutil.copytree(checkpoint.parents[1], tmp_path / "run")
    (run_dir / "checkpoints/round-000002/additional_chat_templates/rag.jinja").write_text("{{ other }}")
    assert runs.call("sample", run_dir) == 2
    assert "(additional_chat_templates/rag.jinja has changed)" in capsys.readouterr().err
