"""Decode attention of our own: norm, rotate, append and attend in one launch, from device lengths alone.

A row's context is split into chunks, one program each per kv head; the last program of a row and head to finish merges
them. Nothing is planned: how a row is split depends on its length and the launch's constants only.

Suffix letters: G query heads of a kv head (padded to a tensor core's 16), N tokens of a block, L and H low and high
half of the head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cap(scores, softcap):
    return softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)


@triton.jit
def _rotated(low, high, cos, sin):
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    k_cache,
    v_cache,
    indptr,
    indices,
    last_page_len,
    out,
    partial,
    stats,
    arrivals,
    inv_freq,
    q_weight,
    k_weight,
    stride_q,
    stride_k,
    stride_v,
    stride_page,
    stride_slot,
    stride_head,
    scale,
    softcap,
    window,
    rotary_scaling,
    eps,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROTARY: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1)
    DIM: tl.constexpr = 2 * HALF
    pages_at = tl.load(indptr + row)
    length = (tl.load(indptr + row + 1) - pages_at - 1) * PAGE + tl.load(last_page_len + row)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK) * BLOCK, LEAST)
    used = tl.cdiv(length - first, chunk)
    if split < used:
        begin = first + split * chunk
        end = tl.minimum(begin + chunk, length - 1)  # the new token is not read from the cache
        g, d, n = tl.arange(0, ROWS), tl.arange(0, HALF), tl.arange(0, BLOCK)
        is_head = g[:, None] < GROUP
        q_at = q + row * stride_q + (head * GROUP + g[:, None]) * DIM + d[None, :]
        q_GL, q_GH = tl.load(q_at, mask=is_head, other=0.0), tl.load(q_at + HALF, mask=is_head, other=0.0)
        if HAS_ROTARY:
            angle = (length - 1).to(tl.float32) * tl.load(inv_freq + d)
            cos, sin = tl.cos(angle) * rotary_scaling, tl.sin(angle) * rotary_scaling
            wide_L, wide_H = q_GL.to(tl.float32), q_GH.to(tl.float32)
            if HAS_NORM:
                square = tl.sum(wide_L * wide_L, 1) + tl.sum(wide_H * wide_H, 1)
                unit = tl.rsqrt(square / DIM + eps)
                wide_L = wide_L * unit[:, None] * tl.load(q_weight + d).to(tl.float32)[None, :]
                wide_H = wide_H * unit[:, None] * tl.load(q_weight + HALF + d).to(tl.float32)[None, :]
            wide_L, wide_H = _rotated(wide_L, wide_H, cos[None, :], sin[None, :])
            q_GL, q_GH = wide_L.to(q.dtype.element_ty), wide_H.to(q.dtype.element_ty)
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc_L, acc_H = tl.zeros([ROWS, HALF], tl.float32), tl.zeros([ROWS, HALF], tl.float32)
        if split == used - 1:
            k_at, v_at = k + row * stride_k + head * DIM + d, v + row * stride_v + head * DIM + d
            k_L, k_H, v_L, v_H = tl.load(k_at), tl.load(k_at + HALF), tl.load(v_at), tl.load(v_at + HALF)
            if HAS_ROTARY:
                wide_l, wide_h = k_L.to(tl.float32), k_H.to(tl.float32)
                if HAS_NORM:
                    unit_k = tl.rsqrt((tl.sum(wide_l * wide_l, 0) + tl.sum(wide_h * wide_h, 0)) / DIM + eps)
                    wide_l = wide_l * unit_k * tl.load(k_weight + d).to(tl.float32)
                    wide_h = wide_h * unit_k * tl.load(k_weight + HALF + d).to(tl.float32)
                wide_l, wide_h = _rotated(wide_l, wide_h, cos, sin)
                k_L, k_H = wide_l.to(k_cache.dtype.element_ty), wide_h.to(k_cache.dtype.element_ty)
            page = tl.load(indices + pages_at + (length - 1) // PAGE).to(tl.int64)
            slot = page * stride_page + ((length - 1) % PAGE) * stride_slot + head * stride_head
            tl.store(k_cache + slot + d, k_L)
            tl.store(k_cache + slot + HALF + d, k_H)
            tl.store(v_cache + slot + d, v_L)
            tl.store(v_cache + slot + HALF + d, v_H)
            best = tl.sum(q_GL.to(tl.float32) * k_L.to(tl.float32)[None, :], 1)
            best = (best + tl.sum(q_GH.to(tl.float32) * k_H.to(tl.float32)[None, :], 1)) * scale
            if HAS_SOFTCAP:
                best = _cap(best, softcap)
            total = tl.full([ROWS], 1.0, tl.float32)
            acc_L += v_L.to(tl.float32)[None, :]
            acc_H += v_H.to(tl.float32)[None, :]
        for start in range(begin, end, BLOCK):
            at = start + n
            inside = at < end
            page_N = tl.load(indices + pages_at + at // PAGE, mask=inside, other=0).to(tl.int64)
            slot_N = page_N * stride_page + (at % PAGE) * stride_slot + head * stride_head
            where, read = slot_N[:, None] + d[None, :], inside[:, None]
            k_NL = tl.load(k_cache + where, mask=read, other=0.0)
            k_NH = tl.load(k_cache + where + HALF, mask=read, other=0.0)
            v_NL = tl.load(v_cache + where, mask=read, other=0.0)
            v_NH = tl.load(v_cache + where + HALF, mask=read, other=0.0)
            scores_GN = (tl.dot(q_GL, tl.trans(k_NL)) + tl.dot(q_GH, tl.trans(k_NH))) * scale
            if HAS_SOFTCAP:
                scores_GN = _cap(scores_GN, softcap)
            scores_GN = tl.where(inside[None, :], scores_GN, float("-inf"))
            higher = tl.maximum(best, tl.max(scores_GN, 1))
            fade = tl.exp(best - higher)
            weight_GN = tl.exp(scores_GN - higher[:, None])
            total = total * fade + tl.sum(weight_GN, 1)
            weight_GN = weight_GN.to(v_NL.dtype)
            acc_L = acc_L * fade[:, None] + tl.dot(weight_GN, v_NL)
            acc_H = acc_H * fade[:, None] + tl.dot(weight_GN, v_NH)
            best = higher
        counter = row * num_heads + head
        is_last = used == 1
        if used > 1:
            place = counter * SPLITS + split
            partial_at = partial + (place * GROUP + g[:, None]) * DIM + d[None, :]
            tl.store(partial_at, acc_L, mask=is_head)
            tl.store(partial_at + HALF, acc_H, mask=is_head)
            tl.store(stats + (place * GROUP + g) * 2, best, mask=g < GROUP)
            tl.store(stats + (place * GROUP + g) * 2 + 1, total, mask=g < GROUP)
            tl.debug_barrier()  # every thread's part is stored before the program counts as arrived
            is_last = tl.atomic_add(arrivals + counter, 1, sem="acq_rel") == used - 1
            if is_last:
                tl.debug_barrier()
                best = tl.full([ROWS], float("-inf"), tl.float32)
                total = tl.zeros([ROWS], tl.float32)
                acc_L, acc_H = tl.zeros([ROWS, HALF], tl.float32), tl.zeros([ROWS, HALF], tl.float32)
                for other in range(0, used):
                    place = counter * SPLITS + other
                    partial_at = partial + (place * GROUP + g[:, None]) * DIM + d[None, :]
                    other_L = tl.load(partial_at, mask=is_head, other=0.0)
                    other_H = tl.load(partial_at + HALF, mask=is_head, other=0.0)
                    other_best = tl.load(stats + (place * GROUP + g) * 2, mask=g < GROUP, other=0.0)
                    other_total = tl.load(stats + (place * GROUP + g) * 2 + 1, mask=g < GROUP, other=1.0)
                    higher = tl.maximum(best, other_best)
                    fade, other_fade = tl.exp(best - higher), tl.exp(other_best - higher)
                    total = total * fade + other_total * other_fade
                    acc_L = acc_L * fade[:, None] + other_L * other_fade[:, None]
                    acc_H = acc_H * fade[:, None] + other_H * other_fade[:, None]
                    best = higher
                tl.store(arrivals + counter, 0)
        if is_last:
            out_at = out + (counter * GROUP + g[:, None]) * DIM + d[None, :]
            tl.store(out_at, (acc_L / total[:, None]).to(out.dtype.element_ty), mask=is_head)
            tl.store(out_at + HALF, (acc_H / total[:, None]).to(out.dtype.element_ty), mask=is_head)
