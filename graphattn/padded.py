"""A ragged batch at fixed addresses and of fixed sizes, as a captured prefill reads it.

Shape letters: N tokens, R rows, B = R + 1 with one of padding, B1 = B + 1, P pages of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from .batch import CSR, Batch, ragged_arrays
from .errors import InvalidArgumentError
from .pages import NULL_PAGE

_ALIGNED = 4  # int32 numbers in the 16 bytes on which every part begins


class PaddedBatch:
    """The buffers of one number of tokens, which fewer are padded to.

    Behind the rows that it is filled with comes one of padding, whose pages are the null page over and over and whose
    tokens are all at position 0, and then rows without any token.

    Args:
        num_tokens: of every batch, padding included.
        num_rows: that a batch has at most.
        max_pages: that a row has at most.
        page_size: tokens in a page.
        num_groups: layer groups.
        device: where the buffers are.

    Attributes:
        token_ids_N, positions_N, rows_N, lengths_N: as in `Batch`.
        last_R: int64, the token whose logits each row asks for.
        qo_indptr_B1: int32 on the device, as `Batch` has it on the host.
        groups: a `CSR` per layer group.
    """

    def __init__(
        self,
        num_tokens: int,
        num_rows: int,
        *,
        max_pages: int,
        page_size: int,
        num_groups: int,
        device: torch.device | str,
    ):
        self.num_tokens, self.num_rows, self.page_size, self._max_pages = num_tokens, num_rows, page_size, max_pages
        with_padding = num_rows + 1
        sizes = [2 * num_rows, *[num_tokens] * 4, with_padding + 1]
        sizes += [with_padding + 1, with_padding] * num_groups
        sizes += [num_rows * max_pages + -(-num_tokens // page_size)] * num_groups
        self._ends = list(accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes))
        with torch.inference_mode(False):
            self._all = torch.zeros(self._ends[-1], dtype=torch.int32, device=device)
        parts = [self._all[start : start + size] for start, size in zip((0, *self._ends), sizes, strict=False)]
        last_R, self.token_ids_N, self.positions_N, self.rows_N, self.lengths_N, self.qo_indptr_B1, *csr = parts
        self.last_R = last_R.view(torch.int64)
        self.groups = tuple(
            CSR(csr[2 * group], csr[2 * num_groups + group], csr[2 * group + 1]) for group in range(num_groups)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return self._all.nbytes

    def fill(
        self,
        token_ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        tables: Sequence[Sequence[Sequence[int]]],
        last: Sequence[int],
        lengths: Sequence[int] | None = None,
    ) -> Batch:
        """Sends a batch's numbers, in one copy for the first layer group and one for each other.

        Args:
            token_ids, starts, tables, lengths: as `ragged_batch` takes them; `num_tokens` in `num_rows` at most, or
                no row at all.
            last: tokens, counted through the batch, whose logits are asked for; one a row at most.

        Raises:
            InvalidArgumentError: more tokens, rows or pages of a row than there is room for, or what `ragged_batch`
                refuses.
        """
        if len(tables) != len(self.groups) or len(starts) != len(token_ids):
            raise InvalidArgumentError(
                f"{len(token_ids)} rows with {len(starts)} starts and pages of {len(tables)} layer groups: give each a "
                f"start, and pages of {len(self.groups)} groups"
            )
        count = self.num_tokens - self._checked(token_ids, starts, last)
        if count:
            token_ids, starts = [*token_ids, [0] * count], [*starts, 0]
            lengths = None if lengths is None else [*lengths, count]
            pages = [NULL_PAGE] * -(-count // self.page_size)
            tables = [[*table, pages] for table in tables]
        arrays = ragged_arrays(token_ids, starts, tables, page_size=self.page_size, lengths=lengths)
        if count:  # a position that every model has
            arrays.positions_N[-count:], arrays.lengths_N[-count:] = 0, 1
        missing = self.num_rows + 1 - len(arrays.kv_lens_B)
        asked_R = np.zeros(self.num_rows, dtype=np.int64)
        asked_R[: len(last)] = last
        qo_indptr_B1 = _with_more(arrays.qo_indptr_B1, missing, arrays.qo_indptr_B1[-1])
        # No pages and a last one that is full: no tokens.
        groups = [
            (_with_more(indptr, missing, indptr[-1]), indices, _with_more(last_page_len, missing, self.page_size))
            for indptr, indices, last_page_len in arrays.groups
        ]
        heads = [asked_R.view(np.int32), arrays.token_ids_N, arrays.positions_N, arrays.rows_N, arrays.lengths_N]
        heads += [qo_indptr_B1, *(part for indptr, _, last_page_len in groups for part in (indptr, last_page_len))]
        self._send(heads, [indices for _, indices, _ in groups])
        return Batch(
            token_ids_N=self.token_ids_N,
            positions_N=self.positions_N,
            rows_N=self.rows_N,
            lengths_N=self.lengths_N,
            qo_indptr_B1=torch.from_numpy(qo_indptr_B1),
            kv_lens_B=torch.from_numpy(_with_more(arrays.kv_lens_B, missing, 0)),
            groups=self.groups,
            count_groups=lambda: tuple(CSR(*map(torch.from_numpy, each)) for each in groups),
            page_size=self.page_size,
        )

    def _checked(self, token_ids: Sequence[Sequence[int]], starts: Sequence[int], last: Sequence[int]) -> int:
        """How many tokens there are, if they and their rows fit."""
        count = sum(map(len, token_ids))
        lens = [start + len(ids) for start, ids in zip(starts, token_ids, strict=True)]
        if count > self.num_tokens or len(token_ids) > self.num_rows:
            raise InvalidArgumentError(
                f"{count} tokens in {len(token_ids)} rows: the batch has {self.num_tokens} tokens in {self.num_rows} "
                "rows at most, give fewer or make a larger one"
            )
        if max(lens, default=0) > (longest := self._max_pages * self.page_size):
            raise InvalidArgumentError(f"rows of {lens} tokens: a row has {longest} at most")
        if len(last) > self.num_rows or not all(0 <= token < count for token in last):
            raise InvalidArgumentError(
                f"last={list(last)}: they are among {count} tokens, {self.num_rows} of them at most"
            )
        return count

    def _send(self, heads: Sequence[np.ndarray], indices: Sequence[np.ndarray]) -> None:
        """Copies what has its size always, and each group's pages as many as there are."""
        starts, (first, *others) = [0, *self._ends[:-1]], indices
        together = np.zeros(starts[len(heads)] + len(first), dtype=np.int32)
        for start, part in zip(starts, (*heads, first), strict=False):
            together[start : start + len(part)] = part
        for start, part in zip((0, *starts[len(heads) + 1 :]), (together, *others), strict=True):
            host = torch.from_numpy(part)
            if self._all.is_cuda:
                host = host.pin_memory()
            self._all[start : start + len(part)].copy_(host, non_blocking=True)


def _with_more(numbers: np.ndarray, count: int, number: int) -> np.ndarray:
    """So many times `number` behind them."""
    return np.concatenate((numbers, np.full(count, number, dtype=np.int32)))
