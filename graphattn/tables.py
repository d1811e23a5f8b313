"""What the device holds of the block tables of a layer group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import ne

import numpy as np

from .errors import InvalidArgumentError
from .integers import integers

UNCHECKED = -1


@dataclass(slots=True)
class Changes:
    """Pages of one group that the device lacks for a step.

    Attributes:
        rows: which rows' tables are not what was last given, each with the table now and how many of its pages the
            device then holds.
        places, pages: which number goes where.
        num_rows: rows of the step.
        num_pages: what all their pages were checked against; None if they were not.
    """

    num_rows: int
    num_pages: int | None

    rows: list[tuple[int, list[int], int]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class SentTables:
    """The block tables of a layer group's rows as last sent, `[R, M]` on the device from `place` on.

    Args:
        max_rows: R.
        max_pages: M, pages that one row may have.
        place: of the first page of the first row.

    Attributes:
        pages_RM: what the device holds once all that was sent is there, int32.
    """

    def __init__(self, max_rows: int, max_pages: int, place: int):
        self._max_pages, self._place = max_pages, place
        self._tables: list[list[int]] = [[] for _ in range(max_rows)]
        self._num_held, self._num_sent = np.zeros(max_rows, np.int64), np.zeros(max_rows, np.int64)
        self.pages_RM = np.zeros((max_rows, max_pages), np.int32)
        self._num_pages = np.full(max_rows, UNCHECKED)  # what each row's pages were checked against

    def held(self, num_rows: int) -> list[list[int]]:
        """The tables as last given, in lists that are not changed any more."""
        return self._tables[:num_rows]

    def changes(
        self,
        group: int,
        tables: Sequence[Sequence[int]],
        seq_lens: Sequence[int],
        lens_B: np.ndarray,
        page_size: int,
        num_pages: int | None,
    ) -> Changes:
        """What to send for rows of these lengths; a row that goes on within its pages costs one comparison.

        Args:
            group: which layer group this is, for messages.
            tables: each row's pages in order.
            seq_lens: tokens of each row.
            lens_B: the same.
            page_size: tokens in a page.
            num_pages: pages of the cache; None to check nothing.

        Raises:
            InvalidArgumentError: a row is empty, its table too short or one of its pages outside the cache.
        """
        num_rows = len(tables)
        if set(map(type, tables)) != {list}:
            if not all(hasattr(table, "__iter__") for table in tables):
                kinds = sorted({type(table).__name__ for table in tables})
                raise InvalidArgumentError(f"tables of layer group {group} are {', '.join(kinds)}: give table.pages")
            tables = [list(table) for table in tables]
        counts_B = (lens_B + (page_size - 1)) // page_size
        changed = list(compress(range(num_rows), map(ne, tables, self._tables)))
        num_held_B = self._num_held[:num_rows]
        if changed:
            num_held_B = num_held_B.copy()
            num_held_B[changed] = [len(tables[row]) for row in changed]
        wrong = (lens_B < 1) | (num_held_B < counts_B)
        if wrong.any():
            row = int(wrong.argmax())
            raise InvalidArgumentError(
                f"row {row}: {seq_lens[row]} tokens need {counts_B[row]} pages (page_size={page_size}), its table has "
                f"{len(tables[row])}; grow the table before the step, and give every row at least one token"
            )
        found = Changes(num_rows, num_pages)
        is_checked_B = (self._num_pages[:num_rows] == num_pages) | (num_pages is None)
        lacking = ((counts_B > self._num_sent[:num_rows]) | ~is_checked_B).nonzero()[0].tolist()
        for row in sorted({*changed, *lacking}):
            table, count = tables[row], int(counts_B[row])
            start = min(int(self._num_sent[row]), len(table))
            if not is_checked_B[row]:
                start = 0
            first = self._place + row * self._max_pages
            if table[:start] != self._tables[row][:start]:  # a row in another's place, or a window that moved on
                replaced = list(compress(range(start), map(ne, table, self._tables[row])))
                found.places += [first + at for at in replaced]
                found.pages += [table[at] for at in replaced]
            if start < count:
                found.places += range(first + start, first + count)
                found.pages += table[start:count]
            found.rows.append((row, table.copy(), max(start, count)))
        pages = found.pages
        integers(pages, f"tables of layer group {group}")
        if num_pages is not None and pages and not 0 <= min(pages) <= max(pages) < num_pages:
            raise InvalidArgumentError(
                f"tables of layer group {group} hold pages {min(pages)} to {max(pages)}, the cache has pages 0 to "
                f"{num_pages - 1}"
            )
        return found

    def forget(self, changes: Changes) -> None:
        """Takes for unknown what is about to be sent."""
        for row, _, _ in changes.rows:
            self._tables[row], self._num_held[row], self._num_sent[row] = [], 0, 0

    def remember(self, changes: Changes) -> None:
        """What was to be sent is on its way."""
        if changes.places:
            self.pages_RM.flat[np.asarray(changes.places) - self._place] = changes.pages
        for row, table, num_sent in changes.rows:
            self._tables[row], self._num_held[row], self._num_sent[row] = table, len(table), num_sent
            self._num_pages[row] = UNCHECKED
        if changes.num_pages is not None:
            self._num_pages[: changes.num_rows] = changes.num_pages
