"""A linear of few rows on tensor cores, whose weights go from memory to registers and nowhere between.

Written in Gluon, Triton's language with layouts, since `tl.dot` takes its operands through shared memory, and what a
multiprocessor has in flight there, with a barrier for each block, is less than what it can hold in registers. Tensor
cores do not mind in which order inputs are added up, so a thread holds 16 bytes that lie together (`k_width=8`).

Suffix letters: S warps, each with a part of the inputs of its own, M rows, K inputs, N outputs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from . import chain
from .axes import along

follow = gluon.jit(chain.follow.fn)


@gluon.jit(do_not_specialize=["num_rows"])  # one kernel for all buckets that have as many blocks
def few_rows(
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
    IN: gl.constexpr,
    OUT: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_OUT: gl.constexpr,
    BLOCK_IN: gl.constexpr,
    HELD: gl.constexpr,
    WARPS: gl.constexpr,
    GATED: gl.constexpr,
    CHAINED: gl.constexpr,
):
    """`HELD` blocks of a warp's part of the weights are fetched before the rows are there, and as many stay ahead."""
    PART: gl.constexpr = IN // WARPS
    BLOCKS: gl.constexpr = PART // BLOCK_IN
    products: gl.constexpr = gl.NVMMADistributedLayout([2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    lhs: gl.constexpr = gl.DotOperandLayout(0, products, k_width=8)
    rhs: gl.constexpr = gl.DotOperandLayout(1, products, k_width=8)
    first_n = gl.program_id(0) * BLOCK_OUT

    s, k = along(0, WARPS, 0, rhs) * PART, along(0, BLOCK_IN, 1, rhs)
    n = first_n + along(0, BLOCK_OUT, 2, rhs)
    weight_SKN = weight + n.to(gl.int64) * IN + (s + k)
    tiles, ups = (), ()
    for block in gl.static_range(HELD):
        tiles = tiles + (gl.load(weight_SKN + block * BLOCK_IN),)
        if GATED:
            ups = ups + (gl.load(weight_SKN + OUT * IN + block * BLOCK_IN),)
    if CHAINED:
        follow()

    s, k = along(0, WARPS, 0, lhs) * PART, along(0, BLOCK_IN, 2, lhs)
    m = along(0, ROWS, 1, lhs)
    x_SMK = x + m * stride_x + (s + k)
    acc_SMN = gl.zeros([WARPS, ROWS, BLOCK_OUT], gl.float32, products)
    up_acc_SMN = gl.zeros([WARPS, ROWS, BLOCK_OUT], gl.float32, products)
    square_SM = gl.zeros([WARPS, ROWS], gl.float32, gl.SliceLayout(2, lhs))
    for block in gl.static_range(BLOCKS):
        rows_SMK = gl.load(x_SMK + block * BLOCK_IN, mask=(m < num_rows) & (s + k < IN), other=0.0)
        if block + HELD < BLOCKS:
            ahead = weight_SKN + (block + HELD) * BLOCK_IN
            tiles = tiles + (gl.load(ahead),)
            if GATED:
                ups = ups + (gl.load(ahead + OUT * IN),)
        if norm is not None:
            wide_SMK = rows_SMK.to(gl.float32)
            square_SM += gl.sum(wide_SMK * wide_SMK, 2)
            wide_SMK *= gl.load(norm + block * BLOCK_IN + s + k).to(gl.float32)
            rows_SMK = wide_SMK.to(x.dtype.element_ty)
        acc_SMN = mma_v2(rows_SMK, tiles[block], acc_SMN)
        if GATED:
            up_acc_SMN = mma_v2(rows_SMK, ups[block], up_acc_SMN)

    stored: gl.constexpr = gl.BlockedLayout([1, 1], [32 // BLOCK_OUT, BLOCK_OUT], [WARPS, 1], [1, 0])
    result_MN = gl.convert_layout(gl.sum(acc_SMN, 0), stored)
    up_MN = gl.convert_layout(gl.sum(up_acc_SMN, 0), stored)
    if norm is not None:
        square_M = gl.convert_layout(gl.sum(square_SM, 0), gl.SliceLayout(1, stored))
        scale_M1 = gl.expand_dims(gl.rsqrt(square_M / IN + eps), 1)
        result_MN, up_MN = result_MN * scale_M1, up_MN * scale_M1
    n = gl.expand_dims(first_n + gl.arange(0, BLOCK_OUT, gl.SliceLayout(0, stored)), 0)
    m = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, stored)), 1)
    if bias is not None:
        result_MN += gl.load(bias + n).to(gl.float32)
        if GATED:
            up_MN += gl.load(bias + OUT + n).to(gl.float32)
    if GATED:
        result_MN = result_MN / (1.0 + gl.exp(-result_MN)) * up_MN
    if residual is not None:
        result_MN += gl.load(residual + m * stride_residual + n, mask=m < num_rows, other=0.0).to(gl.float32)
    gl.store(out + m * OUT + n, result_MN.to(out.dtype.element_ty), mask=m < num_rows)
