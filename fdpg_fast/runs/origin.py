"""What a run began with: its config, and hashes of data, model and code, so that it is resumed with nothing else.

Hashes are of what the run works with, not of files: a model that has moved is the same one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ..config.schema import RESUMABLE, TrainConfig
from ..contexts import Context
from ..errors import UserError
from ..models import parallel
from ..models.language_model import LanguageModel
from .folder import ORIGIN, Json

PLACES = ("run_dir", "model", "base.model", "contexts.train", "contexts.eval")  # what is there counts, wherever it is
CODE = re.compile(r'"(?:path|divergence)": "([^":]+):[^"]*"')  # in the config as JSON: files and modules of the user


def origin_of(
    config: TrainConfig, start: LanguageModel, base: LanguageModel, tokenizer: Any, **contexts: list[Context]
) -> Json:
    """Every key that a resumed run may not change, and hashes of all that the config points to; contexts by name.

    start: the model that training starts from; it may be the base.
    """
    plain = config.model_dump(mode="json")
    origin = {key: value for key, value in _flat(plain, "") if key not in (*RESUMABLE, *PLACES)}
    for name, part in contexts.items():
        texts = ((c.text, c.token_ids, sorted(c.columns.items()), c.messages) for c in part)
        origin[f"the data of contexts.{name}"] = _hash(texts)
    for name in CODE.findall(json.dumps(plain, ensure_ascii=False)):
        file: Any = name
        if not name.endswith(".py"):
            with contextlib.suppress(ImportError, ValueError):  # alpha:0.5 is no module
                file = getattr(importlib.util.find_spec(name), "origin", None)
        if file is not None and Path(file).is_file():
            origin[f"the code of {name}"] = _hash([Path(file).read_bytes()])
    origin["the model's config"], origin["the model's weights"] = found = _of_model(config.model, start)
    if base is not start:
        found = _of_model(config.base.model or config.model, base)
    origin["the base's config"], origin["the base's weights"] = found
    ids = sorted(tokenizer.get_vocab().values())
    return origin | {"the tokenizer": _hash([tokenizer.decode(ids), tokenizer.all_special_ids])}


def refuse_changes(run_dir: str, now: Json) -> None:
    """Raises UserError that names the first thing that is no longer as it was when the run began."""
    path = Path(run_dir) / ORIGIN
    try:
        began = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"--resume: {path} is damaged; delete it to go on with what is there now") from None
    now = json.loads(json.dumps(now))
    for what, value in began.items():  # not what a later version has more
        if what not in now or now[what] != value:
            unsaid = what.startswith("the ") or what not in now  # such as lora, which has keys now
            details = "" if unsaid else f" from {value!r} to {now[what]!r}"
            raise UserError(
                f"--resume: {what} has changed{details} since the run began; put it back, or start a new run "
                f"(to go on with it all the same, delete {path})"
            )


def _of_model(path: str, model: LanguageModel) -> tuple[str, str]:
    """Hashes of a model's config and weights."""
    raw, _ = PretrainedConfig.get_config_dict(path)
    settings = sorted((k, v) for k, v in raw.items() if not k.startswith("_") and k != "transformers_version")
    return _hash(settings), _hash(map(_content, model.model.named_parameters()))


def _flat(value: Any, key: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(key, value)]
    return [leaf for name, inner in value.items() for leaf in _flat(inner, f"{key}.{name}".lstrip("."))]


def _content(named: tuple[str, torch.Tensor]) -> Any:
    """A parameter's name and shape, the sum of its bits and a sample of them: one pass, 0.2 s for 500 MB on a CPU."""
    name, parameter = named[0], parallel.full(named[1])
    bits = parameter.detach().contiguous().flatten().view(getattr(torch, f"int{8 * parameter.element_size()}"))
    return name, tuple(parameter.shape), int(bits.sum()), bits[:: max(1, len(bits) // 64)].tolist()


def _hash(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
