"""The passes of a draw over all logits: a survey for rows with filters; then best scores, or what filters may keep.

The arguments are those that `draw_gumbel` lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ask import LOG_MIN_P, TEMPERATURE, asked, filters_of, logits_of, source_of
from .noise import bits, exponential, key_of
from .rank import LOWEST, number, rank, upper_half, weight

_STEPS = tl.constexpr(16)  # to a bound: more make it sharper than it need be


@triton.jit(
    do_not_specialize=["stride", "set_stride", "row_stride"],
    do_not_specialize_on_alignment=["asks", "positions", "token_ids"],
)
def survey(
    logits, stride_b, stride_v, vocab, asks, stride, positions, token_ids, sets, set_stride, row_stride,
    EDITS: tl.constexpr, peaks, masses, counts, num_chunks, span, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Largest logit of each chunk of each row with a filter, NaN where one is; with top-p alone, its mass over that of
    this logit too."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if split == 0:
        tl.store(counts + row, 0)
    top_k, tail = filters_of(asks, stride, row, vocab)
    if (top_k > 0) | (tail >= 0) | (asked(asks, stride, row, LOG_MIN_P) > -float("inf")):
        temperature = asked(asks, stride, row, TEMPERATURE).to(tl.float32)
        source = source_of(
            row, logits, stride_b, stride_v, vocab, asks, stride, positions, token_ids, sets, set_stride, row_stride,
            EDITS,
        )  # fmt: skip
        chunk = tl.arange(0, BLOCK // CHUNK)
        offset = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        for start in range(split * span, min(split * span + span, vocab), BLOCK):
            x = logits_of(source, start + offset, EDITS)
            peak = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), tl.max(x, 1))  # a maximum may lose it
            at, inside = start // CHUNK + chunk, start // CHUNK + chunk < num_chunks
            tl.store(peaks + row * num_chunks + at, peak, mask=inside)
            if (top_k == 0) & (tail >= 0):
                below = tl.div_rn(x, temperature) - tl.div_rn(peak, temperature)[:, None]
                mass = tl.sum(tl.where(x == -float("inf"), 0.0, tl.exp(below)), 1)
                tl.store(masses + row * num_chunks + at, mass, mask=inside)


@triton.jit(
    do_not_specialize=["stride", "set_stride", "row_stride"],
    do_not_specialize_on_alignment=["asks", "positions", "token_ids"],
)
def gather(
    logits, stride_b, stride_v, vocab, asks, stride, positions, token_ids, sets, set_stride, row_stride,
    EDITS: tl.constexpr, peaks, masses, num_chunks, counts, bounds, weights, held, held_ids, room, scores, ids,
    span, BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Of each part of each row the best score and its id, -1 if a logit is NaN; with top-k or top-p what reaches a
    bound, in any order."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = asked(asks, stride, row, TEMPERATURE).to(tl.float32)
    top_k, tail = filters_of(asks, stride, row, vocab)
    log_min_p = asked(asks, stride, row, LOG_MIN_P).to(tl.float32)
    source = source_of(
        row, logits, stride_b, stride_v, vocab, asks, stride, positions, token_ids, sets, set_stride, row_stride, EDITS
    )
    chunk = tl.arange(0, CHUNKS)
    at, inside = row * num_chunks + chunk, chunk < num_chunks
    first, last = split * span, min(split * span + span, vocab)
    if (top_k > 0) | (tail >= 0):
        peaks_C = tl.div_rn(tl.load(peaks + at, mask=inside, other=-float("inf")), temperature)
        peak = tl.max(peaks_C, 0)
        if top_k > 0:
            bound = _bound_of_top_k(peaks_C, top_k)
        else:
            bound = _bound_of_top_p(peaks_C, tl.load(masses + at, mask=inside, other=0.0), tail, CHUNK)
        if split == 0:
            tl.store(bounds + row, bound)
        total = tl.zeros([BLOCK], tl.int64)
        for start in range(first, last, BLOCK):
            index = start + tl.arange(0, BLOCK)
            logit = logits_of(source, index, EDITS)
            if (top_k == 0) | (rank(tl.div_rn(tl.max(logit, 0), temperature)) >= bound):
                x = tl.div_rn(logit, temperature)
                if top_k == 0:
                    total += weight(x, peak, BITS)
                reaches = (rank(x) >= bound) & (index < vocab)
                count = tl.sum(reaches.to(tl.int32), 0)
                if count > 0:
                    place = tl.atomic_add(counts + row, count) + tl.cumsum(reaches.to(tl.int32), 0) - 1
                    fits = reaches & (place < room)
                    tl.store(held + row * room + place, x, mask=fits)
                    tl.store(held_ids + row * room + place, index, mask=fits)
        tl.store(weights + row * tl.num_programs(1) + split, tl.sum(total, 0))
    else:
        floor = -float("inf")
        if log_min_p > -float("inf"):
            peak = tl.max(tl.load(peaks + at, mask=inside, other=-float("inf")), 0)
            floor = tl.div_rn(peak, temperature) + log_min_p
        if temperature == 0:
            best, best_id = _largest(source, first, last, EDITS, BLOCK)
        else:
            key = key_of(tl.load(asks + row), tl.load(positions + row) + 1)
            best, best_id = _best(source, first, last, temperature, floor, key, EDITS, BLOCK)
        tl.store(scores + row * tl.num_programs(1) + split, best)
        tl.store(ids + row * tl.num_programs(1) + split, best_id)


@triton.jit
def _bound_of_top_k(peaks_C, top_k):
    """A rank that the k largest reach: at least k chunks have one that does."""
    ranks_C, low, high = rank(peaks_C), LOWEST, rank(tl.max(peaks_C, 0))
    for _ in range(_STEPS):
        middle = upper_half(low, high)
        enough = tl.sum((ranks_C >= middle).to(tl.int32), 0) >= top_k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _bound_of_top_p(peaks_C, masses_C, tail, CHUNK: tl.constexpr):
    """A rank that all reach that top-p keeps: what is below it adds up to no more than the tail.

    A chunk with a larger logit holds no more below than its mass without that logit, and no more than the bound in all
    its other places. Float sums in whatever order will do: the weights that decide differ by far less than a hundredth.
    """
    peak = tl.max(peaks_C, 0)
    low, high = LOWEST, rank(peak)
    likelihoods_C = tl.where(peaks_C == -float("inf"), 0.0, tl.exp(peaks_C - peak))
    masses_C *= likelihoods_C
    allowed = tl.sum(masses_C, 0) * tail.to(tl.float32) * 0.99
    for _ in range(_STEPS):
        middle = upper_half(low, high)
        least = number(middle)
        others_C = tl.minimum(masses_C - likelihoods_C, (CHUNK - 1) * tl.exp(least - peak))
        fits = tl.sum(tl.where(peaks_C < least, masses_C, others_C), 0) <= allowed
        low, high = tl.where(fits, middle, low), tl.where(fits, high, middle - 1)
    return low


@triton.jit
def _largest(source, first, last, EDITS: tl.constexpr, BLOCK: tl.constexpr):
    """Largest logit in a part of a row, and the lowest id that has it; threads meet once, at the end."""
    best_id = first + tl.arange(0, BLOCK)
    best = logits_of(source, best_id, EDITS)
    is_nan = best != best
    for start in range(first + BLOCK, last, BLOCK):
        index = start + tl.arange(0, BLOCK)
        logit = logits_of(source, index, EDITS)
        best_id = tl.where(logit > best, index, best_id)
        best = tl.maximum(best, logit)
        is_nan |= logit != logit
    top = tl.max(best, 0)
    top_id = tl.min(tl.where(best == top, best_id, last), 0)
    return top.to(tl.float64), tl.where(tl.max(is_nan.to(tl.int32), 0) > 0, -1, top_id)


@triton.jit
def _best(source, first, last, temperature, floor, key, EDITS: tl.constexpr, BLOCK: tl.constexpr):
    """Best score in a part of a row, and its id.

    The float64 logarithms cost most, so blocks that cannot hold the best are passed over. A score x - log(E) beats the
    best so far only if E < exp(x - best), and E >= u: u < exp(x - best) in float32 is enough, with room for rounding.
    """
    inverse = 1.0 / temperature
    best, best_id = tl.full([], -float("inf"), tl.float64), first
    is_nan = tl.zeros([BLOCK], tl.int1)
    for start in range(first, last, BLOCK):
        index = start + tl.arange(0, BLOCK)
        logit = logits_of(source, index, EDITS)
        is_nan |= logit != logit
        bound = best.to(tl.float32)
        u = ((bits(key, index) >> 41).to(tl.int32) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0  # 23 bits
        # Errors are below 1e-6 * |best| + 1e-4 where x is near enough to matter. A best of inf makes this nan, and is
        # not beaten.
        may_beat = u < tl.exp(tl.fma(logit, inverse, 1e-5 * tl.abs(bound) + 0.01 - bound))
        if tl.max(may_beat.to(tl.int32), 0) > 0:
            x = tl.div_rn(logit, temperature)
            x = tl.where(x < floor, -float("inf"), x)
            score = x.to(tl.float64) - tl.log(exponential(bits(key, index)))
            top, at = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
            if top > best:
                best, best_id = top, start + at
    return best, tl.where(tl.max(is_nan.to(tl.int32), 0) > 0, -1, best_id)
