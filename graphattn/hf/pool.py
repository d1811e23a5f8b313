"""Pages that grow with use, for a model that runs without an engine around it."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..cache import KVCache
from ..pages import PagePool
from ..spec import CacheSpec
from .binding import Binding

FIRST_PAGES = 64


class GrowingPool:
    """A page pool and its cache, doubled when they are full.

    Nothing is captured over this cache, so its tensors may move.

    Args:
        binding: the model whose layers are given the cache.
        page_size: tokens in a page.
        num_pages: pages at most, the null page among them; None for as many as memory holds.
    """

    def __init__(self, binding: Binding, *, page_size: int, num_pages: int | None):
        self._binding, self._max_pages = binding, num_pages
        first = FIRST_PAGES if num_pages is None else min(FIRST_PAGES, num_pages)
        self.pages = PagePool(first, page_size, prefix_cache=False)
        model = binding.model
        self._hold(CacheSpec(num_pages=first, page_size=page_size, dtype=model.dtype), model.device)

    def _hold(self, spec: CacheSpec, device: torch.device) -> None:
        self.cache = KVCache(len(self._binding.layers), self._binding.spec, spec, device)
        self._binding.bind(self.cache)

    def ensure(self, num_pages: int) -> None:
        """Grows until `num_pages` are free, or to the maximum; what then does not fit raises at allocation."""
        missing = num_pages - self.pages.num_free
        if missing <= 0:
            return
        total = max(2 * self.pages.num_pages, self.pages.num_pages + missing)
        if self._max_pages is not None:
            total = min(total, self._max_pages)
        if total > self.pages.num_pages:
            old = self.cache
            self._hold(replace(old.cache, num_pages=total), old.device)
            for pair, old_pair in zip(self.cache.layers, old.layers, strict=True):
                for tensor_PSHD, old_PSHD in zip(pair, old_pair, strict=True):
                    tensor_PSHD[: len(old_PSHD)].copy_(old_PSHD)
            self.pages.grow(total)
