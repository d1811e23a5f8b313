"""Decode attention of our own: norm, rotate, append and attend in one launch, from device lengths alone.

A row's context is split into chunks, one program each per kv head; the last program of a row and head to finish merges
them. Nothing is planned: how a row is split depends on its length and the launch's constants only. Page tables and, if
EAGER, keys and values are read before the kernel that computes the query has ended (`chain.py`).

Suffix letters: G query heads of a kv head (padded to a tensor core's 16), N tokens of a block, L and H low and high
half of the head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chain import follow
from .rotate import cos_sin, rotated


@triton.jit
def _cap(scores, softcap):
    return softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)


@triton.jit
def _tokens(k_cache, v_cache, table, at, end, head_at, stride_page, stride_slot, d, PAGE: tl.constexpr):
    """Keys and values of tokens `at`, low and high halves; zeros from `end` on."""
    HALF: tl.constexpr = d.shape[0]
    inside = at < end
    page_N = tl.load(table + at // PAGE, mask=inside, other=0).to(tl.int64)
    slot_N = page_N * stride_page + (at % PAGE) * stride_slot + head_at
    where, read = slot_N[:, None] + d[None, :], inside[:, None]
    k_NL = tl.load(k_cache + where, mask=read, other=0.0)
    k_NH = tl.load(k_cache + where + HALF, mask=read, other=0.0)
    v_NL = tl.load(v_cache + where, mask=read, other=0.0)
    v_NH = tl.load(v_cache + where + HALF, mask=read, other=0.0)
    return k_NL, k_NH, v_NL, v_NH


@triton.jit
def _merge(
    partial,
    stats,
    out,
    counter,
    used,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Adds a row's chunks up, as many side by side as registers hold: each waits for memory only once."""
    FLOATS: tl.constexpr = 8192 if HEADS * HALF <= 512 else 4096
    SIDE: tl.constexpr = SPLITS if SPLITS * HEADS * HALF <= FLOATS else FLOATS // (HEADS * HALF)
    h, d, s = tl.arange(0, HEADS), tl.arange(0, HALF), tl.arange(0, SPLITS)
    place_SH = (counter * SPLITS + s[:, None]) * GROUP + h[None, :]
    is_part = (s[:, None] < used) & (h[None, :] < GROUP)
    best_SH = tl.load(stats + place_SH * 2, mask=is_part, other=float("-inf"))
    best_H = tl.where(h < GROUP, tl.max(best_SH, 0), 0.0)
    total_SH = tl.load(stats + place_SH * 2 + 1, mask=is_part, other=0.0)
    total_H = tl.sum(total_SH * tl.exp(best_SH - best_H[None, :]), 0)
    acc_L, acc_H = tl.zeros([HEADS, HALF], tl.float32), tl.zeros([HEADS, HALF], tl.float32)
    for start in range(0, used, SIDE):
        part = start + tl.arange(0, SIDE)
        place = (counter * SPLITS + part[:, None]) * GROUP + h[None, :]
        mine = (part[:, None] < used) & (h[None, :] < GROUP)
        fade = tl.exp(tl.load(stats + place * 2, mask=mine, other=float("-inf")) - best_H[None, :])
        at, read = partial + (place * 2 * HALF)[:, :, None] + d[None, None, :], mine[:, :, None]
        acc_L += tl.sum(tl.load(at, mask=read, other=0.0) * fade[:, :, None], 0)
        acc_H += tl.sum(tl.load(at + HALF, mask=read, other=0.0) * fade[:, :, None], 0)
    total_H = tl.where(h < GROUP, total_H, 1.0)
    out_at = out + (counter * GROUP + h[:, None]) * 2 * HALF + d[None, :]
    tl.store(out_at, (acc_L / total_H[:, None]).to(out.dtype.element_ty), mask=h[:, None] < GROUP)
    tl.store(out_at + HALF, (acc_H / total_H[:, None]).to(out.dtype.element_ty), mask=h[:, None] < GROUP)


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
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    NEAR: tl.constexpr,
    WHOLE: tl.constexpr,
    FINE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROTARY: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CHAINED: tl.constexpr,
    EAGER: tl.constexpr,
):
    head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(0)
    DIM: tl.constexpr = 2 * HALF
    pages_at = tl.load(indptr + row)
    length = (tl.load(indptr + row + 1) - pages_at - 1) * PAGE + tl.load(last_page_len + row)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
    chunk = tl.cdiv(length - first, NEAR)
    chunk = tl.maximum(tl.where(chunk > WHOLE, FINE, chunk), tl.cdiv(length - first, SPLITS))
    chunk = tl.cdiv(chunk, BLOCK) * BLOCK
    used = tl.cdiv(length - first, chunk)
    if split < used:
        begin = first + split * chunk
        end = tl.minimum(begin + chunk, length - 1)  # the new token is not read from the cache
        g, d, n = tl.arange(0, ROWS), tl.arange(0, HALF), tl.arange(0, BLOCK)
        caches, strides = (k_cache, v_cache, indices + pages_at), (stride_page, stride_slot)
        head_at = head * stride_head
        if HAS_ROTARY:
            cos, sin = cos_sin((length - 1).to(tl.float32) * tl.load(inv_freq + d), CHAINED)
            cos, sin = cos * rotary_scaling, sin * rotary_scaling
        if EAGER:
            next_KL, next_KH, next_VL, next_VH = _tokens(*caches, begin + n, end, head_at, *strides, d, PAGE)
        if CHAINED:
            follow()
        is_head = g[:, None] < GROUP
        q_at = q + row * stride_q + (head * GROUP + g[:, None]) * DIM + d[None, :]
        q_GL, q_GH = tl.load(q_at, mask=is_head, other=0.0), tl.load(q_at + HALF, mask=is_head, other=0.0)
        if HAS_ROTARY:
            wide_L, wide_H = q_GL.to(tl.float32), q_GH.to(tl.float32)
            if HAS_NORM:
                square = tl.sum(wide_L * wide_L, 1) + tl.sum(wide_H * wide_H, 1)
                unit = tl.rsqrt(square / DIM + eps)
                wide_L = wide_L * unit[:, None] * tl.load(q_weight + d).to(tl.float32)[None, :]
                wide_H = wide_H * unit[:, None] * tl.load(q_weight + HALF + d).to(tl.float32)[None, :]
            wide_L, wide_H = rotated(wide_L, wide_H, cos[None, :], sin[None, :])
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
                wide_l, wide_h = rotated(wide_l, wide_h, cos, sin)
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
            inside = start + n < end
            if EAGER:
                k_NL, k_NH, v_NL, v_NH = next_KL, next_KH, next_VL, next_VH
                ahead = start + BLOCK + n
                next_KL, next_KH, next_VL, next_VH = _tokens(*caches, ahead, end, head_at, *strides, d, PAGE)
            else:
                k_NL, k_NH, v_NL, v_NH = _tokens(*caches, start + n, end, head_at, *strides, d, PAGE)
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
        if used == 1:
            out_at = out + (counter * GROUP + g[:, None]) * DIM + d[None, :]
            tl.store(out_at, (acc_L / total[:, None]).to(out.dtype.element_ty), mask=is_head)
            tl.store(out_at + HALF, (acc_H / total[:, None]).to(out.dtype.element_ty), mask=is_head)
        else:
            place = counter * SPLITS + split
            partial_at = partial + (place * GROUP + g[:, None]) * DIM + d[None, :]
            tl.store(partial_at, acc_L, mask=is_head)
            tl.store(partial_at + HALF, acc_H, mask=is_head)
            tl.store(stats + (place * GROUP + g) * 2, best, mask=g < GROUP)
            tl.store(stats + (place * GROUP + g) * 2 + 1, total, mask=g < GROUP)
            tl.debug_barrier()  # every thread's part is stored before the program counts as arrived
            if tl.atomic_add(arrivals + counter, 1, sem="acq_rel") == used - 1:
                tl.debug_barrier()
                _merge(partial, stats, out, counter, used, GROUP, HEADS, HALF, SPLITS)
                tl.store(arrivals + counter, 0)
