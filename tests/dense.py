"""Rows whose keys and values are known densely, as an oracle that has no pages: plain torch, one row at a time."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from graphattn.batch import Batch, ragged_batch
from graphattn.cache import KVCache
from graphattn.pages import BlockTable, PagePool
from graphattn.spec import AttentionSpec, CacheSpec


class DenseRows:
    """Ragged rows over a poisoned paged cache.

    Row b has `cached[b]` tokens in the cache already and `new[b]` to append and attend with. Everything the cache
    holds beside those tokens is NaN, the null page and the rest of each last page included.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        cached: list[int],
        new: list[int],
        *,
        page_size: int,
        dtype,
        device,
        seed: int = 0,
        layout: str = "NHD",
    ):
        generator = torch.Generator().manual_seed(seed)
        self.spec, self.cached, self.new = spec, cached, new

        def draw(count: int, heads: int) -> Tensor:
            return (
                torch.randn(count, heads, spec.head_dim, generator=generator, dtype=torch.float64).to(dtype).to(device)
            )

        lens = [old + fresh for old, fresh in zip(cached, new, strict=True)]
        self.q = [draw(fresh, spec.num_heads) for fresh in new]
        self.k = [draw(length, spec.num_kv_heads) for length in lens]
        self.v = [draw(length, spec.num_kv_heads) for length in lens]
        needed = sum(-(-length // page_size) for length in lens)
        self.pool = PagePool(needed + 9, page_size)
        spare = self.pool.allocate(needed + 8)  # so that pages come in no order
        random.Random(seed).shuffle(spare)
        for page in spare:
            self.pool.release([page])
        self.tables = [BlockTable(self.pool) for _ in lens]
        for table, length in zip(self.tables, lens, strict=True):
            table.grow(length)
        cache_spec = CacheSpec(num_pages=self.pool.num_pages, page_size=page_size, dtype=dtype, layout=layout)
        self.cache = KVCache(1, spec, cache_spec, device)
        for pages in self.cache.layers[0]:
            pages.fill_(float("nan"))
        for tensor_PSKD, rows in zip(self.pages, (self.k, self.v), strict=True):
            for table, row, count in zip(self.tables, rows, cached, strict=True):
                for token in range(count):
                    tensor_PSKD[table.pages[token // page_size], token % page_size] = row[token]

    @property
    def pages(self) -> list[Tensor]:
        """The cache's keys and values, `[pages, slots, kv heads, head dim]` whatever its layout."""
        is_hnd = self.cache.cache.layout == "HND"
        return [tensor.transpose(1, 2) if is_hnd else tensor for tensor in self.cache.layers[0]]

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the new tokens, row after row."""
        fresh = [
            torch.cat([row[old:] for row, old in zip(rows, self.cached, strict=True)]) for rows in (self.k, self.v)
        ]
        return torch.cat(self.q), *fresh

    def batch(self, device) -> Batch:
        return ragged_batch(
            [[0] * count for count in self.new],
            self.cached,
            [[table.pages for table in self.tables]],
            page_size=self.pool.page_size,
            device=device,
        )

    def attend(self, dtype) -> Tensor:
        """Dense causal attention of every row in `dtype`, `[N, H, D]`."""
        return torch.cat([self._row(row, dtype) for row in range(len(self.new))])

    def _row(self, row: int, dtype) -> Tensor:
        spec = self.spec
        q_HTD, k_HLD, v_HLD = (tensor.to(dtype).transpose(0, 1) for tensor in (self.q[row], self.k[row], self.v[row]))
        k_HLD, v_HLD = (tensor.repeat_interleave(spec.group_size, 0) for tensor in (k_HLD, v_HLD))
        position_T = torch.arange(q_HTD.shape[1], device=q_HTD.device) + self.cached[row]
        distance_TL = position_T[:, None] - torch.arange(k_HLD.shape[1], device=q_HTD.device)
        visible_TL = (distance_TL >= 0) & (distance_TL < (spec.window or k_HLD.shape[1]))
        if spec.pos_encoding == "rope_llama":
            q_HTD, k_HLD = self._turned(q_HTD, position_T), self._turned(k_HLD, torch.arange(k_HLD.shape[1]))
        scores_HTL = q_HTD @ k_HLD.mT * spec.scale
        if spec.softcap is not None:
            scores_HTL = torch.tanh(scores_HTL / spec.softcap) * spec.softcap
        scores_HTL = scores_HTL.masked_fill(~visible_TL, float("-inf"))
        return (scores_HTL.softmax(-1) @ v_HLD).transpose(0, 1)

    def _turned(self, x_HND: Tensor, position_N: Tensor) -> Tensor:
        """As complex numbers, whose two parts lie half a head apart."""
        spec, half, wide = self.spec, self.spec.head_dim // 2, x_HND.double()
        angles = spec.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half) / spec.rope_scale
        turns = torch.polar(torch.ones((), dtype=torch.float64), position_N.cpu()[:, None] * angles).to(x_HND.device)
        turned = torch.complex(wide[..., :half], wide[..., half:]) * turns
        return torch.cat((turned.real, turned.imag), dim=-1).to(x_HND.dtype)


class SharedRows(DenseRows):
    """Decode rows that share pages, over a cache poisoned like that of `DenseRows`.

    Args:
        prefixes: a letter for each full page that row b begins with; rows share as many as they begin with alike.
        own: tokens behind them, the step's own included.
        num_pages: of the cache.
    """

    def __init__(self, spec: AttentionSpec, prefixes: list[str], own: list[int], *, num_pages: int, **options):
        page_size, device = options["page_size"], options["device"]
        super().__init__(
            spec,
            [len(prefix) * page_size + count - 1 for prefix, count in zip(prefixes, own, strict=True)],
            [1] * len(own),
            **options,
        )
        rows = list(zip(prefixes, self.k, self.v, strict=True))
        first_with: dict[str, int] = {}  # who has a page first has its keys and values
        names = []
        for row, (prefix, k, v) in enumerate(rows):
            names.append([prefix[:end] for end in range(1, len(prefix) + 1)])
            for place, name in enumerate(names[-1]):
                first, at = first_with.setdefault(name, row), slice(place * page_size, (place + 1) * page_size)
                k[at], v[at] = rows[first][1][at], rows[first][2][at]
        free = list(range(1, num_pages))
        random.Random(options.get("seed", 0)).shuffle(free)
        page_of = {name: free.pop() for name in first_with}
        cache = CacheSpec(
            num_pages=num_pages,
            page_size=page_size,
            dtype=options["dtype"],
            layout=options.get("layout", "NHD"),
        )
        self.cache = KVCache(1, spec, cache, device)
        for pages in self.cache.layers[0]:
            pages.fill_(float("nan"))
        for table, shared, count in zip(self.tables, names, own, strict=True):
            table.pages = [page_of[name] for name in shared] + [free.pop() for _ in range(-(-count // page_size))]
        for tensor_PSKD, kept in zip(self.pages, (self.k, self.v), strict=True):
            for table, row, count in zip(self.tables, kept, self.cached, strict=True):
                for token in range(count):
                    tensor_PSKD[table.pages[token // page_size], token % page_size] = row[token]


def assert_close(ours: Tensor, plain: Tensor, exact: Tensor, *, floor: float) -> None:
    """The tolerance rule: against `exact`, our error is at most twice `plain`'s plus `floor`, in RMS and in maximum."""
    assert ours.shape == exact.shape
    assert ours.isfinite().all(), f"{(~ours.isfinite()).sum()} elements are not finite"
    ours_error, plain_error = ((each.double() - exact.double()).abs() for each in (ours, plain))
    for name, reduce in (("RMS", lambda error: error.square().mean().sqrt()), ("maximum", torch.max)):
        got, allowed = reduce(ours_error).item(), 2 * reduce(plain_error).item() + floor
        assert got <= allowed, f"{name} error {got:.3g}, allowed {allowed:.3g} (twice plain torch's plus {floor})"
