"""Linear layers over few rows, whose time is that of reading the weight once, with what stands beside them folded in.

Suffix letters: M rows, K inputs, N outputs, S parts of the inputs, each added up by a warp of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import follow, is_chained

MAX_ROWS = 16
DTYPES = (torch.bfloat16, torch.float16)
_MAX_WEIGHTS = 2**24  # of a linear that is ours at more rows than one: beyond, cuBLAS is as near to the bytes


def suits(weight_NK: Tensor) -> bool:
    """Whether a linear of this weight can be computed here."""
    if weight_NK.dim() != 2:
        return False
    num_out, num_in = weight_NK.shape
    return (
        is_chained(weight_NK.device)
        and weight_NK.dtype in DTYPES
        and weight_NK.is_contiguous()
        and num_out % 32 == 0
        and num_in % 128 == 0
    )


def is_faster(num_rows: int, weight_NK: Tensor) -> bool:
    """Whether `linear` is faster than cuBLAS for a weight that `suits` (docs/design-notes.md)."""
    is_small = num_rows == 1 or (num_rows <= MAX_ROWS and weight_NK.numel() <= _MAX_WEIGHTS)
    return is_small and weight_NK.data_ptr() % 16 == 0


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
    out = torch.empty((*x.shape[:-1], num_out), dtype=x.dtype, device=x.device)
    launch, chained = _launch(len(x_MK), num_out, gated), is_chained(x.device)
    with torch.cuda.device_of(x):
        launch.kernel[(num_out // launch.block_out,)](
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
            ROWS=launch.rows,
            BLOCK_OUT=launch.block_out,
            BLOCK_IN=launch.block_in,
            WARPS=launch.warps,
            GATED=gated,
            CHAINED=chained,
            num_warps=launch.warps,
            launch_pdl=chained,
        )
    return out


def _rows(x: Tensor) -> Tensor:
    """`x` as `[M, K]`, each row of one piece and on 16 bytes."""
    x_MK = x.reshape(-1, x.shape[-1])
    is_aligned = x_MK.stride(1) == 1 and x_MK.stride(0) % 8 == 0 and x_MK.data_ptr() % 16 == 0
    return x_MK if is_aligned else x_MK.clone(memory_format=torch.contiguous_format)


class _Launch(NamedTuple):
    kernel: object
    rows: int
    block_out: int
    block_in: int
    warps: int


def _launch(num_rows: int, num_out: int, gated: bool) -> _Launch:
    """Which kernel, and its blocks, as measured between other kernels (docs/design-notes.md)."""
    is_wide = num_out >= 2048
    if num_rows == 1:
        if gated:
            return _Launch(_one_row, 1, 4, 512, 4)
        return _Launch(_one_row, 1, 16, 1024, 8) if is_wide else _Launch(_one_row, 1, 4, 2048, 8)
    return _Launch(_few_rows, 16, 16, 128, 4) if is_wide else _Launch(_few_rows, 16, 8, 256, 8)


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
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WARPS: tl.constexpr,
    GATED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """A product and sum; the first weights are fetched before the row is there, the rest one block ahead."""
    n, k = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    weight_NK = weight + n.to(tl.int64)[:, None] * IN + k[None, :]
    tile_NK = tl.load(weight_NK, mask=k[None, :] < IN, other=0.0)
    if GATED:
        up_NK = tl.load(weight_NK + OUT * IN, mask=k[None, :] < IN, other=0.0)
    if CHAINED:
        follow()
    acc_NK = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    up_acc_NK = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
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
        acc_NK += tile_NK.to(tl.float32) * x_K[None, :]
        if GATED:
            up_acc_NK += up_NK.to(tl.float32) * x_K[None, :]
        if start + BLOCK_IN < IN:
            tile_NK = next_NK
            if GATED:
                up_NK = next_up_NK
    result_N, up_N = tl.sum(acc_NK, 1), tl.sum(up_acc_NK, 1)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(square_K, 0) / IN + eps)
        result_N, up_N = result_N * scale, up_N * scale
    result_N = _finish(result_N, up_N, bias, residual, n, n, n < OUT, OUT, GATED)
    tl.store(out + n, result_N.to(out.dtype.element_ty))


@triton.jit
def _few_rows(
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
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WARPS: tl.constexpr,
    GATED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """On tensor cores, weights as in `_one_row`.

    Each warp adds up a part of the inputs of its own: one chain of dots as long as all of them would wait for itself.
    """
    PART: tl.constexpr = IN // WARPS
    n, m = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, ROWS)
    s, k = tl.arange(0, WARPS)[:, None, None] * PART, tl.arange(0, BLOCK_IN)[None, None, :]
    weight_SNK = weight + n.to(tl.int64)[None, :, None] * IN + s + k
    tile_SNK = tl.load(weight_SNK, mask=k < PART, other=0.0)
    if GATED:
        up_SNK = tl.load(weight_SNK + OUT * IN, mask=k < PART, other=0.0)
    if CHAINED:
        follow()
    is_row = m[None, :, None] < num_rows
    x_SMK = x + m[None, :, None] * stride_x + s + k
    acc_SMN = tl.zeros([WARPS, ROWS, BLOCK_OUT], tl.float32)
    up_acc_SMN = tl.zeros([WARPS, ROWS, BLOCK_OUT], tl.float32)
    square_SM = tl.zeros([WARPS, ROWS], tl.float32)
    for start in tl.static_range(0, PART, BLOCK_IN):
        inside = start + k < PART
        rows_SMK = tl.load(x_SMK + start, mask=is_row & inside, other=0.0)
        if start + BLOCK_IN < PART:
            ahead = start + BLOCK_IN
            next_SNK = tl.load(weight_SNK + ahead, mask=ahead + k < PART, other=0.0)
            if GATED:
                next_up_SNK = tl.load(weight_SNK + OUT * IN + ahead, mask=ahead + k < PART, other=0.0)
        if norm is not None:
            wide_SMK = rows_SMK.to(tl.float32)
            square_SM += tl.sum(wide_SMK * wide_SMK, 2)
            wide_SMK *= tl.load(norm + s + start + k, mask=inside, other=0.0).to(tl.float32)
            rows_SMK = wide_SMK.to(x.dtype.element_ty)
        acc_SMN = tl.dot(rows_SMK, tl.permute(tile_SNK, (0, 2, 1)), acc_SMN)
        if GATED:
            up_acc_SMN = tl.dot(rows_SMK, tl.permute(up_SNK, (0, 2, 1)), up_acc_SMN)
        if start + BLOCK_IN < PART:
            tile_SNK = next_SNK
            if GATED:
                up_SNK = next_up_SNK
    result_MN, up_MN = tl.sum(acc_SMN, 0), tl.sum(up_acc_SMN, 0)
    if norm is not None:
        scale_M1 = tl.rsqrt(tl.sum(square_SM, 0) / IN + eps)[:, None]
        result_MN, up_MN = result_MN * scale_M1, up_MN * scale_M1
    is_row = m[:, None] < num_rows
    at = m[:, None] * stride_residual + n[None, :]
    result_MN = _finish(result_MN, up_MN, bias, residual, n[None, :], at, is_row, OUT, GATED)
    tl.store(out + m[:, None] * OUT + n[None, :], result_MN.to(out.dtype.element_ty), mask=is_row)


@triton.jit
def _finish(result, up, bias, residual, n, residual_at, mask, OUT: tl.constexpr, GATED: tl.constexpr):
    """Bias, gate and residual, in float32."""
    if bias is not None:
        result += tl.load(bias + n).to(tl.float32)
        if GATED:
            up += tl.load(bias + OUT + n).to(tl.float32)
    if GATED:
        result = result * tl.sigmoid(result) * up
    if residual is not None:
        result += tl.load(residual + residual_at, mask=mask, other=0.0).to(tl.float32)
    return result
