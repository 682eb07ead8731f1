"""What happens to rows and sequences between the matrix products: a few bytes a token each.

Row arrays are indexed by token of the whole call; E and the partials of the matrix product by row of the chunk that
starts at token `offset`. `top` is z_y + a, the exponent of the target's entry of E: log q where the sampler anchors.
"""

import triton
import triton.language as tl

from .gemm import FLOOR, tanh
from .weigh import weigh_sequence

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
IGNORED = tl.constexpr(-100)
SAFE = tl.constexpr(1.2676506002282294e30)  # 2^100: row sums further from 1 are recomputed around their own maximum


@triton.jit(do_not_specialize=["N"])
def target_logits(
    x_ptr, w_ptr, bias_ptr, target_ids_ptr, behavior_ptr, temperature_ptr, target_ptr, anchor_ptr, top_ptr,
    N, K, D, V, stride_x, stride_w, inverse_temperature, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ANCHORED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """z_y of BT of N targets, an indexed dot in float32; row i of x has targets K·i to K·i + K − 1.

    ANCHORED, one target a row: also a = log q − z_y (log₂ units) and top = log q. A target outside the vocabulary gives
    NaN, which no later step hides.
    """
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = rows < N
    row_of_x = rows // K
    target = tl.load(target_ids_ptr + rows, mask=inside, other=-100).to(tl.int64)
    live = target != IGNORED
    valid = (target >= 0) & (target < V)
    column = tl.where(valid, target, 0)
    z = tl.zeros((BT,), tl.float32)
    for d in range(0, D, BD):
        depth = d + tl.arange(0, BD)
        mask = valid[:, None] & (depth < D)[None, :]
        x = tl.load(x_ptr + row_of_x.to(tl.int64)[:, None] * stride_x + depth[None, :], mask=mask, other=0.0)
        w = tl.load(w_ptr + column[:, None] * stride_w + depth[None, :], mask=mask, other=0.0)
        z += tl.sum(x.to(tl.float32) * w.to(tl.float32), 1)
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    if temperature_ptr is not None:
        z /= tl.load(temperature_ptr + row_of_x, mask=inside, other=1.0)
    z = tl.where(live & (valid == 0), float("nan"), z * inverse_temperature)
    tl.store(target_ptr + rows, z, mask=inside)
    if ANCHORED:
        behavior = tl.load(behavior_ptr + rows, mask=inside & live, other=0.0).to(tl.float32)
        tl.store(anchor_ptr + rows, tl.where(live, (behavior - z) * LOG2_E, float("-inf")), mask=inside)
        tl.store(top_ptr + rows, behavior, mask=inside)


@triton.jit(do_not_specialize=["offset", "height"], do_not_specialize_on_alignment=["sum_ptr"])
def sum_rows(
    sum_ptr, target_ids_ptr, total_ptr, flag_ptr, offset, height, num_columns, BT: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """s of BT rows from the partials [num_columns, height], added in a fixed order; 1 for an ignored row.

    The program's flag is 1 where one of them lies outside [2^-100, 2^100] or is no number.
    """
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = rows < height
    total = tl.zeros((BT,), tl.float32)
    for first in range(0, num_columns, BS):
        columns = first + tl.arange(0, BS)
        mask = (columns < num_columns)[:, None] & inside[None, :]
        total += tl.sum(tl.load(sum_ptr + columns[:, None] * height + rows[None, :], mask=mask, other=0.0), 0)
    live = inside & (tl.load(target_ids_ptr + offset + rows, mask=inside, other=-100) != IGNORED)
    tl.store(total_ptr + offset + rows, tl.where(live, total, 1.0), mask=inside)
    safe = (total > 1 / SAFE) & (total < SAFE)
    tl.store(flag_ptr + tl.program_id(0), tl.max((live & (safe == 0)).to(tl.int32), 0))


@triton.jit(
    do_not_specialize=["offset", "height"], do_not_specialize_on_alignment=["maximum_ptr", "sum_ptr", "moment_ptr"]
)
def finish_statistics(
    maximum_ptr, sum_ptr, moment_ptr, target_ids_ptr, target_ptr, anchor_ptr, top_ptr, total_ptr, entropy_ptr, flag_ptr,
    offset, height, num_columns, GUARDED: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """anchor = −lse (log₂ units), top = log π and s = 1 from the partials of an online softmax; ignored: −inf, 0, 1.

    With moments also the entropy, in nats.
    """
    run = True
    if GUARDED:
        run = tl.load(flag_ptr + tl.program_id(0)) != 0
    if run:
        rows = tl.program_id(0) * BT + tl.arange(0, BT)
        inside = rows < height
        largest = tl.full((BT,), float("-inf"), tl.float32)
        for first in range(0, num_columns, BS):
            columns = first + tl.arange(0, BS)
            mask = (columns < num_columns)[:, None] & inside[None, :]
            part = tl.load(maximum_ptr + columns[:, None] * height + rows[None, :], mask=mask, other=float("-inf"))
            largest = tl.maximum(largest, tl.max(part, 0))
        largest = tl.where(inside, largest, 0.0)
        total = tl.zeros((BT,), tl.float32)
        moment = tl.zeros((BT,), tl.float32)
        for first in range(0, num_columns, BS):
            columns = first + tl.arange(0, BS)
            mask = (columns < num_columns)[:, None] & inside[None, :]
            at = columns[:, None] * height + rows[None, :]
            part = tl.load(maximum_ptr + at, mask=mask, other=float("-inf")) - largest[None, :]
            sums = tl.load(sum_ptr + at, mask=mask, other=0.0)
            total += tl.sum(sums * tl.exp2(part), 0)
            if moment_ptr is not None:
                moments = tl.load(moment_ptr + at, mask=mask, other=0.0) + sums * tl.maximum(part, FLOOR)
                moment += tl.sum(moments * tl.exp2(part), 0)
        total = tl.where(inside, total, 1.0)
        lse2 = largest + tl.log2(total)
        tokens = offset + rows
        if moment_ptr is not None:
            tl.store(entropy_ptr + tokens, (tl.log2(total) - moment / total) * LN_2, mask=inside)
        live = inside & (tl.load(target_ids_ptr + tokens, mask=inside, other=-100) != IGNORED)
        target = tl.load(target_ptr + tokens, mask=inside, other=0.0)
        tl.store(anchor_ptr + tokens, tl.where(live, -lse2, float("-inf")), mask=inside)
        tl.store(top_ptr + tokens, tl.where(live, target - lse2 * LN_2, 0.0), mask=inside)
        tl.store(total_ptr + tokens, tl.full((BT,), 1.0, tl.float32), mask=inside)


@triton.jit
def rows_of_block(block_sequence_ptr, first_block_ptr, cu_seqlens_ptr, block, BT: tl.constexpr):
    """The sequence that block number `block` belongs to, its first row and the end of its sequence."""
    sequence = tl.load(block_sequence_ptr + block)
    start = tl.load(cu_seqlens_ptr + sequence) + (block - tl.load(first_block_ptr + sequence)) * BT
    return sequence, start, tl.load(cu_seqlens_ptr + sequence + 1)


@triton.jit(do_not_specialize=["first_block", "num_sequences"])
def finish_sequences(
    top_ptr, total_ptr, target_ids_ptr, behavior_ptr, logprob_ptr,
    block_sequence_ptr, first_block_ptr, cu_seqlens_ptr, counter_ptr,
    score_ptr, log_z_ptr, baseline_ptr, result_ptr, clipped_ptr,
    first_block, num_sequences, stride_log_z, stride_baseline,
    FAMILY: tl.constexpr, EXPONENT: tl.constexpr, FACTOR: tl.constexpr, AT_INFINITY: tl.constexpr,
    HAS_RATIO: tl.constexpr, LOG_RATIO_CAP: tl.constexpr, LOG_RATIO_DROP: tl.constexpr, REWARD_CAP: tl.constexpr,
    HAS_BASELINE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Row sums → log π of every token; whoever finishes a sequence last makes its weight of it, in the same launch.

    A program takes one block of one sequence. One thread draws the ticket, after a barrier, for without it the other
    warps' stores may still be on their way (Triton 3.6 sets none of its own). So the ticket orders all stores of a
    program before the last one's loads, which bypass L1; the sum over the sequence is taken by one program in token
    order, so results do not depend on who was last.
    """
    block = first_block + tl.program_id(0)
    sequence, start, end = rows_of_block(block_sequence_ptr, first_block_ptr, cu_seqlens_ptr, block, BT)
    tokens = start + tl.arange(0, BT)
    inside = tokens < end
    live = inside & (tl.load(target_ids_ptr + tokens, mask=inside, other=-100) != IGNORED)
    total = tl.load(total_ptr + tokens, mask=live, other=1.0)
    top = tl.load(top_ptr + tokens, mask=live, other=0.0)
    tl.store(logprob_ptr + tokens, top - tl.log(total), mask=inside)

    blocks = tl.load(first_block_ptr + sequence + 1) - tl.load(first_block_ptr + sequence)
    tl.debug_barrier()
    ticket = tl.atomic_add(counter_ptr + sequence, 1, sem="acq_rel")
    if ticket == blocks - 1:
        weigh_sequence(
            sequence, tl.load(cu_seqlens_ptr + sequence), end, logprob_ptr, behavior_ptr, target_ids_ptr,
            score_ptr, log_z_ptr, baseline_ptr, result_ptr, clipped_ptr,
            num_sequences, stride_log_z, stride_baseline,
            FAMILY, EXPONENT, FACTOR, AT_INFINITY, HAS_RATIO, LOG_RATIO_CAP, LOG_RATIO_DROP, REWARD_CAP,
            HAS_BASELINE, True, ".cg", BT,
        )  # fmt: skip
