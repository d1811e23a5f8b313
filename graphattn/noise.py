"""The noise of a draw: a hash of the row's seed, the position of its token and the vocabulary index.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK_64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(z: int) -> int:
    """The finaliser of splitmix64; 0 stays 0, so whatever goes in has GOLDEN added at least once."""
    z &= MASK_64
    z = ((z ^ (z >> 30)) * _MIX_1) & MASK_64
    z = ((z ^ (z >> 27)) * _MIX_2) & MASK_64
    return z ^ (z >> 31)


def keys_of(seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    """What the noise of rows is a hash of, from int64 seeds in [0, 2**63) and positions of the tokens drawn; int64."""
    return _mix_(_mix_(seeds_R + _signed(GOLDEN)) + (positions_R + 1) * _signed(GOLDEN))


def exponentials(keys_R: Tensor, vocab: int) -> Tensor:
    """[R, V] float64 exponential noise, a function of the row's key and the vocabulary index."""
    z = _mix_(torch.arange(1, vocab + 1, device=keys_R.device) * _signed(GOLDEN) + keys_R[:, None])
    # 53 bits, all exact in float64. 0 would make the noise infinite and a banned token nan, which argmax picks.
    u = (z >> 11).bitwise_and_(MASK_64 >> 11).double().clamp_(min=0.5).mul_(2.0**-53)
    return u.neg_().log1p_().neg_()


def _signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def _mix_(z: Tensor) -> Tensor:
    """`mix` of the 64 bits of int64 numbers, in place."""
    # int64 >> n copies the sign down; a logical shift needs the mask.
    z.bitwise_xor_((z >> 30).bitwise_and_(MASK_64 >> 30)).mul_(_signed(_MIX_1))
    z.bitwise_xor_((z >> 27).bitwise_and_(MASK_64 >> 27)).mul_(_signed(_MIX_2))
    return z.bitwise_xor_((z >> 31).bitwise_and_(MASK_64 >> 31))
