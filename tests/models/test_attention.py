"""Every way to compute attention in a packed row, against its definition in float64, and what it keeps in memory."""

import pytest
import torch
import transformers as hf
from torch.nn.attention import flex_attention as flex_module
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask, create_sliding_window_causal_mask

from fdpg_fast.errors import UserError
from fdpg_fast.models import attention, blockwise, flash_parts, flex
from fdpg_fast.models.attention import Kind
from fdpg_fast.models.rows import Row

HEADS, KEY_HEADS, WIDTH = 4, 2, 16
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
ROWS = {  # lengths of texts, and which of them each continues
    "long and short": ([37, 290, 150, 61, 1, 0, 200, 3], [None, None, 0, 0, 0, 0, 1, 1]),
    "short": ([5, 1, 9, *[7] * 30], [None, None, None, *[0] * 10, *[1] * 10, *[2] * 10]),
    "prompts alone": ([140, 139, 1], [None] * 3),
    "long prompts": ([130, 150, 2, 3, 1, 140], [None, None, 0, 0, 1, 1]),
}
KINDS = {
    "plain": Kind(0.3),
    "window": Kind(0.3, window=50),
    "short window": Kind(0.3, window=3),
    "soft cap": Kind(0.3, softcap=1.5),
    "sinks": Kind(0.3, sinks=SINKS),
    "all": Kind(0.3, window=140, softcap=1.5, sinks=SINKS),
}


def tensors(row, dtype, value_width=WIDTH):
    generator = torch.Generator().manual_seed(0)
    sizes = ((HEADS, WIDTH), (KEY_HEADS, WIDTH), (KEY_HEADS, value_width))
    drawn = [torch.randn(heads, row.num_tokens, width, generator=generator) for heads, width in sizes]
    upstream = torch.randn(HEADS, row.num_tokens, value_width, generator=generator)
    return [x.to(dtype).requires_grad_() for x in drawn], upstream.to(dtype)


def definition(row, query, key, value, kind):
    """All scores at once, who sees whom written down token by token."""
    sees = torch.zeros(row.num_tokens, row.num_tokens, dtype=torch.bool)
    for text in row.texts:
        whole = [*range(text.prompt.start, text.prompt.stop), *range(text.start, text.stop)]
        for place in range(text.before, len(whole)):
            first = 0 if kind.window is None else max(0, place + 1 - kind.window)
            sees[whole[place], whole[first : place + 1]] = True
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, 0) for x in (key, value))
    scores = query @ key.transpose(1, 2) * kind.scale
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    scores = scores.masked_fill(~sees, -torch.inf)
    if kind.sinks is not None:
        scores = torch.cat([scores, kind.sinks[:, None, None].expand(-1, len(sees), 1)], 2)
    return scores.softmax(2)[..., : len(sees)] @ value


def check(attend, row, kind, dtype=torch.float32, tolerance=2e-5, **options):
    leaves, upstream = tensors(row, dtype, **options)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    sinks = [] if kind.sinks is None else [kind.sinks.to(dtype).requires_grad_()]
    exact_sinks = [x.detach().double().requires_grad_() for x in sinks]
    out = attend(row, *leaves, kind._replace(sinks=sinks[0] if sinks else None))
    expected = definition(row, *exact, kind._replace(sinks=exact_sinks[0] if sinks else None))
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    found = torch.autograd.grad(out, [*leaves, *sinks], upstream)
    wanted = torch.autograd.grad(expected, [*exact, *exact_sinks], upstream.double())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=5 * tolerance, rtol=5 * tolerance)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks(name, kind):
    check(blockwise.attend, Row(*ROWS[name]), KINDS[kind])


@pytest.mark.parametrize("name", ROWS)
def test_two_flash_parts(name):
    check(flash_parts.attend, Row(*ROWS[name]), KINDS["plain"])


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_flex_in_its_eager_form(name, kind, monkeypatch):
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)  # torch has no gradients of it on a CPU

    def attend(row, query, key, value, kind):
        return flex.attend(row, query[None], key[None], value[None], kind, flex_module.flex_attention)[0]

    check(attend, Row(*ROWS[name]), KINDS[kind])


def test_float64_is_computed_in_float64():
    check(blockwise.attend, Row(*ROWS["long and short"]), KINDS["all"], torch.float64, 1e-11)
    check(flash_parts.attend, Row(*ROWS["long and short"]), KINDS["plain"], torch.float64, 1e-11)


def test_values_narrower_than_keys():
    check(blockwise.attend, Row(*ROWS["long and short"]), KINDS["all"], value_width=8)


def test_bfloat16_is_off_by_its_own_rounding():
    check(blockwise.attend, Row(*ROWS["long and short"]), KINDS["all"], torch.bfloat16, 1e-2)
    check(flash_parts.attend, Row(*ROWS["long and short"]), KINDS["plain"], torch.bfloat16, 1e-2)


@pytest.mark.parametrize("window", [None, 50, 3, 140])
@pytest.mark.parametrize("name", ROWS)
def test_blocks_of_flex_are_those_that_torch_finds(name, window):
    row = Row(*ROWS[name])
    ours = row.plan(flex._block_mask, window, torch.device("cpu"))
    length = row.num_tokens
    theirs = flex_module.create_block_mask(ours.mask_mod, None, None, length, length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    sees = flex_module.create_mask(ours.mask_mod, None, None, length, length, device="cpu")[0, 0]
    for i, (count, listed) in enumerate(zip(ours.full_kv_num_blocks[0, 0], ours.full_kv_indices[0, 0], strict=True)):
        for j in listed[:count]:  # no mask is looked at there
            assert sees[i * flex.BLOCK : (i + 1) * flex.BLOCK, j * flex.BLOCK : (j + 1) * flex.BLOCK].all()
    for i, (count, listed) in enumerate(zip(ours.q_num_blocks[0, 0], ours.q_indices[0, 0], strict=True)):
        assert ours.to_dense()[0, 0, listed[:count].long(), i].all()


class Recorded:
    """A layout that remembers the kinds that it was asked for."""

    def __init__(self, longest):
        self.longest, self.kinds = longest, []

    def attend(self, query, key, value, kind):
        self.kinds.append(kind)
        return query.transpose(1, 2)


MASKS = {"all": create_causal_mask, "window": create_sliding_window_causal_mask, "chunk": create_chunked_causal_mask}


def asked(kind, longest, **options):
    """What a layout of texts up to so long is asked for by a layer of transformers with a mask of that kind."""
    config = hf.LlamaConfig(sliding_window=16, attention_chunk_size=16, attn_implementation=attention.IMPLEMENTATION)
    layout, states = Recorded(longest), torch.randn(1, 4, longest, 8)

    def base_model(attention_mask, layout, **_):
        mask = MASKS[kind](config, states[0], attention_mask, None)
        layer = attention.AttentionInterface()[attention.IMPLEMENTATION]
        layer(torch.nn.Module(), states, states, states, mask, layout=layout, scaling=0.3, **options)
        return hf.modeling_outputs.BaseModelOutput(states)

    model = torch.nn.Module()
    model.base_model = base_model
    attention.run(model, torch.zeros(1, longest, dtype=torch.long), torch.arange(longest)[None], layout)
    return layout.kinds


def test_a_layer_is_asked_for_what_the_masks_of_its_model_say():
    assert asked("all", 40) == [Kind(0.3)]
    assert asked("window", 40, softcap=2.0, s_aux=SINKS) == [Kind(0.3, 16, 2.0, SINKS)]
    assert asked("window", 5)[0].over(5) == Kind(0.3)
    assert asked("chunk", 16)[0].over(16) == Kind(0.3)
    with pytest.raises(UserError, match="sees chunks of 16 tokens, and a text has 17"):
        asked("chunk", 17)
    with pytest.raises(UserError, match="adds a bias to its scores"):
        asked("all", 3, position_bias=torch.zeros(1))
