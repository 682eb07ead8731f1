"""Models that two processes load by parts: what each of them then has, and how a damaged one is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fdpg_fast.errors import UserError
from fdpg_fast.models.load import load_model
from support import processes
from support.architectures import ARCHITECTURES, save_architecture

WEIGHTS = "model.safetensors"
# tied, untied, encoder-decoders, fused experts; of the others one way is enough
IN_TURN = ("llama, tied", "qwen3", "mixtral", "t5")


def settings(**changes: Any):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(change):
    def rewrite(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def not_a_number(row: int):
    return tensors(lambda found: found["model.layers.1.mlp.up_proj.weight"][row].fill_(float("nan")))


DAMAGES = {
    "cut short": lambda folder: os.truncate(folder / WEIGHTS, 10_000),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "a longer norm": tensors(lambda found: found.update({"model.norm.weight": torch.ones(33)})),
    "a token more": settings(vocab_size=258),  # the first process's part of 257 rows is as long as of 258
    "a layer more": settings(num_hidden_layers=3),
    "a layer less": settings(num_hidden_layers=1),
    "without a head": settings(tie_word_embeddings=False),
    "a head that is not the embedding": tensors(lambda found: found.update({"lm_head.weight": torch.randn(257, 32)})),
    "NaN in the first part": not_a_number(0),
    "NaN in the last part": not_a_number(-1),
    "quantised": settings(quantization_config={"quant_method": "gptq", "bits": 4}),
}


@pytest.fixture(scope="module")
def loaded(tiny_model, tmp_path_factory) -> Path:
    """Every model of ours and every damaged one, loaded by two processes."""
    root = tmp_path_factory.mktemp("models")
    commands: list[list[object]] = []
    for name in ARCHITECTURES:
        folder = save_architecture(name, root / name)
        commands.append(["weights", folder, "float32", "read", root / f"{name}.read"])
        if name in IN_TURN:
            commands.append(["weights", folder, "float32", "in turn", root / f"{name}.in turn"])
    commands.append(["weights", tiny_model, "bfloat16", "read", root / "narrow"])
    for name, damage in DAMAGES.items():
        damage(shutil.copytree(tiny_model, root / name))
        commands.append(["weights", root / name, "float32", "any", root / f"{name}.refused"])
    ended = processes.run(*commands)
    assert ended.returncode == 0, ended.stderr
    return root


def whole(folder: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    model = load_model(str(folder), dtype, "cpu", trust_remote_code=False).model
    return dict(model.named_parameters()) | dict(model.named_buffers())


def differing(found: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    report = torch.load(found)
    assert report["refused"] == ["", ""] and report["tensors"].keys() == expected.keys()
    sizes = sum(x.numel() for x in expected.values() if isinstance(x, torch.nn.Parameter))
    assert sum(report["held"]) == sizes and max(report["held"]) < 0.6 * sizes  # odd rows: not quite a half
    return [name for name, x in expected.items() if not torch.equal(report["tensors"][name], x)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_are_of_what_one_process_loads(loaded, name):
    expected = whole(loaded / name)
    assert differing(loaded / f"{name}.read", expected) == []
    assert name not in IN_TURN or differing(loaded / f"{name}.in turn", expected) == []


def test_parts_are_converted_when_they_are_read(loaded, tiny_model):
    assert load_file(tiny_model / WEIGHTS)["model.norm.weight"].dtype == torch.float32
    assert differing(loaded / "narrow", whole(tiny_model, "bfloat16")) == []


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_refused_in_the_same_words(loaded, name):
    with pytest.raises(UserError) as refusal:
        load_model(str(loaded / name), "float32", "cpu", trust_remote_code=False)
    first, _ = torch.load(loaded / f"{name}.refused")["refused"]  # the only one to speak
    assert first == str(refusal.value)
