"""A decode step that is launched before the host has read which tokens it feeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rows import Decode


def expected(seqs: Sequence, *, page_size: int, max_seq_len: int) -> Decode | None:
    """The rows of the step after one of these sequences, if nothing but a length ends any of them.

    None where there is none, where one needs a page that it has not, or where one is at its end.

    Args:
        seqs: as they are before the tokens that were just drawn for them, row by row, are appended.
        page_size: tokens in a page.
        max_seq_len: tokens that a row may reach.
    """
    rows = [
        (row, seq)
        for row, seq in enumerate(seqs)
        if len(seq) + 1 - seq.num_prompt_tokens < getattr(seq, "max_tokens", float("inf"))
    ]
    if not rows or any(len(seq) >= min(len(seq.block_table) * page_size, max_seq_len) for _, seq in rows):
        return None
    going, places = [seq for _, seq in rows], [row for row, _ in rows]
    lens, tables = [len(seq) + 1 for seq in going], [seq.block_table for seq in going]
    return Decode(going, [0] * len(going), lens, tables, places)


class Ahead:
    """What such a step computes, for the rows that turned out to be as was expected.

    Rows that ended meanwhile were computed for nothing: what they wrote lies behind their tokens, in pages that were
    theirs, and whoever gets those pages writes later.

    Args:
        rows: as `expected` had them.
        hidden: `[B, hidden]` of those.
    """

    def __init__(self, rows: Decode, hidden: Tensor):
        self._rows = {key: row for row, key in enumerate(rows.keys())}
        self._hidden = hidden

    def of(self, rows: Decode) -> Tensor | None:
        """The hidden states of rows, `[B, hidden]`; None if one of them was not computed."""
        places = [self._rows.get(key) for key in rows.keys()]
        if None in places:
            return None
        if places == list(range(len(self._rows))):
            return self._hidden
        index = torch.tensor(places, device="cpu", pin_memory=self._hidden.is_cuda)
        return self._hidden.index_select(0, index.to(self._hidden.device, non_blocking=True))
