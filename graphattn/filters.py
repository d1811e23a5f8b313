"""What top-k, top-p and min-p leave of a row: thresholds on its logits over temperature.

Letters: R rows, V vocabulary, H largest logits in order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LN2_HIGH, LN2_LOW = 0.693359375, -0.00021219444170128554  # the first has so few bits that small multiples are exact
LOG2_E = 1.4426950216293335
# exp(r) = 1 + r + r * r * (c0 + c1 * r + ...) to 1.1e-8 for |r| <= ln(2) / 2; each is exact in float32.
EXP = (0.5, 0.16666576266288757, 0.04166646674275398, 0.008363177068531513, 0.0013933645095676184)
LEAST = -60.0  # what is that much less likely than the most likely token weighs nothing


def weight_bits(vocab: int) -> int:
    """Bits behind the point of a weight; a vocabulary of weights then adds up to less than 2**63."""
    return min(44, 61 - vocab.bit_length())


def weights(x_RV: Tensor, peak_R1: Tensor, vocab: int) -> Tensor:
    """exp(x - peak) in int64 steps of 2**-bits: integer sums are exact, so no device or batch size can change them.

    In float32 it is made of sums, products and shifts alone, each rounded as IEEE says, so that every device and our
    kernel get the same bits, and errs by less than 1e-6 of itself. In float64 it is `torch.exp`.

    Args:
        x_RV: float32 or float64, at most `peak_R1`.
        peak_R1: of the same dtype.
        vocab: how many may be added up.
    """
    bits, largest = weight_bits(vocab), torch.finfo(x_RV.dtype).max
    # inf - inf is a nan, which has no int64: infinite logits are taken for the largest that are finite.
    below_RV = x_RV.clamp(max=largest) - peak_R1.clamp(-largest, largest)
    if x_RV.dtype == torch.float64:
        return below_RV.exp_().mul_(2.0**bits).round_().long()
    below_RV = below_RV.clamp_(min=LEAST)
    power_RV = (below_RV * LOG2_E).add_(0.5).floor_()
    r_RV = below_RV - power_RV * LN2_HIGH - power_RV * LN2_LOW
    sum_RV = torch.full_like(r_RV, EXP[-1])
    for factor in EXP[-2::-1]:
        sum_RV = sum_RV.mul_(r_RV).add_(factor)
    sum_RV = sum_RV.mul_(r_RV * r_RV).add_(r_RV).add_(1.0)
    shift_RV = power_RV.long() + (bits - 23)
    return ((sum_RV * 2.0**23).long() << shift_RV.clamp(min=0)) >> (-shift_RV).clamp_(min=0)


def filtered(x_RV: Tensor, log_min_p_R1: Tensor, top_k_R1: Tensor, tail_R1: Tensor, num_sorted: int) -> Tensor:
    """Logits over temperature with -inf where top-k, top-p or min-p removes.

    Args:
        x_RV: float32 or float64.
        log_min_p_R1: float64, -inf where it is off.
        top_k_R1: float64, 0 where it is off; tokens that tie with the last one kept are kept.
        tail_R1: float64, 1 - p, or -1 where top-p is off.
        num_sorted: how many of the largest logits any row needs in order: its top-k, or for top-p alone all of them.
    """
    vocab, is_off_R1 = x_RV.shape[1], log_min_p_R1 == -math.inf
    floor_R1 = x_RV.amax(-1, keepdim=True) + log_min_p_R1.to(x_RV.dtype)
    floor_R1 = floor_R1.masked_fill_(is_off_R1, -math.inf)
    if num_sorted:
        top_RH = x_RV.topk(num_sorted).values if num_sorted < vocab else x_RV.sort(descending=True).values
        is_cut_R1 = (top_k_R1 > 0) & (top_k_R1 < vocab)
        last_R1 = torch.where(is_cut_R1, top_k_R1, num_sorted).clamp_(max=num_sorted).long() - 1
        top_floor_R1 = _nucleus_floor(x_RV, top_RH, top_RH.gather(1, last_R1), tail_R1)
        is_whole_R1 = ~is_cut_R1 & (tail_R1 < 0)
        floor_R1 = torch.maximum(floor_R1, top_floor_R1.masked_fill_(is_whole_R1, -math.inf))
    return x_RV.masked_fill(x_RV < floor_R1, -math.inf)


def _nucleus_floor(x_RV: Tensor, top_RH: Tensor, floor_R1: Tensor, tail_R1: Tensor) -> Tensor:
    """Least logit top-p keeps of those >= floor: one with more than `tail` (1 - p) of the weight from it downwards."""
    vocab, peak_R1 = x_RV.shape[1], top_RH[:, :1]
    weight_RH, floor_weight_R1 = weights(top_RH, peak_R1, vocab), weights(floor_R1, peak_R1, vocab)
    ties_R1 = (x_RV == floor_R1).sum(-1, keepdim=True)
    total_R1 = weight_RH.masked_fill(top_RH <= floor_R1, 0).sum(-1, keepdim=True) + ties_R1 * floor_weight_R1
    below_RH = total_R1 - weight_RH.cumsum(-1) + weight_RH
    kept_RH = (below_RH.double() > tail_R1 * total_R1.double()) & (top_RH >= floor_R1)
    return top_RH.gather(1, kept_RH.sum(-1, keepdim=True).clamp(min=1) - 1)
