"""Keys and values into an fp8 cache: divided by their scales, made e4m3 and stored where they belong, in one launch.

Suffix letters: H kv heads (padded to a power of two), D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def append_fp8(
    k_NKD: Tensor,
    v_NKD: Tensor,
    rows_N: Tensor,
    positions_N: Tensor,
    pages: tuple[Tensor, Tensor],
    indptr_B1: Tensor,
    indices_P: Tensor,
    scales_2K: Tensor,
    *,
    layout: str,
) -> None:
    """Writes what `scales.quantised` gives of each token's keys and values to the slot of its position.

    Args:
        k_NKD, v_NKD: `[N, K, D]`, D a power of two and each head in one piece.
        rows_N, positions_N: whose token it is, and where in the row; int32.
        pages: keys and values, e4m3, with equal strides.
        indptr_B1, indices_P: the pages of each row, int32.
        scales_2K: float32 contiguous.
        layout: of a page.
    """
    num_tokens, num_heads, head_dim = k_NKD.shape
    k_NKD, v_NKD = (x_NKD if x_NKD.stride(2) == 1 else x_NKD.contiguous() for x_NKD in (k_NKD, v_NKD))
    k_cache, v_cache = pages
    slot, head = (1, 2) if layout == "NHD" else (2, 1)
    with torch.cuda.device_of(k_NKD):  # Triton launches on the current device
        _append[(num_tokens,)](
            k_NKD,
            v_NKD,
            rows_N,
            positions_N,
            k_cache,
            v_cache,
            indptr_B1,
            indices_P,
            scales_2K,
            *k_NKD.stride()[:2],
            *v_NKD.stride()[:2],
            k_cache.stride(0),
            k_cache.stride(slot),
            k_cache.stride(head),
            PAGE=k_cache.shape[slot],
            HEADS=num_heads,
            ROWS=triton.next_power_of_2(num_heads),
            DIM=head_dim,
        )


@triton.jit
def quantised(x, scale):
    """What `scales.quantised` computes, from compute capability 9.0 on bit for bit; 8.9 rounds to float16 before."""
    x = x.to(tl.float32) * tl.div_rn(1.0, scale)
    x = tl.where(x > 448.0, 448.0, x)  # minimum and maximum would lose NaN
    return tl.where(x < -448.0, -448.0, x).to(tl.float8e4nv)


@triton.jit
def _append(
    k,
    v,
    rows,
    positions,
    k_cache,
    v_cache,
    indptr,
    indices,
    scales,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    stride_page,
    stride_slot,
    stride_head,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    page = tl.load(indices + tl.load(indptr + tl.load(rows + token)) + position // PAGE).to(tl.int64)
    h, d = tl.arange(0, ROWS)[:, None], tl.arange(0, DIM)[None, :]
    is_head = h < HEADS
    slot = page * stride_page + (position % PAGE) * stride_slot + h * stride_head + d
    k_HD = tl.load(k + token * stride_k + h * stride_k_head + d, mask=is_head, other=0.0)
    v_HD = tl.load(v + token * stride_v + h * stride_v_head + d, mask=is_head, other=0.0)
    k_scale_H1 = tl.load(scales + h, mask=is_head, other=1.0)
    v_scale_H1 = tl.load(scales + HEADS + h, mask=is_head, other=1.0)
    tl.store(k_cache + slot, quantised(k_HD, k_scale_H1), mask=is_head)
    tl.store(v_cache + slot, quantised(v_HD, v_scale_H1), mask=is_head)
