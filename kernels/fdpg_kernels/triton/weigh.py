"""From the log-probs of a sequence's tokens to its f-DPG weight, in float64: a few hundred operations a sequence.

The definition is `fdpg_kernels.reference.sequence_weights`; here it is one device function that both the kernel of
`sequence_weights` and the tail of the fused loss end with.
"""

import triton
import triton.language as tl

LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def slope_of(log_t, FAMILY: tl.constexpr, EXPONENT: tl.constexpr, FACTOR: tl.constexpr):
    """f'(t) from log t, finite log t."""
    if FAMILY == "power":
        return FACTOR * (tl.exp(EXPONENT * log_t) - 1)
    elif FAMILY == "reverse_kl":
        return log_t
    elif FAMILY == "total_variation":
        return tl.where(log_t > 0, 0.5, tl.where(log_t < 0, -0.5, log_t * 0))
    else:
        tl.static_assert(FAMILY == "jensen_shannon")
        return LOG_2 - (tl.maximum(-log_t, 0.0) + tl.log(1 + tl.exp(-tl.abs(log_t))))


@triton.jit
def weigh_sequence(
    sequence, start, end, policy_ptr, behavior_ptr, target_ids_ptr, score_ptr, log_z_ptr, baseline_ptr,
    result_ptr, clipped_ptr, num_sequences, stride_log_z, stride_baseline,
    FAMILY: tl.constexpr, EXPONENT: tl.constexpr, FACTOR: tl.constexpr, AT_INFINITY: tl.constexpr,
    HAS_RATIO: tl.constexpr, LOG_RATIO_CAP: tl.constexpr, LOG_RATIO_DROP: tl.constexpr, REWARD_CAP: tl.constexpr,
    HAS_BASELINE: tl.constexpr, HAS_IGNORED: tl.constexpr, CACHE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Sum tokens start:end in a fixed order and write column `sequence` of result [6, B] and clipped [B]."""
    policy = tl.zeros((BT,), tl.float64)
    behavior = tl.zeros((BT,), tl.float64)
    for first in range(start, end, BT):
        tokens = first + tl.arange(0, BT)
        inside = tokens < end
        live = inside
        if HAS_IGNORED:
            live = inside & (tl.load(target_ids_ptr + tokens, mask=inside, other=-100) != -100)
        policy += tl.load(policy_ptr + tokens, mask=inside, other=0.0, cache_modifier=CACHE).to(tl.float64)
        behavior += tl.load(behavior_ptr + tokens, mask=live, other=0.0).to(tl.float64)
    log_pi = tl.sum(policy, 0)
    log_q = tl.sum(behavior, 0)

    score = tl.load(score_ptr + sequence).to(tl.float64)
    log_z = tl.load(log_z_ptr + sequence * stride_log_z).to(tl.float64)
    no_z = log_z == float("-inf")
    log_t = tl.where(no_z, 0.0, log_pi - (score - log_z))
    off_support = log_t == float("inf")  # the target is zero
    finite = tl.where(off_support, 0.0, log_t)

    log_ratio = tl.full((), 0.0, tl.float64)
    if HAS_RATIO:
        log_ratio = log_pi - log_q
    capped_ratio = log_ratio
    if LOG_RATIO_CAP is not None:
        limit = tl.full((), LOG_RATIO_CAP, tl.float64)
        capped_ratio = tl.where(log_ratio > limit, limit, log_ratio)  # NaN stays, which tl.minimum would drop
    clipped = capped_ratio != log_ratio
    ignored = no_z
    if LOG_RATIO_DROP is not None:
        dropped = log_ratio > tl.full((), LOG_RATIO_DROP, tl.float64)
        ignored = no_z | dropped
        capped_ratio = tl.where(dropped, float("-inf"), capped_ratio)
    log_ratio = capped_ratio
    reward = -slope_of(finite, FAMILY, EXPONENT, FACTOR)
    reward = tl.where(off_support, -AT_INFINITY, reward)
    capped = reward
    if REWARD_CAP is not None:
        bound = tl.full((), REWARD_CAP, tl.float64)
        capped = tl.where(reward > bound, bound, tl.where(reward < -bound, -bound, reward))
    clipped = clipped | (capped != reward)
    offset = tl.full((), 0.0, tl.float64)
    if HAS_BASELINE:
        offset = tl.load(baseline_ptr + sequence * stride_baseline).to(tl.float64)
    ratio = tl.exp(log_ratio)
    weight = ratio * (capped - offset)
    if FAMILY == "power":
        # −f' = c − c·t^κ, and ratio·t^κ is one exponent: for forward KL it is p/q, whatever π underflows to
        joined = tl.where(off_support, 0.0, tl.exp(log_ratio + EXPONENT * finite))
        if EXPONENT > 0:
            joined = tl.where(off_support, float("inf"), joined)
        weight = tl.where(reward == capped, ratio * (FACTOR - offset) - FACTOR * joined, weight)
    weight = tl.where(ignored, 0.0, weight)

    column = result_ptr + sequence
    tl.store(column, log_pi)
    tl.store(column + num_sequences, log_q)
    tl.store(column + 2 * num_sequences, log_t)
    tl.store(column + 3 * num_sequences, log_ratio)
    tl.store(column + 4 * num_sequences, capped)
    tl.store(column + 5 * num_sequences, weight)
    tl.store(clipped_ptr + sequence, (clipped & (ignored == 0)).to(tl.int8))


@triton.jit(do_not_specialize=["num_sequences"])
def weigh_sequences(
    policy_ptr, behavior_ptr, cu_seqlens_ptr, score_ptr, log_z_ptr, baseline_ptr, result_ptr, clipped_ptr,
    num_sequences, stride_log_z, stride_baseline,
    FAMILY: tl.constexpr, EXPONENT: tl.constexpr, FACTOR: tl.constexpr, AT_INFINITY: tl.constexpr,
    HAS_RATIO: tl.constexpr, LOG_RATIO_CAP: tl.constexpr, LOG_RATIO_DROP: tl.constexpr, REWARD_CAP: tl.constexpr,
    HAS_BASELINE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One program a sequence: `sequence_weights` as one launch, without atomics, equal from run to run."""
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int32)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int32)
    weigh_sequence(
        sequence, start, end, policy_ptr, behavior_ptr, policy_ptr, score_ptr, log_z_ptr, baseline_ptr,
        result_ptr, clipped_ptr, num_sequences, stride_log_z, stride_baseline,
        FAMILY, EXPONENT, FACTOR, AT_INFINITY, HAS_RATIO, LOG_RATIO_CAP, LOG_RATIO_DROP, REWARD_CAP,
        HAS_BASELINE, False, "", BT,
    )  # fmt: skip
