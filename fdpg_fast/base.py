"""The base of the target: what training starts from, or a model of its own that knows the same texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .config.schema import TrainConfig
from .errors import UserError
from .models.language_model import LanguageModel
from .models.load import load_tokenizer

SPECIAL = ("bos_token_id", "eos_token_id")


def load_base(
    config: TrainConfig, start: LanguageModel, tokenizer: Any, load: Callable[[str], LanguageModel]
) -> LanguageModel:
    """The base, which is `start` where nothing asks for a copy or for another model.

    Args:
        start, tokenizer: what training starts from.
        load: makes a frozen model.

    Raises:
        UserError: it cannot be loaded, or is of other texts.
    """
    if config.starts_from_base:
        moves_beside_adapter = config.lora is not None and config.base.refresh_every is not None
        return load(config.model) if moves_beside_adapter else start
    path = str(config.base.model)
    try:
        base, its_tokenizer = load(path), load_tokenizer(path, config.trust_remote_code)
    except UserError as error:  # "model: …"
        raise UserError(f"base.{error}") from error
    _refuse_other_texts(base, its_tokenizer, start, tokenizer)
    if config.base.refresh_every:
        _refuse_other_weights(base, start)
    return base


def sampled_from(config: TrainConfig) -> TrainConfig:
    """The config of an engine that samples from the base, not from the policy."""
    if config.starts_from_base:
        return config
    kind = "transformers" if config.engine.kind == "vllm_server" else config.engine.kind  # servers have the policy
    engine = config.engine.model_copy(update={"kind": kind})
    return config.model_copy(update={"model": config.base.model, "engine": engine})


def _refuse_other_texts(base: LanguageModel, its_tokenizer: Any, start: LanguageModel, tokenizer: Any) -> None:
    if base.continues_prompt != start.continues_prompt:
        kinds = ["a decoder" if model.continues_prompt else "an encoder-decoder" for model in (base, start)]
        raise UserError(f"base.model: it is {kinds[0]} and model {kinds[1]}, which get other tokens of a prompt")
    theirs, ours = its_tokenizer.get_vocab(), tokenizer.get_vocab()
    for token in sorted({**ours, **theirs}):
        if theirs.get(token) != ours.get(token):
            places = [f"number {ids[token]}" if token in ids else "not there" for ids in (theirs, ours)]
            raise UserError(f"base.model: in its tokenizer {token!r} is {places[0]}, in that of model {places[1]}")
    for name in SPECIAL:
        if getattr(its_tokenizer, name) != getattr(tokenizer, name):
            raise UserError(
                f"base.model: its tokenizer has {name} {getattr(its_tokenizer, name)}, that of model "
                f"{getattr(tokenizer, name)}: their texts do not begin and end alike"
            )
    rows, least = (len(model.model.get_input_embeddings().weight) for model in (base, start))
    if rows < least:
        raise UserError(
            f"base.model: it has {rows} embeddings and model {least}, so it cannot score all that is sampled; add to "
            f"them with its resize_token_embeddings({least}), and save it"
        )


def _refuse_other_weights(base: LanguageModel, start: LanguageModel) -> None:
    own, other = ({name: x.shape for name, x in model.model.state_dict().items()} for model in (base, start))
    for name in {**own, **other}:
        if own.get(name) != other.get(name):
            raise UserError(f"base.refresh_every: base.model cannot become the policy, for they differ in {name}")
