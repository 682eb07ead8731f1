"""A transformers causal LM behind the one scoring path that engine, learner and base model share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from fdpg_kernels import linear_logprob

from ..contexts import Context
from ..errors import UserError
from ..rollouts import Rollouts
from . import attention, onednn
from .linear_layers import use_fast_products


@dataclass(frozen=True)
class Head:
    """The LM head as the fused ops take it: weight [V, D], bias [V] or None, and the logits' scaling."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None

    def options(self) -> dict[str, Any]:
        """The keyword arguments that `linear_logprob` and `fdpg_loss` share."""
        return {"bias": self.bias, "temperature": self.temperature, "softcap": self.softcap}

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, D] → [B, V] float32, multiplied in float32: logits of 30 in bfloat16 are off by a tenth of a nat."""
        bias = None if self.bias is None else self.bias.float()
        logits = onednn.linear(hidden.float(), self.weight.float(), bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature


class Decoding(Protocol):
    """B completions that grow side by side, a token at a time.

    Attributes:
        first: the state that predicts each completion's first token, [B, D].
    """

    first: Tensor

    def advance(self, tokens: Tensor) -> Tensor:
        """Append one token to each completion, [B]; the states that predict the next, [B, D]."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep only these completions, [b] indices into the present ones."""
        ...


class LanguageModel:
    """A causal LM, always in eval mode: dropout would make its log-probs differ from the sampler's.

    Args:
        model: any transformers causal LM whose attention goes through the attention registry.

    Raises:
        UserError: the packed forward pass does not reproduce the model's own logits.

    Attributes:
        continues_prompt: prompt and completion are one text; else the completion answers it.
    """

    continues_prompt = True
    _layout = "on packed rows"

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval()
        kind = type(model).__name__
        try:
            model.set_attn_implementation(attention.IMPLEMENTATION)
        except (ValueError, AttributeError) as error:
            raise UserError(f"model: {kind} does not let its attention be chosen: {_first_line(error)}") from None
        config = model.config.get_text_config()
        scaling = getattr(config, "logits_scaling", None) or 1 / (getattr(config, "logit_scale", None) or 1.0)
        self._temperature = float(scaling)
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._check_scoring()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> Head:
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, getattr(layer, "bias", None), self._temperature, self._softcap)

    @property
    def max_length(self) -> int:
        """Positions that there are."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", 2**31)

    def prompt_room(self, max_new_tokens: int) -> int:
        """Tokens that a prompt may have before a completion of so many; less than 1: there is no room."""
        return self.max_length - max_new_tokens

    def start(self, contexts: Sequence[Context], owner: Tensor, max_new_tokens: int) -> Decoding:
        """Begin B completions, to be decoded side by side.

        Args:
            contexts: C prompts, each of which is computed once.
            owner: which of them each completion continues, [B] int64 on the CPU.
            max_new_tokens: that a completion may have.
        """
        return attention.PackedDecoding(self.model, [context.token_ids for context in contexts], owner, max_new_tokens)

    def hidden(self, rollouts: Rollouts) -> Tensor:
        """The hidden state that predicts each completion token, [N, D]; carries gradients where they are on."""
        batch = attention.PackedBatch(rollouts, self.device)
        states = attention.run(self.model, batch.input_ids, batch.position_ids, batch)
        return states.index_select(0, batch.target_rows)

    @torch.no_grad()
    def token_logprobs(self, rollouts: Rollouts, micro_batch_tokens: int) -> Tensor:
        """log-probs of the completions' tokens under this model, [N] float32 on the CPU."""
        head = self.head
        parts = []
        for rows in rollouts.micro_batches(micro_batch_tokens):
            part = rollouts.part(rows)
            token_ids = part.token_ids.to(self.device)
            parts.append(linear_logprob(self.hidden(part), head.weight, token_ids, **head.options()).cpu())
        return torch.cat(parts)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """What an engine samples with: names as in a checkpoint, in module order, and tensors in the model's dtype.

        A tied head comes under its own name too: vLLM packs a copy of it on a CPU, which else stays the old one.
        """
        yield from self.model.state_dict().items()

    @torch.no_grad()
    def take_weights(self, policy: LanguageModel) -> None:
        """Become a copy of another: this model has its shape."""
        own = dict(self.weights())
        for name, tensor in policy.weights():
            own[name].copy_(tensor)

    def save(self, folder: Path) -> None:
        """Write what was trained, as `from_pretrained` reads it."""
        self.model.save_pretrained(folder)

    @torch.no_grad()
    def _check_scoring(self) -> None:
        """Compare with the model's own forward pass on two short rows; a wrong log-prob must not start a run."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.get_text_config().vocab_size
        rows = torch.randint(vocabulary, (2, 7), generator=generator)
        prompts = [Context(0, "", tuple(rows[0, :2].tolist())), Context(1, "", tuple(rows[1, :4].tolist()))]
        probe = Rollouts(
            contexts=tuple(prompts),
            context_index=torch.tensor([0, 1]),
            token_ids=torch.cat([rows[0, 2:], rows[1, 4:]]),
            cu_seqlens=torch.tensor([0, 5, 8], dtype=torch.int32),
            behavior_logprob=torch.zeros(8),
            finished=torch.zeros(2, dtype=torch.bool),
        )
        kind, dtype = type(self.model).__name__, self.model.dtype
        try:
            ours = self.token_logprobs(probe, micro_batch_tokens=1024)
            own = torch.cat([self._own_logprobs(row[:n], row[n:]) for row, n in zip(rows, (2, 4), strict=True)])
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"model: {kind} cannot run {self._layout}: {type(error).__name__}: {error}") from error
        gap = float((ours - own).abs().max())
        limit = 1e-3 if dtype == torch.float32 else 0.25
        if not gap < limit:
            raise UserError(
                f"model: {kind} cannot be scored {self._layout}: its log-probs differ from the model's own by "
                f"{gap:.3g} nats (limit {limit:g}); its attention or its head is of a kind that is not supported"
            )

    def _own_logprobs(self, prompt: Tensor, completion: Tensor) -> Tensor:
        logits = self._own_logits(prompt.to(self.device), completion.to(self.device))
        return logits.float().log_softmax(-1).cpu().gather(1, completion[:, None])[:, 0]

    def _own_logits(self, prompt: Tensor, completion: Tensor) -> Tensor:
        """That the model itself gives for a completion's tokens, [n, V]."""
        return self.model(torch.cat([prompt, completion])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]


def load_model(path: str, dtype: str, device: str, trust_remote_code: bool) -> LanguageModel:
    """Load a causal LM or an encoder-decoder from a folder or the hub; safetensors only.

    Raises:
        UserError: there is no such model, or it cannot be used.
    """
    from .encoder_decoder import EncoderDecoderModel

    _refuse_missing_folder(path)
    transformers.utils.logging.disable_progress_bar()  # a bar for every load drowns the lines that matter
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model: Any = kind.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: cannot load {path!r}: {_first_line(error)}{_hint(path)}") from None
    model = model.to(device)
    use_fast_products(model)
    return (EncoderDecoderModel if config.is_encoder_decoder else LanguageModel)(model)


def load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    _refuse_missing_folder(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: cannot load the tokenizer of {path!r}: {_first_line(error)}{_hint(path)}") from None


def eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a text: chat models often have more than one."""
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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _hint(path: str) -> str:
    if Path(path).is_dir():
        names = {p.name for p in Path(path).iterdir()}
        if not any(name.endswith(".safetensors") for name in names):
            return f" ({path!r} holds no .safetensors file, the only format that is loaded)"
        return ""
    return f" (there is no folder {path!r} here)" if not Path(path).exists() else ""
