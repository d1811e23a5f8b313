"""Linear layers over few rows, whose time is that of reading the weight once, with what stands beside them folded in.

One row is a product and a sum (here), from two rows on it is tensor cores (`mma.py`).

Suffix letters: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import InvalidArgumentError
from . import has_gluon
from .chain import follow, is_chained

MAX_ROWS = 32
DTYPES = (torch.bfloat16, torch.float16)
_REGISTERS = 128  # of a thread, that may hold weights which are ahead
_NEAR = tl.constexpr(8)  # inputs that a thread loads at once
_FEW = 16  # rows that one block of tensor cores holds
_LARGEST, _LARGEST_WIDE, _LARGEST_NARROW = 2**23, 2**27, 2**24  # weights; of larger ones cuBLAS is as near to the bytes


def suits(weight_NK: Tensor) -> bool:
    """Whether a linear of this weight can be computed here."""
    if weight_NK.dim() != 2:
        return False
    num_out, num_in = weight_NK.shape
    return (
        is_chained(weight_NK.device)
        and has_gluon()
        and weight_NK.dtype in DTYPES
        and weight_NK.is_contiguous()
        and num_out % 32 == 0
        and num_in % 128 == 0
    )


def is_faster(num_rows: int, weight_NK: Tensor) -> bool:
    """Whether `linear` is faster than cuBLAS for a weight that `suits`, as measured in steps (docs/design-notes.md)."""
    if num_rows > MAX_ROWS or weight_NK.data_ptr() % 16:
        return False
    num_out, num_in = weight_NK.shape
    if num_rows == 1:
        return True
    largest = _LARGEST
    if num_rows <= _FEW and num_out > num_in:
        largest = _LARGEST_WIDE
    elif num_rows <= _FEW and num_out <= 2048:
        largest = _LARGEST_NARROW
    return num_out * num_in <= largest


def linear(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    norm_K: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`linear(rms_norm(x) * norm)`, gated, plus `residual`, in one launch; added up in float32.

    Args:
        x: `[..., K]` bfloat16 or float16, `MAX_ROWS` rows at most in all.
        weight_NK: `[N, K]` that `suits`; not written by the launch right before (`chain.py`).
        bias_N: `[N]`.
        norm_K: `[K]` weight of an RMS norm of `x` before; None for none.
        eps: of that norm.
        gated: give `silu(first half of the outputs) * second half`, `[..., N / 2]`.
        residual: of the output's shape, added to it.

    Returns:
        `[..., N]`, `[..., N / 2]` if gated.
    """
    num_out, num_in = weight_NK.shape
    num_out = num_out // 2 if gated else num_out
    x_MK, residual_MN = _rows(x), None if residual is None else _rows(residual)
    if len(x_MK) > MAX_ROWS:
        raise InvalidArgumentError(f"{len(x_MK)} rows: this linear takes {MAX_ROWS} at most")
    out = torch.empty((*x.shape[:-1], num_out), dtype=x.dtype, device=x.device)
    kernel, blocks = _launch(len(x_MK), num_out, num_in, gated)
    chained = is_chained(x.device)
    with torch.cuda.device_of(x):
        kernel[(num_out // blocks["BLOCK_OUT"],)](
            x_MK,
            weight_NK,
            bias_N,
            norm_K,
            residual_MN,
            out,
            len(x_MK),
            x_MK.stride(0),
            0 if residual is None else residual_MN.stride(0),
            eps,
            IN=num_in,
            OUT=num_out,
            GATED=gated,
            CHAINED=chained,
            launch_pdl=chained,
            **blocks,
        )
    return out


def _rows(x: Tensor) -> Tensor:
    """`x` as `[M, K]`, each row of one piece and on 16 bytes."""
    x_MK = x.reshape(-1, x.shape[-1])
    is_aligned = x_MK.stride(1) == 1 and x_MK.stride(0) % 8 == 0 and x_MK.data_ptr() % 16 == 0
    return x_MK if is_aligned else x_MK.clone(memory_format=torch.contiguous_format)


def _launch(num_rows: int, num_out: int, num_in: int, gated: bool) -> tuple[object, dict[str, int]]:
    """Which kernel, and its blocks, as measured in steps (docs/design-notes.md)."""
    is_wide = num_out > num_in
    if num_rows == 1:
        block_out, block_in, warps = (2, 512, 2) if num_in <= 1024 else (4, 1024, 4) if is_wide else (2, 2048, 4)
        return _one_row, {"BLOCK_OUT": block_out, "BLOCK_IN": block_in, "num_warps": warps}
    from .mma import few_rows

    rows, warps = _FEW if num_rows <= _FEW else MAX_ROWS, 4
    if gated and rows == MAX_ROWS:
        block_out, warps = 8, 2
    elif gated:
        block_out = 16 if num_in <= 2048 else 8
    elif is_wide:
        block_out = 32 if num_out >= 4096 else 16
    elif rows == MAX_ROWS:
        block_out = 8 if num_in > 2 * num_out else 16
    elif num_out >= 2048 or num_in <= 2 * num_out:
        block_out = 16
    else:
        block_out, warps = 8, 8 if num_in % 256 == 0 else 4
    part = num_in // warps
    block_in = max(size for size in (32, 64, 128) if part % size == 0)
    held = max(1, _REGISTERS * 64 // (block_out * (2 if gated else 1) * block_in))
    blocks = {"ROWS": rows, "BLOCK_OUT": block_out, "BLOCK_IN": block_in, "WARPS": warps}
    return few_rows, {**blocks, "HELD": min(part // block_in, held), "num_warps": warps}


@triton.jit
def _one_row(
    x,
    weight,
    bias,
    norm,
    residual,
    out,
    num_rows,
    stride_x,
    stride_residual,
    eps,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GATED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """A product and sum; the first weights are fetched before the row is there, the rest one block ahead.

    What a thread adds up, it adds up over neighbouring inputs first: fewer registers, so that more programs are on a
    multiprocessor at once, and some of them always read.
    """
    n, k = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    weight_NK = weight + n.to(tl.int64)[:, None] * IN + k[None, :]
    tile_NK = tl.load(weight_NK, mask=k[None, :] < IN, other=0.0)
    if GATED:
        up_NK = tl.load(weight_NK + OUT * IN, mask=k[None, :] < IN, other=0.0)
    if CHAINED:
        follow()
    acc_NP = tl.zeros([BLOCK_OUT, BLOCK_IN // _NEAR], tl.float32)
    up_acc_NP = tl.zeros([BLOCK_OUT, BLOCK_IN // _NEAR], tl.float32)
    square_K = tl.zeros([BLOCK_IN], tl.float32)
    for start in tl.static_range(0, IN, BLOCK_IN):
        inside = start + k < IN
        x_K = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
        if norm is not None:
            square_K += x_K * x_K
            x_K *= tl.load(norm + start + k, mask=inside, other=0.0).to(tl.float32)
        if start + BLOCK_IN < IN:
            ahead = start + BLOCK_IN
            next_NK = tl.load(weight_NK + ahead, mask=ahead + k[None, :] < IN, other=0.0)
            if GATED:
                next_up_NK = tl.load(weight_NK + OUT * IN + ahead, mask=ahead + k[None, :] < IN, other=0.0)
        acc_NP += _near_sums(tile_NK, x_K, BLOCK_OUT, BLOCK_IN)
        if GATED:
            up_acc_NP += _near_sums(up_NK, x_K, BLOCK_OUT, BLOCK_IN)
        if start + BLOCK_IN < IN:
            tile_NK = next_NK
            if GATED:
                up_NK = next_up_NK
    result_N, up_N = tl.sum(acc_NP, 1), tl.sum(up_acc_NP, 1)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(square_K, 0) / IN + eps)
        result_N, up_N = result_N * scale, up_N * scale
    if bias is not None:
        result_N += tl.load(bias + n).to(tl.float32)
        if GATED:
            up_N += tl.load(bias + OUT + n).to(tl.float32)
    if GATED:
        result_N = result_N * tl.sigmoid(result_N) * up_N
    if residual is not None:
        result_N += tl.load(residual + n).to(tl.float32)
    tl.store(out + n, result_N.to(out.dtype.element_ty))


@triton.jit
def _near_sums(weight_NK, x_K, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    """Products, those of `_NEAR` neighbouring inputs added up, `[N, K / _NEAR]`."""
    products_NK = weight_NK.to(tl.float32) * x_K[None, :]
    return tl.sum(tl.reshape(products_NK, [BLOCK_OUT, BLOCK_IN // _NEAR, _NEAR]), 2)
