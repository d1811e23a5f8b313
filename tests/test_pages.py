"""PagePool and BlockTable against a simulated cache in which every slot remembers all it depends on."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from graphattn import pages as pages_module
from graphattn.errors import GraphattnError, InvalidArgumentError, OutOfPagesError
from graphattn.pages import NULL_PAGE, BlockTable, PagePool

NUM_REQUESTS = 4
REQUESTS = st.integers(0, NUM_REQUESTS - 1)
TOKENS = st.integers(0, 1)  # two tokens only, so that prompts agree often
PROMPTS = st.builds(lambda length, tail: [1] * length + tail, st.integers(0, 12), st.lists(TOKENS, max_size=4))


class Request:
    """A table and what the simulated cache must hold for it: one entry per written token."""

    def __init__(self, pool: PagePool) -> None:
        self.table = BlockTable(pool)
        self.tokens: list[int] = []
        self.written: list[tuple] = []
        self.outdated = False  # had pages when the weights changed


class PagesMachine(RuleBasedStateMachine):
    """The slot of token i holds (weights, tokens[: i + 1]), as keys and values depend on all tokens before."""

    @initialize(num_pages=st.integers(2, 16), page_size=st.integers(1, 3), prefix_cache=st.integers(0, 9).map(bool))
    def create(self, num_pages: int, page_size: int, prefix_cache: bool) -> None:
        self.pool = PagePool(num_pages, page_size, prefix_cache=prefix_cache)
        self.prefix_cache = prefix_cache
        self.cache: dict[tuple[int, int], object] = {}
        self.weights = 0
        self.live = [Request(self.pool) for _ in range(NUM_REQUESTS)]
        self.bare: list[int] = []  # allocated without a table
        self.committed: set[tuple[int, ...]] = set()  # full-page prefixes of these weights that were registered
        self.num_evictions_before = 0  # evictions until the weights last changed

    # What every step does to the simulated cache.

    def take(self, call, num_needed: int, before: list[int]) -> list[int] | None:
        """Run an allocating call; checks what it may take and evict. Returns the pages now, None if it was refused."""
        pool = self.pool
        num_free, num_uncached, evictions = pool.num_free, pool.num_free - pool.num_cached, pool.num_evictions
        try:
            pages = call()
        except OutOfPagesError:
            assert num_needed > num_free
            assert (pool.num_free, pool.num_evictions) == (num_free, evictions)
            return None
        assert num_needed <= num_free
        assert pages[: len(before)] == before
        new = pages[len(before) :]
        assert len(new) == num_needed
        assert pool.num_evictions - evictions == max(0, num_needed - num_uncached)
        assert pool.num_free == num_free - num_needed
        for page in new:
            for slot in range(pool.page_size):
                self.cache[page, slot] = "undefined"
        return pages

    def grow(self, request: Request, num_tokens: int) -> bool:
        table, before = request.table, list(request.table.pages)

        def call() -> list[int]:
            table.grow(num_tokens)
            return table.pages

        needed = max(0, -(-num_tokens // self.pool.page_size) - len(before))
        if self.take(call, needed, before) is None:
            assert table.pages == before
            return False
        assert table.num_slots == len(table.pages) * self.pool.page_size >= num_tokens
        return True

    def write(self, request: Request, tokens: list[int]) -> None:
        size = self.pool.page_size
        for token in tokens:
            page = request.table.pages[len(request.tokens) // size]
            assert all(other is request or page not in other.table.pages for other in self.live), "wrote a shared page"
            request.tokens.append(token)
            entry = (self.weights, tuple(request.tokens))
            self.cache[page, (len(request.tokens) - 1) % size] = entry
            request.written.append(entry)

    def commit(self, request: Request) -> None:
        request.table.commit(request.tokens)
        if self.prefix_cache and not request.outdated:
            size = self.pool.page_size
            self.committed |= {tuple(request.tokens[:end]) for end in range(size, len(request.tokens) + 1, size)}

    # Rules.

    @rule(index=REQUESTS, prompt=PROMPTS, chunk=st.integers(1, 12))
    def prefill(self, index: int, prompt: list[int], chunk: int) -> None:
        request = self.live[index]
        table, pool, size = request.table, self.pool, self.pool.page_size
        if table.pages:
            with pytest.raises(InvalidArgumentError, match="empty table"):
                table.reuse_prefix(prompt)
            self.release(index)
        hits = pool.num_hits
        reused = table.reuse_prefix(prompt)
        assert pool.num_hits == hits + reused
        assert reused % size == 0 and (reused < len(prompt) or reused == 0)
        assert len(table.pages) * size == reused
        expected = [(self.weights, tuple(prompt[: i + 1])) for i in range(reused)]
        assert [self.cache[table.pages[i // size], i % size] for i in range(reused)] == expected
        longest = 0
        while longest + size < len(prompt) and tuple(prompt[: longest + size]) in self.committed:
            longest += size
        assert reused <= longest
        if pool.num_evictions == self.num_evictions_before:
            assert reused == longest, "nothing was evicted, so all that was registered must be found"
        request.tokens, request.written = prompt[:reused], expected
        while len(request.tokens) < len(prompt):
            part = prompt[len(request.tokens) :][:chunk]
            if not self.grow(request, len(request.tokens) + len(part)):
                break
            self.write(request, part)
            self.commit(request)

    @rule(index=REQUESTS, tokens=st.lists(TOKENS, min_size=1, max_size=5))
    def decode(self, index: int, tokens: list[int]) -> None:
        request = self.live[index]
        for token in tokens:
            if not self.grow(request, len(request.tokens) + 1):
                break
            self.write(request, [token])
            self.commit(request)

    @rule(index=REQUESTS, extra=st.integers(0, 9))
    def reserve(self, index: int, extra: int) -> None:
        self.grow(self.live[index], len(self.live[index].tokens) + extra)

    @rule(index=REQUESTS, num_dropped=st.integers(0, 12))
    def truncate(self, index: int, num_dropped: int) -> None:
        request, size = self.live[index], self.pool.page_size
        table = request.table
        num_tokens = max(0, table.num_slots + 2 - num_dropped)
        before = list(table.pages)
        keep = min(len(before), -(-num_tokens // size))
        try:
            table.truncate(num_tokens)
        except InvalidArgumentError:
            assert table.pages == before
            assert num_tokens % size and num_tokens < table.num_slots
            assert len(request.tokens) >= keep * size, "only a full page can be shared or registered"
            return
        assert table.pages == before[:keep]
        del request.tokens[num_tokens:], request.written[num_tokens:]
        if num_tokens % size and num_tokens < table.num_slots:
            for slot in range(num_tokens % size, size):
                self.cache[table.pages[-1], slot] = "truncated"
        request.outdated &= bool(table.pages)

    @rule(index=REQUESTS)
    def release(self, index: int) -> None:
        request = self.live[index]
        for _ in range(2):
            request.table.release()
            assert request.table.pages == [] and request.table.num_slots == 0
        request.tokens, request.written, request.outdated = [], [], False

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        self.bare += self.take(lambda: self.pool.allocate(count), count, []) or []

    @precondition(lambda self: self.bare)
    @rule(count=st.integers(1, 4), bad=st.sampled_from([None, NULL_PAGE, -1, 99, "again"]))
    def free(self, count: int, bad: int | str | None) -> None:
        pages = self.bare[:count]
        if bad is not None:
            used = self.pool.num_used
            with pytest.raises(InvalidArgumentError):
                self.pool.release([*pages, pages[0] if bad == "again" else bad])
            assert self.pool.num_used == used
        self.pool.release(pages)
        del self.bare[:count]

    @rule()
    def change_weights(self) -> None:
        free = self.pool.num_free
        self.pool.clear_prefixes()
        assert (self.pool.num_cached, self.pool.num_free) == (0, free)
        self.weights += 1
        self.committed.clear()
        for request in self.live:
            request.outdated = bool(request.table.pages)
        self.num_evictions_before = self.pool.num_evictions

    @rule(index=REQUESTS)
    def disown(self, index: int) -> None:
        tokens, free = self.live[index].tokens, (self.pool.num_used, self.pool.num_free)
        self.live[index].table.disown(tokens)
        assert (self.pool.num_used, self.pool.num_free) == free
        first = tuple(tokens[: self.pool.page_size])
        gone = {prefix for prefix in self.committed if prefix[: self.pool.page_size] == first}
        self.committed -= gone
        if gone:
            self.num_evictions_before = -1  # who goes on behind it registers what nobody can find

    @rule(added=st.integers(0, 3))
    def grow_pool(self, added: int) -> None:
        num_pages, num_free = self.pool.num_pages, self.pool.num_free
        if num_pages + added <= 20:
            self.pool.grow(num_pages + added)
            assert (self.pool.num_pages, self.pool.num_free) == (num_pages + added, num_free + added)

    # What always holds.

    @invariant()
    def books_balance(self) -> None:
        pool = self.pool
        pool.check()
        tables = [request.table.pages for request in self.live]
        holders = [*tables, self.bare]
        used = {page for pages in holders for page in pages}
        assert all(len(set(pages)) == len(pages) for pages in holders), "a page in two places"
        assert all(0 < page < pool.num_pages for page in used)
        assert not set(self.bare) & {page for pages in tables for page in pages}
        assert pool.num_used == len(used)
        assert pool.num_used + pool.num_free == pool.num_usable
        assert 0 <= pool.num_cached <= pool.num_free
        if not self.prefix_cache:
            assert (pool.num_cached, pool.num_hits, pool.num_evictions) == (0, 0, 0)

    @invariant()
    def every_request_reads_what_it_wrote(self) -> None:
        size = self.pool.page_size
        for request in self.live:
            found = [self.cache[request.table.pages[i // size], i % size] for i in range(len(request.tokens))]
            assert found == request.written

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for request in self.live:
            request.table.release()
        self.pool.release(self.bare)
        self.pool.check()
        assert (self.pool.num_free, self.pool.num_used) == (self.pool.num_usable, 0)
        assert len(set(self.pool.allocate(self.pool.num_usable))) == self.pool.num_usable


TestPagesMachine = PagesMachine.TestCase
TestPagesMachine.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)


def filled(pool: PagePool, tokens: list[int]) -> BlockTable:
    """A table that holds tokens, reusing what it can."""
    table = BlockTable(pool)
    table.reuse_prefix(tokens)
    table.grow(len(tokens))
    table.commit(tokens)
    return table


def reusable(pool: PagePool, tokens: list[int]) -> int:
    """How many leading tokens are registered; changes the least recent order like any use."""
    table = BlockTable(pool)
    count = table.reuse_prefix([*tokens, -1])
    table.release()
    return count


def test_imports_no_torch():
    tree = ast.parse(Path(pages_module.__file__).read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    assert {name for name in names if name.split(".")[0] not in sys.stdlib_module_names} == {"errors"}


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"num_pages": 1}, "num_pages must be at least 2 (page 0 is the null page), got 1"),
        ({"num_pages": 8, "page_size": 0}, "page_size must be at least 1, got 0"),
    ],
)
def test_pool_arguments(kwargs, text):
    with pytest.raises(InvalidArgumentError) as error:
        PagePool(**kwargs)
    assert str(error.value) == text


def test_counts():
    pool = PagePool(num_pages=4096)
    assert (pool.page_size, pool.num_usable, pool.num_free, pool.num_used) == (16, 4095, 4095, 0)
    assert pool.capacity_tokens == 4095 * 16
    assert [pool.pages_for(n) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_out_of_pages_text_and_nothing_taken():
    pool = PagePool(num_pages=4096)
    pool.allocate(4094)
    table = BlockTable(pool)
    table.grow(0)
    with pytest.raises(OutOfPagesError) as error:
        table.grow(48)
    assert str(error.value) == (
        "3 pages needed, 1 of 4095 free (page_size=16); finish a request, lower max_seq_len or raise num_pages"
    )
    assert (table.pages, pool.num_free) == ([], 1)
    table.grow(16)
    with pytest.raises(OutOfPagesError, match=r"^1 page needed, 0 of 4095 free"):
        table.grow(17)
    assert table.num_slots == 16
    with pytest.raises(InvalidArgumentError, match="at least 0, got -1"):
        pool.allocate(-1)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (0, "page 0 is the null page; release only pages 1 to 7"),
        (8, "page 8 is not of this pool; release only pages 1 to 7"),
        (-1, "page -1 is not of this pool; release only pages 1 to 7"),
        (1, "2 references to page 1 released, there are 1; release each only once"),
        (7, "1 references to page 7 released, there are 0; release each only once"),
    ],
)
def test_bad_release_drops_nothing(bad, text):
    pool = PagePool(num_pages=8)
    pages = pool.allocate(2)
    assert pages == [1, 2]
    with pytest.raises(InvalidArgumentError) as error:
        pool.release([*pages, bad])
    assert str(error.value) == text
    assert pool.num_used == 2
    pool.check()


def test_reuse_leaves_a_token_to_compute():
    pool = PagePool(num_pages=16, page_size=4)
    filled(pool, list(range(8))).release()
    for count, reused in [(0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)]:
        table = BlockTable(pool)
        assert table.reuse_prefix(list(range(count))) == reused == table.num_slots
        table.release()
    assert pool.num_hits == 4 + 4 + 8 + 8


def test_running_request_shares_its_full_pages():
    pool = PagePool(num_pages=16, page_size=4)
    first = filled(pool, list(range(10)))
    second = filled(pool, [*range(8), 50, 51])
    assert second.pages[:2] == first.pages[:2] and second.pages[2] != first.pages[2]
    assert pool.num_used == 4
    first.release()
    assert (pool.num_used, pool.num_cached) == (3, 0)
    second.release()
    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 2, 15)


def test_equal_page_after_another_prefix_is_not_shared():
    pool = PagePool(num_pages=16, page_size=2)
    filled(pool, [1, 1, 9, 9]).release()
    second = filled(pool, [2, 2, 9, 9])
    assert pool.num_hits == 0
    second.release()
    assert pool.num_cached == 4
    assert reusable(pool, [1, 1, 9, 9]) == reusable(pool, [2, 2, 9, 9]) == 4
    assert reusable(pool, [9, 9]) == 0


def test_same_content_twice_keeps_one_and_continues_its_chain():
    pool = PagePool(num_pages=16, page_size=2)
    first, second = BlockTable(pool), BlockTable(pool)
    for table in (first, second):
        table.grow(6)
    first.commit([1, 2, 3, 4])
    second.commit([1, 2, 3, 4, 5, 6])
    kept, continued = first.pages[:2], second.pages[2]
    second.release()
    assert pool.num_cached == 1
    first.release()
    assert pool.num_cached == 3
    third = BlockTable(pool)
    assert third.reuse_prefix([1, 2, 3, 4, 5, 6, 7]) == 6
    assert third.pages == [*kept, continued]


def test_eviction_takes_uncached_pages_first_then_the_least_recent_from_its_end():
    pool = PagePool(num_pages=9, page_size=2)
    old, new = [1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2]
    filled(pool, old).release()
    filled(pool, new).release()
    assert (pool.num_cached, pool.num_free) == (6, 8)
    pool.allocate(2)
    assert (pool.num_cached, pool.num_evictions) == (6, 0)
    assert (reusable(pool, old), reusable(pool, new), reusable(pool, old)) == (6, 6, 6)  # old is now the more recent
    pool.allocate(1)
    assert (pool.num_evictions, reusable(pool, new), reusable(pool, old)) == (1, 4, 6)
    pool.allocate(2)
    assert (pool.num_evictions, reusable(pool, new), reusable(pool, old)) == (3, 0, 6)
    pool.allocate(1)
    assert (pool.num_evictions, reusable(pool, old), pool.num_free) == (4, 4, 2)
    pool.check()


def test_first_released_is_first_evicted():
    pool = PagePool(num_pages=4, page_size=1)
    table = filled(pool, [5, 6, 7])
    a, b, c = table.pages
    pool.release([b, c, a])
    assert pool.allocate(3) == [b, c, a]


def test_children_of_an_evicted_page_are_out_of_reach():
    pool = PagePool(num_pages=4, page_size=1)
    table = filled(pool, [5, 6, 7])
    pool.release(table.pages)  # against the usual order: the first page is the least recent
    page = pool.allocate(1)
    assert (reusable(pool, [5, 6, 7]), pool.num_cached) == (0, 2)
    pool.release(page)
    filled(pool, [5]).release()
    assert reusable(pool, [5, 6, 7]) == 1, "a new registration of [5] must not bring back what followed the old one"
    pool.check()


def test_without_prefix_cache_nothing_is_kept():
    pool = PagePool(num_pages=8, page_size=2, prefix_cache=False)
    filled(pool, [1, 2, 3, 4]).release()
    assert (pool.num_cached, reusable(pool, [1, 2, 3, 4]), pool.num_hits) == (0, 0, 0)


def test_commit_needs_room():
    table = BlockTable(PagePool(num_pages=8, page_size=2))
    table.grow(2)
    with pytest.raises(InvalidArgumentError) as error:
        table.commit([1, 2, 3])
    assert str(error.value) == "3 tokens committed, the table has 2 slots; call grow before writing"
    table.grow(3)
    table.commit([1, 2, 3])


class CountedTokens(list):
    """Token ids that count how many of them were read."""

    num_read = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        self.num_read += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self):
        raise AssertionError("commit must not walk over all tokens")


def test_commit_reads_each_token_once():
    pool = PagePool(num_pages=100, page_size=4)
    table, tokens = BlockTable(pool), CountedTokens()
    for token in range(200):
        tokens.append(token)
        table.grow(len(tokens))
        table.commit(tokens)
        assert tokens.num_read == len(tokens) // 4 * 4
    table.release()
    assert pool.num_cached == 50


def test_truncate_at_a_page_end_continues_with_other_tokens():
    pool = PagePool(num_pages=16, page_size=2)
    table = filled(pool, [1, 2, 3, 4, 5])
    table.truncate(2)
    assert (len(table.pages), pool.num_used, pool.num_cached) == (1, 1, 1)
    table.grow(4)
    table.commit([1, 2, 8, 9])
    table.release()
    assert reusable(pool, [1, 2, 3, 4]) == reusable(pool, [1, 2, 8, 9]) == 4


def test_truncate_inside_a_page_nobody_can_reach():
    pool = PagePool(num_pages=16, page_size=4)
    table = filled(pool, [1, 2, 3, 4, 5, 6, 7])
    table.grow(20)
    table.truncate(5)
    assert len(table.pages) == 2
    table.commit([1, 2, 3, 4, 5, 8, 8, 8])
    table.truncate(100)
    assert len(table.pages) == 2
    table.release()
    assert reusable(pool, [1, 2, 3, 4, 5, 6, 7, 7]) == 4
    assert reusable(pool, [1, 2, 3, 4, 5, 8, 8, 8]) == 8


def test_truncate_of_a_duplicate_registers_its_new_content():
    pool = PagePool(num_pages=16, page_size=2)
    first, second = BlockTable(pool), BlockTable(pool)
    for table in (first, second):
        table.grow(4)
        table.commit([1, 2, 3, 4])
    second.truncate(3)
    second.commit([1, 2, 3, 7])
    first.release()
    second.release()
    assert reusable(pool, [1, 2, 3, 4]) == reusable(pool, [1, 2, 3, 7]) == 4


def test_truncate_inside_a_registered_or_shared_page():
    pool = PagePool(num_pages=16, page_size=4)
    table = filled(pool, list(range(10)))
    before = list(table.pages)
    with pytest.raises(InvalidArgumentError) as error:
        table.truncate(6)
    assert str(error.value) == (
        "truncate to 6 tokens cuts page 2, which is shared or registered as a prefix; "
        "truncate to 4 tokens and compute the rest again"
    )
    sharing = filled(pool, list(range(10)))
    pool.clear_prefixes()  # no longer registered, but still shared
    for either in (table, sharing):
        with pytest.raises(InvalidArgumentError, match="shared or registered"):
            either.truncate(7)
    assert table.pages == before
    sharing.release()
    table.truncate(7)
    assert table.pages == before[:2]
    with pytest.raises(InvalidArgumentError, match="at least 0, got -1"):
        table.truncate(-1)


def test_clear_prefixes_forgets_cached_and_running_pages():
    pool = PagePool(num_pages=16, page_size=2)
    filled(pool, [1, 2, 3, 4]).release()
    running = filled(pool, [5, 6, 7])
    pool.clear_prefixes()
    assert (pool.num_cached, pool.num_free, pool.num_evictions) == (0, 13, 0)
    assert reusable(pool, [1, 2, 3, 4]) == reusable(pool, [5, 6]) == 0
    running.grow(8)
    running.commit([5, 6, 7, 8, 9, 9])
    running.release()
    assert pool.num_cached == 0, "computed in part with the old weights"
    running.grow(2)
    running.commit([5, 6])
    assert reusable(pool, [5, 6]) == 2
    pool.check()


def test_clear_prefixes_while_the_first_page_is_not_full():
    pool = PagePool(num_pages=16, page_size=4)
    table = filled(pool, [1, 2])
    pool.clear_prefixes()
    table.commit([1, 2, 3, 4])
    assert reusable(pool, [1, 2, 3, 4]) == 0


def test_pool_grows_only_up():
    pool = PagePool(num_pages=4, page_size=2)
    table = filled(pool, [1, 2, 3, 4, 5])
    with pytest.raises(InvalidArgumentError) as error:
        pool.grow(3)
    assert str(error.value) == "num_pages=3 asked, the pool has 4 and only grows"
    pool.grow(4)
    pool.grow(7)
    assert (pool.num_pages, pool.num_free, pool.capacity_tokens) == (7, 3, 12)
    table.grow(12)
    assert sorted(table.pages) == [1, 2, 3, 4, 5, 6]
    table.release()
    assert reusable(pool, [1, 2, 3, 4]) == 4
    pool.check()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda pool: pool._free.pop(), "free 3 + cached 2 + used 1 != usable 7 pages"),
        (lambda pool: pool._free.append(1), "free 5 + cached 2 + used 1 != usable 7 pages"),
        (lambda pool: pool._free.__setitem__(0, pool._free[1]), "references disagree"),
        (lambda pool: pool._free.__setitem__(0, NULL_PAGE), "references disagree"),
        (lambda pool: pool._free.__setitem__(0, 3), "references disagree"),
        (lambda pool: pool._refs.__setitem__(3, -1), "references disagree"),
        (lambda pool: pool._free.append(pool._cached.popitem()[0]), "registered contents disagree"),
        (lambda pool: pool._contents.popitem(), "registered contents disagree"),
    ],
)
def test_check_finds_spoiled_books(spoil, text):
    pool = PagePool(num_pages=8, page_size=2)
    filled(pool, [1, 2, 3, 4]).release()
    table = BlockTable(pool)
    table.grow(2)
    assert (table.pages, pool.num_cached, pool.num_free) == ([3], 2, 6)
    pool.check()
    spoil(pool)
    with pytest.raises(GraphattnError) as error:
        pool.check()
    assert text in str(error.value)
