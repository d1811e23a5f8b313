"""Decode attention of our own: norm, rotate, append and attend in one launch, from device lengths alone.

A row's context is split into chunks, one program each per kv head; the last program of a row and head to finish merges
them. Nothing is planned: how a row is split depends on its length and the launch's constants only. Page tables, keys
and values are read before the kernel that computes the query has ended (`chain.py`): they are on their way to shared
memory while that still runs. Each warp attends to tokens of its own, so none waits for another before the end. That
is why it is written in Gluon, Triton's language with layouts, which says when a copy starts and who holds what.

Suffix letters: S warps, G query heads of a kv head (padded to a tensor core's 16), N tokens of a warp's block, D head
dim, L half of it, H query heads of a kv head (padded to a power of two).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from . import append, chain, rotate
from .axes import along
from .heads import frequencies, ready
from .pairs import normal, operands

follow, frequencies_at, quantised = (
    gluon.jit(each.fn) for each in (chain.follow, rotate.frequencies_at, append.quantised)
)
TOKENS = gl.constexpr(16)  # N
_NONE = gl.constexpr(-1e30)  # a maximum over nothing; infinity less itself would be nan


@gluon.constexpr_function
def _bits(size, at, ndim=3):
    """Basis vectors of a dimension, one for each bit of a size."""
    return [[2**bit if dim == at else 0 for dim in range(ndim)] for bit in range(size.bit_length() - 1)]


@gluon.constexpr_function
def _page_layout(warps, across):
    """[S, N, 1], the page of each token once in every thread that copies from it; `across` threads share a token."""
    shared, tokens = [[0, 0, 0]] * (across.bit_length() - 1), _bits(16, 1)
    lanes = 5 - len(shared)
    return gl.DistributedLinearLayout(tokens[lanes:], shared + tokens[:lanes], _bits(warps, 0), [], [warps, 16, 1])


@gluon.constexpr_function
def _side_layout(warps, dim):
    """[S, H, D] with all of S in each thread, so that adding up parts crosses none."""
    wide = min(warps, max(1, dim // 64))
    return gl.BlockedLayout([1, 1, 2], [1, 1, 32], [1, warps // wide, wide], [2, 1, 0])


@gluon.jit
def _cap(scores, softcap):
    return softcap * (2.0 / (1.0 + gl.exp(-2.0 * scores / softcap)) - 1.0)


@gluon.jit
def _fetch(keys, values, stage, caches, page_SN1, at_SN1, end, d_11D, PAGE: gl.constexpr):
    """Starts copying a block's keys, then its values; zeros from `end` on."""
    k_cache, v_cache, stride_page, stride_slot, head_at = caches
    page_SN1 = gl.convert_layout(page_SN1, at_SN1.type.layout).to(gl.int64)
    slot_SN1 = page_SN1 * stride_page + (at_SN1 % PAGE) * stride_slot + head_at
    inside = (at_SN1 < end) & (d_11D >= 0)
    async_copy.async_copy_global_to_shared(keys.index(stage), k_cache + slot_SN1 + d_11D, mask=inside)
    async_copy.commit_group()
    async_copy.async_copy_global_to_shared(values.index(stage), v_cache + slot_SN1 + d_11D, mask=inside)
    async_copy.commit_group()


@gluon.jit
def _merge(
    partial,
    stats,
    out,
    counter,
    used,
    h,
    d,
    GROUP: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """Adds a row's chunks up, as many side by side as registers hold: those wait for memory only once."""
    DIM: gl.constexpr = d.shape[1]
    SIDE: gl.constexpr = min(SPLITS, 32, max(1, 4096 * gl.num_warps() // (h.shape[0] * DIM)))
    best = gl.full_like(h, 0).to(gl.float32) + _NONE
    total = gl.full_like(best, 0.0)
    acc = gl.full_like(best + d, 0.0)
    for start in range(0, used, SIDE):
        bests, totals, parts = (), (), ()
        for part in gl.static_range(SIDE):
            is_part = (h < GROUP) & (start + part < used)
            place = (counter * SPLITS + start + part) * GROUP + h
            bests = bests + (gl.load(stats + place * 2, mask=is_part, other=_NONE),)
            totals = totals + (gl.load(stats + place * 2 + 1, mask=is_part, other=0.0),)
            parts = parts + (gl.load(partial + place * DIM + d, mask=is_part & (d < DIM), other=0.0),)
        higher = best
        for part in gl.static_range(SIDE):
            higher = gl.maximum(higher, bests[part])
        total, acc, best = total * gl.exp(best - higher), acc * gl.exp(best - higher), higher
        for part in gl.static_range(SIDE):
            fade = gl.exp(bests[part] - best)
            total += totals[part] * fade
            acc += parts[part] * fade
    total = gl.where(h < GROUP, total, 1.0)
    out_at = out + (counter * GROUP + h) * DIM + d
    gl.store(out_at, (acc / total).to(out.dtype.element_ty), mask=(h < GROUP) & (d < DIM))


@gluon.jit
def decode_kernel(
    q,
    k,
    v,
    k_cache,
    v_cache,
    indptr,
    indices,
    last_page_len,
    order,
    out,
    partial,
    stats,
    arrivals,
    inv_freq,
    q_weight,
    k_weight,
    scales,
    stride_q,
    stride_k,
    stride_v,
    stride_page,
    stride_slot,
    stride_head,
    scale,
    softcap,
    window,
    threshold,
    num_frequencies,
    rotary_scaling,
    eps,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    HALF: gl.constexpr,
    TURNED: gl.constexpr,
    DEPENDS: gl.constexpr,
    PAGE: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    SPLITS: gl.constexpr,
    NEAR: gl.constexpr,
    WHOLE: gl.constexpr,
    FINE: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_ROTARY: gl.constexpr,
    HAS_NORM: gl.constexpr,
    FP8: gl.constexpr,
    CHAINED: gl.constexpr,
):
    DIM: gl.constexpr = 2 * HALF
    PARTS: gl.constexpr = 2 if FP8 else 1
    WORDS: gl.constexpr = DIM // PARTS  # of 16 bits, of a head in the cache
    PHASES: gl.constexpr = min(8, WORDS // 8)
    BLOCK: gl.constexpr = WARPS * TOKENS
    dtype: gl.constexpr = k_cache.dtype.element_ty
    weight_dtype: gl.constexpr = gl.float16 if FP8 else dtype
    products: gl.constexpr = gl.NVMMADistributedLayout([2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    rows: gl.constexpr = gl.SliceLayout(2, products)
    lhs: gl.constexpr = gl.DotOperandLayout(0, products, k_width=2)
    rhs: gl.constexpr = gl.DotOperandLayout(1, products, k_width=2)
    across: gl.constexpr = min(WORDS // 8, 32)
    copied: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32 // across, across], [WARPS, 1, 1], [2, 1, 0])
    paged: gl.constexpr = _page_layout(WARPS, across)
    heads: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (HALF // 8), HALF // 8], [WARPS, 1], [1, 0])
    side: gl.constexpr = _side_layout(WARPS, DIM)
    flat: gl.constexpr = gl.SliceLayout(0, side)

    head, row, split = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    if order is not None:
        row = gl.load(order + row)
    counter = row * gl.num_programs(0) + head
    pages_at = gl.load(indptr + row)
    length = (gl.load(indptr + row + 1) - pages_at - 1) * PAGE + gl.load(last_page_len + row)
    table = indices + pages_at
    first = 0
    if HAS_WINDOW:
        first = gl.maximum(length - window, 0)
    chunk = gl.cdiv(length - first, NEAR)
    chunk = gl.maximum(gl.where(chunk > WHOLE, FINE, chunk), gl.cdiv(length - first, SPLITS))
    chunk = gl.cdiv(chunk, TOKENS) * TOKENS
    used = gl.cdiv(length - first, chunk)
    if split < used:
        begin = first + split * chunk
        end = gl.minimum(begin + chunk, length - 1)  # the new token is not read from the cache
        swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 8 // PHASES, PHASES, [2, 1, 0])
        keys = gl.allocate_shared_memory(dtype, [STAGES, WARPS, TOKENS, WORDS], swizzled)
        values = gl.allocate_shared_memory(dtype, [STAGES, WARPS, TOKENS, WORDS], swizzled)
        caches = (k_cache, v_cache, stride_page, stride_slot, head * stride_head)
        own_SN1 = along(0, WARPS, 0, copied) * TOKENS + along(0, TOKENS, 1, copied)
        own_page_SN1 = along(0, WARPS, 0, paged) * TOKENS + along(0, TOKENS, 1, paged)
        d_11D = along(0, WORDS, 2, copied)
        at = begin + own_page_SN1
        page_SN1 = gl.load(table + at // PAGE, mask=at < end, other=0)
        for stage in gl.static_range(STAGES):
            start = begin + stage * BLOCK
            next_at = start + BLOCK + own_page_SN1
            next_page_SN1 = gl.load(table + next_at // PAGE, mask=next_at < end, other=0)
            _fetch(keys, values, stage, caches, page_SN1, start + own_SN1, end, d_11D, PAGE)
            page_SN1 = next_page_SN1
        d_1L = gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, heads)), 0)
        g_G1 = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, heads)), 1)
        if HAS_ROTARY:
            if DEPENDS:
                inv_freq += frequencies_at(length, threshold, num_frequencies) * TURNED
            turns = frequencies(inv_freq, d_1L, TURNED)
        if CHAINED:
            follow()

        q_at = q + row * stride_q + (head * GROUP + g_G1) * DIM + d_1L
        is_head = (g_G1 < GROUP) & (d_1L < HALF)
        if HAS_ROTARY:
            last = (length, turns, rotary_scaling, eps, d_1L)
            q_GL, q_GH = ready(q_at, is_head, q_weight, last, TURNED, HAS_NORM, CHAINED)
        else:
            q_GL, q_GH = gl.load(q_at, mask=is_head, other=0.0), gl.load(q_at + HALF, mask=is_head, other=0.0)
        q_GD = gl.reshape(gl.permute(gl.join(q_GL, q_GH), [0, 2, 1]), [16, DIM])
        if FP8:
            k_scale, v_scale = gl.load(scales + head), gl.load(scales + gl.num_programs(0) + head)
            scale *= k_scale
            q_GD, power_G = normal(q_GD)
            factor_1G = gl.expand_dims(gl.convert_layout(power_G * scale, gl.SliceLayout(0, rows)), 0)
            q_parts, factor = gl.split(gl.reshape(q_GD, [16, WORDS, 2])), gl.expand_dims(factor_1G, 2)
        else:
            q_parts, factor = (q_GD,), scale
        queries, acc = (), ()
        for part in gl.static_range(PARTS):
            q_1GW = gl.expand_dims(gl.convert_layout(q_parts[part], gl.SliceLayout(0, lhs)), 0)
            q_SGW, _zeros = gl.broadcast(q_1GW, gl.zeros([WARPS, 16, WORDS], q_1GW.dtype, lhs))
            queries, acc = queries + (q_SGW,), acc + (gl.zeros([WARPS, 16, WORDS], gl.float32, products),)
        best_SG = gl.full([WARPS, 16], _NONE, gl.float32, rows)
        total_SG = gl.zeros([WARPS, 16], gl.float32, rows)
        if split == used - 1:
            k_at = k + row * stride_k + head * DIM + d_1L
            if HAS_ROTARY:
                k_1L, k_1H = ready(k_at, d_1L < HALF, k_weight, last, TURNED, HAS_NORM, CHAINED)
            else:
                k_1L, k_1H = gl.load(k_at), gl.load(k_at + HALF)
            page = gl.load(table + (length - 1) // PAGE).to(gl.int64)
            slot = page * stride_page + ((length - 1) % PAGE) * stride_slot + head * stride_head
            k_slot, v_slot = k_cache + slot, v_cache + slot
            if FP8:
                k_slot = k_slot.to(gl.pointer_type(gl.float8e4nv), bitcast=True)
                v_slot = v_slot.to(gl.pointer_type(gl.float8e4nv), bitcast=True)
                k_1L, k_1H = quantised(k_1L, k_scale), quantised(k_1H, k_scale)
            gl.store(k_slot + d_1L, k_1L)
            gl.store(k_slot + HALF + d_1L, k_1H)
            score_G = gl.sum(q_GL.to(gl.float32) * k_1L.to(gl.float32) + q_GH.to(gl.float32) * k_1H.to(gl.float32), 1)
            score_1G = gl.expand_dims(gl.convert_layout(score_G * scale, gl.SliceLayout(0, rows)), 0)
            if HAS_SOFTCAP:
                score_1G = _cap(score_1G, softcap)
            is_first = gl.expand_dims(gl.arange(0, WARPS, gl.SliceLayout(1, rows)), 1) == 0
            best_SG = gl.where(is_first, score_1G, best_SG)
            total_SG = gl.where(is_first, 1.0, total_SG)
            started = ()
            for part in gl.static_range(PARTS):
                d_11W = along(0, WORDS, 2, products) * PARTS + part
                v_11W = gl.load(v + row * stride_v + head * DIM + d_11W)
                if FP8:
                    v_11W = quantised(v_11W, v_scale)
                gl.store(v_slot + d_11W, v_11W)
                started = started + (acc[part] + gl.where(gl.expand_dims(is_first, 2), v_11W.to(gl.float32), 0.0),)
            acc = started

        n_S1N = along(0, WARPS, 0, products) * TOKENS + along(0, TOKENS, 2, products)
        stage = 0
        for start in range(begin, end, BLOCK):
            async_copy.wait_group(2 * STAGES - 1)
            score_SGN = gl.zeros([WARPS, 16, TOKENS], gl.float32, products)
            held = operands(keys.index(stage).permute([0, 2, 1]), rhs, FP8)
            for part in gl.static_range(PARTS):
                score_SGN = mma_v2(queries[part], held[part], score_SGN)
            score_SGN *= factor
            if HAS_SOFTCAP:
                score_SGN = _cap(score_SGN, softcap)
            score_SGN = gl.where(start + n_S1N < end, score_SGN, float("-inf"))
            higher_SG = gl.maximum(best_SG, gl.max(score_SGN, 2))
            fade_SG = gl.exp(best_SG - higher_SG)
            weight_SGN = gl.exp(score_SGN - gl.expand_dims(higher_SG, 2))
            total_SG = total_SG * fade_SG + gl.sum(weight_SGN, 2)
            best_SG = higher_SG
            async_copy.wait_group(2 * STAGES - 2)
            weight_SGN = gl.convert_layout(weight_SGN.to(weight_dtype), lhs)
            held = operands(values.index(stage), rhs, FP8)
            added = ()
            for part in gl.static_range(PARTS):
                added = added + (mma_v2(weight_SGN, held[part], acc[part] * gl.expand_dims(fade_SG, 2)),)
            acc = added
            following = start + STAGES * BLOCK
            next_at = following + BLOCK + own_page_SN1
            next_page_SN1 = gl.load(table + next_at // PAGE, mask=next_at < end, other=0)
            _fetch(keys, values, stage, caches, page_SN1, following + own_SN1, end, d_11D, PAGE)
            page_SN1 = next_page_SN1
            stage = (stage + 1) % STAGES

        # The warps' parts meet where keys and values were, once no copy is on its way there.
        async_copy.wait_group(0)
        acc_SGD = acc[0]
        if FP8:
            acc_SGD = gl.reshape(gl.join(acc[0], acc[1]), [WARPS, 16, DIM])
        ROWS: gl.constexpr = 8 if HEADS <= 8 else 16
        if ROWS == 8:  # the others are padding
            acc_SGD, _padding = gl.split(gl.permute(gl.reshape(acc_SGD, [WARPS, 2, 8, DIM]), [0, 2, 3, 1]))
            best_SG, _padding = gl.split(gl.permute(gl.reshape(best_SG, [WARPS, 2, 8]), [0, 2, 1]))
            total_SG, _padding = gl.split(gl.permute(gl.reshape(total_SG, [WARPS, 2, 8]), [0, 2, 1]))
        parts = keys._reinterpret(gl.float32, [WARPS, ROWS, DIM], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
        sums = values._reinterpret(gl.float32, [2 * WARPS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        bests, totals = sums.slice(0, WARPS, 0), sums.slice(WARPS, WARPS, 0)
        gl.thread_barrier()
        parts.store(acc_SGD)
        bests.store(best_SG)
        totals.store(total_SG)
        gl.thread_barrier()
        best_SH = bests.slice(0, HEADS, 1).load(gl.SliceLayout(2, side))
        best_H = gl.max(best_SH, 0)
        fade_SH = gl.exp(best_SH - gl.expand_dims(best_H, 0))
        total_H = gl.sum(totals.slice(0, HEADS, 1).load(gl.SliceLayout(2, side)) * fade_SH, 0)
        acc_HD = gl.sum(parts.slice(0, HEADS, 1).load(side) * gl.expand_dims(fade_SH, 2), 0)
        if FP8:
            acc_HD *= v_scale
        best_H1 = gl.expand_dims(gl.convert_layout(best_H, gl.SliceLayout(1, flat)), 1)
        total_H1 = gl.expand_dims(gl.convert_layout(total_H, gl.SliceLayout(1, flat)), 1)
        h = gl.expand_dims(gl.arange(0, HEADS, gl.SliceLayout(1, flat)), 1)
        d = gl.expand_dims(gl.arange(0, DIM, gl.SliceLayout(0, flat)), 0)
        if used == 1:
            out_at = out + (counter * GROUP + h) * DIM + d
            gl.store(out_at, (acc_HD / total_H1).to(out.dtype.element_ty), mask=(h < GROUP) & (d < DIM))
        else:
            place = (counter * SPLITS + split) * GROUP + h
            gl.store(partial + place * DIM + d, acc_HD, mask=(h < GROUP) & (d < DIM))
            gl.store(stats + place * 2, best_H1, mask=h < GROUP)
            gl.store(stats + place * 2 + 1, total_H1, mask=h < GROUP)
            gl.thread_barrier()  # every thread's part is stored before the program counts as arrived
            if gl.atomic_add(arrivals + counter, 1, sem="acq_rel") == used - 1:
                gl.thread_barrier()
                _merge(partial, stats, out, counter, used, h, d, GROUP, SPLITS)
                gl.store(arrivals + counter, 0)
