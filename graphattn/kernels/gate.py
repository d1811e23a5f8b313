"""`silu(gate) * up` of many rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import follow, is_chained

_BLOCK = tl.constexpr(1024)


def gate(x: Tensor) -> Tensor:
    """`silu(first half) * second half` of the last dimension, in one pass.

    Args:
        x: `[..., 2 * N]` contiguous, any floating dtype; computed in float32.

    Returns:
        `[..., N]`.
    """
    width = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    chained = is_chained(x.device)
    with torch.cuda.device_of(x):
        _gate[(out.numel() // width, triton.cdiv(width, _BLOCK.value))](x, out, width, chained, launch_pdl=chained)
    return out


@triton.jit
def _gate(x, out, width, CHAINED: tl.constexpr):
    if CHAINED:
        follow()
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    inside = column < width
    at = x + row * 2 * width + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)
