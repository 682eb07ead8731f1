"""A transformers causal LM behind the one scoring path that engine, learner and base model share."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from fdpg_kernels import FDPGLoss

from .. import ranks
from ..contexts import Context
from ..errors import UserError, disk_errors, is_out_of_memory, one_line
from ..rollouts import Rollouts, pack
from . import attention, parallel, parts
from .decoding import ContinuedDecoding, Decoding
from .files import write_weights
from .head import FusedHead
from .packed import PackedBatch

BLOCK = re.compile(r".*?\.\d+\.")  # of a tensor's name, what names the block that it lies in


class LanguageModel:
    """A causal LM, always in eval mode: dropout would make its log-probs differ from the sampler's.

    Any of transformers will do whose attention goes through the attention registry; one whose own logits the packed
    forward pass does not reproduce is refused.
    """

    continues_prompt = True  # prompt and completion are one text; else the completion answers it
    _layout = "on packed rows"
    _longest_text = attention.UNLIMITED  # tokens of which its layers see all

    def __init__(self, model: PreTrainedModel):
        self.model, self.dtype = model.eval(), model.dtype
        kind = type(model).__name__
        try:
            model.set_attn_implementation(attention.IMPLEMENTATION)
        except (ValueError, AttributeError) as error:
            raise UserError(f"model: {kind} does not let its attention be chosen: {one_line(error)}") from None
        config = model.config.get_text_config()
        scaling = getattr(config, "logits_scaling", None) or 1 / (getattr(config, "logit_scale", None) or 1.0)
        softcap, self._longest_text = getattr(config, "final_logit_softcapping", None), attention.longest_text(config)
        self.head = FusedHead(model.get_output_embeddings(), temperature=float(scaling), softcap=softcap)
        self._check_scoring()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def saved_dtype(self) -> torch.dtype:
        """Of the weights that `save` writes."""
        return self.dtype

    @property
    def max_length(self) -> int:
        """Positions that there are."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", attention.UNLIMITED)

    def prompt_room(self, max_new_tokens: int) -> int:
        """Tokens that a prompt may have before a completion of so many; less than 1: there is no room."""
        return self.max_length - max_new_tokens

    def refuse_lengths(self, contexts: Sequence[Context], max_new_tokens: int) -> None:
        """Refuse completions of so many tokens whose log-probs would be wrong, or depend on what is beside them.

        Raises:
            UserError: they reach past what all layers see, or lie on both sides of a length at which rotary scaling
                changes.
        """
        prompts = [len(context.token_ids) for context in contexts]
        shortest, longest = min(prompts), max(prompts) + max_new_tokens
        remedy = "shorten the prompts or lower engine.max_new_tokens"
        if longest > self._longest_text:
            raise UserError(
                f"model: prompt and completion reach {longest:,} tokens, past the {self._longest_text:,} up to which "
                f"all layers see all; {remedy}"
            )
        for kind, limit in attention.rotary_limits(self.model.config.get_text_config()):
            if longest > limit and (kind == "dynamic" or shortest <= limit):
                more = "" if kind == "dynamic" else ", or leave the short prompts out"
                raise UserError(
                    f"model: its rotary scaling ({kind}) is another one past {limit:,} tokens, for a whole batch; "
                    f"with prompts of {shortest:,} tokens up and texts of {longest:,}, log-probs would depend on the "
                    f"neighbours; {remedy}{more}"
                )

    def start(self, contexts: Sequence[Context], context_index: Tensor, max_new_tokens: int) -> Decoding:
        """B completions to be decoded side by side, of C prompts, each computed once; context_index is [B] int64."""
        self.refuse_lengths(contexts, max_new_tokens)
        return ContinuedDecoding(self.model, contexts, context_index, max_new_tokens)

    def hidden(self, rollouts: Rollouts) -> Tensor:
        """The hidden state that predicts each completion token, [N, D]; carries gradients where they are on."""
        self.refuse_lengths(rollouts.contexts, int(rollouts.lengths.max()))
        batch = PackedBatch(rollouts, self.device)
        states = attention.run(self.model, batch.input_ids, batch.position_ids, batch)
        return states[0].index_select(0, batch.target_rows)

    def loss(self, rollouts: Rollouts, *sequences: Tensor, **options: Any) -> FDPGLoss:
        """The f-DPG loss of a micro-batch, whose tensors [B] and [N] these are; options as of `fdpg_loss`."""

        def run() -> FDPGLoss:
            tokens = rollouts.token_ids.to(self.device)
            return self.head(self.hidden(rollouts), tokens, rollouts.cu_seqlens, *sequences, **options)

        return parallel.inside(self.model, run)

    @torch.no_grad()
    def token_logprobs(self, rollouts: Rollouts, micro_batch_tokens: int) -> Tensor:
        """log-probs of the completions' tokens under this model, [N] float32 on the CPU."""

        def run(batch: Rollouts) -> Tensor:
            return self.head.logprob(self.hidden(batch), batch.token_ids.to(self.device)).cpu()

        ends, found = rollouts.cu_seqlens.tolist(), []
        for rows, is_own in ranks.passes(rollouts.micro_batches(micro_batch_tokens), rollouts.lengths.tolist()):
            logprob = parallel.inside(self.model, run, rollouts.part(rows))
            found += [(slice(ends[rows.start], ends[rows.stop]), logprob)] * is_own
        parallel.release(self.model)
        return ranks.whole(found, torch.empty(rollouts.num_tokens))

    def divide(self, dtype: torch.dtype | None, reshard_after_forward: bool = True) -> None:
        """Spread over all processes; the dtype that passes compute in, None: that of the parameters."""
        self.dtype = dtype or self.dtype
        parallel.divide(self.model, dtype, reshard_after_forward)
        self._check_scoring()

    @contextlib.contextmanager
    def as_base(self) -> Iterator[LanguageModel]:
        """The model without what is trained beside its weights: here itself, for nothing is."""
        yield self

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What this policy amounts to, under the names and in the shapes that the module has for it."""
        for name, tensor in self.model.state_dict().items():
            yield name, parallel.full(tensor.to(self.dtype) if tensor.is_floating_point() else tensor)

    def blocks(self, repeat_tied: bool = True) -> Iterator[dict[str, Tensor]]:
        """What an engine samples with: names and shapes as in a checkpoint, block by block, in the model's dtype.

        transformers keeps experts fused and some layers under other names. Its own way back, which `save_pretrained`
        takes, copies what it splits: of one block at a time. `repeat_tied`: a tied head comes under its own name too,
        for on a CPU vLLM packs a copy of it, which else stays the old one.
        """
        left_out = () if repeat_tied else getattr(self.model, "all_tied_weights_keys", ())
        tensors = ((name, tensor) for name, tensor in self.tensors() if name not in left_out)
        for _, block in itertools.groupby(tensors, lambda item: BLOCK.findall(item[0])[:1]):
            yield revert_weight_conversion(self.model, dict(block))

    def weights(self, repeat_tied: bool = True) -> Iterator[tuple[str, Tensor]]:
        """The same, one by one."""
        for block in self.blocks(repeat_tied):
            yield from block.items()
            block.clear()  # before the next is made

    @torch.no_grad()
    def take_weights(self, policy: LanguageModel) -> None:
        """Become a copy of another: this model has its shape."""
        own = self.model.state_dict()
        for name, tensor in policy.tensors():
            own[name].copy_(parallel.part_of(tensor, own[name]))

    def save(self, folder: Path) -> None:
        """Write what was trained, as `from_pretrained` reads it: the first process does, all gather, block by block."""
        if not parallel.is_divided(self.model):
            return self._write(folder, None)

        def write(blocks: Iterator[dict[str, Tensor]]) -> None:
            with disk_errors(f"writing weights to {folder}"):
                self._write(folder, {})
                self.model.config.dtype = self.dtype
                self.model.config.save_pretrained(folder)
                write_weights(folder, blocks)

        ranks.for_first(self.blocks(repeat_tied=False), write)

    def _write(self, folder: Path, state: dict[str, Tensor] | None) -> None:
        """Settings and tensors of a `state_dict`, None: the module's."""
        generation, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            self.model.save_pretrained(folder, state_dict=state)
        finally:
            self.model.generation_config = generation
        if generation is not None:  # transformers reads any, but writes none that it calls invalid, as Llama 2's
            generation.to_json_file(folder / "generation_config.json")

    @torch.no_grad()
    def _check_scoring(self) -> None:
        """Compare with the model's own forward pass on two short rows; a wrong log-prob must not start a run."""
        if parts.are_parts(self.model) and not parallel.is_divided(self.model):
            return  # neither can run: it is compared when it is divided
        vocabulary = self.model.config.get_text_config().vocab_size
        texts = torch.randint(vocabulary, (2, 7), generator=torch.Generator().manual_seed(0))
        pairs = [texts[0].split([2, 5]), texts[1].split([4, 3])]
        prompts = [Context(i, "", tuple(prompt.tolist())) for i, (prompt, _) in enumerate(pairs)]
        probe = pack(prompts, [[(text.tolist(), [0.0] * len(text), False)] for _, text in pairs])
        kind = type(self.model).__name__
        try:
            ours = self.token_logprobs(probe, micro_batch_tokens=1024)
            logits = torch.cat([self._own_logits(*(part.to(self.device) for part in pair)) for pair in pairs])
            parallel.release(self.model)
        except UserError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {one_line(error)[:300]}"
            raise UserError(f"model: {kind} cannot run {self._layout}: {reason}") from error
        own = logits.float().log_softmax(-1).cpu().gather(1, probe.token_ids[:, None])[:, 0]
        gap, limit = float((ours - own).abs().max()), 1e-3 if self.dtype == torch.float32 else 0.25
        if not gap < limit:
            raise UserError(
                f"model: {kind} cannot be scored {self._layout}: its log-probs differ from the model's own by "
                f"{gap:.3g} nats (limit {limit:g}); its attention or its head is of a kind that is not supported"
            )

    def _own_logits(self, prompt: Tensor, completion: Tensor) -> Tensor:
        """What the model itself gives for a completion's n tokens, [n, V]."""
        return self.model(torch.cat([prompt, completion])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
