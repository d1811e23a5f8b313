"""Norm and rotation of queries and keys: of many tokens in one pass, for prefill, and the parts of it.

Suffix letters: H heads (padded to a power of two), L and R left and right half of the head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rope import Rotary


def rotate(
    rotary: Rotary, q_NHD: Tensor, k_NKD: Tensor, positions_N: Tensor, lengths_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `Rotary.rotate` computes, in float32 throughout and rounded once; heads of a token must lie together."""
    weights, where = (rotary.q_weight, rotary.k_weight), (positions_N, lengths_N)
    q, k = (_rotate(rotary, x, weight, *where) for x, weight in zip((q_NHD, k_NKD), weights, strict=True))
    return q, k


def _rotate(
    rotary: Rotary, x_NHD: Tensor, weight_D: Tensor | None, positions_N: Tensor, lengths_N: Tensor | None
) -> Tensor:
    num_tokens, num_heads, head_dim = x_NHD.shape
    if x_NHD.stride()[1:] != (head_dim, 1):
        x_NHD = x_NHD.contiguous()
    out_NHD = torch.empty(x_NHD.shape, dtype=x_NHD.dtype, device=x_NHD.device)
    with torch.cuda.device_of(x_NHD):  # Triton launches on the current device
        _rotate_kernel[(num_tokens,)](
            x_NHD,
            out_NHD,
            positions_N,
            lengths_N if rotary.depends_on_length else None,
            rotary.inv_freq,
            weight_D,
            x_NHD.stride(0),
            rotary.threshold,
            len(rotary.inv_freq) if rotary.depends_on_length else 1,
            rotary.scaling,
            rotary.eps,
            HEADS=num_heads,
            ROWS=triton.next_power_of_2(num_heads),
            HALF=head_dim // 2,
            TURNED=rotary.num_turned,
            DEPENDS=rotary.depends_on_length,
            HAS_NORM=weight_D is not None,
            FAST=x_NHD.is_cuda,
        )
    return out_NHD


@triton.jit
def cos_sin(angle, FAST: tl.constexpr):
    """Cosine and sine, within 1e-6 up to angles of a million: whole turns are taken off, in three parts of 2 pi."""
    turns = tl.floor(angle * 0.15915494309189535 + 0.5)
    angle = tl.fma(-turns, 6.28125, angle)
    angle = tl.fma(-turns, 1.9340515136718750e-3, angle)
    angle = tl.fma(-turns, 1.2556659146e-6, angle)
    if not FAST:
        return tl.cos(angle), tl.sin(angle)
    # The exact ones bring code for angles of any size, more than all the rest of the kernel.
    asm: tl.constexpr = "{ cos.approx.f32 $0, $2; sin.approx.f32 $1, $2; }"
    return tl.inline_asm_elementwise(asm, "=f,=f,f", [angle], (tl.float32, tl.float32), is_pure=True, pack=1)


@triton.jit
def rotated(low, high, cos, sin):
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def other_of(d, TURNED: tl.constexpr):
    """The other dim of each one's pair, where the first 2 * TURNED dims of a head turn; itself where it does not."""
    return tl.where(d < TURNED, d + TURNED, tl.where(d < 2 * TURNED, d - TURNED, d))


@triton.jit
def frequencies_at(length, threshold, num_frequencies):
    """Which row of frequencies that depend on the length is for rows of that length."""
    return tl.minimum(tl.maximum(length - threshold, 0), num_frequencies - 1)


@triton.jit
def _rotate_kernel(
    x,
    out,
    positions,
    lengths,
    inv_freq,
    weight,
    stride,
    threshold,
    num_frequencies,
    scaling,
    eps,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    TURNED: tl.constexpr,
    DEPENDS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    FAST: tl.constexpr,
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
    position = tl.load(positions + token)
    if DEPENDS:
        length = position + 1
        if lengths is not None:
            length = tl.load(lengths + token)
        inv_freq += frequencies_at(length, threshold, num_frequencies) * TURNED
    position = position.to(tl.float32)
    if TURNED == HALF:
        cos, sin = cos_sin(position * tl.load(inv_freq + d), FAST)
        x_HL, x_HR = rotated(x_HL, x_HR, (cos * scaling)[None, :], (sin * scaling)[None, :])
    else:
        head = x + token * stride + h[:, None] * (2 * HALF)
        for right in tl.static_range(2):
            own = right * HALF + d
            other = other_of(own, TURNED)
            y_HD = tl.load(head + other[None, :], mask=is_head, other=0.0).to(tl.float32)
            if HAS_NORM:
                y_HD *= unit_H[:, None] * tl.load(weight + other).to(tl.float32)[None, :]
            is_turned = own < 2 * TURNED
            cos, sin = cos_sin(position * tl.load(inv_freq + own % TURNED, mask=is_turned, other=0.0), FAST)
            cos, sin = tl.where(is_turned, cos * scaling, 1.0), tl.where(own < TURNED, -sin, sin) * scaling
            if right == 0:
                x_HL = x_HL * cos[None, :] + y_HD * sin[None, :]
            else:
                x_HR = x_HR * cos[None, :] + y_HD * sin[None, :]
    out_at = out + token * (HEADS * 2 * HALF) + at
    tl.store(out_at, x_HL.to(out.dtype.element_ty), mask=is_head)
    tl.store(out_at + HALF, x_HR.to(out.dtype.element_ty), mask=is_head)
