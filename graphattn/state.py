"""The fixed-address device buffers of a decode step, and their host mirror.

Shape letters: R rows of the largest bucket, B rows of a bucket, B1 = B + 1, P pages of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .batch import CSR, Batch, csr_arrays
from .errors import InvalidArgumentError
from .pages import NULL_PAGE
from .spec import AttentionSpec

ALIGNMENT = 64  # int32 elements: Inductor copies an input that does not start on 16 bytes
RING_DEPTH = 2


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class _Staging:
    """One pinned host copy of all buffers, and the event after which it may be written again."""

    def __init__(self, sizes: Sequence[int], device: torch.device):
        pinned = device.type == "cuda"
        self.tensors = [torch.zeros(size, dtype=torch.int32, device="cpu", pin_memory=pinned) for size in sizes]
        self.arrays = [tensor.numpy() for tensor in self.tensors]
        self.copied = torch.cuda.Event() if pinned else None


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a layer group's last_page_len, indptr and indices start in its packed buffer."""

    indptr: int
    indices: int
    size: int

    def csr(self, buffer: Tensor, num_rows: int, num_pages: int | None = None) -> CSR:
        end = self.size if num_pages is None else self.indices + num_pages
        return CSR(buffer[self.indptr : self.indptr + num_rows + 1], buffer[self.indices : end], buffer[:num_rows])


class StepState:
    """Token ids, positions and page tables of a decode step, at addresses that never change.

    A bucket of B rows uses the first B rows of every buffer. What a step needs on the device is written to a pinned
    mirror and sent in one copy per buffer; the mirror is a ring of two, so the next step can be staged while the last
    one's copy is still under way.

    A row's token may be one that the host has not read yet: what was drawn lies in `drawn`, and `feed` takes each row's
    token from there or from what was staged.

    Attributes:
        drawn: `[2, S]` int32 on the device with S at least R, where whoever draws puts ids that later steps feed: by
            convention those of a decode step in `drawn[0]` and of a prefill in `drawn[1]`.

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
        for name, value in (("max_batch", max_batch), ("max_seq_len", max_seq_len), ("page_size", page_size)):
            if value < 1:
                raise InvalidArgumentError(f"{name}={value}: it must be at least 1")
        if not groups:
            raise InvalidArgumentError("no layer group: the state needs at least one")
        self.max_batch, self.max_seq_len, self.page_size = max_batch, max_seq_len, page_size
        self.groups = tuple(groups)
        self.max_pages_per_row = -(-max_seq_len // page_size)
        self._stride = _aligned(max_batch)
        indices_at = _aligned(max_batch) + _aligned(max_batch + 1)
        self._layout = _Layout(_aligned(max_batch), indices_at, indices_at + max_batch * self.max_pages_per_row)
        sizes = [3 * self._stride, *[self._layout.size] * len(groups)]
        with torch.inference_mode(False):
            # Positions, staged tokens, and where each row's token is, which are sent together; then what was drawn.
            # Positions come first: Dynamo would take a storage offset for a dynamic number.
            rows = torch.zeros(5 * self._stride, dtype=torch.int32, device=device)
            self._buffers = [rows[: sizes[0]]]
            self._buffers += [torch.zeros(size, dtype=torch.int32, device=device) for size in sizes[1:]]
            self._token_ids = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self._known, self.drawn = rows[self._stride :], rows[sizes[0] :].view(2, -1)
        self.device = rows.device
        self._ring = [_Staging(sizes, self.device) for _ in range(RING_DEPTH)]
        self._turn = 0
        self._rows = torch.arange(max_batch, dtype=torch.int32, device=self.device)
        self._qo_indptr_host = torch.arange(max_batch + 1, dtype=torch.int32, device="cpu")

    @property
    def num_bytes(self) -> int:
        """Bytes of the device buffers."""
        return sum(buffer.nbytes for buffer in (*self._buffers, self.drawn, self._token_ids, self._rows))

    def token_ids(self, bucket: int) -> Tensor:
        """The token each row feeds in this step, `[B]` int32, once `feed` has run."""
        return self._token_ids[:bucket]

    def positions(self, bucket: int) -> Tensor:
        """The position of that token in its row, `[B]` int32."""
        return self._buffers[0][:bucket]

    def feed(self, bucket: int) -> None:
        """Puts each row's token where the step reads it; the first thing of a step, and captured with it."""
        sources_B = self._buffers[0][2 * self._stride : 2 * self._stride + bucket]
        torch.index_select(self._known, 0, sources_B, out=self._token_ids[:bucket])

    def csr(self, bucket: int, group: int) -> CSR:
        """The fixed-address page tables of a layer group at a bucket; `indices_P` is the whole buffer."""
        return self._layout.csr(self._buffers[1 + group], bucket)

    def stage(
        self,
        bucket: int,
        token_ids: Sequence[int],
        seq_lens: Sequence[int],
        tables: Sequence[Sequence[Sequence[int]]],
        *,
        drawn: Sequence[int | None] | None = None,
        num_pages: int | None = None,
    ) -> Batch:
        """Sends a step's numbers to the device, without waiting for it, and returns the batch to plan from.

        Rows beyond `len(token_ids)` are padding: token 0, length 1, on the null page.

        Args:
            bucket: rows the step is computed at, at least `len(token_ids)`.
            token_ids: the token each row feeds; whatever for a row whose token is in `drawn`.
            seq_lens: each row's length with that token counted.
            tables: `tables[group][row]`, the row's pages in order; may hold more pages than the length needs.
            drawn: where in `self.drawn.flatten()` each row's token is, or None for `token_ids[row]`.
            num_pages: pages of the cache, to check the tables against; kernels do not.

        Raises:
            InvalidArgumentError: more rows than the bucket holds, a row longer than `max_seq_len`, too few pages, a
                page outside the cache, or arguments that differ in length.
        """
        num_rows, padding = len(token_ids), bucket - len(token_ids)
        if padding < 0 or bucket > self.max_batch:
            raise InvalidArgumentError(
                f"{num_rows} rows at bucket {bucket}: the bucket must hold them and be at most {self.max_batch}"
            )
        if len(seq_lens) != num_rows or [len(table) for table in tables] != [num_rows] * len(self.groups):
            given = f"{len(seq_lens)} lengths and tables of {[len(table) for table in tables]} rows"
            raise InvalidArgumentError(
                f"{num_rows} token ids, {given}: give one length per row and, for each of {len(self.groups)} layer "
                "groups, one table per row"
            )
        sources = [source for source in drawn or () if source is not None]
        if drawn is not None and (len(drawn) != num_rows or not all(0 <= at < self.drawn.numel() for at in sources)):
            places = f"0 to {self.drawn.numel() - 1}"
            raise InvalidArgumentError(f"drawn={list(drawn)}, {num_rows} rows: give each a place, {places}, or None")
        if seq_lens and max(seq_lens) > self.max_seq_len:
            row = max(range(num_rows), key=lambda index: seq_lens[index])
            raise InvalidArgumentError(f"row {row}: {seq_lens[row]} tokens, max_seq_len is {self.max_seq_len}")
        lens = [*seq_lens, *[1] * padding]
        packed = [csr_arrays([*table, *[[NULL_PAGE]] * padding], lens, self.page_size) for table in tables]
        for group, (_, indices, _) in enumerate(packed):
            if num_pages is not None and not 0 <= indices.min() <= indices.max() < num_pages:
                raise InvalidArgumentError(
                    f"tables of layer group {group} hold pages {indices.min()} to {indices.max()}, the cache has "
                    f"pages 0 to {num_pages - 1}"
                )
        staging = self._ring[self._turn]
        self._turn = (self._turn + 1) % RING_DEPTH
        if staging.copied is not None:
            staging.copied.synchronize()  # its copy of two steps ago; the host must not overwrite what is still read
        rows, stride = staging.arrays[0], self._stride
        rows[:bucket] = np.subtract(lens, 1)
        rows[stride : stride + num_rows] = token_ids
        rows[stride + num_rows : stride + bucket] = 0
        rows[2 * stride : 2 * stride + bucket] = np.arange(bucket)
        for row, source in enumerate(drawn or ()):
            if source is not None:
                rows[2 * stride + row] = 2 * stride + source
        self._buffers[0].copy_(staging.tensors[0], non_blocking=True)
        for group, (indptr, indices, last_page_len) in enumerate(packed, start=1):
            array, used = staging.arrays[group], self._layout.indices + len(indices)
            array[:bucket] = last_page_len
            array[self._layout.indptr : self._layout.indptr + bucket + 1] = indptr
            array[self._layout.indices : used] = indices
            self._buffers[group][:used].copy_(staging.tensors[group][:used], non_blocking=True)
        if staging.copied is not None:
            staging.copied.record(torch.cuda.current_stream(self.device))
        return Batch(
            token_ids_N=self.token_ids(bucket),
            positions_N=self.positions(bucket),
            rows_N=self._rows[:bucket],
            qo_indptr_B1=self._qo_indptr_host[: bucket + 1],
            groups=tuple(self.csr(bucket, group) for group in range(len(self.groups))),
            groups_host=tuple(
                self._layout.csr(tensor, bucket, len(indices))
                for tensor, (_, indices, _) in zip(staging.tensors[1:], packed, strict=True)
            ),
        )
