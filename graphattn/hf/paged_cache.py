"""transformers' `Cache` over our pages: it stores nothing itself, the attention op appends."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import InvalidArgumentError
from ..pages import BlockTable
from .pool import GrowingPool


class _PassThroughLayer(CacheLayerMixin):
    """Hands keys and values on to the attention function as they came."""

    def __init__(self, cache: PagedCache):
        super().__init__()
        self._cache = weakref.proxy(cache)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.num_columns

    def get_max_length(self) -> int:
        return -1


def _release(tables: Sequence[BlockTable]) -> None:
    for table in tables:
        table.release()


class PagedCache(Cache):
    """The pages of one batch of rows; they go back to the pool when the cache is dropped.

    Attributes:
        tables: a `BlockTable` per row.
        lens: tokens of each row, padding left out.
        columns: per row, whether each column so far held a token (1) or padding (0).
    """

    def __init__(self, pool: GrowingPool, num_layers: int, num_rows: int):
        super().__init__(layers=[_PassThroughLayer(self) for _ in range(num_layers)])
        self.pool = pool
        self.tables = [BlockTable(pool.pages) for _ in range(num_rows)]
        self.lens = [0] * num_rows
        self.columns: list[list[int]] = [[] for _ in range(num_rows)]
        weakref.finalize(self, _release, self.tables)

    @property
    def num_columns(self) -> int:
        """Tokens of a row, padding counted: what transformers calls the sequence length."""
        return len(self.columns[0])

    def grow(self, valid: Sequence[Sequence[int]]) -> None:
        """Makes room for new columns, all or nothing; `valid[row][column]` is 1 for a token and 0 for padding."""
        lens = [length + sum(row) for length, row in zip(self.lens, valid, strict=True)]
        needed = [
            max(0, self.pool.pages.pages_for(length) - len(table.pages))
            for length, table in zip(lens, self.tables, strict=True)
        ]
        self.pool.ensure(sum(needed))
        for table, length in zip(self.tables, lens, strict=True):
            table.grow(length)
        self.lens = lens
        for columns, row in zip(self.columns, valid, strict=True):
            columns.extend(row)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what row `beam_idx[i]` was; rows that others continue are copied page by page."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(len(self.tables)) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        taken: set[int] = set()
        tables, source, target = [], [], []
        copies = [row for at, row in enumerate(rows) if row in rows[:at]]
        self.pool.ensure(sum(len(self.tables[row].pages) for row in copies))
        for row in rows:
            table = self.tables[row]
            if row in taken:
                copied = BlockTable(self.pool.pages)
                copied.grow(len(table.pages) * self.pool.pages.page_size)
                source += table.pages
                target += copied.pages
                table = copied
            taken.add(row)
            tables.append(table)
        if source:
            self.pool.cache.copy_pages(source, target)
        _release([table for row, table in enumerate(self.tables) if row not in taken])
        self.lens = [self.lens[row] for row in rows]
        self.columns = [list(self.columns[row]) for row in rows]
        self.tables[:] = tables  # in place: the finalizer holds this list

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns of every row, as assisted generation asks."""
        if not 0 <= tokens_to_remove <= self.num_columns:
            raise InvalidArgumentError(f"crop({tokens_to_remove}): the cache holds {self.num_columns} columns")
        for row, columns in enumerate(self.columns):
            kept = len(columns) - tokens_to_remove
            self.lens[row] -= sum(columns[kept:])
            del columns[kept:]

    def reset(self) -> None:
        """Forgets everything; the pages go back to the pool."""
        _release(self.tables)
        self.lens = [0] * len(self.lens)
        self.columns = [[] for _ in self.columns]

    @property
    def batch_size(self) -> int:
        return len(self.tables)

    @property
    def device(self) -> torch.device:
        return self.pool.cache.device
