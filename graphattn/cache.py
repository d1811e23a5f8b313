"""The paged keys and values: one pair of tensors per layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from .errors import InvalidArgumentError
from .integers import integers
from .pages import NULL_PAGE
from .spec import AttentionSpec, CacheSpec


def first_page(pages: Tensor) -> Tensor:
    """A cache's first page over the cache's own storage: what a layer holds and hands to the op.

    Dynamo guards on a tensor's shape. As it sees one page, what it compiled serves a cache of any number of pages.
    """
    with torch.inference_mode(False):
        held = torch.empty(0, dtype=pages.dtype, device=pages.device)
        return held.set_(pages.untyped_storage(), pages.storage_offset(), (1, *pages.shape[1:]), pages.stride())


def all_pages(page: Tensor) -> Tensor:
    """The cache that a first page belongs to: every page that lies in its storage from there on.

    Of caches that share a storage that is more than the cache has; page tables are checked against `CacheSpec`.
    """
    _, rows, columns, width = page.shape  # spelt out: eager steps do this for every layer
    stride = page.stride()
    extent = 1 + (rows - 1) * stride[1] + (columns - 1) * stride[2] + (width - 1) * stride[3]
    behind = page.untyped_storage().nbytes() // page.itemsize - page.storage_offset() - extent
    return page.as_strided((1 + behind // stride[0], rows, columns, width), stride)


class KVCache:
    """Keys and values of every layer, in pages.

    Args:
        num_layers: layers to hold.
        spec: heads and width of a layer.
        cache: pages, page size and dtype.
        device: where the tensors lie.

    Attributes:
        layers: `[(k_cache, v_cache), ...]`, each tensor `[num_pages, page_size, num_kv_heads, head_dim]`, or with
            layout "HND" `[num_pages, num_kv_heads, page_size, head_dim]`. The null page holds zeros, since kernels that
            read tiles may read it before a window, weighed with zero. Others are uninitialised: attention never reads
            a slot that no token was appended to.

    Raises:
        InvalidArgumentError: `num_layers` is below 1.
    """

    def __init__(self, num_layers: int, spec: AttentionSpec, cache: CacheSpec, device: torch.device | str):
        if num_layers < 1:
            raise InvalidArgumentError(f"num_layers={num_layers}: it must be at least 1")
        self._spec, self._cache = spec, cache
        shape = (cache.num_pages, *cache.page_shape(spec))
        with torch.inference_mode(False):  # what is made inside it cannot be written outside it
            self.layers: list[tuple[Tensor, Tensor]] = [
                tuple(torch.empty(shape, dtype=cache.dtype, device=device) for _ in "kv") for _ in range(num_layers)
            ]
        self.device = self.layers[0][0].device
        self.clear([NULL_PAGE])

    @property
    def spec(self) -> AttentionSpec:
        """What each layer computes."""
        return self._spec

    @property
    def cache(self) -> CacheSpec:
        """How the pages lie in memory, which does not change while there are any: `converted` makes others."""
        return self._cache

    def converted(self, layout: str) -> KVCache:
        """A copy of every page in a layout, "NHD" or "HND".

        This cache stays as it is, and so do layers that are bound to it and graphs that were captured over it: bind the
        copy, and plan and capture for its `cache`.

        Raises:
            InvalidArgumentError: there is no such layout.
        """
        other = KVCache(len(self.layers), self.spec, replace(self.cache, layout=layout), self.device)
        is_turned = layout != self.cache.layout
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            for pages, target in zip(ours, theirs, strict=True):
                target.copy_(pages.transpose(1, 2) if is_turned else pages)
        return other

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers' keys and values."""
        return len(self.layers) * self.cache.num_pages * self.cache.page_bytes(self.spec)

    def clear(self, pages: Sequence[int]) -> None:
        """Writes zeros to whole pages of every layer.

        Raises:
            InvalidArgumentError: it has no such page; nothing was written.
        """
        index_P = self._index(pages)
        for held in self._bytes():
            held.index_fill_(0, index_P, 0)

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copies whole pages within every layer; the two lists are paired and share no page.

        Raises:
            InvalidArgumentError: it has no such page, lists of different lengths, or a copy onto the null page; nothing
                was written.
        """
        if len(source) != len(target) or NULL_PAGE in target:
            raise InvalidArgumentError(
                f"pages {list(source)} onto {list(target)}: give as many of both, and not the null page, {NULL_PAGE}"
            )
        source_P, target_P = self._index(source), self._index(target)
        for held in self._bytes():
            held.index_copy_(0, target_P, held.index_select(0, source_P))

    def _index(self, pages: Sequence[int]) -> Tensor:
        if any(not 0 <= page < self.cache.num_pages for page in pages):
            raise InvalidArgumentError(f"pages {list(pages)}: the cache has pages 0 to {self.cache.num_pages - 1}")
        return torch.from_numpy(integers(list(pages), "pages")).to(self.device)

    def _bytes(self) -> Iterator[Tensor]:
        """Keys and values of every layer, those in fp8 as bytes: torch does not have all its kernels for fp8."""
        for held in chain.from_iterable(self.layers):
            yield held.view(torch.uint8) if self.cache.is_fp8 else held
