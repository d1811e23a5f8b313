"""The draw of one token per row from its logits, without an order of them all.

A row without top-k and top-p takes the best score in one pass. For the others a first pass takes the largest logit of
each chunk of the vocabulary. From those follows a bound that all must reach which top-k and top-p keep; a second pass
gathers what reaches it, which is little, and then one program finds the exact threshold and draws.

Letters: B rows of the batch, V vocabulary, F numbers of an `Ask`, S parts that the vocabulary is split in, C chunks, W
words of a set of ids. How the vocabulary is parted changes no draw.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..errors import InvalidArgumentError
from .choose import choose
from .scan import gather, survey

_BLOCK, _CHUNK = 1024, 256
_WIDE = 2048  # elements looked through at once by the program that draws
_ROOM = 4096  # of what reaches a row's bound; a row with more is looked through again and again
_MAX_SPLITS, _FEW_ROWS = 16, 8  # few rows fill no device, and are split into four times as many parts
_REGISTERS = 80  # of a thread in the second pass; for more, filters keep rows without them from filling the device
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUM_FIELDS = 7  # of an `Ask`


class Edits(NamedTuple):
    """What is done to the logits of a row before it draws.

    Attributes:
        token_ids_B: [B] int32, each row's last token, which it has seen whatever its set says; the draw adds it to that
            of a row with a penalty, unless it is the first token of the row.
        sets_2RW: [2, at least B, W] int32, the ids that each row has seen, and those banned for it: id i is bit i % 32
            of word i // 32.
    """

    token_ids_B: Tensor
    sets_2RW: Tensor


def draw_gumbel(
    logits_BV: Tensor,
    asks_FB: Tensor,
    positions_B: Tensor,
    *,
    edits: Edits | None = None,
    drawn_B: Tensor | None = None,
) -> Tensor:
    """Draws one token per row as `graphattn.draw.sample` does; waits for nothing and can be captured.

    The draw is the argmax of logits / temperature - log(noise), the lowest id on ties, over the tokens that top-k,
    top-p and min-p leave. A row's noise depends on its seed, the position and the vocabulary index, and nothing depends
    on the other rows.

    Example:
        >>> token_ids_B = draw_gumbel(logits_BV, asks_FB, positions_B)  # doctest: +SKIP

    Args:
        logits_BV: [B, V] bfloat16, float16 or float32, of any strides. A row that is -inf throughout gives id 0, one
            with a NaN -1.
        asks_FB: [F, B] int64, the numbers of each row's `Ask`: its seed, the others as bits of a float64.
        positions_B: [B] int32 or int64, of each row's last token; the one behind it is drawn.
        edits: None if the logits have penalty and bans already.
        drawn_B: [B] int32, where the ids go too, 0 in place of -1: what a step feeds must be in the vocabulary.

    Returns:
        [B] int64.

    Raises:
        InvalidArgumentError: the logits are of another shape or dtype, or something else does not match them.
    """
    if logits_BV.dim() != 2 or logits_BV.dtype not in _DTYPES or not logits_BV.shape[1]:
        given = f"{logits_BV.dtype} {tuple(logits_BV.shape)}"
        raise InvalidArgumentError(f"logits must be bfloat16, float16 or float32 [B, V >= 1], got {given}")
    (num_rows, vocab), device = logits_BV.shape, logits_BV.device
    token_ids_B, sets_2RW = (None, None) if edits is None else edits
    for name, rows, dtypes in (
        ("positions", positions_B, (torch.int32, torch.int64)),
        ("token_ids", token_ids_B, (torch.int32,)),
        ("drawn", drawn_B, (torch.int32,)),
    ):
        if rows is not None and (rows.dtype not in dtypes or rows.shape != (num_rows,) or not rows.is_contiguous()):
            given = f"{rows.dtype} {tuple(rows.shape)} of strides {rows.stride()}"
            allowed = " or ".join(map(str, dtypes))
            raise InvalidArgumentError(f"{name} must be contiguous {allowed} [B={num_rows}], got {given}")
    if asks_FB.dtype != torch.int64 or asks_FB.shape != (NUM_FIELDS, num_rows) or (num_rows and asks_FB.stride(1) != 1):
        given = f"{asks_FB.dtype} {tuple(asks_FB.shape)} of strides {asks_FB.stride()}"
        raise InvalidArgumentError(f"asks must be int64 [{NUM_FIELDS}, B={num_rows}], rows side by side, got {given}")
    if sets_2RW is not None:
        is_small = sets_2RW.shape[1] < num_rows or sets_2RW.shape[2] * 32 < vocab
        if sets_2RW.dtype != torch.int32 or is_small or not sets_2RW.is_contiguous():
            given = f"{sets_2RW.dtype} {tuple(sets_2RW.shape)}"
            raise InvalidArgumentError(f"sets must be contiguous int32 [2, B={num_rows}, V={vocab} / 32], got {given}")
    drawn_ids_B = torch.empty(num_rows, dtype=torch.int64, device=device)
    if not num_rows:
        return drawn_ids_B
    span = triton.cdiv(triton.cdiv(vocab, _BLOCK), _MAX_SPLITS * (4 if num_rows <= _FEW_ROWS else 1)) * _BLOCK
    num_splits, num_chunks = triton.cdiv(vocab, span), triton.cdiv(vocab, _CHUNK)

    def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((num_rows, *shape), dtype=dtype, device=device)

    peak_BC, mass_BC = scratch(torch.float32, num_chunks), scratch(torch.float32, num_chunks)
    score_BS, id_BS = scratch(torch.float64, num_splits), scratch(torch.int32, num_splits)
    weight_BS = scratch(torch.int64, num_splits)
    count_B, bound_B = scratch(torch.int32), scratch(torch.int32)
    held_BH, held_ids_BH = scratch(torch.float32, _ROOM), scratch(torch.int32, _ROOM)
    if edits is None:
        token_ids_B, sets_2RW = count_B, count_B.expand(2, 1, num_rows)  # not read
    source = (logits_BV, *logits_BV.stride(), vocab, asks_FB, asks_FB.stride(0), positions_B)
    source += (token_ids_B, sets_2RW, *sets_2RW.stride()[:2], edits is not None)
    found = (peak_BC, mass_BC, num_chunks, count_B, bound_B, weight_BS, held_BH, held_ids_BH, _ROOM, score_BS, id_BS)
    sizes = {"CHUNKS": triton.next_power_of_2(num_chunks), "BITS": min(44, 61 - vocab.bit_length())}
    sizes |= {"enable_fp_fusion": False}  # torch rounds products before it adds them
    parts = {"BLOCK": _BLOCK, "CHUNK": _CHUNK}
    with torch.cuda.device_of(logits_BV):  # Triton launches on the current device
        grid = num_rows, num_splits
        survey[grid](*source, peak_BC, mass_BC, count_B, num_chunks, span, **parts, enable_fp_fusion=False)
        gather[grid](*source, *found, span, **parts, **sizes, maxnreg=_REGISTERS)
        splits = {"SPLITS": triton.next_power_of_2(num_splits)}
        choose[(num_rows,)](
            *source, *found, drawn_ids_B, drawn_B, num_splits, BLOCK=_WIDE, **splits, **sizes, num_warps=8
        )
    return drawn_ids_B
