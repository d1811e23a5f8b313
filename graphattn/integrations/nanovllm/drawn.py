"""What the sampler drew, where it lies on the device, so that the next step need not be sent it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

DECODED, PREFILLED = 0, 1  # the rows of `StepState.drawn`


class Drawn:
    """The tokens that were drawn last, by sequence: in the last decode step, and in the last prefill.

    A row is fed from a place on the device only if what lies there is the token that its sequence ends with now. Where
    the sampler is called otherwise than once for all rows, and on ranks that have none, tokens are sent.
    """

    def __init__(self):
        self._places: list[dict[int, tuple[int, int]]] = [{}, {}]  # by sequence: place and token
        self._counts: list[int] = []  # rows of each call of the sampler since the step began
        self._buffer: Tensor | None = None
        self._region = DECODED

    def begin(self, buffer: Tensor, region: int) -> None:
        """A step begins, which overwrites what that region held.

        Args:
            buffer: `StepState.drawn`.
            region: `DECODED` or `PREFILLED`.
        """
        self._buffer, self._region = buffer, region
        self._places[region], self._counts = {}, []

    def keep(self, token_ids_B: Tensor) -> bool:
        """The sampler drew; queues a copy and waits for nothing. False where it is none of a step's rows."""
        if self._buffer is None:
            return False
        fits = isinstance(token_ids_B, Tensor) and token_ids_B.dim() == 1 and len(token_ids_B) <= self._buffer.shape[1]
        self._counts.append(len(token_ids_B) if fits else -1)
        if fits:
            self._buffer[self._region, : len(token_ids_B)].copy_(token_ids_B)
        return fits

    def end(self, seqs: Sequence, token_ids: Sequence[int] | None) -> None:
        """The step's tokens are known to the host; None on ranks that draw none."""
        buffer, self._buffer = self._buffer, None  # what is drawn outside of steps is nobody's
        if buffer is None:
            return
        rows = buffer.shape[1]
        if token_ids is None or self._counts != [len(seqs)] or len(token_ids) != len(seqs) or len(seqs) > rows:
            return
        first = self._region * rows
        self._places[self._region] = {
            id(seq): (first + row, token_id) for row, (seq, token_id) in enumerate(zip(seqs, token_ids, strict=True))
        }

    def place(self, seq) -> int | None:
        """Where in `StepState.drawn.flatten()` the last token of a sequence lies; None if it does not."""
        for places in self._places:
            place, token_id = places.get(id(seq), (None, None))
            if token_id == seq.last_token:
                return place
        return None
