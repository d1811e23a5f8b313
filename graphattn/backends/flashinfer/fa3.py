"""FlashInfer's prefill for Hopper, fa3: where it can be had, which batches it is for, and what its plans take.

It computes tiles of query tokens of one head, each over the row's whole context: 128 tokens, where fa2 packs the heads
of a kv head into a tile and splits the context where tiles are few.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BackendError
from ...spec import AttentionSpec, CacheSpec

TILES = {64: 192, 128: 128, 256: 128}  # query tokens by head_dim (scheduler.cuh, PrefillSM90Plan)
CAPABILITY, CUDA = (9, 0), (12, 3)
ONE_SCHEDULE_FROM = 4096  # tiles of a head beyond which all heads share one work list
ARRAYS = 7  # that a work list has, of one int32 per tile


def why_not(spec: AttentionSpec, cache: CacheSpec, device: torch.device) -> str | None:
    """Why it cannot prefill the layer group on this device; None if it can."""
    if spec.variant is not None:
        return f"variant {spec.variant.name} is compiled for fa2"
    if spec.pos_encoding != "none":
        return f"pos_encoding {spec.pos_encoding} is fa2's"
    if cache.is_fp8:
        return f"dtype {cache.dtype}: it takes fp8 keys with fp8 queries only, fa2 takes them with {cache.query_dtype}"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        asked, there = (".".join(map(str, each)) for each in (CAPABILITY, capability))
        return f"it is for compute capability {asked}, this device has {there}"
    if tuple(map(int, torch.version.cuda.split(".")[:2])) < CUDA:
        return f"it needs CUDA {'.'.join(map(str, CUDA))}, torch was built for {torch.version.cuda}"
    from . import private

    return private.why_no_fa3(spec, cache)


def kernels_for(
    asked: str, spec: AttentionSpec, cache: CacheSpec, device: torch.device, num_processors: int, max_tokens: int
) -> tuple[tuple[str, ...], str | None]:
    """Which prefill kernels serve a layer group, and why fa3 does not; None where it does or nobody asked.

    Args:
        asked: "auto", "fa2" or "fa3"; "auto" waits for no compilation of fa3.
        max_tokens: query tokens of the largest batch; "auto" leaves fa3 out if it is for larger ones only.

    Raises:
        BackendError: fa3 was asked for and does not serve it; says why.
    """
    if asked == "fa2":
        return ("fa2",), None
    least = least_tokens(spec, num_processors)
    if asked == "auto" and max_tokens < least:
        return ("fa2",), f"it is for batches of {least} tokens and more, and the largest has {max_tokens}"
    reason = why_not(spec, cache, device)
    if asked == "fa3":
        if reason is None:
            return ("fa3",), None
        raise BackendError(f"prefill='fa3' cannot serve {spec} on {device}: {reason}; 'auto' and 'fa2' do without it")
    if reason is None:
        from . import private

        if private.has_fa3(spec, cache):
            return ("fa2", "fa3"), None
        reason = "its module is not compiled yet; prefill='fa3' compiles it, once, in a minute or more"
    return ("fa2",), reason


def least_tokens(spec: AttentionSpec, num_processors: int) -> int:
    """Query tokens of a batch from which on there is a tile for every other multiprocessor."""
    return -(-num_processors * TILES[spec.head_dim] // (2 * spec.num_heads))


def suits(spec: AttentionSpec, num_processors: int, counts_B: Tensor) -> bool:
    """Whether rows of so many query tokens keep the device busy, and fill more than half of their tiles."""
    tile, tokens = TILES[spec.head_dim], int(counts_B.sum())
    return tokens >= least_tokens(spec, num_processors) and 2 * tokens > tile * int(_tiles(tile, counts_B))


def plan_bytes(spec: AttentionSpec, num_processors: int, counts_B: Tensor) -> int:
    """Bytes of ints of a plan for rows of so many query tokens; FlashInfer's `workspace_size` has no answer for fa3."""
    tile = TILES[spec.head_dim]
    most = _most_tiles(spec, int(counts_B.sum()), len(counts_B))
    return _list_bytes(spec, num_processors, most, int(_tiles(tile, counts_B)))


def padded_plan_bytes(spec: AttentionSpec, num_processors: int, num_tokens: int, num_rows: int) -> int:
    """The same of plans in a CUDA graph, which are as large as those of any rows with so many query tokens in all."""
    most = _most_tiles(spec, num_tokens, num_rows)
    return _list_bytes(spec, num_processors, most, most)


def _most_tiles(spec: AttentionSpec, num_tokens: int, num_rows: int) -> int:
    """Tiles of a head that so many rows of so many query tokens in all can have."""
    return -(-num_tokens // TILES[spec.head_dim]) + num_rows - 1


def _list_bytes(spec: AttentionSpec, num_processors: int, most: int, tiles: int) -> int:
    works = tiles * (1 if most > ONE_SCHEDULE_FROM else spec.num_heads)
    return ARRAYS * (_aligned(4 * works)) + _aligned(4 * (num_processors + 1))


def _tiles(tile: int, counts_B: Tensor) -> Tensor:
    return (-(-counts_B // tile)).sum()


def _aligned(size: int) -> int:
    return -(-size // 16) * 16
