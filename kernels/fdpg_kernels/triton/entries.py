"""What targets add to the gradient of the logits that a matrix product left: their entries, and what scales a row.

Row arrays are indexed by token of the whole call, E by row of the chunk that starts at token `offset`, as in `rows`.
"""

import triton
import triton.language as tl

from .gemm import FLOOR
from .rows import IGNORED


@triton.jit
def store(high_ptr, low_ptr, at, value, mask):
    """A number in the dtype of the one, or as the sum of both."""
    high = value.to(high_ptr.dtype.element_ty)
    tl.store(high_ptr + at, high, mask=mask)
    if low_ptr is not None:
        tl.store(low_ptr + at, (value - high.to(tl.float32)).to(low_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["offset", "height"])
def prepare_gradients(
    x_ptr, scaled_ptr, scaled_low_ptr, e_ptr, e_low_ptr, target_ids_ptr, target_ptr, top_ptr, total_ptr, weight_ptr,
    sequence_ptr, scale_ptr, temperature_ptr, offset, height, D, V, stride_x, stride_e, temperature, softcap, divisor,
    HAS_SOFTCAP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Turn E into F = E − s·1[y] and x into c·x, so that ∇hidden = c·(F·W) and ∇head = Fᵀ·(c·x).

    c = −g/(s·temperature), g the gradient of the loss in log π, −weight/divisor of the token's sequence. F's entry at
    the target is formed in float32 from `top`, not from the rounded E: no cancellation. A target outside the vocabulary
    has no entry: its row is NaN.
    """
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = rows < height
    tokens = offset + rows
    target = tl.load(target_ids_ptr + tokens, mask=inside, other=-100).to(tl.int64)
    live = target != IGNORED
    valid = (target >= 0) & (target < V)
    total = tl.load(total_ptr + tokens, mask=inside & live, other=1.0)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + tokens, mask=inside, other=1.0)
    sequence = tl.load(sequence_ptr + tokens, mask=inside, other=0)
    g = (tl.load(weight_ptr + sequence, mask=inside & live, other=0.0) * (-1 / divisor)).to(tl.float32)
    scale = tl.where(live & (valid == 0), float("nan"), -g / (total * temperature))
    depth = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = inside[:, None] & (depth < D)[None, :]
    x = tl.load(x_ptr + tokens.to(tl.int64)[:, None] * stride_x + depth[None, :], mask=mask, other=0.0)
    scaled = x.to(tl.float32) * scale[:, None]
    at = rows.to(tl.int64)[:, None] * D + depth[None, :]
    store(scaled_ptr, scaled_low_ptr, at, scaled, mask)
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + rows, scale, mask=inside)
        entry = tl.exp(tl.load(top_ptr + tokens, mask=inside & live, other=0.0)) - total
        if HAS_SOFTCAP:
            capped = tl.load(target_ptr + tokens, mask=inside, other=0.0) * temperature / softcap
            entry = entry * (1 - capped * capped)
        at_target = rows.to(tl.int64) * stride_e + tl.where(valid, target, 0)
        store(e_ptr, e_low_ptr, at_target, entry, inside & valid)


@triton.jit(do_not_specialize=["offset", "count"])
def write_targets(
    e_ptr, e_low_ptr, target_ids_ptr, logprob_ptr, lse_ptr, at_target_ptr, alpha_ptr, beta_ptr, temperature_ptr,
    offset, count, K, V, stride_e, temperature, softcap, HAS_SOFTCAP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Complete a gradient π·(α + β·log π) of the logits by what `count` targets add, K to a row, from row `offset` on.

    Their entries are formed in float32 from log π, not from what is rounded there: nothing cancels where π_y is near 1.
    A target that is twice in a row is written twice, each time as the sum.
    """
    targets = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = targets < count
    row = targets // K
    tokens, at = offset + row, offset * K + targets
    target = tl.load(target_ids_ptr + at, mask=inside, other=-100).to(tl.int64)
    given = tl.zeros((BT,), tl.float32)
    for k in range(0, K):
        same = tl.load(target_ids_ptr + tokens * K + k, mask=inside, other=-100).to(tl.int64) == target
        given += tl.where(same, tl.load(at_target_ptr + tokens * K + k, mask=inside, other=0.0), 0.0)
    log_p = tl.load(logprob_ptr + at, mask=inside, other=0.0)
    slant = tl.load(alpha_ptr + tokens, mask=inside, other=0.0) + given  # 0 if this target alone has a gradient
    if beta_ptr is not None:
        slant += tl.load(beta_ptr + tokens, mask=inside, other=0.0) * tl.maximum(log_p, FLOOR)
    p = tl.exp(log_p)
    entry = p * slant + given * (1 - p)
    if HAS_SOFTCAP:
        if temperature_ptr is not None:
            temperature = tl.load(temperature_ptr + tokens, mask=inside, other=1.0)
        capped = (log_p + tl.load(lse_ptr + tokens, mask=inside, other=0.0)) * temperature / softcap
        entry = entry * (1 - capped * capped)
    valid = inside & (target >= 0) & (target < V)
    at_entry = row.to(tl.int64) * stride_e + tl.where(valid, target, 0)
    store(e_ptr, e_low_ptr, at_entry, entry, valid)
