"""An RMS norm, of a sum with a residual too, of many rows in one pass."""

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
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual.contiguous(), weight_K, total, normed, eps)
    return total, normed


def rms_norm(x: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    """`rms_norm(x) * weight`, computed in float32 and rounded once; `x` as for `add_norm`, of any strides."""
    x = x.contiguous()
    normed = torch.empty_like(x)
    _launch(x, None, weight_K, None, normed, eps)
    return normed


def _launch(
    x: Tensor, residual: Tensor | None, weight_K: Tensor, total: Tensor | None, normed: Tensor, eps: float
) -> None:
    num_in = x.shape[-1]
    chained, block = is_chained(x.device), triton.next_power_of_2(num_in)
    with torch.cuda.device_of(x):
        _norm[(x.numel() // num_in,)](
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


@triton.jit
def _norm(x, residual, weight, total, normed, eps, IN: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    k = tl.arange(0, BLOCK)
    inside = k < IN
    weight_K = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    if CHAINED:
        follow()
    at = tl.program_id(0).to(tl.int64) * IN + k
    sum_K = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        sum_K += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded_K = sum_K.to(total.dtype.element_ty)
        tl.store(total + at, rounded_K, mask=inside)
        sum_K = rounded_K.to(tl.float32)
    unit = tl.rsqrt(tl.sum(sum_K * sum_K, 0) / IN + eps)
    tl.store(normed + at, (sum_K * unit * weight_K).to(normed.dtype.element_ty), mask=inside)
