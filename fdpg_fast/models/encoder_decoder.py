"""An encoder-decoder of transformers (T5, BART) behind the scoring path of `LanguageModel`.

The prompt goes through the encoder, once however many completions it has; the decoder starts from its start token, and
from the first token that a generation config may force behind it, as mBART's language. The state of the last of them
predicts the completion's first token. Scoring and sampling run the same two steps: the start once a prompt, which
leaves the prompt's keys and values in transformers' cache, and then the completions, all tokens at once or one at a
time. Completions are padded at their end, where causal attention never looks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from ..contexts import Context
from ..errors import UserError
from ..rollouts import Rollouts
from .decoding import Decoding, pad_prompts, roomy_cache
from .head import FusedHead
from .language_model import LanguageModel

# these shrink the decoder's states by 1/sqrt(d) before a tied head; transformers 5 says so in the config of some
SCALED_IF_TIED = ("t5", "longt5", "umt5", "switch_transformers")


class EncoderDecoderModel(LanguageModel):
    """Any transformers sequence-to-sequence model of text whose decoder keeps an `EncoderDecoderCache`."""

    continues_prompt = False
    _layout = "as an encoder-decoder"

    def __init__(self, model: PreTrainedModel):
        self.model, self.dtype, config = model.eval(), model.dtype, model.config
        if getattr(config, "decoder_start_token_id", None) is None:
            raise UserError(f"model: the config of {type(model).__name__} names no decoder_start_token_id")
        forced = getattr(model.generation_config, "forced_bos_token_id", None)
        self._start = [config.decoder_start_token_id] + ([] if forced is None else [forced])
        tied = config.model_type in SCALED_IF_TIED and config.tie_word_embeddings
        scaled = getattr(config, "scale_decoder_outputs", tied)
        bias = getattr(model, "final_logits_bias", None)  # BART's: a buffer [1, V], mostly zeros
        temperature = config.d_model**0.5 if scaled else 1.0
        self.head = FusedHead(model.get_output_embeddings(), None if bias is None else bias[0], temperature)
        self._check_scoring()

    def prompt_room(self, max_new_tokens: int) -> int:
        """Prompt and completion have positions of their own."""
        return self.max_length if len(self._start) - 1 + max_new_tokens <= self.max_length else 0

    def start(self, contexts: Sequence[Context], context_index: Tensor, max_new_tokens: int) -> Decoding:
        return _AnswerDecoding(self.model, self._start, contexts, context_index, max_new_tokens)

    def hidden(self, rollouts: Rollouts) -> Tensor:
        decoding = _AnswerDecoding(self.model, self._start, rollouts.contexts, rollouts.context_index)
        states = decoding.first[:, None]  # [B, 1, D]
        tokens = pad_sequence(rollouts.token_ids.split(rollouts.lengths.tolist()), batch_first=True)  # [B, T]
        if tokens.shape[1] > 1:
            states = torch.cat([states, decoding.run(tokens[:, :-1].to(self.device))], dim=1)
        return torch.cat([row[:length] for row, length in zip(states, rollouts.lengths.tolist(), strict=True)])

    def _own_logits(self, prompt: Tensor, completion: Tensor) -> Tensor:
        tokens = torch.cat([torch.tensor(self._start, device=self.device), completion[:-1]])
        return self.model(prompt[None], decoder_input_ids=tokens[None]).logits[0, len(self._start) - 1 :]


class _AnswerDecoding(Decoding):
    """Completions behind start tokens, which see their prompt through the encoder; see `LanguageModel.start`."""

    def __init__(
        self, model: PreTrainedModel, start: list[int], contexts: Sequence[Context], index: Tensor, room: int = 0
    ):
        self._decoder = model.get_decoder()
        input_ids, is_real = pad_prompts(contexts, model.device)
        encoded = model.get_encoder()(input_ids=input_ids, attention_mask=is_real).last_hidden_state
        cache = EncoderDecoderCache(roomy_cache(room), DynamicCache())
        super().__init__(cache, encoder_hidden_states=encoded, encoder_attention_mask=is_real)
        starts = torch.tensor(start, device=model.device).expand(len(contexts), -1)  # [C, S]
        self._begin(self.run(starts)[:, -1], index)

    def run(self, tokens: Tensor) -> Tensor:
        output = self._decoder(input_ids=tokens, past_key_values=self._cache, use_cache=True, **self._rows)
        return output.last_hidden_state
