"""What each row asks of the draw inside the step, on the device, and that draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress
from operator import ne
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..draw import draws_in_one_pass, exponentials, keys_of
from ..mirror import Mirror
from ..sampling import SamplingParams

BLOCK_ELEMENTS = 1 << 22  # logits whose noise is held at once


class Ask(NamedTuple):
    """What a request asks of every draw in the step.

    Attributes:
        seed: in [0, 2**63).
        temperature: in [1e-30, 1e30], or 0 for the most likely token.
        log_min_p: -inf where it is off.
    """

    seed: int
    temperature: float
    log_min_p: float

    @classmethod
    def of(cls, params: SamplingParams, seed: int) -> Ask:
        """What `params` ask; where the step cannot draw it, the most likely token, which costs the least."""
        if params.is_greedy or not is_drawn_in_step(params):
            return cls(seed % 2**63, 0.0, -math.inf)
        log_min_p = math.log(params.min_p) if params.min_p else -math.inf
        return cls(seed % 2**63, min(max(params.temperature, 1e-30), 1e30), log_min_p)


GREEDY = Ask(seed=0, temperature=0.0, log_min_p=-math.inf)


def is_drawn_in_step(params: SamplingParams) -> bool:
    """Whether temperature and min-p are all that they ask: nothing that must be sorted, edited or told besides."""
    is_sorted = not params.is_greedy and (params.top_k > 0 or params.top_p < 1)
    return not is_sorted and params.repetition_penalty == 1.0 and params.logprobs is None


class RowDraws:
    """Seed, temperature and min-p of the rows at fixed addresses, sent for rows that change, and the draw from them.

    Args:
        drawn_R: int32, where what a step draws goes, row by row: `StepState.drawn[0]`.
        max_batch: rows.
        dtype: of the logits.

    Attributes:
        is_greedy_only: whether it takes the most likely token whatever is asked: logits that our kernel does not take,
            on CUDA.
    """

    def __init__(self, drawn_R: Tensor, *, max_batch: int, dtype: torch.dtype):
        self._drawn_R = drawn_R
        self._in_kernel = draws_in_one_pass(dtype, drawn_R.device)
        self.is_greedy_only = not self._in_kernel and drawn_R.device.type != "cpu"
        self._mirror = Mirror(len(Ask._fields), max_batch, dtype=torch.int64, device=drawn_R.device)
        seeds, *floats = (self._mirror.field(index) for index in range(len(Ask._fields)))
        self._fields = (seeds, *(field.view(torch.float64) for field in floats))
        self._staged: list[Ask | None] = [None] * max_batch

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        return self._mirror.num_bytes

    @property
    def num_sent(self) -> int:
        """Numbers sent to the device so far."""
        return self._mirror.num_sent

    def stage(self, asks: Sequence[Ask]) -> None:
        """Says what the first rows ask from the next step on; sends what changed, and waits for nothing."""
        changed = list(compress(range(len(asks)), map(ne, asks, self._staged)))
        if not changed:
            return
        seeds, *floats = zip(*(asks[row] for row in changed), strict=True)
        wanted_FB = self._mirror.known[:, : len(asks)].copy()
        wanted_FB[0, changed] = seeds
        wanted_FB[1:, changed] = np.array(floats, np.float64).view(np.int64)
        for row in changed:
            self._staged[row] = None  # for as long as this may be interrupted
        self._mirror.send(wanted_FB)
        for row in changed:
            self._staged[row] = asks[row]

    def __call__(self, logits_BV: Tensor, positions_B: Tensor) -> Tensor:
        """Draws the token behind `positions_B` in each row, `[B]` int64, and leaves it in `drawn_R`; captured."""
        num_rows = len(logits_BV)
        drawn_B, rows = self._drawn_R[:num_rows], [field[:num_rows] for field in self._fields]
        if self._in_kernel:
            from ..kernels.draw import draw_gumbel

            return draw_gumbel(logits_BV, *rows, positions_B=positions_B, drawn_B=drawn_B)
        token_ids_B = logits_BV.argmax(-1)
        if not self.is_greedy_only:
            _draw_plainly(logits_BV, positions_B, *rows, token_ids_B)
        drawn_B.copy_(token_ids_B)
        return token_ids_B


@torch.no_grad()
def _draw_plainly(
    logits_BV: Tensor,
    positions_B: Tensor,
    seeds_B: Tensor,
    temperature_B: Tensor,
    log_min_p_B: Tensor,
    token_ids_B: Tensor,
) -> None:
    """Puts what `sample` draws for rows with a temperature into `token_ids_B`; reads back which they are."""
    vocab = logits_BV.shape[1]
    for index_R in temperature_B.nonzero()[:, 0].split(max(1, BLOCK_ELEMENTS // vocab)):
        x_RV = logits_BV[index_R]
        x_RV = x_RV if x_RV.dtype == torch.float64 else x_RV.float()
        x_RV = x_RV / temperature_B[index_R, None].to(x_RV.dtype)
        floor_R1 = x_RV.amax(-1, keepdim=True) + log_min_p_B[index_R, None].to(x_RV.dtype)
        x_RV = x_RV.masked_fill(x_RV < floor_R1, -math.inf)
        keys_R = keys_of(seeds_B[index_R], positions_B[index_R].long() + 1)
        token_ids_B[index_R] = (x_RV.double() - exponentials(keys_R, vocab).log_()).argmax(-1)
