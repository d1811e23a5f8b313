"""A cache's first page leads to all of them, however they lie in their storage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphattn import AttentionSpec, CacheSpec, InvalidArgumentError, KVCache
from graphattn.cache import all_pages, first_page


@given(
    pages=st.integers(2, 9),
    page=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)),
    layers=st.integers(1, 3),
    which=st.sampled_from(["own", "stacked", "interleaved", "transposed"]),
)
def test_the_first_page_leads_to_all(pages: int, page: tuple[int, int, int], layers: int, which: str) -> None:
    caches = {
        "own": [torch.zeros(pages, *page) for _ in range(layers)],
        "stacked": list(torch.zeros(layers, pages, *page)),
        "interleaved": list(torch.zeros(pages, layers, *page).unbind(1)),
        "transposed": [torch.zeros(pages, page[1], page[0], page[2]).transpose(1, 2) for _ in range(layers)],
    }[which]
    for index, cache in enumerate(caches):
        held = first_page(cache)
        assert held.shape == (1, *page) and held.data_ptr() == cache.data_ptr()
        found = all_pages(held)
        assert found.stride() == cache.stride() and len(found) >= pages
        assert which == "stacked" or len(found) == pages, "a stack's later layers lie behind it"
        found[pages - 1] = index + 1.0
        assert (cache[pages - 1] == index + 1.0).all() and (cache[: pages - 1] == 0).all()
        assert torch.equal(all_pages(found), found)
    assert [cache[pages - 1].unique().tolist() for cache in caches] == [[index + 1.0] for index in range(layers)]


def test_a_cache_is_given_back_with_its_last_holder() -> None:
    cache = KVCache(1, AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4), CacheSpec(num_pages=3), "cpu")
    held = first_page(cache.layers[0][0])
    assert held.untyped_storage().data_ptr() == cache.layers[0][0].untyped_storage().data_ptr()
    assert held._base is None, "a view would have Dynamo look at what it is a view of"


@given(layouts=st.tuples(*[st.sampled_from(["NHD", "HND"])] * 2), page_size=st.sampled_from([1, 2, 3]))
def test_a_copy_in_another_layout(layouts: tuple[str, str], page_size: int) -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=4)
    cache = CacheSpec(num_pages=3, page_size=page_size, dtype=torch.float32, layout=layouts[0])
    ours = KVCache(2, spec, cache, "cpu")
    for index, pages in enumerate(pages for pair in ours.layers for pages in pair):
        pages.copy_(torch.arange(pages.numel()).view(pages.shape) + 1000 * index)
    theirs = ours.converted(layouts[1])
    assert theirs.cache == CacheSpec(num_pages=3, page_size=page_size, dtype=torch.float32, layout=layouts[1])
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        for left, right in zip(mine, other, strict=True):
            left, right = (
                x if layout == "NHD" else x.transpose(1, 2) for x, layout in zip((left, right), layouts, strict=True)
            )
            assert torch.equal(left, right) and left.data_ptr() != right.data_ptr()
    with pytest.raises(InvalidArgumentError, match="layout='DHN': choose NHD or HND"):
        ours.converted("DHN")
    with pytest.raises(AttributeError):
        ours.cache = theirs.cache


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda cache: cache.clear([4]), "the cache has pages 0 to 3"),
        (lambda cache: cache.clear([-1]), "the cache has pages 0 to 3"),
        (lambda cache: cache.copy_pages([1], [4]), "the cache has pages 0 to 3"),
        (lambda cache: cache.clear([1.5]), "pages: 1.5 is among them, give ints"),
        (lambda cache: cache.copy_pages([1], [0]), "not the null page"),
        (lambda cache: cache.copy_pages([1, 2], [3]), "give as many of both"),
    ],
)
def test_pages_that_are_not_there(call, complaint: str) -> None:
    cache = KVCache(2, AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8), CacheSpec(num_pages=4), "cpu")
    for held in cache._bytes():
        held.fill_(1)
    with pytest.raises(InvalidArgumentError, match=complaint):
        call(cache)
    assert all((held == 1).all() for held in cache._bytes())


def test_no_pages_at_all_are_cleared_and_copied() -> None:
    cache = KVCache(1, AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8), CacheSpec(num_pages=4), "cpu")
    cache.clear([])
    cache.copy_pages([], [])
