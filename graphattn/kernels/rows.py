"""The first launch of a decode step: what it reads, from the state of its rows, which it then moves on.

Shape letters: R rows of the largest bucket, S = R with alignment, B rows of the bucket, M pages that one row may have,
G layer groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512  # pages copied at once


def feed_rows(
    fields: Tensor,
    candidates: Tensor,
    tables_GRM: Tensor,
    token_ids_R: Tensor,
    positions_R: Tensor,
    order_R: Tensor,
    csr_G: Tensor,
    arrivals: Tensor,
    *,
    stride: int,
    bucket: int,
    at_indptr: int,
    at_indices: int,
    page_size: int,
) -> None:
    """Derives tokens, positions and page tables of the first B rows; then active ones are a token longer, and their
    next token comes from their own place behind the first S candidates. Waits for nothing and can be captured.

    All tensors are int32 and contiguous, on one device.

    Args:
        fields: one behind the other, S apart: tokens of each row with the one fed now, at least 1; whether it is
            active (0 or 1; others are padding: token 0, length 1, page 0, and stay so); which candidate it feeds.
        candidates: token ids.
        tables_GRM: each group's pages of each row, in order.
        token_ids_R, positions_R: where the token of each row and its position go.
        order_R: where the rows themselves go, the longest first, of equals the first.
        csr_G: where each group's last_page_len, indptr and indices go, the latter two from `at_indptr` and
            `at_indices` on. The first number of indptr must be 0 already.
        arrivals: one number, 0 before and after.
        stride: S.
        bucket: B.
        at_indptr, at_indices: see `csr_G`.
        page_size: tokens in a page.
    """
    num_groups, max_rows, max_pages = tables_GRM.shape
    with torch.cuda.device_of(fields):  # Triton launches on the current device
        _feed[(bucket, num_groups)](
            fields,
            candidates,
            tables_GRM,
            token_ids_R,
            positions_R,
            order_R,
            csr_G,
            arrivals,
            bucket,
            max_rows,
            max_pages,
            csr_G.stride(0),
            at_indptr,
            at_indices,
            S=stride,
            PAGE=page_size,
            ROWS=triton.next_power_of_2(max_rows),
            BLOCK=_BLOCK,
        )


@triton.jit(do_not_specialize=["bucket"])
def _feed(
    fields,
    candidates,
    tables,
    token_ids,
    positions,
    order,
    csr,
    arrivals,
    bucket,
    max_rows,
    max_pages,
    csr_stride,
    at_indptr,
    at_indices,
    S: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a row and group. The last to have read the fields moves all rows on: before that others read them.

    Hazard: what comes behind reads the page tables early (`chain.py`), so this must never let it start before it ends.
    """
    row, group = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, ROWS)
    inside = r < bucket
    lens_R = tl.load(fields + r, mask=inside, other=1)
    active_R = tl.load(fields + S + r, mask=inside, other=0)
    kv_lens_R = tl.where(active_R != 0, lens_R, 1)
    counts_R = (kv_lens_R + (PAGE - 1)) // PAGE
    first = tl.sum(tl.where(r < row, counts_R, 0), 0)
    length = tl.sum(tl.where(r == row, kv_lens_R, 0), 0)
    is_active = tl.sum(tl.where(r == row, active_R, 0), 0) != 0
    count = (length + (PAGE - 1)) // PAGE
    csr += group * csr_stride
    tl.store(csr + row, (length - 1) % PAGE + 1)
    tl.store(csr + at_indptr + row + 1, first + count)
    if group == 0:
        token_id = tl.load(candidates + tl.load(fields + 2 * S + row))
        tl.store(token_ids + row, tl.where(is_active, token_id, 0))
        tl.store(positions + row, length - 1)
        is_ahead_R = inside & ((kv_lens_R > length) | ((kv_lens_R == length) & (r < row)))
        tl.store(order + tl.sum(is_ahead_R.to(tl.int32), 0), row)
    table = tables + (group * max_rows + row).to(tl.int64) * max_pages
    for start in range(0, count, BLOCK):
        page = start + tl.arange(0, BLOCK)
        held = tl.load(table + page, mask=(page < count) & is_active, other=0)
        tl.store(csr + at_indices + first + page, held, mask=page < count)
    tl.debug_barrier()  # every thread of the program has read before the program counts as arrived
    num_programs = tl.num_programs(0) * tl.num_programs(1)
    if tl.atomic_add(arrivals, 1, sem="acq_rel") == num_programs - 1:
        tl.store(fields + r, lens_R + active_R, mask=inside)
        tl.store(fields + 2 * S + r, S + r, mask=inside & (active_R != 0))
        tl.store(arrivals, 0)
