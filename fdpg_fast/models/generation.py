"""What a model's generation config wants of sampling, which is from the full distribution at temperature 1."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..errors import UserError

# they say which texts there are at all; dropped, another model would be aligned than the one that `generate` shows
DECISIVE = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "stop_strings")
# they choose among texts, and do nothing at these values
AT_1 = "temperature top_p top_h typical_p repetition_penalty encoder_repetition_penalty num_beams length_penalty"
AT_0 = "top_k min_p epsilon_cutoff eta_cutoff no_repeat_ngram_size encoder_no_repeat_ngram_size min_length"
ADVICE: dict[str, Any] = dict.fromkeys(("forced_eos_token_id", "exponential_decay_length_penalty"))  # at None
ADVICE |= dict.fromkeys((*AT_1.split(), "guidance_scale"), 1) | dict.fromkeys((*AT_0.split(), "min_new_tokens"), 0)


def refuse_decisive(model: PreTrainedModel, continues_prompt: bool) -> None:
    """Refuse what sampling would drop and a model is not itself without; a first token is kept behind an encoder."""
    for key in (*DECISIVE, "forced_bos_token_id")[: None if continues_prompt else -1]:
        if (value := _wanted(model, key)) not in (None, [], {}):
            raise UserError(
                f"model: its generation config has {key}: {value}, which sampling does not keep to; "
                "remove that if the model is to be aligned without it"
            )


def advice(model: PreTrainedModel) -> str:
    """What is not done of what the config advises, in words; "" for nothing."""
    wanted = {key: _wanted(model, key) for key in ADVICE}
    left = [f"{key} {value}" for key, value in wanted.items() if value not in (None, ADVICE[key])]
    return ", without the model's " + ", ".join(left) if left else ""


def eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a text: chat models often have more than one."""
    declared = _wanted(model, "eos_token_id")
    declared = declared if isinstance(declared, list) else [declared]
    token_ids = {token_id for token_id in (*declared, tokenizer.eos_token_id) if token_id is not None}
    if not token_ids:
        raise UserError("model: neither its generation config nor its tokenizer names an EOS token")
    rows = len(model.get_output_embeddings().weight)
    for token_id in token_ids:
        if not isinstance(token_id, int) or not 0 <= token_id < rows:
            raise UserError(f"model: EOS token {token_id!r} has no row in the head of {rows:,}: no text could end")
    return tuple(sorted(token_ids))


def _wanted(model: PreTrainedModel, key: str) -> Any:
    return getattr(model.generation_config, key, None)
