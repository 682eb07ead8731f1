"""Models and tokenizers from a folder or the hub, and what their configs and weights must not be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from ..errors import UserError
from ..model_files import reading
from ..progress import say_once
from . import parts
from .encoder_decoder import EncoderDecoderModel
from .generation import refuse_decisive
from .language_model import LanguageModel

QUANTISED = ("quantization_config", "quantization", "compression_config")  # keys of a config.json
NO_LANGUAGE_MODEL = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|RewardModel")


def load_model(path: str, dtype: str, device: str, trust_remote_code: bool, is_divided: bool = False) -> LanguageModel:
    """A causal LM or an encoder-decoder from a folder or the hub; safetensors only.

    is_divided: this process keeps its part of the weights, all processes load at once, and the model is to be divided
    before it is used.

    Raises:
        UserError: whatever is wrong with its files, named.
    """
    with reading(path):
        settings, _ = transformers.PreTrainedConfig.get_config_dict(path)
        _refuse_settings(path, settings, trust_remote_code)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        options = {"config": config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}

        def load(**more: Any) -> parts.Loaded:
            return kind.from_pretrained(path, trust_remote_code=trust_remote_code, **options, **more)

        model, found = parts.read_parts(load, torch.device(device)) if is_divided else load()
        _refuse_weights(path, model, found)
        refuse_decisive(model, not config.is_encoder_decoder)
        model = model.to(device)
        return (EncoderDecoderModel if config.is_encoder_decoder else LanguageModel)(model)


def load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a model, from where the model is; raises as `load_model`."""
    with reading(path, f"the tokenizer of {path!r}"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def _refuse_settings(path: str, settings: dict[str, Any], trust_remote_code: bool) -> None:
    """What a config.json says that keeps its model from being trained here."""
    for key, value in _keys_of(settings):
        if key in QUANTISED and value is not None:
            method = value.get("quant_method", key) if isinstance(value, dict) else key
            reason = f"its weights are quantised ({method}), which cannot be trained; use the unquantised model"
        elif key.endswith("_implementation") and "/" in str(value) and not trust_remote_code:
            reason = f"{key}: {value!r} would run code from the hub; remove the key from config.json"
        elif key == "architectures" and NO_LANGUAGE_MODEL.search(str(value)):
            reason = f"it is no language model but {value}; its base may be meant"
        else:
            continue
        raise UserError(f"model: {path!r} cannot be taken: {reason}")


def _keys_of(settings: Any) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items() if isinstance(settings, dict) else ():
        yield key, value
        yield from _keys_of(value)


def _refuse_weights(path: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Weights that are not in the file would be random; those that no layer takes belong to another model."""
    kind, own = type(model).__name__, dict(model.named_parameters())
    if missing := found["missing_keys"]:
        raise UserError(f"model: {path!r} lacks weights of a {kind}, which would be random: {_some(missing)}")
    extra = {name for name in found["unexpected_keys"] if not re.search("mtp|nextn", name)}  # predict later tokens
    foreign = {name for name in extra if re.fullmatch(rf"{model.base_model_prefix}\..*\.weight", name)}
    for name in extra:  # a bias or a scale of a weight that is here; a mask or a table of an old release is none
        parent = name.rpartition(".")[0]
        foreign |= {name} if parent in own or f"{parent}.weight" in own else set()
    if foreign:
        raise UserError(f"model: {path!r} is no {kind} as its config.json says: no layer takes {_some(foreign)}")
    if extra:
        say_once(f"model: {path}: weights that a {kind} does not use are left out: {_some(extra)}")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    config, can_tie = model.config.get_text_config(), getattr(type(model), "_tied_weights_keys", None)
    if can_tie and config.tie_word_embeddings and not config.is_encoder_decoder and head.weight is not embedding.weight:
        raise UserError(
            f"model: {path!r} has a head of its own, but its config.json says that it is the embedding: "
            "set tie_word_embeddings: false there"
        )
    if broken := parts.broken(model):
        raise UserError(f"model: {path!r} has NaN or infinity in its weights: {_some(broken)}")


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
