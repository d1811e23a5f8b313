"""Order and weight of logits as kernels see them; the weights are those of `graphattn.filters`, bit by bit."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-2139095041)  # the rank of -inf
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def rank(x):
    """int32 in the order of float32 numbers; 0.0 and -0.0 are one."""
    ordered = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return ordered ^ ((ordered >> 31) & 0x7FFFFFFF)


@triton.jit
def number(rank):
    """The float32 of a rank."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def upper_half(low, high):
    """The middle of two ranks, the upper one of two, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def lower_half(low, high):
    """The middle of two ranks, the lower one of two, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def weight(x, peak, BITS: tl.constexpr):
    """exp(x - peak) in int64 steps of 2**-BITS; compile without fused multiply-adds, which round otherwise."""
    peak = tl.maximum(tl.minimum(peak, _LARGEST), -_LARGEST)
    below = tl.maximum(tl.minimum(x, _LARGEST) - peak, -60.0)
    power = tl.floor(below * 1.4426950216293335 + 0.5)
    r = below - power * 0.693359375 - power * -0.00021219444170128554
    total = r * 0.0013933645095676184 + 0.008363177068531513
    total = total * r + 0.04166646674275398
    total = total * r + 0.16666576266288757
    total = total * r + 0.5
    total = total * (r * r) + r + 1.0
    shift = power.to(tl.int32) + (BITS - 23)
    return ((total * 8388608.0).to(tl.int64) << tl.maximum(shift, 0).to(tl.int64)) >> tl.maximum(-shift, 0).to(tl.int64)
