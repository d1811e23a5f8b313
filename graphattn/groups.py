"""The pages of all layer groups, of which each request takes some of every one. Host integers only, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import InvalidArgumentError
from .pages import BlockTable, PagePool
from .window_table import WindowTable


def row_pages(window: int, page_size: int, num_new: int) -> int:
    """Pages that one row holds at most in a group with a window while so many of its tokens are computed at once."""
    return -(-(window + num_new) // page_size) + 1


def row_limit(num_pages: int, page_size: int, window: int | None, num_new: int) -> int | None:
    """Tokens that one row may reach in a group's pages, the null page among them; None for any number.

    Args:
        num_pages: of the group.
        page_size: tokens in a page.
        window: tokens that a token of the group sees, itself included; None for all.
        num_new: tokens of the row that are computed at once.
    """
    if window is not None and num_pages - 1 >= row_pages(window, page_size, num_new):
        return None
    return (num_pages - 1) * page_size


class GroupPools:
    """One page pool for each layer group; a group with a window gives pages back while a request goes on.

    Args:
        pools: the pools, all with pages of one size.
        windows: tokens that a token of each group sees, itself included; None for all.

    Raises:
        InvalidArgumentError: there is no pool, not one window for each, or pages of several sizes.

    Example:
        >>> pools = GroupPools([PagePool(9, 2), PagePool(5, 2)], windows=[None, 3])
        >>> row = pools.row()
        >>> row.grow(5)
        >>> row.commit([5, 6, 7, 8, 9])
        >>> row.pages
        [[1, 2, 3], [0, 2, 3]]
    """

    def __init__(self, pools: Sequence[PagePool], windows: Sequence[int | None]) -> None:
        if not pools or len(pools) != len(windows) or len({pool.page_size for pool in pools}) != 1:
            sizes = [pool.page_size for pool in pools]
            raise InvalidArgumentError(
                f"pools with pages of {sizes} tokens, windows {list(windows)}: give one window, or None, for each "
                "pool, and pages of one size"
            )
        self.pools, self.windows = tuple(pools), tuple(windows)
        self.page_size = self.pools[0].page_size
        # The group that keeps most, by whose pages prefixes are told.
        self._keeper = max(
            range(len(windows)), key=lambda group: math.inf if windows[group] is None else windows[group]
        )

    def row(self) -> RowPages:
        """Tables of a new row, without pages."""
        pairs = list(zip(self.pools, self.windows, strict=True))
        pool, window = pairs[self._keeper]
        keeper = BlockTable(pool) if window is None else WindowTable(pool, window)
        tables = [BlockTable(pool) if window is None else WindowTable(pool, window, keeper) for pool, window in pairs]
        tables[self._keeper] = keeper
        return RowPages(tables, keeper)

    def tightest(self, num_new: int) -> tuple[int | None, PagePool]:
        """Tokens that one row may reach if so many are computed at once, None for any number; and which pool's limit
        that is."""
        limits = [
            (row_limit(pool.num_pages, self.page_size, window, num_new), pool)
            for pool, window in zip(self.pools, self.windows, strict=True)
        ]
        return min(limits, key=lambda limit: math.inf if limit[0] is None else limit[0])

    def clear_prefixes(self) -> None:
        """Has every pool forget its registered contents."""
        for pool in self.pools:
            pool.clear_prefixes()


class RowPages:
    """The pages of one request: a block table in each layer group, grown and given back together.

    Args:
        tables: by layer group.
        keeper: the one of them by whose pages the others with windows tell prefixes.

    Attributes:
        tables: by layer group.
    """

    __slots__ = ("_followers", "_ordered", "_windowed", "tables")

    def __init__(self, tables: Sequence[BlockTable], keeper: BlockTable) -> None:
        self.tables = tuple(tables)
        self._windowed = tuple(table for table in self.tables if isinstance(table, WindowTable))
        self._followers = tuple(table for table in self._windowed if table is not keeper)
        self._ordered = (keeper, *(table for table in self.tables if table is not keeper))

    @property
    def pages(self) -> list[list[int]]:
        """Page numbers in order, by layer group; to be read, not changed."""
        return [table.pages for table in self.tables]

    def reuse_prefix(self, token_ids: Sequence[int], key: int = 0) -> int:
        """Takes the longest registered beginning of which every group still has what the next token sees; as
        `BlockTable.reuse_prefix`."""
        whole = [table for table in self.tables if table not in self._followers]
        found, longest = min(table.reuse_prefix(token_ids, key) for table in whole), -1
        while found != longest:  # windows differ, so a beginning that one ends must be asked of all again
            longest = found
            for table in self._followers:
                found = table.findable(token_ids, found)
        for table in whole:
            table.pool.num_hits -= table.num_slots - found
            table.truncate(found)
        for table in self._followers:
            table.take(token_ids, found)
        self.drop_behind(found)
        return found

    def refuse_prefix(self) -> None:
        """Gives back what `reuse_prefix` took, as if it had not been asked for."""
        for table in self.tables:
            table.pool.num_hits -= table.num_slots
        self.release()

    def missing(self, num_tokens: int, ahead: int = 0) -> list[int]:
        """Pages that `grow` would take, by layer group."""
        return [
            max(0, table.pool.pages_for(self._wanted(table, num_tokens, ahead)) - len(table.pages))
            for table in self.tables
        ]

    def grow(self, num_tokens: int, ahead: int = 0) -> None:
        """Makes room for `num_tokens` tokens in total, and for `ahead` in the groups that keep all of them.

        Raises:
            OutOfPagesError: a pool has too few pages; every table is as it was.
        """
        most = max(num_tokens, ahead)
        if all([most <= table.num_slots for table in self.tables]):  # as for most rows of most steps
            return
        wanted = [self._wanted(table, num_tokens, ahead) for table in self.tables]
        lacks = [
            table.pool.pages_for(count) - len(table.pages) > table.pool.num_free
            for table, count in zip(self.tables, wanted, strict=True)
        ]
        if any(lacks):  # raises before anything is taken
            at = lacks.index(True)
            self.tables[at].grow(wanted[at])
        for table, count in zip(self.tables, wanted, strict=True):
            table.grow(count)

    def commit(self, token_ids: Sequence[int], count: int | None = None) -> None:
        """Registers full pages, and gives back what lies behind windows; as `BlockTable.commit`."""
        for table in self._ordered:
            table.commit(token_ids, count)

    def drop_behind(self, num_tokens: int) -> None:
        """Gives back the pages that no token from position num_tokens on sees."""
        for table in self._windowed:
            table.drop_behind(num_tokens)

    def disown(self, token_ids: Sequence[int]) -> None:
        """As `BlockTable.disown`; pages of windows are found by those of the group that keeps most."""
        for table in self.tables:
            table.disown(token_ids)

    def release(self) -> None:
        """Gives every page back; the tables are empty and can be used again."""
        for table in self.tables:
            table.release()

    def _wanted(self, table: BlockTable, num_tokens: int, ahead: int) -> int:
        return num_tokens if table in self._windowed else max(num_tokens, ahead)
