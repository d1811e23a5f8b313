"""The fixed-address device buffers of a decode step, which the step itself moves on to the next.

Shape letters: R rows of the largest bucket, B rows of a bucket, B1 = B + 1, P pages of all rows together, M pages that
one row may have, G layer groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from .batch import CSR, Batch, csr_arrays
from .errors import InvalidArgumentError
from .integers import integers, integers32
from .mirror import UNKNOWN, Mirror, aligned
from .pages import NULL_PAGE
from .spec import AttentionSpec, check_counts
from .tables import SentTables

LENS, ACTIVE, SOURCES, TOKENS = range(4)  # the fields of a row


class StepState:
    """Token ids, lengths and page tables of a decode step, at addresses that never change.

    A bucket of B rows uses the first B rows of every buffer. `stage` says what the next step's rows are, and sends what
    differs from what the device will have by then. `feed`, the first thing of a step and captured with it, makes of
    that what the step reads: token ids, positions and each group's `CSR`. Then it moves every row on: one token longer,
    the next to be taken from the row's own place in `drawn[0]`. So rows that go on as they did are not sent at all.

    A row's token may be one that the host has not read yet: what was drawn lies in `drawn`, and `feed` takes each row's
    token from there or from what was staged.

    Attributes:
        drawn: `[2, S]` int32 on the device with S at least R, where whoever draws puts ids that later steps feed: by
            convention those of a decode step in `drawn[0]`, row by row, and of a prefill in `drawn[1]`.

    Args:
        max_batch: rows of the largest bucket.
        max_seq_len: tokens that one row may reach.
        page_size: tokens in a page.
        groups: the layer groups; each has its own page tables.
        device: where the step runs.

    Raises:
        InvalidArgumentError: a count is below 1 or there is no group.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_seq_len: int,
        page_size: int,
        groups: Sequence[AttentionSpec],
        device: torch.device | str,
    ):
        check_counts(max_batch=max_batch, max_seq_len=max_seq_len, page_size=page_size)
        if not groups:
            raise InvalidArgumentError("no layer group: the state needs at least one")
        self.max_batch, self.max_seq_len, self.page_size = max_batch, max_seq_len, page_size
        self.groups = tuple(groups)
        self.max_pages_per_row = -(-max_seq_len // page_size)
        stride, table = aligned(max_batch), max_batch * self.max_pages_per_row
        self._mirror = Mirror(4, max_batch, tail=2 * stride + len(groups) * table, dtype=torch.int32, device=device)
        self.device, tail_at = self._mirror.numbers.device, self._mirror.tail_at
        tables_at = tail_at + 2 * stride
        self.drawn = self._mirror.numbers[tail_at:tables_at].view(2, stride)
        self._candidates = self._mirror.numbers[TOKENS * stride : tables_at]  # what a row's source is a place in
        self._drawn_from = stride
        self._tables_GRM = self._mirror.numbers[tables_at:].view(len(groups), max_batch, -1)
        self._sent = [
            SentTables(max_batch, self.max_pages_per_row, tables_at + group * table) for group in range(len(groups))
        ]
        # Per group last_page_len, indptr and indices; at the end of indices one place that is written and not read.
        self._at_indptr, self._at_indices = stride, stride + aligned(max_batch + 1)
        integers = {"dtype": torch.int32, "device": self.device}
        with torch.inference_mode(False):
            self._csr_G = torch.zeros(len(groups), aligned(self._at_indices + table + 1), **integers)
            # Each a tensor of its own: Dynamo would take a storage offset for a dynamic number.
            self._token_ids, self._positions = torch.zeros(max_batch, **integers), torch.zeros(max_batch, **integers)
            self._rows, self._order = torch.arange(max_batch, **integers), torch.zeros(max_batch, **integers)
            self._arrivals = torch.zeros(1, **integers)
        self._qo_indptr_host = torch.arange(max_batch + 1, dtype=torch.int32, device="cpu")
        self._own_B = stride + np.arange(max_batch)  # each row's place in drawn[0], as a source
        self._views: dict[int, dict] = {}
        self._in_kernel = self.device.type == "cuda" and find_spec("triton") is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of the device buffers."""
        buffers = (self._csr_G, self._token_ids, self._positions, self._rows, self._order, self._arrivals)
        return self._mirror.num_bytes + sum(buffer.nbytes for buffer in buffers)

    @property
    def num_sent(self) -> int:
        """Numbers sent to the device so far; a step whose rows go on as they did adds none."""
        return self._mirror.num_sent

    def token_ids(self, bucket: int) -> Tensor:
        """The token each row feeds in this step, `[B]` int32, once `feed` has run."""
        return self._token_ids[:bucket]

    def positions(self, bucket: int) -> Tensor:
        """The position of that token in its row, `[B]` int32, once `feed` has run."""
        return self._positions[:bucket]

    def csr(self, bucket: int, group: int) -> CSR:
        """The fixed-address page tables of a layer group at a bucket; `indices_P` is the whole buffer."""
        buffer, end = self._csr_G[group], self._at_indices + self.max_batch * self.max_pages_per_row
        indptr_B1 = buffer[self._at_indptr : self._at_indptr + bucket + 1]
        return CSR(indptr_B1, buffer[self._at_indices : end], buffer[:bucket])

    def stage(
        self,
        bucket: int,
        token_ids: Sequence[int],
        seq_lens: Sequence[int],
        tables: Sequence[Sequence[Sequence[int]]],
        *,
        drawn: Sequence[int | None] | None = None,
        num_pages: Sequence[int] | None = None,
    ) -> Batch:
        """Says what the rows of the next `feed` are, sends what the device lacks of it, and returns the batch to plan.

        Rows beyond `len(token_ids)` are padding: token 0, length 1, on the null page; they do not move on.

        Args:
            bucket: rows the step is computed at, at least `len(token_ids)`.
            token_ids: the token each row feeds; whatever for a row whose token is in `drawn`.
            seq_lens: each row's length with that token counted.
            tables: `tables[group][row]`, the row's pages in order; may hold more pages than the length needs.
            drawn: where in `self.drawn.flatten()` each row's token is, or None for `token_ids[row]`.
            num_pages: pages of each group's cache, to check the tables against; kernels do not.

        Raises:
            InvalidArgumentError: more rows than the bucket holds, a row longer than `max_seq_len`, too few pages, a
                page outside the cache, numbers that are no ints, or arguments that differ in length. What is on the
                device stays as it was.
        """
        num_rows = len(token_ids)
        self._check_counts(bucket, num_rows, seq_lens, tables)
        lens_B = integers(seq_lens, "seq_lens")
        if num_rows and lens_B.max() > self.max_seq_len:
            row = int(lens_B.argmax())
            raise InvalidArgumentError(f"row {row}: {seq_lens[row]} tokens, max_seq_len is {self.max_seq_len}")
        wanted_FB = self._mirror.known[:, :bucket].copy()
        wanted_FB[LENS, :num_rows] = lens_B
        wanted_FB[ACTIVE, :num_rows], wanted_FB[ACTIVE, num_rows:] = 1, 0
        self._want_tokens(wanted_FB[SOURCES:, :num_rows], token_ids, drawn)
        limits = [None] * len(tables) if num_pages is None else num_pages
        changes = [
            sent.changes(group, table, seq_lens, lens_B, self.page_size, limit)
            for group, (sent, table, limit) in enumerate(zip(self._sent, tables, limits, strict=True))
        ]
        for sent, changed in zip(self._sent, changes, strict=True):
            sent.forget(changed)
        places = [place for changed in changes for place in changed.places]
        pages = [page for changed in changes for page in changed.pages]
        self._mirror.send(wanted_FB, places, pages)
        for sent, changed in zip(self._sent, changes, strict=True):
            sent.remember(changed)
        if bucket not in self._views:
            self._views[bucket] = {
                "token_ids_N": self.token_ids(bucket),
                "positions_N": self.positions(bucket),
                "rows_N": self._rows[:bucket],
                "qo_indptr_B1": self._qo_indptr_host[: bucket + 1],
                "groups": tuple(self.csr(bucket, group) for group in range(len(self.groups))),
                "order_B": self._order[:bucket],
            }
        held = [sent.held(num_rows) for sent in self._sent]
        kv_lens_B = np.where(wanted_FB[ACTIVE], wanted_FB[LENS], 1).astype(np.int32)
        return Batch(
            **self._views[bucket],
            kv_lens_B=torch.from_numpy(kv_lens_B),
            count_groups=lambda: tuple(self._csr_host(table, kv_lens_B) for table in held),
            tables_host=tuple(sent.pages_RM[:bucket] for sent in self._sent),
        )

    def feed(self, bucket: int) -> None:
        """Derives what the step reads, then moves the rows on; the first thing of a step, and captured with it."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._derive(bucket)  # nothing runs now; whoever replays it says so with `fed`
            return
        with self.fed(bucket):
            self._derive(bucket)

    @contextmanager
    def fed(self, bucket: int) -> Iterator[None]:
        """Goes around the launch of a graph in which `feed` was captured, to follow here what it does there.

        If the launch raises, nothing is taken for known: the next `stage` sends what it would not have sent else.
        """
        lens_B, active_B, sources_B = self._mirror.known[:TOKENS, :bucket]
        next_lens_B = lens_B + active_B
        next_sources_B = np.where(active_B == 1, self._own_B[:bucket], sources_B)
        if active_B.min() < 0:  # a stage was interrupted
            next_lens_B[active_B < 0] = next_sources_B[active_B < 0] = UNKNOWN
        lens_B[:], sources_B[:] = UNKNOWN, UNKNOWN
        yield
        lens_B[:], sources_B[:] = next_lens_B, next_sources_B

    def _check_counts(self, bucket: int, num_rows: int, seq_lens: Sequence[int], tables: Sequence[Sequence]) -> None:
        if num_rows > bucket or bucket > self.max_batch:
            raise InvalidArgumentError(
                f"{num_rows} rows at bucket {bucket}: the bucket must hold them and be at most {self.max_batch}"
            )
        if len(seq_lens) != num_rows or [len(table) for table in tables] != [num_rows] * len(self.groups):
            given = f"{len(seq_lens)} lengths and tables of {[len(table) for table in tables]} rows"
            raise InvalidArgumentError(
                f"{num_rows} token ids, {given}: give one length per row and, for each of {len(self.groups)} layer "
                "groups, one table per row"
            )

    def _want_tokens(self, wanted_2B: np.ndarray, token_ids: Sequence[int], drawn: Sequence[int | None] | None) -> None:
        """Where each row's token is, and the token of those that are staged; the last token of others is no matter."""
        num_rows = len(token_ids)
        sources_B, tokens_B = wanted_2B
        if drawn is None:
            sources_B[:] = np.arange(num_rows)
            tokens_B[:] = integers32(token_ids, "token_ids")
            return
        given = [place for place in drawn if place is not None]
        if len(drawn) != num_rows or (given and not 0 <= min(given) <= max(given) < self.drawn.numel()):
            places = f"0 to {self.drawn.numel() - 1}"
            raise InvalidArgumentError(f"drawn={list(drawn)}, {num_rows} rows: give each a place, {places}, or None")
        if len(given) == num_rows:
            sources_B[:] = integers(given, "drawn") + self._drawn_from
        else:
            is_drawn_B = np.array([place is not None for place in drawn])
            sources_B[:] = np.arange(num_rows)
            sources_B[is_drawn_B] = integers(given, "drawn") + self._drawn_from
            tokens_B[~is_drawn_B] = integers32(token_ids, "token_ids")[~is_drawn_B]

    def _csr_host(self, held: Sequence[Sequence[int]], kv_lens_B: np.ndarray) -> CSR:
        padding = [[NULL_PAGE]] * (len(kv_lens_B) - len(held))
        indptr, indices, last_page_len = csr_arrays([*held, *padding], kv_lens_B.tolist(), self.page_size)
        return CSR(torch.from_numpy(indptr), torch.from_numpy(indices), torch.from_numpy(last_page_len))

    def _derive(self, bucket: int) -> None:
        if self._in_kernel:
            from .kernels.rows import feed_rows

            feed_rows(
                self._mirror.numbers,
                self._candidates,
                self._tables_GRM,
                self._token_ids,
                self._positions,
                self._order,
                self._csr_G,
                self._arrivals,
                stride=self._drawn_from,
                bucket=bucket,
                at_indptr=self._at_indptr,
                at_indices=self._at_indices,
                page_size=self.page_size,
            )
            return
        lens_B, active_B, sources_B = (self._mirror.field(index)[:bucket] for index in (LENS, ACTIVE, SOURCES))
        is_row_B = active_B != 0
        kv_lens_B = torch.where(is_row_B, lens_B, 1)
        self._positions[:bucket] = kv_lens_B - 1
        self._order[:bucket] = kv_lens_B.argsort(descending=True, stable=True)
        self._token_ids[:bucket] = self._candidates.index_select(0, sources_B) * active_B
        counts_B = (kv_lens_B + self.page_size - 1) // self.page_size
        page_M = torch.arange(self.max_pages_per_row, dtype=torch.int32, device=self.device)
        is_held_BM = page_M < counts_B[:, None]
        for csr, table_RM in zip(self._csr_G, self._tables_GRM, strict=True):
            csr[:bucket] = (kv_lens_B - 1) % self.page_size + 1
            indptr_B1 = csr[self._at_indptr : self._at_indptr + bucket + 1]
            torch.cumsum(counts_B, 0, dtype=torch.int32, out=indptr_B1[1:])
            indices_P = csr[self._at_indices :]
            places_BM = torch.where(is_held_BM, indptr_B1[:-1, None] + page_M, len(indices_P) - 1)
            pages_BM = torch.where(is_row_B[:, None], table_RM[:bucket], NULL_PAGE)
            indices_P.index_copy_(0, places_BM.flatten().long(), pages_BM.flatten())
        lens_B += active_B
        sources_B.copy_(torch.where(is_row_B, self._drawn_from + self._rows[:bucket], sources_B))
