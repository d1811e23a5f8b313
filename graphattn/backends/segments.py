"""Stretches of rows' pages inside one index buffer, as paged kernels take them without a copy of the pages.

A kernel reads the pages of slot s from `indices[indptr[s]]` on, and how many tokens they hold from
`(indptr[s + 1] - indptr[s] - 1) * page_size + last_page_len[s]`, or 0 where both indptr are equal. Nothing asks that
the slot ends where the next begins, so a stretch of any place and length is one choice of `last_page_len`, which may be
negative or longer than a page (the sum is right in 32-bit integers that wrap).

Shape letters: B rows, S slots, S1 = S + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..prefixes import Cascade


@dataclass(frozen=True, eq=False)
class Segments:
    """What slots attend to, int64 on the host.

    Attributes:
        qo_indptr_S1: slot s has the queries `qo_indptr_S1[s]:qo_indptr_S1[s + 1]`, in the cascade's order; every query
            belongs to one slot.
        num_pages_S: pages that it attends to, all full.
        kv_indptr_S1, last_page_len_S: where they are, as above.
    """

    qo_indptr_S1: np.ndarray
    num_pages_S: np.ndarray
    kv_indptr_S1: np.ndarray
    last_page_len_S: np.ndarray


def max_slots(num_rows: int, max_runs: int) -> int:
    """Slots that a level of any cascade takes: its runs, of two rows or more, and what stands between them."""
    return min((2 * num_rows + 1) // 3, 2 * max_runs + 1)


def stretches(starts_S: np.ndarray, lens_S: np.ndarray, total: int, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """indptr and last_page_len of slots that begin at `starts_S` and hold `lens_S` tokens.

    Args:
        starts_S: places in the index buffer; no two of slots with tokens alike.
        lens_S: tokens.
        total: places of the buffer that are in use: kernels read none beyond the last indptr.
        page_size: tokens in a page.
    """
    indptr_S1 = np.append(starts_S, total)
    return indptr_S1, lens_S - (np.diff(indptr_S1) - 1) * page_size


def level_segments(cascade: Cascade, level: int, indptr_B1: np.ndarray, *, num_slots: int, page_size: int) -> Segments:
    """The slots of a shared level: one for each run, one without pages for the rows before, between and behind them.

    Args:
        cascade: the rows.
        level: which of its levels.
        indptr_B1: where the pages of each row begin in the index buffer.
        num_slots: how many to give; what is left over has neither queries nor pages.
        page_size: tokens in a page.
    """
    num_rows, total = len(cascade.order_B), int(indptr_B1[-1])
    ends, starts, counts = [], [], []
    for run in cascade.levels[level]:
        if run.first > (ends[-1] if ends else 0):
            ends.append(run.first)
            starts.append(total)
            counts.append(0)
        ends.append(run.first + run.count)
        starts.append(int(indptr_B1[cascade.order_B[run.first]]) + run.start)
        counts.append(run.end - run.start)
    left = num_slots - len(ends)
    num_pages_S = np.array(counts + [0] * left, np.int64)
    kv_indptr_S1, last_page_len_S = stretches(
        np.array(starts + [total] * left, np.int64), num_pages_S * page_size, total, page_size
    )
    qo_indptr_S1 = np.array([0, *ends, *[num_rows] * left], np.int64)
    return Segments(qo_indptr_S1, num_pages_S, kv_indptr_S1, last_page_len_S)
