"""The draw of one token per row, which its neighbours cannot change.

Letters: B rows of the batch, R those of them at hand, V vocabulary, H largest logits in order, K top log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidArgumentError
from .sampling import RowSampling, SamplingParams

_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SAMPLE_SALT = 0x5851F42D4C957F2D
_BLOCK_ELEMENTS = 1 << 22


@dataclass
class Sampled:
    """What `sample` drew, on the logits' device.

    Attributes:
        token_ids: [B] int64.
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
    return seed if index == 0 else _mix(_mix((seed ^ _SAMPLE_SALT) + _GOLDEN) + index * _GOLDEN) >> 1


@torch.no_grad()
def sample(logits: Tensor, rows: Sequence[RowSampling]) -> Sampled:
    """Draw one token per row; nothing is read back from the device.

    In the order of transformers' generate: bans, repetition penalty, temperature, top-k, top-p, min-p, draw. The draw
    is Gumbel-max with noise that depends on (seed, position, vocabulary index) alone, and no sum of floats is taken
    whose order a device could choose, so a row gets the same token in any batch, at any place in it.

    Args:
        logits: [B, V], any floating dtype; left as it is. Computed in float32, in float64 if it is that. A row that is
            -inf throughout (everything banned) gives id 0.
        rows: One per row of `logits`.

    Raises:
        InvalidArgumentError: `logits` is no floating [B, V] with B == len(rows), or a seen or banned id is outside V.
    """
    if logits.dim() != 2 or not logits.is_floating_point() or len(logits) != len(rows) or not logits.shape[1]:
        given = f"{logits.dtype} {tuple(logits.shape)}"
        raise InvalidArgumentError(f"logits must be floating point [B={len(rows)} (one per row), V >= 1], got {given}")
    edited, vocab = _edited(logits, rows), logits.shape[1]
    drawn = [i for i, row in enumerate(rows) if not row.params.is_greedy]
    is_sorted = any(_num_sorted(rows[i].params, vocab) for i in drawn)
    if drawn and not is_sorted and draws_in_one_pass(edited.dtype, edited.device):
        from .kernels.draw import draw_gumbel, upload_rows

        keys = [_key(row) for row in rows]
        return _with_logprobs(Sampled(draw_gumbel(edited, *upload_rows(rows, keys, edited.device))), logits, rows)
    if len(drawn) < len(rows) or not rows:
        token_ids = edited.argmax(-1)
    else:
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for same_filters in _by_filters(drawn, rows, vocab):
        for index, chosen, x_RV in _blocks(edited, same_filters, rows):
            scores_RV = _filtered(x_RV, chosen).double() - _exponentials(chosen, vocab, logits.device).log_()
            token_ids.index_copy_(0, index, scores_RV.argmax(-1))
    return _with_logprobs(Sampled(token_ids), logits, rows)


@torch.no_grad()
def sample_again(logits: Tensor, token_ids: Tensor, rows: Mapping[int, RowSampling]) -> Sampled:
    """What `sample` draws for some of the rows, and the ids that the others have already.

    Args:
        logits: [B, V], as in `sample`.
        token_ids: [B], the ids drawn so far; left as they are.
        rows: what the rows to be drawn ask for, by their place in the batch; at least one.

    Raises:
        InvalidArgumentError: as in `sample`.
    """
    if len(rows) == len(logits):
        return sample(logits, [rows[row] for row in range(len(rows))])
    index = _upload(list(rows), np.int64, logits.device)
    sampled = sample(logits.index_select(0, index), list(rows.values()))

    def among_all(drawn: Tensor | None, filler: float) -> Tensor | None:
        if drawn is None:
            return None
        shape = (len(logits), *drawn.shape[1:])
        return torch.full(shape, filler, dtype=drawn.dtype, device=drawn.device).index_copy_(0, index, drawn)

    return Sampled(
        token_ids=token_ids.index_copy(0, index, sampled.token_ids),
        logprobs=among_all(sampled.logprobs, math.nan),
        top_ids=among_all(sampled.top_ids, -1),
        top_logprobs=among_all(sampled.top_logprobs, math.nan),
    )


def draws_in_one_pass(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our kernel takes such logits; it draws what the code here does, in a thirtieth of the time."""
    return device.type == "cuda" and dtype != torch.float64 and find_spec("triton") is not None


def keys_of(seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    """What the noise of rows is a hash of, from int64 seeds in [0, 2**63) and positions of the tokens drawn; int64."""
    return _mix_(_mix_(seeds_R + _signed(_GOLDEN)) + (positions_R + 1) * _signed(_GOLDEN))


def exponentials(keys_R: Tensor, vocab: int) -> Tensor:
    """[R, V] float64 exponential noise, a function of the row's key and the vocabulary index."""
    z = _mix_(torch.arange(1, vocab + 1, device=keys_R.device) * _signed(_GOLDEN) + keys_R[:, None])
    # 53 bits, all exact in float64. 0 would make the noise infinite and a banned token nan, which argmax picks.
    u = (z >> 11).bitwise_and_(_MASK_64 >> 11).double().clamp_(min=0.5).mul_(2.0**-53)
    return u.neg_().log1p_().neg_()


def _mix(z: int) -> int:
    """The finaliser of splitmix64; 0 stays 0, so whatever goes in has _GOLDEN added at least once."""
    z &= _MASK_64
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK_64
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK_64
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def _key(row: RowSampling) -> int:
    """64 bits, of the row's seed and position, that its noise is a hash of."""
    return _mix(_mix(row.seed % 2**63 + _GOLDEN) + (row.position + 1) * _GOLDEN)


def _mix_(z: Tensor) -> Tensor:
    """`_mix` of the 64 bits of int64 numbers, in place."""
    # int64 >> n copies the sign down; a logical shift needs the mask.
    z.bitwise_xor_((z >> 30).bitwise_and_(_MASK_64 >> 30)).mul_(_signed(_MIX_1))
    z.bitwise_xor_((z >> 27).bitwise_and_(_MASK_64 >> 27)).mul_(_signed(_MIX_2))
    return z.bitwise_xor_((z >> 31).bitwise_and_(_MASK_64 >> 31))


def _exponentials(rows: Sequence[RowSampling], vocab: int, device: torch.device) -> Tensor:
    """[R, V] float64 exponential noise, a function of (seed, position, vocabulary index) and nothing else."""
    return exponentials(_upload([_signed(_key(row)) for row in rows], np.int64, device), vocab)


def _upload(values: Sequence | np.ndarray, dtype: type, device: torch.device) -> Tensor:
    host = torch.from_numpy(np.array(values, dtype=dtype))
    # The caching host allocator keeps the pinned block until the copy has run.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _flat_ids(rows: Sequence[RowSampling], field: str, wanted: Sequence[int], vocab: int) -> list[np.ndarray]:
    """For each wanted row, where its seen or banned ids are in the flattened [B, V] logits."""
    flat = []
    for i in wanted:
        ids = getattr(rows[i], field)
        ids = np.fromiter(ids, np.int64, len(ids)) if isinstance(ids, Set) else np.asarray(ids, dtype=np.int64)
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
    x = _compute(logits).flatten()
    if banned:
        index = _upload(np.concatenate(_flat_ids(rows, "banned", banned, vocab)), np.int64, device)
        x = x.index_fill(0, index, -math.inf)
    if penalised:
        flat = _flat_ids(rows, "seen", penalised, vocab)
        penalty = np.clip([rows[i].params.repetition_penalty for i in penalised], 1e-30, 1e30)
        penalty = _upload(np.repeat(penalty, [len(ids) for ids in flat]), np.float64, device).to(x.dtype)
        index = _upload(np.concatenate(flat), np.int64, device)
        value = x.index_select(0, index)
        # An id seen twice is written twice with one value, so the order of the writes does not matter.
        x = x.index_copy(0, index, torch.where(value < 0, value * penalty, value / penalty))
    return x.view_as(logits)


def _num_sorted(params: SamplingParams, vocab: int) -> int:
    """How many of the largest logits top-k and top-p need in order."""
    if 0 < params.top_k < vocab:
        return params.top_k
    return vocab if params.top_p < 1 else 0


def _by_filters(drawn: Sequence[int], rows: Sequence[RowSampling], vocab: int) -> list[list[int]]:
    """Rows that need no order, a top-k and a full sort, apart, so that each pays for its own."""
    groups: list[list[int]] = [[], [], []]
    for i in drawn:
        num_sorted = _num_sorted(rows[i].params, vocab)
        groups[(num_sorted > 0) + (num_sorted == vocab)].append(i)
    return groups


def _blocks(
    x_BV: Tensor, wanted: Sequence[int], rows: Sequence[RowSampling]
) -> Iterator[tuple[Tensor, list[RowSampling], Tensor]]:
    """The wanted rows a few at a time, which bounds the memory the float64 noise takes."""
    size = max(1, _BLOCK_ELEMENTS // x_BV.shape[1])
    for start in range(0, len(wanted), size):
        block = wanted[start : start + size]
        index = _upload(block, np.int64, x_BV.device)
        yield index, [rows[i] for i in block], _compute(x_BV.index_select(0, index))


def _weights(x: Tensor, peak_R1: Tensor, vocab: int) -> tuple[Tensor, int]:
    """exp(x - peak) in int64 steps of 2**-bits: integer sums are exact, so no device or batch size can change them."""
    bits = min(44, 61 - vocab.bit_length())
    # A row of -inf throughout would be -inf - -inf, a nan, which has no int64.
    peak_R1 = peak_R1.clamp(min=torch.finfo(peak_R1.dtype).min)
    return (x.double() - peak_R1.double()).exp_().mul_(2.0**bits).round_().long(), bits


def _filtered(x_RV: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """Edited logits over temperature, with -inf where top-k, top-p or min-p removes; each is a threshold per row."""
    vocab, device, params = x_RV.shape[1], x_RV.device, [row.params for row in rows]
    num_sorted = [_num_sorted(p, vocab) for p in params]
    most_sorted = max(num_sorted)
    last = [min(p.top_k or vocab, vocab, most_sorted) - 1 for p in params]
    tail = [1 - p.top_p if p.top_p < 1 else -1.0 for p in params]
    log_min_p = [math.log(p.min_p) if p.min_p else -math.inf for p in params]
    temperature = np.clip([p.temperature for p in params], 1e-30, 1e30)
    table = _upload([temperature, log_min_p, tail, num_sorted, last], np.float64, device)[..., None]
    x_RV = x_RV / table[0].to(x_RV.dtype)
    floor_R1 = None
    if most_sorted:
        if most_sorted < vocab:
            top_RH = x_RV.topk(most_sorted).values
        else:
            top_RH = x_RV.sort(descending=True).values
        floor_R1 = top_RH.gather(1, table[4].long())
        if max(tail) >= 0:
            floor_R1 = _nucleus_floor(x_RV, top_RH, floor_R1, table[2])
        floor_R1 = floor_R1.masked_fill(table[3] == 0, -math.inf)
    if any(p.min_p for p in params):
        min_p_R1 = x_RV.amax(-1, keepdim=True) + table[1].to(x_RV.dtype)
        floor_R1 = min_p_R1 if floor_R1 is None else torch.maximum(floor_R1, min_p_R1)
    return x_RV if floor_R1 is None else x_RV.masked_fill(x_RV < floor_R1, -math.inf)


def _nucleus_floor(x_RV: Tensor, top_RH: Tensor, floor_R1: Tensor, tail_R1: Tensor) -> Tensor:
    """Least logit top-p keeps of those >= floor: one with more than `tail` (1 - p) of the weight from it downwards."""
    vocab, peak_R1 = x_RV.shape[1], top_RH[:, :1]
    weight_RH, floor_weight_R1 = _weights(top_RH, peak_R1, vocab)[0], _weights(floor_R1, peak_R1, vocab)[0]
    ties_R1 = (x_RV == floor_R1).sum(-1, keepdim=True)
    total_R1 = weight_RH.masked_fill(top_RH <= floor_R1, 0).sum(-1, keepdim=True) + ties_R1 * floor_weight_R1
    below_RH = total_R1 - weight_RH.cumsum(-1) + weight_RH
    kept_RH = (below_RH.double() > tail_R1 * total_R1.double()) & (top_RH >= floor_R1)
    return top_RH.gather(1, kept_RH.sum(-1, keepdim=True).clamp(min=1) - 1)


def _with_logprobs(sampled: Sampled, logits: Tensor, rows: Sequence[RowSampling]) -> Sampled:
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return sampled
    (num_rows, vocab), device = logits.shape, logits.device
    k = min(max(rows[i].params.logprobs for i in asked), vocab)
    sampled.logprobs = torch.full((num_rows,), math.nan, dtype=torch.float32, device=device)
    sampled.top_ids = torch.full((num_rows, k), -1, dtype=torch.int64, device=device)
    sampled.top_logprobs = torch.full((num_rows, k), math.nan, dtype=torch.float32, device=device)
    for index, _, x_RV in _blocks(logits, asked, rows):
        peak_R1 = x_RV.amax(-1, keepdim=True)
        weight_RV, bits = _weights(x_RV, peak_R1, vocab)
        norm_R1 = peak_R1.double() + weight_RV.sum(-1, keepdim=True).double().log() - bits * math.log(2)
        drawn_R1 = x_RV.gather(1, sampled.token_ids.index_select(0, index)[:, None])
        sampled.logprobs.index_copy_(0, index, (drawn_R1.double() - norm_R1).float()[:, 0])
        if k:
            top_RV, ids_RV = x_RV.sort(descending=True, stable=True)
            sampled.top_ids.index_copy_(0, index, ids_RV[:, :k])
            sampled.top_logprobs.index_copy_(0, index, (top_RV[:, :k].double() - norm_R1).float())
    return sampled
