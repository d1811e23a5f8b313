"""transformers' `Cache` over our pages: it stores nothing itself, the attention op appends."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import InvalidArgumentError
from ..pages import BlockTable
from .pool import GrowingPool


class _PassThroughLayer(CacheLayerMixin):
    """Hands keys and values on to the attention function as they came."""

    is_croppable = True

    def __init__(self, cache: PagedCache):
        super().__init__()
        self._cache = weakref.proxy(cache)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self._cache.is_filling:
            raise InvalidArgumentError(
                "past_key_values holds pages of an attached model: pass it to that model, while it is attached"
            )
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.num_columns

    def get_max_length(self) -> int:
        return -1


def _release(tables: Iterable[BlockTable]) -> None:
    for table in tables:
        table.release()


class PagedCache(Cache):
    """The pages of one batch of rows; they go back to the pool when the cache is dropped.

    Shape letters: B rows, C columns (tokens of a row, padding counted), T new ones of them.

    Attributes:
        pool: where the pages come from.
        tables: a `BlockTable` per row.
        valid_BC: which columns so far hold tokens and not padding, in host memory; only tokens take slots.
        is_filling: whether the attached model is appending to it now.
    """

    def __init__(self, pool: GrowingPool, num_layers: int, num_rows: int):
        super().__init__(layers=[_PassThroughLayer(self) for _ in range(num_layers)])
        self.pool = pool
        self.tables = [BlockTable(pool.pages) for _ in range(num_rows)]
        self.valid_BC = torch.zeros(num_rows, 0, dtype=torch.bool, device="cpu")
        self.is_filling = False
        weakref.finalize(self, _release, self.tables)

    @property
    def batch_size(self) -> int:
        return len(self.tables)

    @property
    def num_columns(self) -> int:
        """What transformers calls the sequence length."""
        return self.valid_BC.shape[1]

    @property
    def lens(self) -> list[int]:
        """Tokens of each row."""
        return self.valid_BC.sum(1).tolist()

    @contextmanager
    def filling(self, valid_BT: Tensor) -> Iterator[None]:
        """Has room for new columns while a forward appends to them, and holds them once it has.

        Raises:
            OutOfPagesError: the pool may not grow as far; the cache is as it was.
        """
        lens, pages_for = (self.valid_BC.sum(1) + valid_BT.sum(1)).tolist(), self.pool.pages.pages_for
        grown = list(zip(self.tables, lens, strict=True))
        self.pool.ensure(sum(max(0, pages_for(length) - len(table.pages)) for table, length in grown))
        for table, length in grown:
            table.grow(length)
        self.is_filling = True
        try:
            yield
        except BaseException:
            self._keep(self.num_columns)
            raise
        finally:
            self.is_filling = False
        self.valid_BC = torch.cat([self.valid_BC, valid_BT], dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` columns of every row, as assisted generation asks."""
        count = -int(tokens_to_remove)
        if not 0 <= count <= self.num_columns:
            raise InvalidArgumentError(
                f"crop({-count}) of {self.num_columns} columns: crop(-n) forgets the last n, as many as there are"
            )
        self._keep(self.num_columns - count)

    def reset(self) -> None:
        """Forgets everything; the pages go back to the pool."""
        self._keep(0)

    def _keep(self, num_columns: int) -> None:
        self.valid_BC = self.valid_BC[:, :num_columns]
        for table, length in zip(self.tables, self.lens, strict=True):
            table.truncate(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what row `beam_idx[i]` was; rows that several continue are copied page by page."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(self.batch_size, device="cpu")[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(self.batch_size) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        is_copy = [row in rows[:at] for at, row in enumerate(rows)]
        copies = iter(self._copies([row for row, again in zip(rows, is_copy, strict=True) if again]))
        tables = [next(copies) if again else self.tables[row] for row, again in zip(rows, is_copy, strict=True)]
        _release(table for row, table in enumerate(self.tables) if row not in rows)
        self.tables[:] = tables  # in place: the finalizer holds this list
        self.valid_BC = self.valid_BC[rows]

    def _copies(self, rows: Sequence[int]) -> list[BlockTable]:
        """Tables of their own with the content of these rows, all or none of them."""
        self.pool.ensure(sum(len(self.tables[row].pages) for row in rows))
        copies = [BlockTable(self.pool.pages) for _ in rows]
        for row, copied in zip(rows, copies, strict=True):
            copied.grow(self.tables[row].num_slots)
        source = [page for row in rows for page in self.tables[row].pages]
        if source:
            self.pool.copy_pages(source, [page for copied in copies for page in copied.pages])
        return copies

    def __deepcopy__(self, memo: dict) -> PagedCache:
        """A cache of its own over the same pool, to continue one prefix several ways."""
        copied = PagedCache(self.pool, len(self.layers), 0)
        copied.tables[:] = self._copies(range(self.batch_size))
        copied.valid_BC = self.valid_BC.clone()
        return copied
