"""Models and tokenizers from a folder or the hub, and what can be wrong with their files in one line."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from ..errors import UserError, is_out_of_memory, one_line
from ..progress import say_once
from .encoder_decoder import EncoderDecoderModel
from .generation import refuse_decisive
from .language_model import LanguageModel

QUANTISED = ("quantization_config", "quantization", "compression_config")  # keys of a config.json
NO_LANGUAGE_MODEL = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|RewardModel")
MISMATCH = re.compile(r"(?m)^(\S+).*MISMATCH.*ckpt: torch.Size\((.*?)\) vs model: ?torch.Size\((.*?)\)")
SAID_BETTER = re.compile("LOAD REPORT|we will NOT tie them")  # by lines of ours


def load_model(path: str, dtype: str, device: str, trust_remote_code: bool) -> LanguageModel:
    """A causal LM or an encoder-decoder from a folder or the hub; safetensors only.

    Raises:
        UserError: whatever is wrong with its files, named.
    """
    transformers.utils.logging.disable_progress_bar()  # a bar for every load drowns the lines that matter
    with _reading(path, repr(path)):
        settings, _ = transformers.PreTrainedConfig.get_config_dict(path)
        _refuse_settings(path, settings, trust_remote_code)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        options = {"config": config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        model, found = kind.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
        _refuse_weights(path, model, found)
        refuse_decisive(model, not config.is_encoder_decoder)
        model = model.to(device)
        return (EncoderDecoderModel if config.is_encoder_decoder else LanguageModel)(model)


def load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a model, from where the model is; raises as `load_model`."""
    with _reading(path, f"the tokenizer of {path!r}"):
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
    if broken := [name for name, x in own.items() if not x.sum().isfinite() and not x.isfinite().all()]:
        raise UserError(f"model: {path!r} has NaN or infinity in its weights: {_some(broken)}")


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def _reading(path: str, what: str) -> Iterator[None]:
    """Whatever libraries raise or print over somebody's files becomes a line of ours.

    Raises:
        UserError: in place of any exception but for want of memory.
    """
    logger, said = logging.getLogger("transformers"), logging.handlers.BufferingHandler(10**6)
    handlers, logger.handlers = logger.handlers, [said]
    try:
        with warnings.catch_warnings(action="ignore"):
            _refuse_place(path)
            if transformers.utils.find_adapter_config_file(path) is not None:
                remedy = "merge it into its base and give the merged model, or continue its run with --resume"
                raise UserError(f"model: {path!r} holds an adapter, not a model: {remedy}")
            yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        says_little = isinstance(error, (LookupError, ArithmeticError, TypeError, AttributeError))
        reason = f"{type(error).__name__}: " * says_little + one_line(error)[:300]
        if "trust_remote_code" in str(error):
            reason = "it needs Python code that comes with it; read that, and set trust_remote_code: true"
        for record in said.buffer:
            if shapes := MISMATCH.search(record.getMessage()):
                reason = "{} is {} in the file, {} by config.json".format(*shapes.groups())
        raise UserError(f"model: cannot load {what}: {_damage(path) or reason}") from None
    finally:
        logger.handlers = handlers
    for record in said.buffer:  # of the config nothing is said twice: the tokenizer reads it too
        if not (SAID_BETTER.search(record.getMessage()) or (what != repr(path) and "tokeniz" not in record.name)):
            say_once(f"model: {path}: {one_line(record.getMessage())}")


def _refuse_place(path: str) -> None:
    folder = Path(path)
    if os.path.isfile(path):
        raise UserError(f"model: {path!r} is a file; give the folder that holds it")
    if os.path.isdir(path):
        generation = folder / "generation_config.json"  # transformers passes over a damaged one, and over its EOS
        if generation.is_file() and not isinstance(json.loads(generation.read_bytes()), dict):
            raise ValueError("generation_config.json holds no object")
        return
    if path.startswith((".", "/", "~")) or ("/" in path and folder.parent.is_dir()):
        raise UserError(f"model: there is no folder {path!r} here")  # mistyped: no name to ask the network for
    if huggingface_hub.try_to_load_from_cache(path, "config.json") is None:
        try:  # one question; transformers would ask for half a minute where there is no network
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(path, "config.json"), timeout=10)
        except EntryNotFoundError:
            pass  # there is such a repository
        except Exception as error:
            raise UserError(
                f"model: there is no folder {path!r} here, and the hub does not give it: {one_line(error)[:300]}"
            ) from None


def _damage(path: str) -> str | None:
    """What is wrong with a file of a model that could not be loaded."""
    folder = Path(path)
    opens = {".safetensors": lambda file: safe_open(file, "pt"), ".json": lambda file: json.loads(file.read_bytes())}
    for file in sorted(folder.iterdir()) if os.path.isdir(path) else ():
        if not file.is_file() or file.suffix not in opens:
            continue
        with open(file, "rb") as opened:
            head = opened.read(64).lstrip()
        if head.startswith(b"version https://git-lfs"):
            return f"{file.name} is a Git LFS pointer; fetch the file itself with `git lfs pull`"
        if head.startswith(b"<"):
            return f"{file.name} is a web page, not the file"
        try:
            opens[file.suffix](file)
        except Exception as error:
            return f"{file.name} is damaged or cut short ({one_line(error)[:200]})"
    if os.path.isdir(path) and not any(folder.glob("*.safetensors")):
        return f"{path!r} holds no .safetensors file, the only format that is loaded"
    return None
