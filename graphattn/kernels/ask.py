"""What a row asks of its draw, and its logits with penalty and bans, as the kernels of a draw read them."""

from __future__ import annotations

import triton
import triton.language as tl

TEMPERATURE, LOG_MIN_P, TOP_K, TAIL, PENALTY, BANNED_UNTIL = (tl.constexpr(field) for field in range(1, 7))  # 0: seed


@triton.jit
def asked(asks, stride, row, FIELD: tl.constexpr):
    """A number of the row's `Ask`, float64."""
    return tl.load(asks + FIELD * stride + row).to(tl.float64, bitcast=True)


@triton.jit
def filters_of(asks, stride, row, vocab):
    """Top-k, 0 where it is off, and the tail that top-p cuts, -1 where it is off."""
    top_k = asked(asks, stride, row, TOP_K).to(tl.int32)
    return tl.where(top_k < vocab, top_k, 0), asked(asks, stride, row, TAIL)


@triton.jit
def source_of(
    row, logits, stride_b, stride_v, vocab, asks, stride, positions, token_ids, sets, set_stride, row_stride,
    EDITS: tl.constexpr,
):  # fmt: skip
    """What `logits_of` reads of a row, loaded once."""
    penalty, is_banned, token_id = tl.full([], 1.0, tl.float32), tl.full([], 0, tl.int1), tl.full([], -1, tl.int32)
    if EDITS:
        penalty = asked(asks, stride, row, PENALTY).to(tl.float32)
        is_banned = tl.load(positions + row) + 1 < asked(asks, stride, row, BANNED_UNTIL)
        token_id = tl.load(token_ids + row)
    seen = sets + row * row_stride
    return logits + row * stride_b, stride_v, vocab, seen, seen + set_stride, penalty, is_banned, token_id


@triton.jit
def logits_of(source, index, EDITS: tl.constexpr):
    """float32 logits of a row, banned ids at -inf and seen ids penalised; -inf outside the vocabulary."""
    logits, stride_v, vocab, seen, banned, penalty, is_banned, token_id = source
    inside = index < vocab
    x = tl.load(logits + index.to(tl.int64) * stride_v, mask=inside, other=-float("inf")).to(tl.float32)
    if EDITS:
        if is_banned:
            bit = tl.load(banned + (index >> 5), mask=inside, other=0) >> (index & 31)
            x = tl.where((bit & 1) != 0, -float("inf"), x)
        if penalty != 1:
            bit = tl.load(seen + (index >> 5), mask=inside, other=0) >> (index & 31)
            # A plain / is not rounded as IEEE wants and as torch does.
            penalised = tl.where(x < 0, x * penalty, tl.div_rn(x, penalty))
            x = tl.where(((bit & 1) != 0) | (index == token_id), penalised, x)
    return x
