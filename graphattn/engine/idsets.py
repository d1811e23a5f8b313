"""Sets of token ids of the rows of a step, at a fixed device address.

Letters: R rows of the largest bucket, W words of 32 bits, B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..draw import upload

SEEN, BANNED = 0, 1
_WORD = 32


class IdSets:
    """Which ids each row has seen, and which are banned for it, a bit each.

    They take a quarter of a byte for each row and id, whether anybody asks or not: captured steps hold their address.
    An id list would hold only so many stop ids, and a penalty would have to look through all of the text.

    Args:
        max_batch: R.
        vocab: V; ids go from 0 to it, itself left out.
        device: where they are.

    Attributes:
        words_2RW: int32 on the device, all 0 to begin with; id i is bit i % 32 of word i // 32.
        num_sent: sets sent so far.
    """

    def __init__(self, max_batch: int, vocab: int, device: torch.device):
        with torch.inference_mode(False):
            self.words_2RW = torch.zeros(2, max_batch, -(-vocab // _WORD), dtype=torch.int32, device=device)
        self.num_sent = 0

    def put(self, which: int, row: int, ids: Sequence[int]) -> None:
        """Makes the set of a row that of the ids, whatever it was; waits for nothing."""
        words_W = self.words_2RW[which, row]
        flags = np.zeros(len(words_W) * _WORD, np.uint8)
        flags[np.asarray(ids, np.int64)] = 1
        packed = np.packbits(flags, bitorder="little").view("<i4")
        words_W.copy_(upload(packed, np.int32, words_W.device), non_blocking=True)
        self.num_sent += 1


def contains(words_BW: Tensor, vocab: int) -> Tensor:
    """[B, V] bool, from the words of some rows."""
    bits = torch.arange(_WORD, dtype=torch.int32, device=words_BW.device)
    return (words_BW[:, :, None] >> bits).bitwise_and_(1).bool().flatten(1)[:, :vocab]
