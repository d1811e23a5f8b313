"""Numbers of the rows of a step at a fixed device address, of which the host sends only those that change.

Shape letters: F fields, R rows of the largest bucket, B rows of a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # elements: what a field starts at, so that every view of one is aligned as a tensor of its own
RING_DEPTH = 2
CHUNK = 1 << 15  # numbers sent at once
# What the host does not know: no int32, and as the bits of a float64 a nan that nobody sends.
UNKNOWN = -(2**51) + 1


def aligned(count: int) -> int:
    """`count` rounded up to where the next field may start."""
    return -(-count // ALIGNMENT) * ALIGNMENT


class _Slot:
    """A pinned host buffer of places and values, and the event after which it may be written again."""

    def __init__(self, num_words: int, device: torch.device):
        pinned = device.type == "cuda"
        self.tensor = torch.zeros(num_words, dtype=torch.int64, device="cpu", pin_memory=pinned)
        self.array = self.tensor.numpy()
        self.copied = torch.cuda.Event() if pinned else None


class Mirror:
    """`[F, R]` numbers and a tail of others on the device, and what the host knows them to be.

    What is sent goes as (place, value) pairs: one copy from a ring of two pinned buffers and one launch that puts the
    values where they belong, however many fields and rows they are for; nothing if nothing differs. A buffer is written
    again once its last copy is over.

    The host may let the device change fields by itself, if it does the same to `known`, and must set to `UNKNOWN` what
    it cannot be sure of: that is sent again when it is next asked for.

    Args:
        num_fields: F.
        num_rows: R.
        tail: numbers behind the fields, whose values the host keeps elsewhere.
        dtype: torch.int32 or torch.int64; other things of these sizes are sent as their bits.
        device: where they are.

    Attributes:
        numbers: fields and tail on the device, all 0 to begin with.
        fields: `[F, R]` of them, and as many more as alignment takes.
        known: `[F, R]` int64, what the fields are once all that is queued has run.
        num_sent: numbers sent so far.
    """

    def __init__(self, num_fields: int, num_rows: int, *, tail: int = 0, dtype: torch.dtype, device: torch.device):
        self._stride, self._size = aligned(num_rows), dtype.itemsize
        self.tail_at = num_fields * self._stride
        capacity = min(CHUNK, num_fields * num_rows + tail)
        num_words = capacity + self._words(capacity)
        with torch.inference_mode(False):
            self.numbers = torch.zeros(self.tail_at + tail, dtype=dtype, device=device)
            self._sent = torch.zeros(num_words, dtype=torch.int64, device=device)
        self.fields = self.numbers[: self.tail_at].view(num_fields, self._stride)
        self.known = np.zeros((num_fields, num_rows), np.int64)
        self.num_sent = 0
        self._capacity, self._dtype = capacity, np.dtype(f"i{self._size}")
        self._ring = [_Slot(num_words, self.numbers.device) for _ in range(RING_DEPTH)]
        self._turn = 0

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self.numbers.nbytes + self._sent.nbytes

    def field(self, index: int) -> Tensor:
        """A field on the device, `[R]` and as many more as alignment takes."""
        return self.fields[index]

    def send(self, wanted_FB: np.ndarray, places: Sequence[int] = (), values: Sequence[int] = ()) -> None:
        """Makes the fields of the first B rows what is wanted, and sets values in the tail; waits for nothing queued.

        Args:
            wanted_FB: int64; where it is what `known` holds, `UNKNOWN` included, nothing is sent.
            places: where in `numbers` the values of the tail go, each at most once.
            values: as many.
        """
        known_FB = self.known[:, : wanted_FB.shape[1]]
        fields, rows = (wanted_FB != known_FB).nonzero()
        count = len(fields) + len(places)
        if not count:
            return
        cells = wanted_FB[fields, rows]
        index = np.concatenate((fields * self._stride + rows, np.asarray(places, np.int64)))
        numbers = np.concatenate((cells, np.asarray(values, np.int64)))
        known_FB[fields, rows] = UNKNOWN  # for as long as this may be interrupted
        for start in range(0, count, self._capacity):
            self._send(index[start : start + self._capacity], numbers[start : start + self._capacity])
        known_FB[fields, rows] = cells
        self.num_sent += count

    def _words(self, count: int) -> int:
        """Words of 8 bytes that `count` values take."""
        return -(-count * self._size // 8)

    def _send(self, places: np.ndarray, values: np.ndarray) -> None:
        slot, count = self._ring[self._turn], len(places)
        self._turn = (self._turn + 1) % RING_DEPTH
        if slot.copied is not None:
            slot.copied.synchronize()  # its last copy; the host must not overwrite what is still read
        words = count + self._words(count)
        slot.array[:count] = places
        slot.array[count:words].view(self._dtype)[:count] = values
        sent = self._sent[:words]
        sent.copy_(slot.tensor[:words], non_blocking=True)
        if slot.copied is not None:
            slot.copied.record(torch.cuda.current_stream(sent.device))
        self.numbers.index_copy_(0, sent[:count], sent[count:].view(self.numbers.dtype)[:count])
