"""The draw of one token per row in one pass over the logits, for rows without top-k and top-p.

Letters: B rows of the batch, V vocabulary, S parts that the vocabulary is split in: where it is split changes no draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import InvalidArgumentError

if TYPE_CHECKING:
    from ..sampling import RowSampling

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)
_BLOCK = 1024
_MAX_SPLITS, _FEW_ROWS = 16, 8  # few rows fill no device, and are split into four times as many parts
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class DrawRows(NamedTuple):
    """What each row asks for, on the device; the arguments of `draw_gumbel` after the logits.

    Attributes:
        keys_B: [B] int64, the row's noise.
        temperature_B: [B] float32; 0 is greedy.
        log_min_p_B: [B] float32, -inf where a row has no min-p; None if none has.
    """

    keys_B: Tensor
    temperature_B: Tensor
    log_min_p_B: Tensor | None


def upload_rows(rows: Sequence[RowSampling], keys: Sequence[int], device: torch.device | str) -> DrawRows:
    """Sends what `draw_gumbel` needs of the rows in one pinned copy, without waiting for it.

    Args:
        rows: one per row of the logits; top-k (other than 1), top-p, penalty and bans are not looked at.
        keys: 64 bits for each row, signed or not, hashed from its seed and position.
        device: where the logits are.
    """
    count, params, device = len(rows), [row.params for row in rows], torch.device(device)
    # The caching host allocator keeps the pinned block until the copy has run.
    host = torch.empty(2 * count, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    packed = host.numpy()
    packed[:count] = np.array([key % 2**64 for key in keys], np.uint64).view(np.int64)
    temperature, log_min_p = packed[count:].view(np.float32).reshape(2, count)
    temperature[:] = [0 if p.is_greedy else min(max(p.temperature, 1e-30), 1e30) for p in params]
    log_min_p[:] = [math.log(p.min_p) if p.min_p and not p.is_greedy else -math.inf for p in params]
    sent = host.to(device, non_blocking=True)
    temperature_B, log_min_p_B = sent[count:].view(torch.float32).view(2, count)
    return DrawRows(sent[:count], temperature_B, log_min_p_B if (log_min_p > -math.inf).any() else None)


def draw_gumbel(
    logits_BV: Tensor,
    keys_B: Tensor,
    temperature_B: Tensor,
    log_min_p_B: Tensor | None = None,
    *,
    positions_B: Tensor | None = None,
    drawn_B: Tensor | None = None,
) -> Tensor:
    """Draws one token per row as `graphattn.draw.sample` does; waits for nothing and can be captured.

    The draw is the argmax of logits / temperature - log(noise), the lowest id on ties, over the tokens that min-p
    leaves. A row's noise depends on its key and the vocabulary index, and nothing depends on the other rows.

    Example:
        >>> token_ids_B = draw_gumbel(logits_BV, *upload_rows(rows, keys, logits_BV.device))  # doctest: +SKIP

    Args:
        logits_BV: [B, V] bfloat16, float16 or float32 without nan, of any strides. A row that is -inf throughout
            gives id 0.
        keys_B: [B] int64.
        temperature_B: [B] float32 in [1e-30, 1e30], or 0 for the most likely token; float64 is rounded to that.
        log_min_p_B: [B] float32 or float64 likewise, the log of min-p, -inf where it is off; None if no row has it.
        positions_B: [B] int32, of each row's last token; `keys_B` then are seeds in [0, 2**63), and a row's key is
            what `graphattn.draw` makes of its seed and the position behind that token.
        drawn_B: [B] int32, where the ids go too.

    Returns:
        [B] int64.

    Raises:
        InvalidArgumentError: the logits are of another shape or dtype, or the rows do not match them.
    """
    if logits_BV.dim() != 2 or logits_BV.dtype not in _DTYPES or not logits_BV.shape[1]:
        given = f"{logits_BV.dtype} {tuple(logits_BV.shape)}"
        raise InvalidArgumentError(f"logits must be bfloat16, float16 or float32 [B, V >= 1], got {given}")
    num_rows, vocab = logits_BV.shape
    floats = (torch.float32, torch.float64)
    for name, rows, dtypes in (
        ("keys", keys_B, (torch.int64,)),
        ("temperature", temperature_B, floats),
        ("log_min_p", log_min_p_B, floats),
        ("positions", positions_B, (torch.int32,)),
        ("drawn", drawn_B, (torch.int32,)),
    ):
        if rows is not None and (rows.dtype not in dtypes or rows.shape != (num_rows,) or not rows.is_contiguous()):
            given = f"{rows.dtype} {tuple(rows.shape)} of strides {rows.stride()}"
            allowed = " or ".join(map(str, dtypes))
            raise InvalidArgumentError(f"{name} must be contiguous {allowed} [B={num_rows}], got {given}")
    token_ids_B = torch.empty(num_rows, dtype=torch.int64, device=logits_BV.device)
    if not num_rows:
        return token_ids_B
    num_blocks = triton.cdiv(vocab, _BLOCK)
    span = triton.cdiv(num_blocks, _MAX_SPLITS * (4 if num_rows <= _FEW_ROWS else 1)) * _BLOCK
    num_splits = triton.cdiv(vocab, span)
    grid, padded = (num_rows, num_splits), triton.next_power_of_2(num_splits)
    score_BS = torch.empty(grid, dtype=torch.float64, device=logits_BV.device)
    id_BS = torch.empty(grid, dtype=torch.int32, device=logits_BV.device)
    peak_BS = None if log_min_p_B is None else torch.empty(grid, dtype=torch.float32, device=logits_BV.device)
    with torch.cuda.device_of(logits_BV):
        if peak_BS is not None:
            _peak[grid](logits_BV, *logits_BV.stride(), log_min_p_B, peak_BS, vocab, span, _BLOCK)
        # Fused multiply-adds could differ between the kernel with min-p and the one without, a row's token with them.
        _draw[grid](
            logits_BV,
            *logits_BV.stride(),
            keys_B,
            positions_B,
            temperature_B,
            log_min_p_B,
            peak_BS,
            score_BS,
            id_BS,
            vocab,
            span,
            _BLOCK,
            padded,
            enable_fp_fusion=False,
        )
        _reduce[(num_rows,)](score_BS, id_BS, token_ids_B, drawn_B, num_splits, padded, num_warps=1)
    return token_ids_B


@triton.jit
def _mix(z):
    """The finaliser of splitmix64, of unsigned numbers, so that >> shifts zeros in."""
    z = (z ^ (z >> 30)) * _MIX_1
    z = (z ^ (z >> 27)) * _MIX_2
    return z ^ (z >> 31)


@triton.jit
def _bits(key, index):
    """64 random bits for each vocabulary index."""
    return _mix(key.to(tl.uint64) + (index + 1).to(tl.uint32).to(tl.uint64) * _GOLDEN)


@triton.jit
def _key(seed, position):
    """What the noise of the token at a position is a hash of."""
    return _mix(_mix(seed.to(tl.uint64) + _GOLDEN) + (position + 1).to(tl.uint64) * _GOLDEN)


@triton.jit
def _exponential(z):
    """-log1p(-u) in float64 for u = max(z >> 11, 0.5) * 2**-53."""
    k = (z >> 11).to(tl.int64)
    # 1 - u is exact for every u but that of k = 0, whose logarithm rounds to -u; so log is as good as log1p.
    survival = (9007199254740992 - k).to(tl.float64) * 1.1102230246251565e-16
    return tl.where(k == 0, 5.551115123125783e-17, -tl.log(survival))


@triton.jit
def _load(row_ptr, index, stride_v, vocab):
    return tl.load(row_ptr + index.to(tl.int64) * stride_v, mask=index < vocab, other=-float("inf")).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["log_min_p_ptr", "peak_ptr"])
def _peak(logits_ptr, stride_b, stride_v, log_min_p_ptr, peak_ptr, vocab, span, BLOCK: tl.constexpr):
    """Largest logit in each part of each row that has a min-p."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(log_min_p_ptr + row) > -float("inf"):
        peak = tl.full([BLOCK], -float("inf"), tl.float32)
        for start in range(split * span, min(split * span + span, vocab), BLOCK):
            index = start + tl.arange(0, BLOCK)
            peak = tl.maximum(peak, _load(logits_ptr + row * stride_b, index, stride_v, vocab))
        tl.store(peak_ptr + row * tl.num_programs(1) + split, tl.max(peak, 0))


@triton.jit(do_not_specialize_on_alignment=["key_ptr", "position_ptr", "temperature_ptr", "log_min_p_ptr", "peak_ptr"])
def _draw(
    logits_ptr,
    stride_b,
    stride_v,
    key_ptr,
    position_ptr,
    temperature_ptr,
    log_min_p_ptr,
    peak_ptr,
    score_ptr,
    id_ptr,
    vocab,
    span,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Best score in each part of each row, and its id.

    The float64 logarithms cost most, so blocks that cannot hold the best are passed over. A score x - log(E) beats the
    best so far only if E < exp(x - best), and E >= u: u < exp(x - best) in float32 is enough, with room for rounding.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key, temperature = tl.load(key_ptr + row).to(tl.uint64), tl.load(temperature_ptr + row).to(tl.float32)
    if position_ptr is not None:
        key = _key(key, tl.load(position_ptr + row) + 1)
    greedy = temperature == 0
    divisor = tl.where(greedy, 1.0, temperature)
    floor = -float("inf")
    if log_min_p_ptr is not None:
        log_min_p = tl.load(log_min_p_ptr + row).to(tl.float32)
        if log_min_p > -float("inf"):
            part = tl.arange(0, SPLITS)
            peaks = tl.load(
                peak_ptr + row * tl.num_programs(1) + part, mask=part < tl.num_programs(1), other=-float("inf")
            )
            floor = tl.div_rn(tl.max(peaks, 0), divisor) + log_min_p
    inverse = 1.0 / divisor
    best, best_id = tl.full([], -float("inf"), tl.float64), split * span
    for start in range(split * span, min(split * span + span, vocab), BLOCK):
        index = start + tl.arange(0, BLOCK)
        logits = _load(logits_ptr + row * stride_b, index, stride_v, vocab)
        bound = best.to(tl.float32)
        if greedy:
            may_beat = logits > bound
        else:
            u = ((_bits(key, index) >> 41).to(tl.int32) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0  # 23 bits
            # Errors are below 1e-6 * |best| + 1e-4 where x is near enough to matter. A best of inf makes this nan, and
            # is not beaten.
            may_beat = u < tl.exp(tl.fma(logits, inverse, 1e-5 * tl.abs(bound) + 0.01 - bound))
        if tl.max(may_beat.to(tl.int32), 0) > 0:
            # A plain / is not rounded as IEEE wants and as torch does.
            x = tl.div_rn(logits, divisor)
            x = tl.where(x < floor, -float("inf"), x)
            score = x.to(tl.float64) - tl.where(greedy, 0.0, tl.log(_exponential(_bits(key, index))))
            top, at = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
            if top > best:
                best, best_id = top, start + at
    tl.store(score_ptr + row * tl.num_programs(1) + split, best)
    tl.store(id_ptr + row * tl.num_programs(1) + split, best_id)


@triton.jit(do_not_specialize_on_alignment=["drawn_ptr"])
def _reduce(score_ptr, id_ptr, token_id_ptr, drawn_ptr, num_splits, SPLITS: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    score = tl.load(score_ptr + row * num_splits + part, mask=part < num_splits, other=-float("inf"))
    best = tl.argmax(score, 0, tie_break_left=True)
    token_id = tl.load(id_ptr + row * num_splits + best)
    tl.store(token_id_ptr + row, token_id.to(tl.int64))
    if drawn_ptr is not None:
        tl.store(drawn_ptr + row, token_id)
