"""The end of a draw: the best of a row's parts, or the exact threshold of top-k and top-p and the draw from there."""

from __future__ import annotations

import triton
import triton.language as tl

from .ask import LOG_MIN_P, PENALTY, TEMPERATURE, asked, filters_of, logits_of, source_of
from .noise import bits, exponential, key_of
from .rank import lower_half, rank, upper_half, weight


@triton.jit(
    do_not_specialize=["stride", "set_stride", "row_stride"],
    do_not_specialize_on_alignment=["asks", "positions", "token_ids", "drawn"],
)
def choose(
    logits, stride_b, stride_v, vocab, asks, stride, positions, token_ids, sets, set_stride, row_stride,
    EDITS: tl.constexpr, peaks, masses, num_chunks, counts, bounds, weights, held, held_ids, room, scores, ids,
    drawn_ids, drawn, num_splits,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A program a row; looks through what the row holds, or through all of it where that is more than there is room."""
    row = tl.program_id(0).to(tl.int64)
    top_k, tail = filters_of(asks, stride, row, vocab)
    split = tl.arange(0, SPLITS)
    at = row * num_splits + split
    if (top_k > 0) | (tail >= 0):
        temperature = asked(asks, stride, row, TEMPERATURE).to(tl.float32)
        source = source_of(
            row, logits, stride_b, stride_v, vocab, asks, stride, positions, token_ids, sets, set_stride, row_stride,
            EDITS,
        )  # fmt: skip
        count = tl.load(counts + row)
        is_held = count <= room
        size = tl.where(is_held, count, vocab)
        pool = (source, temperature, is_held, size, held + row * room, held_ids + row * room)
        chunk = tl.arange(0, CHUNKS)
        logit = tl.load(peaks + row * num_chunks + chunk, mask=chunk < num_chunks, other=-float("inf"))
        peak = tl.div_rn(tl.max(logit, 0), temperature)
        floor = tl.load(bounds + row)
        if top_k > 0:
            floor = _floor_of_top_k(pool, floor, rank(peak), top_k, EDITS, BLOCK)
        if tail >= 0:
            if top_k > 0:
                total = _weight_above(pool, floor - 1, peak, EDITS, BLOCK, BITS)
            else:
                total = tl.sum(tl.load(weights + at, mask=split < num_splits, other=0), 0)
            floor = _floor_of_top_p(pool, floor, peak, total, tail, EDITS, BLOCK, BITS)
        log_min_p = asked(asks, stride, row, LOG_MIN_P).to(tl.float32)
        likely = tl.where(log_min_p > -float("inf"), peak + log_min_p, -float("inf"))
        key = key_of(tl.load(asks + row), tl.load(positions + row) + 1)
        best_id = _best(pool, floor, likely, key, EDITS, BLOCK)
        is_nan = tl.max((logit != logit).to(tl.int32), 0) > 0
    else:
        score = tl.load(scores + at, mask=split < num_splits, other=-float("inf"))
        best_id = tl.load(ids + row * num_splits + tl.argmax(score, 0, tie_break_left=True))
        is_nan = tl.min(tl.load(ids + at, mask=split < num_splits, other=0), 0) < 0
    tl.store(drawn_ids + row, tl.where(is_nan, -1, best_id).to(tl.int64))
    if drawn is not None:
        tl.store(drawn + row, tl.where(is_nan, 0, best_id))  # an embedding has no row of -1
    if EDITS:
        # A row's first token was in the set that was sent; and padding feeds token 0 there, which nobody has seen.
        # Others of this program may still read the word: they take that id for seen anyhow.
        if (asked(asks, stride, row, PENALTY) != 1) & (tl.load(positions + row) > 0):
            token_id = tl.load(token_ids + row)
            word = sets + row * row_stride + (token_id >> 5)
            tl.store(word, tl.load(word) | (1 << (token_id & 31)))


@triton.jit
def _scaled(pool, start, EDITS: tl.constexpr, BLOCK: tl.constexpr):
    """Logits over temperature of a block of the pool, -inf beyond it."""
    source, temperature, is_held, size, held, _ = pool
    at = start + tl.arange(0, BLOCK)
    if is_held:
        x = tl.load(held + at, mask=at < size, other=-float("inf"))
    else:
        x = tl.div_rn(logits_of(source, at, EDITS), temperature)
    return x


@triton.jit
def _floor_of_top_k(pool, low, high, top_k, EDITS: tl.constexpr, BLOCK: tl.constexpr):
    """The rank of the k-th largest, from a rank that at least k reach and the largest."""
    size = pool[3]
    while low < high:
        middle = upper_half(low, high)
        reach = tl.zeros([BLOCK], tl.int32)
        for start in range(0, size, BLOCK):
            reach += (rank(_scaled(pool, start, EDITS, BLOCK)) >= middle).to(tl.int32)
        enough = tl.sum(reach, 0) >= top_k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _weight_above(pool, floor, peak, EDITS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """What all of higher rank weigh."""
    size = pool[3]
    above = tl.zeros([BLOCK], tl.int64)
    for start in range(0, size, BLOCK):
        x = _scaled(pool, start, EDITS, BLOCK)
        above += tl.where(rank(x) > floor, weight(x, peak, BITS), 0)
    return tl.sum(above, 0)


@triton.jit
def _floor_of_top_p(pool, low, peak, total, tail, EDITS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """The lowest rank from which downwards more than the tail of the total lies; the largest if there is none."""
    high, cut = rank(peak), tail * total.to(tl.float64)
    while low < high:
        middle = lower_half(low, high)
        is_kept = (total - _weight_above(pool, middle, peak, EDITS, BLOCK, BITS)).to(tl.float64) > cut
        low, high = tl.where(is_kept, low, middle + 1), tl.where(is_kept, middle, high)
    return low


@triton.jit
def _best(pool, floor, likely, key, EDITS: tl.constexpr, BLOCK: tl.constexpr):
    """The id of the best score of what is kept, the lowest of several."""
    size, is_held, held_ids = pool[3], pool[2], pool[5]
    best, best_id = tl.full([], -float("inf"), tl.float64), tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        x = _scaled(pool, start, EDITS, BLOCK)
        kept = (rank(x) >= floor) & (x >= likely)
        if tl.max(kept.to(tl.int32), 0) > 0:
            index = start + tl.arange(0, BLOCK)
            if is_held:
                index = tl.load(held_ids + index, mask=index < size, other=0)
            score = tl.where(kept, x.to(tl.float64) - tl.log(exponential(bits(key, index))), -float("inf"))
            top = tl.max(score, 0)
            top_id = tl.min(tl.where(score == top, index, 2147483647), 0)
            # What is held is in no order.
            if (top > best) | ((top == best) & (top > -float("inf")) & (top_id < best_id)):
                best, best_id = top, top_id
    return best_id
