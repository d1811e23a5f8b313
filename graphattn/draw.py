"""The draw of one token per row, which its neighbours cannot change.

Letters: B rows of the batch, R those of them at hand, V vocabulary, F numbers of an `Ask`, K top log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidArgumentError
from .filters import filtered, weight_bits, weights
from .noise import GOLDEN, exponentials, keys_of, mix
from .sampling import Ask, RowSampling

NOT_DRAWN = -1
"""Stands for the token of a row whose logits hold a NaN."""
_SAMPLE_SALT = 0x5851F42D4C957F2D
_BLOCK_ELEMENTS = 1 << 22  # logits whose noise is held at once


@dataclass
class Sampled:
    """What `sample` drew, on the logits' device.

    Attributes:
        token_ids: [B] int64; `NOT_DRAWN` for a row whose logits hold a NaN.
        logprobs: [B] float32, None if no row asked: log-probability of the drawn token under the model's raw
            distribution (`log_softmax` of the logits as they came in, before bans, penalty and temperature); nan
            where not asked.
        top_ids: [B, K] int64, most likely first, lower id first on ties; None if no row asked, -1 where not asked.
            K is the largest `logprobs` among the rows, at most V; a row that asked for k reads its first k columns.
        top_logprobs: [B, K] float32, the log-probabilities of `top_ids`; nan where not asked.
    """

    token_ids: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


def derive_seed(seed: int, index: int) -> int:
    """Seed in [0, 2**63) of sample number `index` >= 0 of a request; index 0 has the request's own."""
    if index < 0:
        raise InvalidArgumentError(f"index must be an int >= 0, got {index!r}")
    seed %= 2**63
    return seed if index == 0 else mix(mix((seed ^ _SAMPLE_SALT) + GOLDEN) + index * GOLDEN) >> 1


@torch.no_grad()
def sample(logits: Tensor, rows: Sequence[RowSampling]) -> Sampled:
    """Draw one token per row; nothing is read back from the device.

    In the order of transformers' generate: bans, repetition penalty, temperature, top-k, top-p, min-p, draw. The draw
    is Gumbel-max with noise that depends on (seed, position, vocabulary index) alone, and no sum of floats is taken
    whose order a device could choose, so a row gets the same token in any batch, at any place in it.

    Args:
        logits: [B, V], any floating dtype; left as it is. Computed in float32, in float64 if it is that. A row that is
            -inf throughout (everything banned) gives id 0, one with a NaN `NOT_DRAWN`.
        rows: One per row of `logits`.

    Raises:
        InvalidArgumentError: `logits` is no floating [B, V] with B == len(rows), or a seen or banned id is outside V.
    """
    if logits.dim() != 2 or not logits.is_floating_point() or len(logits) != len(rows) or not logits.shape[1]:
        given = f"{logits.dtype} {tuple(logits.shape)}"
        raise InvalidArgumentError(f"logits must be floating point [B={len(rows)} (one per row), V >= 1], got {given}")
    edited, asks = _edited(logits, rows), [Ask.of(row.params, row.seed) for row in rows]
    if not any(ask.temperature for ask in asks):
        token_ids = _most_likely(edited)
    else:
        numbers = np.vstack((packed(asks), np.array([row.position - 1 for row in rows], np.int64)))
        sent = upload(numbers, np.int64, logits.device)
        asks_FB, positions_B = sent[:-1], sent[-1]
        if draws_in_kernel(edited.dtype, edited.device):
            from .kernels.draw import draw_gumbel

            token_ids = draw_gumbel(edited, asks_FB, positions_B)
        else:
            kinds = [(upload(like, np.int64, logits.device), count) for like, count in alike(asks, logits.shape[1])]
            token_ids = draw_plainly(edited, asks_FB, positions_B + 1, kinds)
    return with_logprobs(token_ids, logits, [row.params.logprobs for row in rows])


def draws_in_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our kernel takes such logits; it draws what `draw_plainly` does, many times faster."""
    return device.type == "cuda" and dtype != torch.float64 and find_spec("triton") is not None


def packed(asks: Sequence[Ask]) -> np.ndarray:
    """[F, R] int64: seeds as they are, everything else as the bits of a float64; not for no rows."""
    seeds, *floats = zip(*asks, strict=True)
    return np.vstack((np.array(seeds, np.int64), np.array(floats, np.float64).view(np.int64)))


def upload(values: Sequence | np.ndarray, dtype: type, device: torch.device) -> Tensor:
    """A copy on the device; does not wait for it to be made."""
    host = torch.from_numpy(np.array(values, dtype=dtype))
    # The caching host allocator keeps the pinned block until the copy has run.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def alike(asks: Sequence[Ask], vocab: int) -> list[tuple[list[int], int]]:
    """Rows with a temperature that need no order, a top-k and a full sort, apart, so that each pays for its own; with
    how many of their largest logits they need in order."""
    kinds: list[tuple[list[int], int]] = [([], 0), ([], 0), ([], 0)]
    for row, ask in enumerate(asks):
        if ask.temperature:
            num_sorted = int(ask.top_k) if 0 < ask.top_k < vocab else vocab if ask.tail >= 0 else 0
            kind = (num_sorted > 0) + (num_sorted == vocab)
            rows, most = kinds[kind]
            kinds[kind] = [*rows, row], max(most, num_sorted)
    return [kind for kind in kinds if kind[0]]


@torch.no_grad()
def draw_plainly(
    edited_BV: Tensor, asks_FB: Tensor, positions_B: Tensor, kinds: Iterable[tuple[Tensor, int]]
) -> Tensor:
    """Draws one token per row as `sample` does, from numbers on the device.

    Args:
        edited_BV: logits with bans and penalty.
        asks_FB: int64, `packed`.
        positions_B: int32 or int64, of the tokens drawn.
        kinds: int64 places of rows, and how many of their largest logits they need in order, as from `alike`. Rows in
            none of them take the most likely token, and so do those of temperature 0.

    Returns:
        [B] int64, `NOT_DRAWN` for a row with a NaN.
    """
    vocab, token_ids_B = edited_BV.shape[1], _most_likely(edited_BV)
    for rows_R, num_sorted in kinds:
        for index_R, x_RV in _blocks(edited_BV, rows_R):
            seeds_R1, *floats = asks_FB.index_select(1, index_R)[..., None]
            temperature_R1, log_min_p_R1, top_k_R1, tail_R1, *_ = (each.view(torch.float64) for each in floats)
            is_greedy_R1 = temperature_R1 == 0
            x_RV = x_RV / temperature_R1.masked_fill(is_greedy_R1, 1).to(x_RV.dtype)
            x_RV = filtered(x_RV, log_min_p_R1, top_k_R1, tail_R1, num_sorted)
            keys_R = keys_of(seeds_R1[:, 0], positions_B.index_select(0, index_R).long())
            scores_RV = x_RV.double() - exponentials(keys_R, vocab).log_()
            likeliest_R = token_ids_B.index_select(0, index_R)
            is_known_R = is_greedy_R1[:, 0] | (likeliest_R == NOT_DRAWN)
            token_ids_B.index_copy_(0, index_R, torch.where(is_known_R, likeliest_R, scores_RV.argmax(-1)))
    return token_ids_B


def _most_likely(logits_BV: Tensor) -> Tensor:
    return logits_BV.argmax(-1).masked_fill_(logits_BV.amax(-1).isnan(), NOT_DRAWN)


@torch.no_grad()
def with_logprobs(token_ids: Tensor, logits: Tensor, counts: Sequence[int | None]) -> Sampled:
    """What was drawn, with the log-probabilities that rows ask for; nothing is read back from the device.

    Args:
        token_ids: [B] int64.
        logits: [B, V], as they were before anything was done to them.
        counts: how many of the most likely ids each row wants told, None for nothing at all.
    """
    sampled, asked = Sampled(token_ids), [row for row, count in enumerate(counts) if count is not None]
    if not asked:
        return sampled
    (num_rows, vocab), device = logits.shape, logits.device
    k = min(max(counts[row] for row in asked), vocab)
    sampled.logprobs = torch.full((num_rows,), math.nan, dtype=torch.float32, device=device)
    sampled.top_ids = torch.full((num_rows, k), -1, dtype=torch.int64, device=device)
    sampled.top_logprobs = torch.full((num_rows, k), math.nan, dtype=torch.float32, device=device)
    for index, x_RV in _blocks(logits, upload(asked, np.int64, device)):
        peak_R1 = x_RV.amax(-1, keepdim=True).double()
        total_R1 = weights(x_RV.double(), peak_R1, vocab).sum(-1, keepdim=True)
        norm_R1 = peak_R1 + total_R1.double().log() - weight_bits(vocab) * math.log(2)
        drawn_R1 = x_RV.gather(1, token_ids.index_select(0, index).clamp(min=0)[:, None])
        sampled.logprobs.index_copy_(0, index, (drawn_R1.double() - norm_R1).float()[:, 0])
        if k:
            top_RV, ids_RV = x_RV.sort(descending=True, stable=True)
            sampled.top_ids.index_copy_(0, index, ids_RV[:, :k])
            sampled.top_logprobs.index_copy_(0, index, (top_RV[:, :k].double() - norm_R1).float())
    return sampled


def _flat_ids(rows: Sequence[RowSampling], field: str, wanted: Sequence[int], vocab: int) -> list[np.ndarray]:
    """For each wanted row, where its seen or banned ids are in the flattened [B, V] logits."""
    flat = []
    for i in wanted:
        ids = getattr(rows[i], field)
        # A copy: an array that something looks into cannot be resized, and its request could not go on.
        ids = np.fromiter(ids, np.int64, len(ids)) if isinstance(ids, Set) else np.array(ids, dtype=np.int64)
        if ids.min() < 0 or ids.max() >= vocab:
            bad = ids[(ids < 0) | (ids >= vocab)][0]
            raise InvalidArgumentError(f"{field} id {bad} of row {i} is not in the vocabulary, 0 to {vocab - 1}")
        flat.append(ids + i * vocab)
    return flat


def _edited(logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """The logits with banned ids at -inf and seen ids penalised; the very tensor given if no row asks for either."""
    vocab, device = logits.shape[1], logits.device
    banned = [i for i, row in enumerate(rows) if len(row.banned)]
    penalised = [i for i, row in enumerate(rows) if row.params.repetition_penalty != 1 and len(row.seen)]
    if not banned and not penalised:
        return logits
    x = (logits if logits.dtype == torch.float64 else logits.float()).flatten()
    if banned:
        index = upload(np.concatenate(_flat_ids(rows, "banned", banned, vocab)), np.int64, device)
        x = x.index_fill(0, index, -math.inf)
    if penalised:
        flat = _flat_ids(rows, "seen", penalised, vocab)
        penalty = np.clip([rows[i].params.repetition_penalty for i in penalised], 1e-30, 1e30)
        penalty = upload(np.repeat(penalty, [len(ids) for ids in flat]), np.float64, device).to(x.dtype)
        index = upload(np.concatenate(flat), np.int64, device)
        value = x.index_select(0, index)
        # An id seen twice is written twice with one value, so the order of the writes does not matter.
        x = x.index_copy(0, index, torch.where(value < 0, value * penalty, value / penalty))
    return x.view_as(logits)


def _blocks(x_BV: Tensor, wanted_R: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The wanted rows a few at a time, which bounds the memory the float64 noise takes."""
    for index_R in wanted_R.split(max(1, _BLOCK_ELEMENTS // x_BV.shape[1])):
        x_RV = x_BV.index_select(0, index_R)
        yield index_R, x_RV if x_RV.dtype == torch.float64 else x_RV.float()
