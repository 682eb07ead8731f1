"""Models and tokenizers from a folder or the hub, and what can be wrong with them in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from ..errors import UserError
from .encoder_decoder import EncoderDecoderModel
from .language_model import LanguageModel, first_line


def load_model(path: str, dtype: str, device: str, trust_remote_code: bool) -> LanguageModel:
    """A causal LM or an encoder-decoder from a folder or the hub; safetensors only."""
    transformers.utils.logging.disable_progress_bar()  # a bar for every load drowns the lines that matter
    with _loading(repr(path), path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model: Any = kind.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    model = model.to(device)
    return (EncoderDecoderModel if config.is_encoder_decoder else LanguageModel)(model)


def load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a model, from where the model is."""
    with _loading(f"the tokenizer of {path!r}", path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a text: chat models often have more than one."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    declared = declared if isinstance(declared, list) else [declared]
    token_ids = {token_id for token_id in (*declared, tokenizer.eos_token_id) if token_id is not None}
    if not token_ids:
        raise UserError("model: neither its generation config nor its tokenizer names an EOS token")
    return tuple(sorted(token_ids))


@contextlib.contextmanager
def _loading(what: str, path: str) -> Iterator[None]:
    folder = Path(path)
    if not folder.exists() and (path.startswith((".", "/", "~")) or ("/" in path and folder.parent.is_dir())):
        raise UserError(f"model: there is no folder {path!r} here")  # mistyped: no name to ask the network for
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        hint = "" if folder.exists() else f" (there is no folder {path!r} here)"
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            hint = f" ({path!r} holds no .safetensors file, the only format that is loaded)"
        raise UserError(f"model: cannot load {what}: {first_line(error)}{hint}") from None
