"""A decode step that is launched before the host has read which tokens it feeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from .rows import Decode


def blank_pages(blocks) -> Iterator[int]:
    """Pages in the order in which they are given out, up to the first whose tokens a prompt may be found to have.

    Args:
        blocks: nano-vLLM's block manager; of one that is otherwise than is known, no page.
    """
    held = getattr(blocks, "blocks", ())
    for page in getattr(blocks, "free_block_ids", ()):
        if page >= len(held) or getattr(held[page], "hash", None) != -1:
            return
        yield page


def expected(seqs: Sequence, blank: Iterable[int], *, page_size: int, max_seq_len: int) -> Decode | None:
    """The rows of the step after one of these sequences, if nothing but a length ends any of them.

    None where there is none, where one is at its end, or where one needs a page and there is no blank one. Such a page
    is written to before it is the row's: if it becomes somebody else's instead, nobody has missed what it held, and who
    gets it writes later.

    Args:
        seqs: as they are before the tokens that were just drawn for them, row by row, are appended.
        blank: pages that will be given out next, in this order.
        page_size: tokens in a page.
        max_seq_len: tokens that a row may reach.
    """
    rows = [
        (row, seq)
        for row, seq in enumerate(seqs)
        if len(seq) + 1 - seq.num_prompt_tokens < getattr(seq, "max_tokens", float("inf"))
    ]
    going, places = [seq for _, seq in rows], [row for row, _ in rows]
    tables, blank = [], iter(blank)
    for seq in going:
        table = seq.block_table
        if len(seq) >= len(table) * page_size:
            table = [*table, *islice(blank, 1)]
        if len(seq) >= min(len(table) * page_size, max_seq_len):
            return None
        tables.append(table)
    return Decode(going, [0] * len(going), [len(seq) + 1 for seq in going], tables, places) if going else None


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
