"""What each row asks of the draw inside the step, on the device, and that draw.

Letters: R rows of the largest bucket, B rows of a bucket, V vocabulary, F numbers of an `Ask`, W words of a set of ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from operator import is_not
from typing import Protocol

import torch
from torch import Tensor

from ..draw import alike, draw_plainly, draws_in_kernel, packed
from ..mirror import Mirror
from ..sampling import Ask
from .idsets import BANNED, SEEN, IdSets, contains

_PENALTY, _BANNED_UNTIL = Ask._fields.index("penalty"), Ask._fields.index("banned_until")


class Drawing(Protocol):
    """Who draws in a row of the step, a request.

    Attributes:
        ask: what it asks, the same object for as long as it draws.
        tokens: all ids of its text, the one that the step feeds at the end; that one may be negative, not read yet.
        stop_ids: what is banned before `ask.banned_until`.
    """

    ask: Ask
    tokens: Sequence[int]
    stop_ids: frozenset[int]


class RowDraws:
    """What the rows ask at fixed addresses, sent for rows that change, and the draw from it.

    The ids that a row with a penalty has seen are sent when it begins to draw in that place, or goes on there after
    anything but one step. Each step adds the token that it fed: that one the host need not have read.

    Args:
        drawn_R: int32, where what a step draws goes, row by row: `StepState.drawn[0]`.
        max_batch: R.
        vocab: V at most.
        dtype: of the logits.
    """

    def __init__(self, drawn_R: Tensor, *, max_batch: int, vocab: int, dtype: torch.dtype):
        self._drawn_R, device = drawn_R, drawn_R.device
        self._in_kernel, self._reads = draws_in_kernel(dtype, device), device.type == "cpu"
        self._mirror = Mirror(len(Ask._fields), max_batch, dtype=torch.int64, device=device)
        # Padding that nobody was in is greedy, which costs the least: of numbers all 0 a kernel would make filters.
        self._mirror.send(packed([Ask(seed=0)] * max_batch))
        self._sets = IdSets(max_batch, vocab, device)
        self._rows = torch.arange(max_batch, device=device)
        self._staged: list[Ask | None] = [None] * max_batch
        self._penalised: set[int] = set()  # places of rows with a penalty
        self._next_lens: dict[int, int] = {}  # and how long their text is when their set holds all of it but its end

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self._mirror.num_bytes + self._sets.words_2RW.nbytes + self._rows.nbytes

    @property
    def num_sent(self) -> int:
        """Numbers sent to the device so far, and sets."""
        return self._mirror.num_sent + self._sets.num_sent

    @contextmanager
    def staged(self, rows: Sequence[Drawing]) -> Iterator[None]:
        """Goes around the launch of a step: says who draws in its first rows, sends what changed, waits for nothing.

        If the launch raises, nobody knows what the step added to the sets: they are sent again.
        """
        asks = [row.ask for row in rows]
        changed = list(compress(range(len(asks)), map(is_not, asks, self._staged)))
        if changed:
            self._send(changed, rows)
        lens = {at: len(rows[at].tokens) for at in self._penalised if at < len(rows)}
        for at, length in lens.items():
            if self._next_lens.pop(at, None) != length:
                self._sets.put(SEEN, at, [token_id for token_id in rows[at].tokens if token_id >= 0])
        yield
        self._next_lens |= {at: length + 1 for at, length in lens.items()}

    @torch.no_grad()
    def __call__(self, logits_BV: Tensor, token_ids_B: Tensor, positions_B: Tensor) -> Tensor:
        """Draws the token behind each row's last, `[B]` int64, and leaves it in `drawn_R`; captured.

        For a row with a NaN that is `NOT_DRAWN`, and in `drawn_R` 0, since the next step feeds it.

        Args:
            logits_BV: where it is drawn from.
            token_ids_B: int32, the last tokens.
            positions_B: int32, where they are.
        """
        num_rows = len(logits_BV)
        drawn_B, asks_FB = self._drawn_R[:num_rows], self._mirror.fields[:, :num_rows]
        if self._in_kernel:
            from ..kernels.draw import Edits, draw_gumbel

            edits = Edits(token_ids_B, self._sets.words_2RW)
            return draw_gumbel(logits_BV, asks_FB, positions_B, edits=edits, drawn_B=drawn_B)
        return self._draw_plainly(logits_BV, asks_FB, token_ids_B, positions_B, drawn_B)

    def _send(self, changed: list[int], rows: Sequence[Drawing]) -> None:
        asks = [rows[at].ask for at in changed]
        wanted_FB = self._mirror.known[:, : len(rows)].copy()
        wanted_FB[:, changed] = packed(asks)
        for at in changed:
            self._staged[at] = None  # for as long as this may be interrupted
            self._penalised.discard(at)
            self._next_lens.pop(at, None)
        self._mirror.send(wanted_FB)
        for at, ask in zip(changed, asks, strict=True):
            if ask.banned_until:
                self._sets.put(BANNED, at, list(rows[at].stop_ids))
            if ask.penalty != 1:
                self._penalised.add(at)
            self._staged[at] = ask

    def _draw_plainly(
        self, logits_BV: Tensor, asks_FB: Tensor, token_ids_B: Tensor, positions_B: Tensor, drawn_B: Tensor
    ) -> Tensor:
        """On a CPU reads back who asks for what; elsewhere all rows take the longest way, which can be captured."""
        (num_rows, vocab), reads = logits_BV.shape, self._reads
        seen_BW, banned_BW = self._sets.words_2RW[:, :num_rows]
        penalty_B, banned_until_B = (asks_FB[at].view(torch.float64) for at in (_PENALTY, _BANNED_UNTIL))
        is_banned_B, is_penalised_B = positions_B + 1 < banned_until_B, penalty_B != 1
        x_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
        if not reads or is_banned_B.any():
            x_BV = x_BV.masked_fill(contains(banned_BW, vocab) & is_banned_B[:, None], -math.inf)
        if not reads or is_penalised_B.any():
            penalty_B1 = penalty_B[:, None].to(x_BV.dtype)
            is_seen_BV = contains(seen_BW, vocab) | (torch.arange(vocab, device=x_BV.device) == token_ids_B[:, None])
            penalised_BV = torch.where(x_BV < 0, x_BV * penalty_B1, x_BV / penalty_B1)
            x_BV = torch.where(is_seen_BV & is_penalised_B[:, None], penalised_BV, x_BV)
        kinds = [(self._rows[:num_rows], vocab)]
        if reads:
            seeds, floats = asks_FB[0].tolist(), asks_FB[1:].view(torch.float64).tolist()
            asks = [Ask(*numbers) for numbers in zip(seeds, *floats, strict=True)]
            kinds = [(torch.tensor(like, device="cpu"), count) for like, count in alike(asks, vocab)]
        drawn = draw_plainly(x_BV, asks_FB, positions_B + 1, kinds)
        # Padding feeds token 0 at position 0, which nobody has seen; a row that feeds its first token was sent it.
        words_B = token_ids_B.long() >> 5
        bits_B = torch.where(is_penalised_B & (positions_B > 0), 1 << (token_ids_B & 31), 0).int()
        held_B = seen_BW.gather(1, words_B[:, None])
        seen_BW.scatter_(1, words_B[:, None], held_B | bits_B[:, None])
        drawn_B.copy_(drawn.clamp(min=0))
        return drawn
