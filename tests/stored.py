"""Rows over an fp8 cache, e4m3 by its definition, and a model's logits over tokens that are given."""

from __future__ import annotations

from dataclasses import replace

import torch
from dense import DenseRows, SharedRows
from torch import Tensor

from graphattn import LLM, ragged_batch
from graphattn.cache import KVCache
from graphattn.spec import FP8, CacheSpec

# Every number from 0 on: a sign, 4 bits of exponent with a bias of 7, 3 bits of fraction; the last pattern is NaN.
NUMBERS = torch.tensor(
    [(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1],
    dtype=torch.float64,
)


def nearest(x: Tensor) -> Tensor:
    """The nearest e4m3 numbers in float64, of two the one whose last bit is 0; NaN for NaN."""
    magnitude = x.double().abs().clamp(max=448)
    above = torch.bucketize(magnitude.nan_to_num(0), NUMBERS.to(x.device)).clamp(max=len(NUMBERS) - 1)
    below = (above - 1).clamp(min=0)
    low, high = (NUMBERS.to(x.device)[at] for at in (below, above))
    up, down = high - magnitude, magnitude - low
    taken = torch.where((up < down) | ((up == down) & (above % 2 == 0)), high, low)
    return torch.where(magnitude.isnan(), magnitude, taken) * x.double().sign()


def stored(x_NKD: Tensor, scale_K: Tensor) -> Tensor:
    """What an fp8 cache holds of keys or values, in float64."""
    return nearest(x_NKD.float() * (1 / scale_K)[:, None])


class Stored:
    """Makes rows ones over an fp8 cache: what they attend to is what it holds, times the scales; `packed` is not."""

    def store(self, scales_2K: Tensor) -> None:
        cache, device = self.cache.cache, scales_2K.device
        self.given, self.scales_2K = (self.k, self.v), scales_2K
        held = [[stored(row, scale) for row in rows] for rows, scale in zip(self.given, scales_2K, strict=True)]
        self.k, self.v = (
            [row * scale.double()[:, None] for row in rows] for rows, scale in zip(held, scales_2K, strict=True)
        )
        sizes = {"num_pages": cache.num_pages, "page_size": cache.page_size, "layout": cache.layout}
        self.cache = KVCache(1, self.spec, CacheSpec(dtype=FP8, query_dtype=cache.dtype, **sizes), device)
        for pages in self.cache.layers[0]:
            pages.fill_(float("nan"))
        self.held = [each.clone() for each in self.pages]
        for pages, after, rows in zip(self.pages, self.held, held, strict=True):
            for table, row, count in zip(self.tables, rows, self.cached, strict=True):
                for token, x in enumerate(row):
                    at = table.pages[token // cache.page_size], token % cache.page_size
                    after[at] = x.to(FP8)
                    if token < count:
                        pages[at] = x.to(FP8)

    def cast(self, dtype: torch.dtype) -> None:
        """Makes the new tokens of a wider dtype; what is cached already stays as it was stored."""
        self.q = [row.to(dtype) for row in self.q]
        self.given = tuple([row.to(dtype) for row in rows] for rows in self.given)
        self.cache._cache = replace(self.cache.cache, query_dtype=dtype)

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        fresh = [torch.cat([row[old:] for row, old in zip(rows, self.cached, strict=True)]) for rows in self.given]
        return torch.cat(self.q), *fresh

    def check_pages(self) -> None:
        """Every page is as it should be after the new tokens were appended, and nothing else was written."""
        for pages, after in zip(self.pages, self.held, strict=True):
            assert torch.equal(pages[1:].view(torch.uint8), after[1:].view(torch.uint8))


class StoredRows(Stored, DenseRows):
    """`DenseRows` over an fp8 cache."""

    def __init__(self, *args, scales_2K: Tensor, **options):
        super().__init__(*args, **options)
        self.store(scales_2K.to(options["device"]))


class StoredSharedRows(Stored, SharedRows):
    """`SharedRows` over an fp8 cache."""

    def __init__(self, *args, scales_2K: Tensor, **options):
        super().__init__(*args, **options)
        self.store(scales_2K.to(options["device"]))


def scales_of(num_kv_heads: int) -> Tensor:
    """Scales as calibration would give them for normal keys and values, others, and a few that saturate."""
    return (
        torch.tensor([[2**-6, 0.013, 2**-7], [0.004, 2**-7, 2**-6]], dtype=torch.float32)
        .repeat(1, 6)[:, :num_kv_heads]
        .contiguous()
    )


def forced_logits(model, ids: list[int], *, chunk: int = 128, **options) -> Tensor:
    """Logits after each token, `[N, vocabulary]`, through an engine's prefill in chunks that read what is cached."""
    with LLM(model, max_batch=1, num_pages=2 + len(ids) // 16, max_prefill_tokens=chunk, **options) as llm:
        pages, executor, found = llm.pool.allocate(-(-len(ids) // 16)), llm._executor, []
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            held = pages[: -(-(start + len(part)) // 16)]
            batch = ragged_batch([part], [start], [[held]], page_size=16, device=executor.device)
            found.append(executor.logits(batch, torch.arange(len(part))))
        llm.pool.release(pages)
    return torch.cat(found).float()
