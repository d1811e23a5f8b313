"""How many pages a model's cache gets, and how long its requests may become."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import KVCache
from ..errors import InvalidArgumentError, OutOfPagesError
from ..hf.binding import Binding
from ..hf.load import max_positions
from ..memory import pages_that_fit, read_meters
from ..ops import active_plans
from ..spec import CacheSpec
from .step import last_logits


def length_limit(binding: Binding, max_seq_len: int | None) -> int | None:
    """Tokens a request may reach, pages aside: what was asked, or else the model's limit; None if it has none.

    Raises:
        InvalidArgumentError: more was asked than the model has positions.
    """
    limit = max_positions(binding.model)
    if max_seq_len is not None and limit is not None and max_seq_len > limit:
        raise InvalidArgumentError(f"max_seq_len={max_seq_len}: the model's positions end at {limit}")
    return limit if max_seq_len is None else max_seq_len


def cache_spec(
    binding: Binding,
    *,
    kv_dtype: torch.dtype | None,
    page_size: int,
    layout: str,
    num_pages: int | None,
    kv_bytes: int | None,
    memory_fraction: float,
    max_batch: int,
    max_prefill_tokens: int,
    limit: int | None,
) -> CacheSpec:
    """The pages asked for, what `kv_bytes` holds, or a share of what is free beside the activations of a prefill.

    Args:
        max_batch, limit: of the free memory no more is taken than so many requests of that length can use.
        max_prefill_tokens: tokens of the prefill whose activations are measured, on CUDA.

    Raises:
        InvalidArgumentError: too little for one page beside the null page, or a `kv_dtype` that is not the model's.
    """
    dtype = binding.model.dtype
    if kv_dtype not in (None, dtype):
        raise InvalidArgumentError(
            f"kv_dtype={kv_dtype}: the model computes in {dtype}, and no backend keeps a cache of any "
            "other dtype; leave kv_dtype out, or load the model in that dtype"
        )
    if num_pages is None:
        smallest = CacheSpec(num_pages=2, page_size=page_size, dtype=dtype, layout=layout)
        page_bytes = len(binding.layers) * smallest.page_bytes(binding.spec)
        if kv_bytes is not None:
            num_pages = pages_that_fit(page_bytes=page_bytes, kv_bytes=kv_bytes)
        else:
            reserve = 0
            if binding.model.device.type == "cuda":
                reserve = _activation_bytes(binding, smallest, max_prefill_tokens, max_batch, limit)
            num_pages = pages_that_fit(
                page_bytes=page_bytes,
                free=read_meters(binding.model.device).free,
                memory_fraction=memory_fraction,
                reserve=reserve,
            )
            if limit is not None:
                num_pages = min(num_pages, 1 + max_batch * -(-limit // page_size))
    return CacheSpec(num_pages=num_pages, page_size=page_size, dtype=dtype, layout=layout)


class _Nothing:
    """A plan under which attention gives zeros, to run a model that has no pages yet."""

    def __init__(self, page_shape: tuple[int, int, int]):
        self.page_shape = page_shape

    def attend(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rotary=None) -> Tensor:
        return q.new_zeros(q.shape)


def _activation_bytes(binding: Binding, smallest: CacheSpec, num_tokens: int, num_rows: int, limit: int | None) -> int:
    """The most that a prefill of `num_tokens` holds at once beside weights and cache, measured, and the logits of
    `num_rows` decoding rows twice: as computed, and in the buffer that all buckets share."""
    model = binding.model
    binding.bind(KVCache(len(binding.layers), binding.spec, smallest, model.device))
    ids = torch.zeros(num_tokens, dtype=torch.int32, device=model.device)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=model.device) % (limit or num_tokens)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    with torch.no_grad(), active_plans([_Nothing(smallest.page_shape(binding.spec))]):
        logits_RV = last_logits(model, ids, positions, positions[:num_rows].long())
    row_bytes, peak = logits_RV[0].nbytes, torch.cuda.max_memory_allocated(model.device) - before
    del logits_RV
    torch.cuda.empty_cache()  # or the driver's free memory, read next, would count the activations as taken
    return peak + 2 * num_rows * row_bytes


def check_room(cache: CacheSpec, max_seq_len: int) -> None:
    """Raises OutOfPagesError if one request of that length does not fit."""
    needed, usable = -(-max_seq_len // cache.page_size), cache.num_pages - 1
    if needed > usable:
        raise OutOfPagesError(
            f"max_seq_len={max_seq_len} needs {needed} pages, the cache has {usable} (page_size={cache.page_size}): "
            "lower max_seq_len or give the cache more"
        )
