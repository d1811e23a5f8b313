"""The noise of a draw as kernels compute it, the same as `graphattn.noise` does."""

from __future__ import annotations

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)


@triton.jit
def mix(z):
    """The finaliser of splitmix64, of unsigned numbers, so that >> shifts zeros in."""
    z = (z ^ (z >> 30)) * _MIX_1
    z = (z ^ (z >> 27)) * _MIX_2
    return z ^ (z >> 31)


@triton.jit
def bits(key, index):
    """64 random bits for each vocabulary index."""
    return mix(key.to(tl.uint64) + (index + 1).to(tl.uint32).to(tl.uint64) * _GOLDEN)


@triton.jit
def key_of(seed, position):
    """What the noise of the token at a position is a hash of."""
    return mix(mix(seed.to(tl.uint64) + _GOLDEN) + (position + 1).to(tl.uint64) * _GOLDEN)


@triton.jit
def exponential(z):
    """-log1p(-u) in float64 for u = max(z >> 11, 0.5) * 2**-53."""
    k = (z >> 11).to(tl.int64)
    # 1 - u is exact for every u but that of k = 0, whose logarithm rounds to -u; so log is as good as log1p.
    survival = (9007199254740992 - k).to(tl.float64) * 1.1102230246251565e-16
    return tl.where(k == 0, 5.551115123125783e-17, -tl.log(survival))
