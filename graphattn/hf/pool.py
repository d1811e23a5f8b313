"""Pages that grow with use, for a model that runs without an engine around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..cache import KVCache
from ..errors import OutOfPagesError
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

    Attributes:
        pages: who holds which page; the same in every layer group.
        caches: their tensors, by layer group.
    """

    def __init__(self, binding: Binding, *, page_size: int, num_pages: int | None):
        self._binding, self._max_pages = binding, num_pages
        first = FIRST_PAGES if num_pages is None else min(FIRST_PAGES, num_pages)
        self.pages = PagePool(first, page_size, prefix_cache=False)
        self.caches = self._allocate(CacheSpec(num_pages=first, page_size=page_size, dtype=binding.model.dtype))

    def _allocate(self, cache: CacheSpec) -> list[KVCache]:
        return self._binding.allocate([cache] * len(self._binding.groups))

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copies whole pages within every layer; the two lists are paired and share no page."""
        for cache in self.caches:
            cache.copy_pages(source, target)

    def ensure(self, num_pages: int) -> None:
        """Grows until `num_pages` are free.

        Raises:
            OutOfPagesError: that is more than the maximum leaves; nothing has grown.
        """
        pages = self.pages
        missing = num_pages - pages.num_free
        if missing <= 0:
            return
        if self._max_pages is not None and pages.num_pages + missing > self._max_pages:
            free = self._max_pages - 1 - pages.num_used
            raise OutOfPagesError(
                f"{num_pages} pages needed, {free} of {self._max_pages - 1} free (page_size={pages.page_size}); drop a "
                "past_key_values, pass fewer or shorter rows, or attach with more num_pages"
            )
        total = max(2 * pages.num_pages, pages.num_pages + missing)
        if self._max_pages is not None:
            total = min(total, self._max_pages)
        held, self.caches = self.caches, self._allocate(replace(self.caches[0].cache, num_pages=total))
        for cache, old in zip(self.caches, held, strict=True):
            for pair, old_pair in zip(cache.layers, old.layers, strict=True):
                for tensor, old_tensor in zip(pair, old_pair, strict=True):
                    tensor[: len(old_tensor)].copy_(old_tensor)
        pages.grow(total)
