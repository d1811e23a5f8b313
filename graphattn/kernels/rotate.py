"""Norm and rotation of many tokens' queries and keys in one pass, for prefill.

Suffix letters: H heads (padded to a power of two), L and R left and right half of the head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rope import Rotary


def rotate(rotary: Rotary, q_NHD: Tensor, k_NKD: Tensor, positions_N: Tensor) -> tuple[Tensor, Tensor]:
    """What `Rotary.rotate` computes, in float32 throughout and rounded once; heads of a token must lie together."""
    weights = (rotary.q_weight, rotary.k_weight)
    q, k = (_rotate(rotary, x, weight, positions_N) for x, weight in zip((q_NHD, k_NKD), weights, strict=True))
    return q, k


def _rotate(rotary: Rotary, x_NHD: Tensor, weight_D: Tensor | None, positions_N: Tensor) -> Tensor:
    num_tokens, num_heads, head_dim = x_NHD.shape
    if x_NHD.stride()[1:] != (head_dim, 1):
        x_NHD = x_NHD.contiguous()
    out_NHD = torch.empty(x_NHD.shape, dtype=x_NHD.dtype, device=x_NHD.device)
    rotate_kernel[(num_tokens,)](
        x_NHD,
        out_NHD,
        positions_N,
        rotary.inv_freq,
        weight_D,
        x_NHD.stride(0),
        rotary.scaling,
        rotary.eps,
        HEADS=num_heads,
        ROWS=triton.next_power_of_2(num_heads),
        HALF=head_dim // 2,
        HAS_NORM=weight_D is not None,
    )
    return out_NHD


@triton.jit
def rotate_kernel(
    x,
    out,
    positions,
    inv_freq,
    weight,
    stride,
    scaling,
    eps,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, ROWS), tl.arange(0, HALF)
    at, is_head = h[:, None] * (2 * HALF) + d[None, :], h[:, None] < HEADS
    x_HL = tl.load(x + token * stride + at, mask=is_head, other=0.0).to(tl.float32)
    x_HR = tl.load(x + token * stride + at + HALF, mask=is_head, other=0.0).to(tl.float32)
    if HAS_NORM:
        unit_H = tl.rsqrt((tl.sum(x_HL * x_HL, 1) + tl.sum(x_HR * x_HR, 1)) / (2 * HALF) + eps)
        x_HL = x_HL * unit_H[:, None] * tl.load(weight + d).to(tl.float32)[None, :]
        x_HR = x_HR * unit_H[:, None] * tl.load(weight + HALF + d).to(tl.float32)[None, :]
    angle = tl.load(positions + token).to(tl.float32) * tl.load(inv_freq + d)
    cos, sin = (tl.cos(angle) * scaling)[None, :], (tl.sin(angle) * scaling)[None, :]
    out_at = out + token * (HEADS * 2 * HALF) + at
    tl.store(out_at, (x_HL * cos - x_HR * sin).to(out.dtype.element_ty), mask=is_head)
    tl.store(out_at + HALF, (x_HR * cos + x_HL * sin).to(out.dtype.element_ty), mask=is_head)
