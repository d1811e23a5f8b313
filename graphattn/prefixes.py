"""Which rows of a step begin with the same pages: the shared levels of a cascade. Host numbers only.

Shape letters: B rows, M pages that one row may have.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .errors import InvalidArgumentError
from .pages import NULL_PAGE

# Measured on an H100 (docs/benchmarks/attention-h100.json). Pages that many rows read come from the L2 cache, so what
# is not read again saves less than memory's rate says.
BYTES_PER_US = 2.9e6  # of keys and values that one row reads
SHARED_BYTES_PER_US = 8.3e6  # of those that many rows read
COST_US = 45.0  # levels, merges and a slower kernel for the tails take 20 to 25; the rest is margin
TAIL_US_PER_TOKEN = 0.013  # of a row's tail that the kernel for tails does not split, as in buckets from 34 rows on


@dataclass(frozen=True)
class SharedRun:
    """Pages that several rows have in common, at the same places of their tables.

    Attributes:
        first, count: which rows, `order_B[first : first + count]` of the cascade.
        start, end: which places of their tables.
    """

    first: int
    count: int
    start: int
    end: int

    @property
    def num_saved(self) -> int:
        """Pages that need not be read again for each row."""
        return (self.count - 1) * (self.end - self.start)


@dataclass(frozen=True, eq=False)
class Cascade:
    """Rows in an order in which those that share pages stand side by side, level by level.

    Attributes:
        order_B: the rows, int64.
        levels: runs of each level, none twice over one row, in order; a run lies inside one of the level above, and
            begins where that one ends. A level may be empty.
        depths_B: how many pages each row shares over all levels, by row, int64.
    """

    order_B: np.ndarray
    levels: tuple[tuple[SharedRun, ...], ...]
    depths_B: np.ndarray


@dataclass(eq=False)
class _Node:
    rows: np.ndarray
    start: int
    end: int
    children: list[_Node] = field(default_factory=list)

    @property
    def num_saved(self) -> int:
        return (len(self.rows) - 1) * (self.end - self.start)


def shared_prefixes(
    pages_BM: np.ndarray, num_full_B: np.ndarray, *, num_pages: int, max_levels: int, max_runs: int
) -> Cascade:
    """The cascade of rows with these pages; a function of nothing else, so a row's bits depend on its step alone.

    The rows of a level are told apart by their next page, and share what all of them have in common from there. Of more
    runs than a level may have, those that save the most pages are kept, and the others' rows share nothing from there.

    Args:
        pages_BM: the pages of each row in order.
        num_full_B: how many of them may be shared: those that are full before the step.
        num_pages: of the cache, the null page among them.
        max_levels: shared levels at most.
        max_runs: runs of a level at most.

    Raises:
        InvalidArgumentError: rows share the null page or one that the cache has not, as if theirs had been freed.

    Example:
        >>> pages = np.array([[5, 6, 7], [5, 6, 8], [9, 2, 0], [5, 6, 8]])
        >>> found = shared_prefixes(pages, np.array([3, 3, 2, 3]), num_pages=10, max_levels=2, max_runs=4)
        >>> found.order_B.tolist(), found.depths_B.tolist()
        ([1, 3, 0, 2], [2, 3, 0, 3])
        >>> [[(run.first, run.count, run.start, run.end) for run in level] for level in found.levels]
        [[(0, 3, 0, 2)], [(0, 2, 2, 3)]]
    """
    num_full_B = np.asarray(num_full_B, np.int64)
    root = _Node(np.arange(len(num_full_B)), 0, 0)
    parents, depths_B = [root], np.zeros(len(num_full_B), np.int64)
    level_of: dict[_Node, int] = {}
    for level in range(max_levels):
        found = [(parent, child) for parent in parents for child in _children(parent, pages_BM, num_full_B)]
        found.sort(key=lambda pair: (-pair[1].num_saved, int(pair[1].rows[0])))
        for parent, child in found[:max_runs]:
            _check(child, pages_BM, num_pages)
            parent.children.append(child)
            level_of[child], depths_B[child.rows] = level, child.end
        parents = [child for _, child in found[:max_runs]]
    order: list[int] = []
    levels: list[list[SharedRun]] = [[] for _ in range(max_levels)]

    def lay(node: _Node) -> None:
        first, laid = len(order), set()
        for child in sorted(node.children, key=lambda child: int(child.rows[0])):
            lay(child)
            laid.update(child.rows.tolist())
        order.extend(row for row in node.rows.tolist() if row not in laid)
        if node is not root:
            levels[level_of[node]].append(SharedRun(first, len(node.rows), node.start, node.end))

    lay(root)
    return Cascade(np.array(order, np.int64), tuple(map(tuple, levels)), depths_B)


def pays(runs: Iterable[SharedRun], tail_lens_B: np.ndarray, *, page_size: int, token_bytes: int) -> bool:
    """Whether attending to shared pages once is taken to be faster than reading them for every row.

    What is saved are the reads; what it costs is a fixed time, and the longest tail where that takes longer than all of
    them read at memory's rate.

    Args:
        runs: what rows share, of all levels.
        tail_lens_B: tokens of each row that are not in them.
        page_size: tokens in a page.
        token_bytes: of a token's keys and values in one layer.

    Example:
        >>> prompt = SharedRun(first=0, count=256, start=0, end=512)
        >>> pays([prompt], np.full(256, 256), page_size=16, token_bytes=4096)
        True
        >>> pays([], np.full(256, 1024), page_size=16, token_bytes=4096)
        False
    """
    saved_us = sum(run.num_saved for run in runs) * page_size * token_bytes / SHARED_BYTES_PER_US
    tails_us = int(tail_lens_B.sum()) * token_bytes / BYTES_PER_US
    longest_us = int(tail_lens_B.max()) * TAIL_US_PER_TOKEN
    return saved_us > COST_US + max(0.0, longest_us - tails_us)


def _children(parent: _Node, pages_BM: np.ndarray, num_full_B: np.ndarray) -> list[_Node]:
    """Rows of the parent that go on together, two or more, each with all that they share."""
    start = parent.end
    rows = parent.rows[num_full_B[parent.rows] > start]
    if len(rows) < 2:
        return []
    _, kinds, counts = np.unique(pages_BM[rows, start], return_inverse=True, return_counts=True)
    children = []
    for kind in (counts > 1).nonzero()[0]:
        alike = rows[kinds == kind]
        shared = pages_BM[alike, start : num_full_B[alike].min()]
        differs = (shared != shared[0]).any(0)
        children.append(_Node(alike, start, start + (int(differs.argmax()) if differs.any() else len(differs))))
    return children


def _check(node: _Node, pages_BM: np.ndarray, num_pages: int) -> None:
    pages = pages_BM[node.rows[0], node.start : node.end]
    wrong = (pages <= NULL_PAGE) | (pages >= num_pages)
    if wrong.any():
        at = int(wrong.argmax())
        raise InvalidArgumentError(
            f"rows {node.rows.tolist()} share page {pages[at]} at place {node.start + at} of their tables, usable are "
            f"1 to {num_pages - 1}: release a page only when no row has it in its table any more"
        )
