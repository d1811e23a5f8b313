"""What nano-vLLM's sequences ask of a step, as host numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...batch import Batch, ragged_batch
from ...pages import NULL_PAGE
from .drawn import Drawn


@dataclass(frozen=True, slots=True)
class Decode:
    """Rows of a decode step.

    Attributes:
        seqs: whose they are.
        token_ids: the last token of each, which it feeds.
        seq_lens: tokens of each with that one.
        tables: pages of each; nano-vLLM's own lists, which grow between steps.
        drawn: where that token lies on the device, None for one that has to be sent.
    """

    seqs: Sequence
    token_ids: list[int]
    seq_lens: list[int]
    tables: list[list[int]]
    drawn: list[int | None]

    @classmethod
    def of(cls, seqs: Sequence, drawn: Drawn) -> Decode:
        token_ids, tables = [seq.last_token for seq in seqs], [seq.block_table for seq in seqs]
        return cls(seqs, token_ids, [len(seq) for seq in seqs], tables, [drawn.place(seq) for seq in seqs])

    def keys(self) -> list[tuple]:
        """What each row's results depend on: two of one key in a row of steps are the same row."""
        fed = zip(self.seqs, self.seq_lens, self.tables, self.drawn, strict=True)
        return [(id(seq), length, len(table), table[-1], place) for seq, length, table, place in fed]


def prefill_batch(seqs: Sequence, *, page_size: int, device: torch.device) -> Batch:
    """The tokens of sequences that are to be computed now, over what each has cached.

    A version that chunks prompts says how many tokens they are; in others it is all that are not cached. Of a prompt
    that is cached whole, as older versions have it, the last token is computed again: its logits are asked for.
    """
    tokens, starts, tables = [], [], []
    for seq in seqs:
        start, chunk = seq.num_cached_tokens, getattr(seq, "num_scheduled_tokens", None)
        end = len(seq) if chunk is None else start + chunk
        start = min(start, end - 1)
        tokens.append(seq[start:end])
        starts.append(start)
        # Only the warm-up has sequences without pages.
        tables.append(seq.block_table or [NULL_PAGE] * -(-end // page_size))
    return ragged_batch(tokens, starts, [tables], page_size=page_size, device=device)
