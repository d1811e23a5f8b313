"""A residual added and the sum normed, of many rows, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import follow, is_chained


def add_norm(x: Tensor, residual: Tensor, weight_K: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`total = x + residual`, rounded to their dtype, and `rms_norm(total) * weight`, computed in float32.

    Args:
        x: `[..., K]` contiguous, any floating dtype.
        residual: of its shape and dtype; any strides.
        weight_K: `[K]`.
        eps: of the norm.

    Returns:
        total, normed; both `[..., K]`, contiguous.
    """
    residual, num_in = residual.contiguous(), x.shape[-1]
    total, normed = torch.empty_like(x), torch.empty_like(x)
    chained, block = is_chained(x.device), triton.next_power_of_2(num_in)
    with torch.cuda.device_of(x):
        _add_norm[(x.numel() // num_in,)](
            x,
            residual,
            weight_K,
            total,
            normed,
            eps,
            IN=num_in,
            BLOCK=block,
            CHAINED=chained,
            num_warps=min(16, max(1, block // 512)),
            launch_pdl=chained,
        )
    return total, normed


@triton.jit
def _add_norm(x, residual, weight, total, normed, eps, IN: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    k = tl.arange(0, BLOCK)
    inside = k < IN
    weight_K = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    if CHAINED:
        follow()
    at = tl.program_id(0).to(tl.int64) * IN + k
    sum_K = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    sum_K += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    sum_K = sum_K.to(total.dtype.element_ty)
    tl.store(total + at, sum_K, mask=inside)
    wide_K = sum_K.to(tl.float32)
    unit = tl.rsqrt(tl.sum(wide_K * wide_K, 0) / IN + eps)
    tl.store(normed + at, (wide_K * unit * weight_K).to(normed.dtype.element_ty), mask=inside)
