"""Models and tokenizers from a folder or the hub, and what can be wrong with them in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from ..errors import UserError
from .encoder_decoder import EncoderDecoderModel
from .language_model import LanguageModel, first_line
from .onednn import speed_up


def load_model(path: str, dtype: str, device: str, trust_remote_code: bool) -> LanguageModel:
    """Load a causal LM or an encoder-decoder from a folder or the hub; safetensors only.

    Raises:
        UserError: there is no such model, or it cannot be used.
    """
    _refuse_missing_folder(path)
    transformers.utils.logging.disable_progress_bar()  # a bar for every load drowns the lines that matter
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model: Any = kind.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: cannot load {path!r}: {first_line(error)}{_hint(path)}") from None
    model = model.to(device)
    speed_up(model)
    return (EncoderDecoderModel if config.is_encoder_decoder else LanguageModel)(model)


def load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a model, from where the model is.

    Raises:
        UserError: there is none.
    """
    _refuse_missing_folder(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: cannot load the tokenizer of {path!r}: {first_line(error)}{_hint(path)}") from None


def eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a text: chat models often have more than one.

    Raises:
        UserError: none is named.
    """
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    declared = declared if isinstance(declared, list) else [declared]
    found = {token_id for token_id in (*declared, tokenizer.eos_token_id) if token_id is not None}
    if not found:
        raise UserError("model: neither its generation config nor its tokenizer names an EOS token")
    return tuple(sorted(found))


def _refuse_missing_folder(path: str) -> None:
    """A mistyped folder is no name on the hub: do not ask the network for it."""
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or ("/" in path and folder.parent.is_dir())
    if looks_local and not folder.exists():
        raise UserError(f"model: there is no folder {path!r} here")


def _hint(path: str) -> str:
    if Path(path).is_dir():
        names = {p.name for p in Path(path).iterdir()}
        if not any(name.endswith(".safetensors") for name in names):
            return f" ({path!r} holds no .safetensors file, the only format that is loaded)"
        return ""
    return f" (there is no folder {path!r} here)" if not Path(path).exists() else ""
