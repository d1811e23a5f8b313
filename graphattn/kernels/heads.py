"""Heads of a row's last token in the decode kernel: read, normed and rotated.

Suffix letters: L half of the head dim.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import rotate

cos_sin, rotated, other_of = (gluon.jit(each.fn) for each in (rotate.cos_sin, rotate.rotated, rotate.other_of))


@gluon.jit
def frequencies(inv_freq, d_1L, TURNED: gl.constexpr):
    """Of the dims of the low half and of the high one; 0 for those that do not turn."""
    HALF: gl.constexpr = d_1L.shape[1]
    if TURNED == HALF:
        low = gl.load(inv_freq + d_1L)
        return low, low
    low = gl.load(inv_freq + d_1L % TURNED, mask=d_1L < 2 * TURNED, other=0.0)
    return low, gl.load(inv_freq + (HALF + d_1L) % TURNED, mask=HALF + d_1L < 2 * TURNED, other=0.0)


@gluon.jit
def _turned(own, other, cos, sin, d_1L, scaling, TURNED: gl.constexpr):
    """Dims of a head of which the first 2 * TURNED turn, with the other ones of their pairs."""
    turned = own * cos + gl.where(d_1L < TURNED, -other, other) * sin
    return gl.where(d_1L < 2 * TURNED, turned * scaling, own)


@gluon.jit
def ready(at, mask, weight, last, TURNED: gl.constexpr, HAS_NORM: gl.constexpr, FAST: gl.constexpr):
    """Heads [G or 1, L] at `at`, low and high halves, normed and rotated to the position of the row's last token."""
    length, turns, scaling, eps, d_1L = last
    HALF: gl.constexpr = d_1L.shape[1]
    low, high = gl.load(at, mask=mask, other=0.0), gl.load(at + HALF, mask=mask, other=0.0)
    wide_low, wide_high = low.to(gl.float32), high.to(gl.float32)
    if HAS_NORM:
        square = gl.sum(wide_low * wide_low, 1) + gl.sum(wide_high * wide_high, 1)
        unit = gl.expand_dims(gl.rsqrt(square / (2 * HALF) + eps), 1)
        wide_low = wide_low * unit * gl.load(weight + d_1L).to(gl.float32)
        wide_high = wide_high * unit * gl.load(weight + HALF + d_1L).to(gl.float32)
    position = (length - 1).to(gl.float32)
    cos, sin = cos_sin(position * turns[0], FAST)
    if TURNED == HALF:
        wide_low, wide_high = rotated(wide_low, wide_high, cos * scaling, sin * scaling)
    else:
        high_1L = HALF + d_1L
        low_by, high_by = other_of(d_1L, TURNED) - d_1L, other_of(high_1L, TURNED) - high_1L
        low_other = gl.load(at + low_by, mask=mask, other=0.0).to(gl.float32)
        high_other = gl.load(at + HALF + high_by, mask=mask, other=0.0).to(gl.float32)
        if HAS_NORM:
            low_other = low_other * unit * gl.load(weight + d_1L + low_by).to(gl.float32)
            high_other = high_other * unit * gl.load(weight + high_1L + high_by).to(gl.float32)
        wide_low = _turned(wide_low, low_other, cos, sin, d_1L, scaling, TURNED)
        cos, sin = cos_sin(position * turns[1], FAST)
        wide_high = _turned(wide_high, high_other, cos, sin, high_1L, scaling, TURNED)
    return wide_low.to(low.dtype), wide_high.to(high.dtype)
