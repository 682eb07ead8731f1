"""A transformers causal LM behind the one scoring path that engine, learner and base model share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fdpg_kernels import linear_logprob

from . import packed
from .errors import UserError
from .rollouts import Rollouts


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
        logits = torch.nn.functional.linear(hidden.float(), self.weight.float(), bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature


class LanguageModel:
    """A causal LM, always in eval mode: dropout would make its log-probs differ from the sampler's.

    Args:
        model: any transformers causal LM whose attention goes through the attention registry.

    Raises:
        UserError: the packed forward pass does not reproduce the model's own logits.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval()
        kind = type(model).__name__
        try:
            model.set_attn_implementation(packed.IMPLEMENTATION)
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
        """Tokens that prompt and completion may have together."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", 2**31)

    def hidden(self, rollouts: Rollouts) -> Tensor:
        """The hidden state that predicts each completion token, [N, D]; carries gradients where they are on."""
        batch = packed.PackedBatch(rollouts, self.device)
        states = packed.run(self.model, batch.input_ids, batch.position_ids, batch)
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
        from .contexts import Context

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
            own = self.model(rows.to(self.device), use_cache=False).logits.float().log_softmax(-1).cpu()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"model: {kind} cannot run on packed rows: {type(error).__name__}: {error}") from error
        own = own[:, :-1].gather(2, rows[:, 1:, None])[..., 0]
        gap = float((ours - torch.cat([own[0, 1:], own[1, 3:]])).abs().max())
        limit = 1e-3 if dtype == torch.float32 else 0.25
        if not gap < limit:
            raise UserError(
                f"model: {kind} cannot be scored on packed rows: its log-probs differ from the model's own by "
                f"{gap:.3g} nats (limit {limit:g}); its attention or its head is of a kind that is not supported"
            )


def load_model(path: str, dtype: str, device: str, trust_remote_code: bool) -> LanguageModel:
    """Load a causal LM from a folder or the hub; safetensors only.

    Raises:
        UserError: there is no such model, or it cannot be used.
    """
    _refuse_missing_folder(path)
    transformers.utils.logging.disable_progress_bar()  # a bar for every load drowns the lines that matter
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: cannot load {path!r}: {_first_line(error)}{_hint(path)}") from None
    return LanguageModel(model.to(device))


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
