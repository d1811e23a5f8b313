"""Pages behind a window are given back while a request goes on, and nothing that is read is missed."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphattn import LLM, SamplingParams
from graphattn.engine.sizing import usable_pages
from graphattn.errors import InvalidArgumentError, OutOfPagesError
from graphattn.groups import GroupPools, row_limit, row_pages
from graphattn.pages import NULL_PAGE, BlockTable, PagePool
from graphattn.window_table import WindowTable
from tests.grouped import WINDOW, grouped
from tests.test_groups import assert_as_eager, greedy, plain, prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")


def poison(llm: LLM) -> None:
    """NaN in every page that nobody holds and no prefix is kept in, and in the null page."""
    for pool, cache in zip(llm.pools.pools, llm._executor.caches, strict=True):
        empty = torch.tensor([NULL_PAGE, *pool._free])
        for pair in cache.layers:
            for pages in pair:
                pages[empty] = float("nan")


def finish(llm: LLM, prompts, max_tokens: int) -> tuple[list, list[list[int]]]:
    """Outputs in order of the prompts, over pages that are poisoned before every step; and pages in use after each."""
    outputs, used = {}, []
    ids = [llm.add_request(prompt, greedy(max_tokens)) for prompt in prompts]
    while llm.has_work:
        poison(llm)
        for delta in llm.step():
            if delta.output is not None:
                outputs[delta.request_id] = delta.output
        used.append([pool.num_used for pool in llm.pools.pools])
        for pool in llm.pools.pools:
            pool.check()
    assert used[-1] == [0] * len(used[-1])
    return [outputs[request_id] for request_id in ids], used


@pytest.mark.parametrize(
    ("name", "page_size", "max_prefill_tokens", "prefix_cache"),
    [
        ("gemma2", 1, 3, True),
        ("gemma2", 4, 3, False),
        ("gemma2", 4, 8192, True),
        ("gemma2", 16, 8192, True),
        ("qwen2", 4, 3, True),
        ("mistral", 1, 8192, True),
        ("mistral", 4, 3, True),
        ("gpt_oss", 4, 3, True),
    ],
)
def test_what_is_given_back_is_never_read(
    name: str, page_size: int, max_prefill_tokens: int, prefix_cache: bool
) -> None:
    shared = prompt_of(33)
    prompts = [shared, *(prompt_of(length) for length in (1, 7, 8, 9, 21)), shared[:26] + (3, 4), shared]
    options = {"page_size": page_size, "num_pages": 2 + 300 // page_size, "max_prefill_tokens": max_prefill_tokens}
    with LLM(grouped(name), max_batch=3, prefix_cache=prefix_cache, **options) as llm:
        for _ in range(2):
            outputs, used = finish(llm, prompts, 20)
            assert_as_eager(plain(name), outputs)
            assert [output.finish_reason for output in outputs] == ["length"] * len(prompts)
        assert (llm.pool.num_hits > 0) == prefix_cache
        windowed = llm.pools.windows.index(WINDOW)
        most = 3 * row_pages(WINDOW, page_size, 1) + (34 if max_prefill_tokens > 33 else 3) * 3 // page_size + 3
        assert max(each[windowed] for each in used) <= most
        if None in llm.pools.windows and page_size < 16:
            whole = llm.pools.windows.index(None)
            assert max(each[windowed] for each in used) < max(each[whole] for each in used)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_requests_in_any_order_over_too_few_pages(seed: int) -> None:
    """Joins, aborts, shared beginnings, chunks and preemptions, where windows have barely the pages they need."""
    rng = random.Random(seed)
    page_size, chunk = rng.choice([1, 2, 4]), rng.choice([3, 5, 50])
    name = rng.choice(["gemma2", "mistral"])
    prompts = [prompt_of(rng.randint(1, 30), seed=rng.randint(0, 1)) for _ in range(rng.randint(2, 6))]
    options = {"page_size": page_size, "max_prefill_tokens": chunk, "prefix_cache": rng.random() < 0.7}
    with LLM(
        _model(name), max_batch=rng.randint(1, 4), num_pages=2 + rng.randint(44, 70) // page_size, **options
    ) as llm:
        asked, outputs = {}, []
        while llm.has_work or prompts:
            if prompts and (rng.random() < 0.5 or not llm.has_work):
                prompt = prompts.pop()
                asked[llm.add_request(prompt, greedy(rng.randint(1, 12)))] = prompt
            if asked and rng.random() < 0.05:
                some = rng.choice([*asked])
                if some in llm._engine.unfinished:
                    llm.abort(some)
            poison(llm)
            outputs += [delta.output for delta in llm.step() if delta.output is not None]
            for pool in llm.pools.pools:
                pool.check()
        assert len(outputs) == len(asked)
        assert not any(pool.num_used for pool in llm.pools.pools)
        assert_as_eager(plain(name), [output for output in outputs if output.token_ids])


@functools.cache
def _model(name: str):
    return grouped(name)


def test_a_request_of_windows_alone_may_be_longer_than_all_pages() -> None:
    with LLM(grouped("mistral"), max_batch=2, page_size=4, num_pages=9, max_prefill_tokens=5) as llm:
        assert llm.pool.capacity_tokens == 32 and llm.max_seq_len == 512
        outputs, used = finish(llm, [prompt_of(50), prompt_of(41)], 40)
        assert_as_eager(plain("mistral"), outputs)
        assert max(used) <= [8]


def test_preempted_requests_are_computed_anew_in_every_group() -> None:
    with LLM(grouped("gemma2"), max_batch=3, page_size=2, num_pages=40, max_prefill_tokens=8) as llm:
        outputs, _ = finish(llm, [prompt_of(20), prompt_of(21), prompt_of(22)], 25)
        assert_as_eager(plain("gemma2"), outputs)
        assert sum(output.timings.preemptions for output in outputs) > 0


def test_explain_and_the_ledger_have_a_line_for_each_group() -> None:
    """128 positions of two rows in full, of which a window of 8 and the chunk keep few."""
    with LLM(
        grouped("gemma2"), max_batch=2, page_size=4, max_seq_len=128, kv_bytes=1 << 20, max_prefill_tokens=8
    ) as llm:
        windowed, whole = llm.pools.pools
        assert windowed.num_pages == usable_pages(WINDOW, 4, max_batch=2, num_new=8, limit=128) < whole.num_pages
        page_bytes = 2 * 2 * 4 * 2 * 16 * 8  # 2 layers, keys and values, 4 tokens, 2 heads of 16 in float64
        lines = {line.name: line for line in llm.ledger().lines}
        assert lines["KV pages, window 8"].bytes == windowed.num_pages * page_bytes
        assert lines["KV pages, all tokens"].bytes == whole.num_pages * page_bytes
        assert all(line.predicted == line.bytes for name, line in lines.items() if name.startswith("KV pages"))
        llm.add_request(prompt_of(100), SamplingParams(temperature=0, max_tokens=5))
        while llm.pool.num_used == 0 or whole.num_used < 25:
            llm.step()
        pages = [line for line in llm.explain().splitlines() if line.startswith("pages")]
        assert f"{windowed.num_used} in use" in pages[0] and pages[0].endswith("given back behind a window of 8")
        assert f"{whole.num_used} in use" in pages[1] and pages[1].endswith("max_seq_len 128")
        assert windowed.num_used <= row_pages(WINDOW, 4, 1) < 25 <= whole.num_used


def test_bytes_that_windows_leave_go_to_layers_that_keep_all_tokens() -> None:
    options = {"max_batch": 2, "page_size": 4, "kv_bytes": 200_000, "max_prefill_tokens": 8}
    with LLM(grouped("gemma2"), **options) as llm:
        windowed, whole = (pool.num_pages for pool in llm.pools.pools)
        page_bytes = llm._executor.cache_bytes // (windowed + whole)
        assert windowed < whole and whole * page_bytes > 100_000
        assert 0 <= 200_000 - llm._executor.cache_bytes < page_bytes
    with pytest.raises(InvalidArgumentError, match="kv_bytes=4095: that holds fewer than 2 pages"):
        LLM(grouped("gemma2"), **(options | {"kv_bytes": 4095}))
    with pytest.raises(OutOfPagesError, match="max_seq_len=200 needs 50 pages, the cache has 9"):
        LLM(grouped("gemma2"), max_batch=2, page_size=4, num_pages=10, max_seq_len=200)


def test_steps_are_timed_over_the_pages_of_the_window_alone() -> None:
    with LLM(grouped("gemma2"), max_batch=2, page_size=4, num_pages=100, max_prefill_tokens=8) as llm:
        assert len(llm.time_steps(2, 150, num_steps=3)) == 3
        assert llm.pools.pools[0].num_pages < 2 * 150 // 4
        assert not any(pool.num_used for pool in llm.pools.pools)
        assert_as_eager(plain("gemma2"), llm.generate([prompt_of(20)], greedy(3)))


# The tables by themselves


def test_a_window_keeps_just_what_the_next_token_sees() -> None:
    for size in (1, 2, 5):
        for window in (1, 2, 4, 5, 6, 11):
            table = WindowTable(PagePool(60, size), window)
            for count in range(1, 40):
                table.grow(count)
                table.commit(list(range(count)))
                seen = range(max(0, count - window + 1), count)  # by the token at position `count`
                held = {at // size for at in range(count) if table.pages[at // size] != NULL_PAGE}
                assert {at // size for at in seen} <= held
                behind = max(0, count - window + 1) // size  # whole pages
                assert not held & set(range(behind)) and table.num_dropped == behind
                assert table.pool.num_used == len(table.pages) - behind
            table.release()
            table.pool.check()
            assert table.pages == [] and table.num_dropped == 0 and table.pool.num_used == 0


def test_a_window_is_cut_only_to_where_it_still_begins() -> None:
    table = WindowTable(PagePool(20, 2), 5)
    table.grow(14)
    table.commit(range(11))  # the next sees 7 to 11: tokens 0 to 5 are gone
    assert table.num_dropped == 3
    with pytest.raises(InvalidArgumentError, match="next one sees a window of 5, pages of the first 6 were given back"):
        table.truncate(8)
    table.truncate(12)
    assert table.pages[:3] == [NULL_PAGE] * 3 and len(table.pages) == 6
    table.truncate(0)
    assert table.pages == [] and table.pool.num_used == 0


def test_a_window_refuses_to_register_what_was_given_back() -> None:
    table = WindowTable(PagePool(20, 2), 3)
    table.drop_behind(9)
    table.grow(12)
    with pytest.raises(InvalidArgumentError, match="3 pages were given back, 0 committed"):
        table.commit(range(10))
    with pytest.raises(InvalidArgumentError, match="window=0"):
        WindowTable(PagePool(20, 2), 0)


def test_rows_grow_in_every_group_or_in_none() -> None:
    pools = GroupPools([PagePool(20, 2), PagePool(4, 2), PagePool(20, 2)], [None, 5, 7])
    row = pools.row()
    with pytest.raises(OutOfPagesError, match="5 pages needed, 3 of 3 free"):
        row.grow(10)
    assert row.pages == [[], [], []]
    row.grow(5, ahead=20)
    assert [len(pages) for pages in row.pages] == [10, 3, 3] and row.missing(7, 22) == [1, 1, 1]
    for pools_and_windows in (([], []), ([PagePool(4, 2)], []), ([PagePool(4, 2), PagePool(4, 3)], [None, None])):
        with pytest.raises(InvalidArgumentError, match="give one window, or None, for each pool"):
            GroupPools(*pools_and_windows)
    assert isinstance(row.tables[0], BlockTable) and not isinstance(row.tables[0], WindowTable)


def test_how_long_a_row_may_become() -> None:
    assert row_limit(10, 4, None, 5) == 36
    assert row_limit(1 + row_pages(8, 4, 5), 4, 8, 5) is None
    assert row_limit(row_pages(8, 4, 5), 4, 8, 5) == 4 * (row_pages(8, 4, 5) - 1)
    assert usable_pages(None, 4, max_batch=3, num_new=5, limit=None) is None
    assert usable_pages(None, 4, max_batch=3, num_new=5, limit=10) == 10
    assert usable_pages(1000, 4, max_batch=3, num_new=5, limit=10) == 10
