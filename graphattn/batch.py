"""What one step runs on: tokens, positions and the pages of each row, on the device and as host numbers.

Shape letters: N tokens of the step, B rows, B1 = B + 1, P pages of all rows together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidArgumentError
from .integers import integers, integers32


@dataclass(frozen=True, slots=True)
class CSR:
    """The pages of each row, as FlashInfer's wrappers take them (all int32).

    Attributes:
        indptr_B1: row b's pages are `indices_P[indptr_B1[b]:indptr_B1[b + 1]]`.
        indices_P: page numbers; a fixed-address buffer may be longer than what `indptr_B1` uses.
        last_page_len_B: filled slots of each row's last page, 1 to page_size.
    """

    indptr_B1: Tensor
    indices_P: Tensor
    last_page_len_B: Tensor

    def kv_lens(self, page_size: int) -> Tensor:
        """Tokens of each row, the step's own included, `[B]`."""
        return (self.indptr_B1.diff() - 1) * page_size + self.last_page_len_B


@dataclass(frozen=True)
class Batch:
    """One step's rows. Planning reads only the host side, kernels only the device side.

    Attributes:
        token_ids_N, positions_N: int32 on the device; row after row.
        rows_N: int32 on the device, the row of each token.
        qo_indptr_B1: int32 on the host, row b's tokens are `qo_indptr_B1[b]:qo_indptr_B1[b + 1]`.
        kv_lens_B: int32 on the host, tokens of each row, the step's own included.
        lengths_N: int32 on the device, how long a row each token counts as part of, where rotary frequencies depend on
            that; None for one that ends with it, as a decode step's do.
        groups: the pages on the device, one `CSR` per layer group; a decode step's are there once it was fed.
        count_groups: makes the same numbers on the host.
        page_size: tokens in a page of a ragged batch; None for a decode step, which has its state's.
        order_B: int32 on the device, a decode step's rows, the longest first, once it was fed; None for a ragged batch.
        tables_host: per layer group the pages of each row of a decode step, `[B, M]` int32, of which row b's first
            `ceil(kv_lens_B[b] / page_size)` count; views that the state's next `stage` changes.
    """

    token_ids_N: Tensor
    positions_N: Tensor
    rows_N: Tensor
    qo_indptr_B1: Tensor
    kv_lens_B: Tensor
    groups: tuple[CSR, ...]
    count_groups: Callable[[], tuple[CSR, ...]]
    lengths_N: Tensor | None = None
    page_size: int | None = None
    order_B: Tensor | None = None
    tables_host: tuple[np.ndarray, ...] = ()

    @cached_property
    def groups_host(self) -> tuple[CSR, ...]:
        """The pages on the host, which cost a loop over all of them: counted when a plan first asks."""
        return self.count_groups()


def csr_arrays(
    tables: Sequence[Sequence[int]], kv_lens: Sequence[int], page_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """indptr, indices and last_page_len for rows of `kv_lens` tokens; a table may hold more pages than that needs.

    Raises:
        InvalidArgumentError: a row is empty, its table too short for its tokens, or a page number negative or no int.
    """
    lens = np.asarray(kv_lens, dtype=np.int32)
    counts = -(-lens // page_size)
    for row, (table, length, count) in enumerate(zip(tables, kv_lens, counts.tolist(), strict=True)):
        if length < 1 or len(table) < count:
            raise InvalidArgumentError(
                f"row {row}: {length} tokens need {count} pages (page_size={page_size}), its table has {len(table)}; "
                "grow the table before the step, and give every row at least one token"
            )
    indptr = np.zeros(len(lens) + 1, dtype=np.int32)
    np.cumsum(counts, out=indptr[1:])
    pages = chain.from_iterable(islice(table, count) for table, count in zip(tables, counts.tolist(), strict=True))
    indices = integers32(list(pages), "pages in a table")
    if len(indices) and indices.min() < 0:
        raise InvalidArgumentError(f"page {indices.min()} is in a table: pages count from 0")
    return indptr, indices, (lens - 1) % page_size + 1


@dataclass(frozen=True)
class RaggedArrays:
    """The numbers of a batch of rows with any number of new tokens each, int32 on the host; names as in `Batch`.

    Attributes:
        groups: indptr, indices and last_page_len of each layer group.
    """

    token_ids_N: np.ndarray
    positions_N: np.ndarray
    rows_N: np.ndarray
    lengths_N: np.ndarray
    qo_indptr_B1: np.ndarray
    kv_lens_B: np.ndarray
    groups: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]


def ragged_arrays(
    token_ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    tables: Sequence[Sequence[Sequence[int]]],
    *,
    page_size: int,
    lengths: Sequence[int] | None = None,
) -> RaggedArrays:
    """The numbers of such a batch; takes and refuses what `ragged_batch` does."""
    if page_size < 1:
        raise InvalidArgumentError(f"page_size={page_size}: it must be at least 1")
    counts = [len(ids) for ids in token_ids]
    if not counts or min(counts) < 1:
        raise InvalidArgumentError(f"rows of {counts} new tokens: a prefill has rows, each with at least one token")
    of_rows = {"starts": starts} | {f"tables[{group}]": table for group, table in enumerate(tables)}
    for name, given in (of_rows | ({} if lengths is None else {"lengths": lengths})).items():
        if len(given) != len(counts):
            raise InvalidArgumentError(f"{name} has {len(given)} rows, token_ids {len(counts)}: make them equal")
    if not all(hasattr(start, "__index__") and start >= 0 for start in starts):
        raise InvalidArgumentError(f"starts={list(starts)}: they are tokens in the cache, ints of at least 0")
    lengths = lengths if lengths is None else integers(lengths, "lengths")
    kv_lens = [start + count for start, count in zip(starts, counts, strict=True)]
    positions = np.concatenate([np.arange(start, end) for start, end in zip(starts, kv_lens, strict=True)])
    lengths_N = np.maximum(positions + 1, np.repeat(kv_lens if lengths is None else lengths, counts))
    return RaggedArrays(
        token_ids_N=integers32(list(chain.from_iterable(token_ids)), "token_ids"),
        positions_N=positions.astype(np.int32, casting="same_kind"),
        rows_N=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        lengths_N=lengths_N.astype(np.int32, casting="same_kind"),
        qo_indptr_B1=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        kv_lens_B=np.asarray(kv_lens, dtype=np.int32),
        groups=tuple(csr_arrays(group, kv_lens, page_size) for group in tables),
    )


def ragged_batch(
    token_ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    tables: Sequence[Sequence[Sequence[int]]],
    *,
    page_size: int,
    device: torch.device | str,
    lengths: Sequence[int] | None = None,
) -> Batch:
    """A batch of rows with any number of new tokens each (prefill, or a chunk of it over a cached prefix).

    Args:
        token_ids: the new tokens of each row.
        starts: tokens of each row that are in the cache already; the position of its first new token.
        tables: `tables[group][row]`, the row's pages in order, with room for all its tokens.
        page_size: tokens in a page.
        device: where the kernels run; everything goes there in one copy.
        lengths: how long each row counts as where rotary frequencies depend on that, and for a token beyond, as long
            as it is with that token; None for its length with all of these tokens.

    Raises:
        InvalidArgumentError: a row has no new token, or too few pages, the arguments are not of the same rows, or
            numbers are no ints of 32 bits.
    """
    arrays = ragged_arrays(token_ids, starts, tables, page_size=page_size, lengths=lengths)
    parts = [arrays.token_ids_N, arrays.positions_N, arrays.rows_N, arrays.lengths_N, *chain(*arrays.groups)]
    host = torch.from_numpy(np.concatenate(parts))
    sizes = [len(part) for part in parts]
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    views_host = host.split(sizes)
    views = host.to(device, non_blocking=True).split(sizes)

    def groups(split: Sequence[Tensor]) -> tuple[CSR, ...]:
        return tuple(CSR(*split[at : at + 3]) for at in range(4, len(split), 3))

    return Batch(
        token_ids_N=views[0],
        positions_N=views[1],
        rows_N=views[2],
        qo_indptr_B1=torch.from_numpy(arrays.qo_indptr_B1),
        kv_lens_B=torch.from_numpy(arrays.kv_lens_B),
        groups=groups(views),
        count_groups=lambda: groups(views_host),
        lengths_N=views[3],
        page_size=page_size,
    )
