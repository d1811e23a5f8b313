"""The scheduler against a model of the cache: who wrote what into which slot, and what each row reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from graphattn.engine.request import Request
from graphattn.engine.scheduler import Schedule, Scheduler
from graphattn.errors import OutOfPagesError
from graphattn.groups import GroupPools, row_pages
from graphattn.pages import NULL_PAGE, PagePool
from graphattn.sampling import SamplingParams


def pools_of(pages: Sequence[int], page_size: int, windows=(None,), *, prefix_cache: bool = True) -> GroupPools:
    """A pool of so many usable pages for each window, or for layers without one."""
    return GroupPools([PagePool(count + 1, page_size, prefix_cache=prefix_cache) for count in pages], windows)


def request(pools: GroupPools, prompt, *, max_tokens: int = 8, id: int = 0) -> Request:
    return Request(
        id=id,
        index=0,
        prompt=tuple(prompt),
        params=SamplingParams(),
        seed=0,
        max_tokens=max_tokens,
        stop_ids=frozenset(),
        pages=pools.row(),
        text=None,
        streams=False,
        outbox=deque(),
    )


class Cache:
    """What lies in each slot of a layer group's cache: the tokens up to and with the one it was computed from, and the
    weights."""

    def __init__(self, group: int, page_size: int, window: int | None):
        self.group, self.page_size, self.window, self.slots, self.weights = group, page_size, window, {}, 0

    def compute(self, one: Request, count: int) -> None:
        """Writes the next tokens of a request and reads everything before them that they see, as attention does."""
        end = one.num_computed + count
        pages = one.pages.pages[self.group]
        assert len(pages) * self.page_size >= end, "a row was scheduled without its pages"
        for at in range(one.num_computed, end):
            self.slots[self._slot(pages, at)] = (tuple(one.tokens[: at + 1]), self.weights)
        for at in range(0 if self.window is None else max(0, one.num_computed - self.window + 1), end):
            assert self.slots[self._slot(pages, at)] == (tuple(one.tokens[: at + 1]), self.weights)

    def check(self, one: Request) -> None:
        """A row holds no more than its window and the pages that this begins and ends in."""
        held = [page for page in one.pages.pages[self.group] if page != NULL_PAGE]
        assert self.window is None or len(held) <= row_pages(self.window, self.page_size, 0)

    def _slot(self, pages: list[int], at: int) -> tuple[int, int]:
        assert pages[at // self.page_size] != NULL_PAGE, "a page that a token sees was given back"
        return pages[at // self.page_size], at % self.page_size


def caches_of(pools: GroupPools) -> list[Cache]:
    return [Cache(group, pools.page_size, window) for group, window in enumerate(pools.windows)]


def compute(caches: list[Cache], one: Request, count: int) -> None:
    for cache in caches:
        cache.compute(one, count)
    one.computed(count)
    for cache in caches:
        cache.check(one)


def next_token(one: Request) -> int:
    return (31 * len(one.tokens) + 7 * one.tokens[-1] + one.tokens[0]) % 3


def lone_run(one: Request) -> list[int]:
    alone = request(pools_of([1], 16), one.prompt)
    while len(alone.tokens) < len(one.prompt) + one.max_tokens:
        alone.tokens.append(next_token(alone))
    return alone.tokens


def run(schedule: Schedule, scheduler: Scheduler, caches: list[Cache]) -> None:
    """Computes a step, draws tokens and takes out who ended with the right ones."""
    work = [(chunk.request, chunk.num_tokens) for chunk in schedule.prefill] + [(one, 1) for one in schedule.decode]
    for one, count in work:
        compute(caches, one, count)
        if one.num_pending == 0:
            one.tokens.append(next_token(one))
            if one.num_generated == one.max_tokens:
                assert one.tokens == lone_run(one)
                scheduler.remove(one)


class Serving(RuleBasedStateMachine):
    """Adds, steps, aborts, failing forwards and new weights in any order."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        pages=st.integers(6, 14),
        windows=st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=3),
        fewer=st.integers(0, 9),
        max_batch=st.integers(1, 5),
        budget=st.sampled_from([1, 3, 5, 100]),
        prefix_cache=st.booleans(),
    )
    def start(self, page_size, pages: int, windows, fewer: int, max_batch: int, budget: int, prefix_cache) -> None:
        counts = [pages if window is None else max(2, pages - fewer) for window in windows]
        self.pools = pools_of(counts, page_size, windows, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(self.pools, max_batch=max_batch, max_prefill_tokens=budget)
        self.caches, self.added = caches_of(self.pools), 0
        limit, _ = self.pools.tightest(budget)
        self.limit = 60 if limit is None else limit  # with windows alone, more than the pages hold

    def everyone(self) -> list[Request]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        max_tokens=st.integers(1, 20),
        copies=st.integers(1, 3),
    )
    def add(self, prompt: list[int], max_tokens: int, copies: int) -> None:
        prompt = prompt[: max(1, self.limit - 1)]
        for _ in range(copies):
            room = self.limit - len(prompt)
            self.scheduler.add(request(self.pools, prompt, max_tokens=min(max_tokens, room), id=self.added))
            self.added += 1

    def schedule(self) -> Schedule:
        """The next step, checked for what must hold of every one."""
        scheduler = self.scheduler
        before, hits = {one: one.preemptions for one in scheduler.running}, self.hits()
        schedule = scheduler.schedule()
        rows = [*(chunk.request for chunk in schedule.prefill), *schedule.decode]
        assert len(set(rows)) == len(rows) <= scheduler.max_batch
        assert set(rows) <= set(scheduler.running)
        assert rows or not self.everyone(), "there is work and none was scheduled"
        assert sum(chunk.num_tokens for chunk in schedule.prefill) <= scheduler.max_prefill_tokens
        assert all(0 < chunk.num_tokens <= chunk.request.num_pending for chunk in schedule.prefill)
        assert all(one.num_pending == 1 for one in schedule.decode)
        assert not before or next(iter(before)) is scheduler.running[0], "the oldest lost its pages"
        fresh = [one for one in scheduler.running if before.get(one) != one.preemptions]
        found = sum(one.num_computed for one in fresh)
        assert self.hits() == [before + found for before in hits]
        return schedule

    def hits(self) -> list[int]:
        return [pool.num_hits for pool in self.pools.pools]

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            run(self.schedule(), self.scheduler, self.caches)

    @rule(pick=st.integers(0, 99))
    def abort(self, pick: int) -> None:
        if self.everyone():
            self.scheduler.remove(self.everyone()[pick % len(self.everyone())])

    @rule(written=st.booleans())
    def fail(self, written: bool) -> None:
        """A forward raises, before or after it wrote keys and values; nothing may be reused of what is not there."""
        schedule = self.schedule()
        if written and schedule.prefill:
            compute(self.caches, schedule.prefill[0].request, schedule.prefill[0].num_tokens)
        waiting = list(self.scheduler.waiting)
        failed = [chunk.request for chunk in schedule.prefill] or schedule.decode
        self.scheduler.preempt(failed)
        assert list(self.scheduler.waiting) == failed + waiting

    @rule()
    def new_weights(self) -> None:
        for cache in self.caches:
            cache.weights += 1
        self.scheduler.preempt(self.scheduler.running)
        self.pools.clear_prefixes()

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "pools"):
            return
        for group, pool in enumerate(self.pools.pools):
            pool.check()
            held = {page for one in self.scheduler.running for page in one.pages.pages[group]} - {NULL_PAGE}
            assert pool.num_used == len(held)
        assert not any(any(one.pages.pages) or one.num_computed for one in self.scheduler.waiting)

    def teardown(self) -> None:
        """Everything left ends, in a number of steps that says nobody starves, and every page is back."""
        if not hasattr(self, "pools"):
            return
        tokens = sum(len(one.prompt) + one.max_tokens for one in self.everyone())
        for _ in range(tokens * (1 + len(self.everyone()))):
            if not self.everyone():
                break
            self.step(times=1)
        assert not self.everyone(), "requests are left over"
        assert not any(pool.num_used for pool in self.pools.pools)


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=300, stateful_step_count=20)


class Server:
    """A scheduler with its cache."""

    def __init__(
        self, pages, page_size: int, windows=(None,), *, max_batch=8, budget: int = 1000, prefix_cache: bool = True
    ):
        pages = pages if isinstance(pages, list) else [pages] * len(windows)
        self.pools = pools_of(pages, page_size, windows, prefix_cache=prefix_cache)
        self.pool = self.pools.pools[0]
        self.scheduler = Scheduler(self.pools, max_batch=max_batch, max_prefill_tokens=budget)
        self.caches = caches_of(self.pools)

    def add(self, prompt, max_tokens: int = 4) -> Request:
        one = request(self.pools, prompt, max_tokens=max_tokens)
        self.scheduler.add(one)
        return one

    def run(self, num_steps: int | None = None) -> list[Schedule]:
        """So many steps, or all until everybody ended."""
        steps = []
        while self.scheduler.running or self.scheduler.waiting if num_steps is None else len(steps) < num_steps:
            steps.append(self.scheduler.schedule())
            run(steps[-1], self.scheduler, self.caches)
        for pool in self.pools.pools:
            pool.check()
        return steps


def test_a_prompt_of_one_token_decodes_at_once() -> None:
    server = Server(4, 4)
    one = server.add([1])
    schedule = server.scheduler.schedule()
    assert not schedule.prefill and schedule.decode == [one]
    assert len(one.pages.pages[0]) == 1


def test_the_last_token_behind_full_chunks_decodes_into_the_page_it_has() -> None:
    """6 tokens in chunks of 5 leave one: it decodes, and its page is the partly filled one."""
    server = Server(4, 4, budget=5)
    one = server.add([1] * 6, max_tokens=1)
    first, second = server.run()
    assert [(chunk.request, chunk.num_tokens) for chunk in first.prefill] == [(one, 5)] and not first.decode
    assert not second.prefill and second.decode == [one]
    assert server.scheduler.num_preemptions == 0


def test_a_prompt_that_is_cached_whole_computes_its_last_token_only() -> None:
    server = Server(8, 4)
    server.add([1] * 9, max_tokens=1)
    server.run()
    again = server.add([1] * 9, max_tokens=1)
    (only,) = server.run()
    assert only.decode == [again] and not only.prefill
    assert again.cached_tokens == 8
    ends_with_a_page = server.add([1] * 8, max_tokens=1)
    (only,) = server.run()
    assert only.prefill[0].num_tokens == 4  # pages are shared whole, and one token must remain
    assert ends_with_a_page.cached_tokens == 4


def test_prefill_budget_is_shared_in_order() -> None:
    server = Server(16, 4, budget=6)
    first, second, third = (server.add([token] * 4) for token in range(3))
    steps = server.run(2)
    assert [(chunk.request, chunk.num_tokens) for chunk in steps[0].prefill] == [(first, 4), (second, 2)]
    assert [(chunk.request, chunk.num_tokens) for chunk in steps[1].prefill] == [(second, 2), (third, 4)]
    assert steps[1].decode == [first]


def test_the_youngest_gives_way_even_in_the_middle_of_its_prefill() -> None:
    server = Server(9, 2, budget=2, prefix_cache=False)
    old = server.add([0, 1], max_tokens=6)
    server.run(1)
    young = server.add([1] * 11)
    server.run(4)
    assert server.scheduler.running == [old, young] and young.num_computed == 8
    steps = server.run()
    assert young.preemptions == server.scheduler.num_preemptions == 1 and old.preemptions == 0
    assert all(young not in [chunk.request for chunk in step.prefill] for step in steps if old in step.decode)
    assert old.tokens == lone_run(old) and young.tokens == lone_run(young)


def test_the_youngest_preempts_itself_and_nobody_older() -> None:
    server = Server(3, 2, prefix_cache=False)
    old, young = server.add([0, 1], max_tokens=3), server.add([1, 1], max_tokens=3)
    steps = server.run()
    assert [chunk.request for chunk in steps[0].prefill] == [old, young]
    assert steps[1].decode == [old]
    assert (old.preemptions, young.preemptions) == (0, 1)


def test_admission_leaves_a_page_for_each_running_row() -> None:
    """Without it a request would be admitted, preempted at the next page and recomputed, again and again."""
    server = Server(6, 1, prefix_cache=False)
    old, young = server.add([0, 1, 1], max_tokens=3), server.add([1, 0, 1], max_tokens=2)
    assert [chunk.request for chunk in server.scheduler.schedule().prefill] == [old]
    assert list(server.scheduler.waiting) == [young] and not young.pages.pages[0]
    server.run()
    assert server.scheduler.num_preemptions == 0


def test_a_request_as_large_as_the_pool_runs_when_nothing_else_does() -> None:
    server = Server(5, 2)
    small, large = server.add([1], max_tokens=3), server.add([0] * 9, max_tokens=1)
    behind = server.add([1], max_tokens=1)
    steps = server.run()
    assert small.num_generated == 3 and large.num_generated == 1
    order = [one for step in steps for one in [*(chunk.request for chunk in step.prefill), *step.decode]]
    assert order.index(large) < order.index(behind), "a later request overtook the first in the queue"


def test_waiting_reuses_nothing_and_counts_no_hits() -> None:
    server = Server(6, 1)
    server.add([1, 1, 1], max_tokens=1)
    server.run()
    server.add([0, 0, 0], max_tokens=1)
    server.scheduler.schedule()
    waiting = server.add([1, 1, 1, 1], max_tokens=1)
    for _ in range(3):
        server.scheduler.schedule()
    assert waiting in server.scheduler.waiting
    assert server.pool.num_hits == 0
    server.pool.check()


def test_pages_held_by_somebody_else_are_an_error_and_no_endless_loop() -> None:
    server = Server(4, 2)
    taken = server.pool.allocate(3)
    one = server.add([1, 1], max_tokens=3)
    with pytest.raises(OutOfPagesError, match="request 0 needs 2 pages, no other request runs and 1 of 4 are free"):
        server.run()
    server.pool.release(taken)
    server.run()
    assert one.tokens == lone_run(one)


def test_preempted_requests_keep_their_order_and_their_tokens() -> None:
    server = Server(32, 2)
    first, second, third = (server.add([token, 0, 1]) for token in (0, 1, 2))
    server.run(2)
    later = server.add([0])
    tokens = [one.tokens[:] for one in (first, second, third)]
    server.scheduler.preempt([third, first])
    assert server.scheduler.running == [second] and list(server.scheduler.waiting) == [first, third, later]
    assert [one.tokens for one in (first, second, third)] == tokens
    assert (first.preemptions, second.preemptions, server.scheduler.num_preemptions) == (1, 0, 2)
    server.run()
    assert all(one.tokens == lone_run(one) for one in (first, second, third, later))


def test_a_long_request_needs_no_more_pages_than_its_window() -> None:
    """100 tokens, in a group that has 6 pages of 2 for windows of 5 and chunks of 4."""
    server = Server([60, 6], 2, [None, 5], budget=4, prefix_cache=False)
    one = server.add([1, 0] * 30, max_tokens=40)
    used = []
    while server.scheduler.running or server.scheduler.waiting:
        server.run(1)
        used.append([pool.num_used for pool in server.pools.pools])
    assert one.preemptions == 0 and one.tokens == lone_run(one)
    assert max(whole for whole, _ in used) == 49 and max(windowed for _, windowed in used) <= row_pages(5, 2, 0)


def test_a_group_without_pages_keeps_a_request_waiting_with_nothing_taken() -> None:
    server = Server([30, 6], 2, [None, 5], budget=12)
    taken = server.pools.pools[1].allocate(5)
    one = server.add([1] * 12)
    with pytest.raises(OutOfPagesError, match=r"request 0 needs 6 pages, no other request runs and 1 of 6 are free"):
        server.scheduler.schedule()
    assert [pool.num_used for pool in server.pools.pools] == [0, 5] and not any(one.pages.pages)
    server.pools.pools[1].release(taken)
    server.run()
    assert one.tokens == lone_run(one)


@pytest.mark.parametrize(("others", "found"), [(0, 12), (15, 12), (17, 0), (19, 0)])
def test_a_prefix_is_found_while_every_group_has_what_its_next_token_sees(others: int, found: int) -> None:
    """In 10 pages of 2, the prompt's 6 whole ones stay until others need them, the first of them first; a window of 4
    takes the last 2."""
    server = Server([40, 10], 2, [None, 4])
    prompt = [1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1]
    server.add(prompt, max_tokens=1)
    server.run()
    if others:
        server.add([0] * others, max_tokens=1)
        server.run()
    again = server.add(prompt, max_tokens=1)
    server.run()
    assert again.cached_tokens == found and [pool.num_hits for pool in server.pools.pools] == [found, found]
    assert not any(pool.num_used for pool in server.pools.pools)


def test_windows_of_several_sizes_agree_on_a_prefix() -> None:
    """The group with the wider window lacks a page that it needs behind 12 tokens, and the other one behind 8."""
    server = Server([40, 40, 40], 2, [None, 4, 7])
    prompt = [1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1]
    row = server.pools.row()
    row.grow(13)
    pages = row.pages[1][:], row.pages[2][:]
    row.commit(prompt)
    row.release()
    for pool, page in ((server.pools.pools[1], pages[0][2]), (server.pools.pools[2], pages[1][4])):
        pool._forget(page)
        del pool._cached[page]
        pool._free.append(page)
    row = server.pools.row()
    # Behind 12 tokens the last group sees tokens 6 to 12, page 4 among them; behind 8 the second one sees token 5.
    assert row.reuse_prefix(prompt) == 4
    for pool in server.pools.pools:
        pool.check()
