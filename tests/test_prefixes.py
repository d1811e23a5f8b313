"""Which rows share which pages, against a search that knows no better way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphattn.backends.segments import level_segments, max_slots, stretches
from graphattn.errors import InvalidArgumentError
from graphattn.prefixes import Cascade, shared_prefixes

MAX_PAGES = 6


def padded(tables: list[list[int]]) -> np.ndarray:
    """The tables as rows of one array; what stands behind each is a page that many rows seem to share."""
    return np.array([table + [7] * (MAX_PAGES - len(table)) for table in tables], np.int32).reshape(-1, MAX_PAGES)


def brute_force(tables: list[list[int]], max_levels: int) -> list[set[tuple[frozenset[int], int, int]]]:
    """(rows, start, end) of every run by level: all sets of rows that begin alike, told apart page by page."""
    levels: list[set] = []
    parents = [(frozenset(range(len(tables))), 0, 0)]
    for _ in range(max_levels):
        found = set()
        for rows, _, start in parents:
            for row in rows:
                alike = frozenset(
                    other
                    for other in rows
                    if len(tables[other]) > start < len(tables[row]) and tables[other][start] == tables[row][start]
                )
                if len(alike) < 2:
                    continue
                end = start
                while all(len(tables[other]) > end for other in alike) and len({tables[o][end] for o in alike}) == 1:
                    end += 1
                found.add((alike, start, end))
        levels.append(found)
        parents = list(found)
    return levels


def runs(cascade: Cascade) -> list[set[tuple[frozenset[int], int, int]]]:
    return [
        {(frozenset(cascade.order_B[r.first : r.first + r.count].tolist()), r.start, r.end) for r in level}
        for level in cascade.levels
    ]


tables_drawn = st.lists(st.lists(st.integers(1, 3), max_size=MAX_PAGES), min_size=1, max_size=14)


@given(tables_drawn, st.integers(1, 3))
def test_every_shared_run_is_found(tables, max_levels) -> None:
    counts = np.array([len(table) for table in tables])
    found = shared_prefixes(padded(tables), counts, num_pages=9, max_levels=max_levels, max_runs=99)
    assert sorted(found.order_B.tolist()) == list(range(len(tables)))
    wanted = brute_force(tables, max_levels)
    assert runs(found) == wanted
    depths = [
        max([end for level in wanted for rows, _, end in level if row in rows], default=0) for row in range(len(tables))
    ]
    assert found.depths_B.tolist() == depths
    for level in found.levels:
        assert all(before.first + before.count <= run.first for before, run in zip(level, level[1:], strict=False))


@given(tables_drawn, st.integers(1, 3))
def test_runs_that_save_most_are_kept(tables, max_runs) -> None:
    counts = np.array([len(table) for table in tables])
    found = shared_prefixes(padded(tables), counts, num_pages=9, max_levels=2, max_runs=max_runs)
    everything = brute_force(tables, 2)

    def saved(level) -> list[int]:
        return sorted(((len(rows) - 1) * (end - start) for rows, start, end in level), reverse=True)

    kept = runs(found)
    assert saved(kept[0]) == saved(everything[0])[:max_runs]
    under = {run for run in everything[1] if any(run[0] <= rows and run[1] == end for rows, _, end in kept[0])}
    assert kept[0] <= everything[0] and kept[1] <= under and saved(kept[1]) == saved(under)[:max_runs]


@given(tables_drawn, st.integers(1, 3), st.integers(1, 5))
def test_segments_say_where_each_row_attends(tables, max_runs, page_size) -> None:
    """What a kernel makes of the numbers, level by level, is each row's pages, every one once and in order."""
    num_rows, counts = len(tables), np.array([len(table) for table in tables])
    found = shared_prefixes(padded(tables), counts, num_pages=9, max_levels=2, max_runs=max_runs)
    tables = [[*table, 8] for table in tables]  # a last page of one token, which nobody shares
    indptr = np.cumsum([0, *map(len, tables)])
    indices = np.array([page for table in tables for page in table])
    read: list[list[int]] = [[] for _ in tables]

    def attend(qo_indptr, kv_indptr, last_page_len) -> None:
        assert qo_indptr[-1] == num_rows and len(kv_indptr) == len(last_page_len) + 1 == len(qo_indptr)
        for slot, last in enumerate(last_page_len.tolist()):
            start, following = kv_indptr[slot : slot + 2].tolist()
            length = 0 if start == following else (following - start - 1) * page_size + last
            assert 0 <= length and (not length or start < kv_indptr[-1])
            pages = indices[start : start - (-length // page_size)].tolist()
            for row in found.order_B[qo_indptr[slot] : qo_indptr[slot + 1]]:
                read[row] += pages

    num_slots = max_slots(num_rows, max_runs)
    for level in range(2):
        each = level_segments(found, level, indptr, num_slots=num_slots, page_size=page_size)
        attend(each.qo_indptr_S1, each.kv_indptr_S1, each.last_page_len_S)
    starts = (indptr[:-1] + found.depths_B)[found.order_B]
    lens = ((counts - found.depths_B) * page_size + 1)[found.order_B]
    attend(np.arange(num_rows + 1), *stretches(starts, lens, int(indptr[-1]), page_size))
    assert read == tables


@pytest.mark.parametrize(("page", "place"), [(0, 1), (9, 0), (-1, 0)])
def test_a_shared_page_that_cannot_be_is_refused(page: int, place: int) -> None:
    tables = [[1, 2, 3], [1, 2, 3], [4, 5, 6]]
    for table in tables[:2]:
        table[place] = page
    with pytest.raises(InvalidArgumentError, match=rf"rows \[0, 1\] share page {page} at place {place} .*1 to 8"):
        shared_prefixes(padded(tables), np.array([3, 3, 3]), num_pages=9, max_levels=2, max_runs=4)


def test_rows_that_share_nothing() -> None:
    found = shared_prefixes(padded([[1], [2], []]), np.array([1, 1, 0]), num_pages=9, max_levels=2, max_runs=4)
    assert found.levels == ((), ()) and found.order_B.tolist() == [0, 1, 2] and not found.depths_B.any()
