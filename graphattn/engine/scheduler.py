"""Who runs in the next step: continuous batching, chunked prefill, preemption by recomputation."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OutOfPagesError
from ..groups import GroupPools
from ..rope import LengthRule
from .request import Request


@dataclass(frozen=True)
class Chunk:
    """The next `num_tokens` tokens of a request's prefill."""

    request: Request
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether the request's next token can be drawn after it."""
        return self.num_tokens == self.request.num_pending


@dataclass(frozen=True)
class Schedule:
    """One step's work; every row of it has its pages."""

    prefill: list[Chunk]
    decode: list[Request]


class Scheduler:
    """First come, first served; the youngest gives way when pages run out.

    A request is admitted with pages for all its tokens, or waits; in layer groups with windows only with those for what
    is computed next, and those behind the window go back. A row with one token to compute decodes, others prefill. A
    preempted request loses its pages and is recomputed from its tokens, so its text stays what it was.

    Args:
        pools: the pages of every layer group.
        max_batch: requests that run at once.
        max_prefill_tokens: prompt tokens computed in one step.
        length_rule: what rotary frequencies that depend on a request's length mean for it; None if they do not.

    Attributes:
        waiting: requests without pages, the next to be admitted first.
        running: requests with pages, in the order they were admitted.
        num_preemptions: how often a request lost its pages.
    """

    def __init__(
        self, pools: GroupPools, *, max_batch: int, max_prefill_tokens: int, length_rule: LengthRule | None = None
    ):
        self._length_rule = length_rule
        self.pools, self.max_batch, self.max_prefill_tokens = pools, max_batch, max_prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is, and its pages back."""
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        request.pages.release()

    def schedule(self) -> Schedule:
        """The next step's work; admits and preempts as pages allow.

        Raises:
            OutOfPagesError: nothing runs and still the first request gets no pages, since something else holds them.
        """
        budget, prefill, decode, at = self.max_prefill_tokens, [], [], 0
        while at < len(self.running):  # what is preempted meanwhile stands at `at` or behind it
            request = self.running[at]
            if self._outgrows(request):
                self.preempt([request])
                continue
            decodes = request.num_pending == 1
            count = 0 if request.is_spent else 1 if decodes else min(request.num_pending, budget)
            if count and self._make_room(request, count):
                if decodes:
                    decode.append(request)
                else:
                    prefill.append(Chunk(request, count))
                    budget -= count
            at += 1
        while budget > 0 and self.waiting and len(self.running) < self.max_batch:
            request = self._admit(budget)
            if request is None:
                break
            if request.num_pending == 1:
                decode.append(request)
            else:
                prefill.append(Chunk(request, min(request.num_pending, budget)))
                budget -= prefill[-1].num_tokens
        if self.waiting and not self.running and not self.waiting[0].num_unread:
            raise OutOfPagesError(self._starved(self.waiting[0]))
        return Schedule(prefill, decode)

    def preempt(self, requests: Sequence[Request]) -> None:
        """Sends those of the requests that run back to wait, in their order; they will be recomputed."""
        chosen = set(requests)
        preempted = [request for request in self.running if request in chosen]
        self.running = [request for request in self.running if request not in chosen]
        self.waiting.extendleft(reversed(preempted))
        for request in reversed(preempted):
            request.pages.release()
            request.num_computed = 0
            request.preemptions += 1
        self.num_preemptions += len(preempted)

    def _outgrows(self, request: Request) -> bool:
        """Whether what is computed of a request is not what its next token must see."""
        rule = self._length_rule
        return rule is not None and not request.is_spent and rule.outgrows(request.computed_as, len(request.tokens))

    def _make_room(self, request: Request, count: int) -> bool:
        """Gives a request the pages its next tokens need, preempting the youngest first; False if it was itself."""
        while True:
            try:
                request.pages.grow(request.num_computed + count)
                return True
            except OutOfPagesError:
                youngest = self.running[-1]
                self.preempt([youngest])
                if youngest is request:
                    return False

    def _admit(self, budget: int) -> Request | None:
        """Moves the first waiting request to the running ones if all its tokens are known and it gets their pages; in
        groups with windows those of what `budget` has it compute first."""
        # One page to spare for each running row, or it would be preempted again at once.
        request, spare, pools = self.waiting[0], len(self.running), self.pools.pools
        request.pages.release()  # where an interrupt (a second Ctrl-C) has left it any
        if request.num_unread or any(pool.num_free <= spare for pool in pools):
            return None
        rule, num_tokens = self._length_rule, len(request.tokens)
        key = 0 if rule is None else rule.prefix_key(len(request.prompt), num_tokens)
        cached = request.pages.reuse_prefix(request.tokens, key)
        end = min(num_tokens, cached + budget)
        missing = request.pages.missing(end, num_tokens)
        if any(count + spare > pool.num_free for count, pool in zip(missing, pools, strict=True)):
            request.pages.refuse_prefix()  # it is asked for again at the next step
            return None
        request.pages.grow(end, num_tokens)
        request.num_computed, request.computed_as = cached, num_tokens
        if request.cached_tokens is None:
            request.cached_tokens = cached
        self.running.append(self.waiting.popleft())
        return request

    def _starved(self, request: Request) -> str:
        """Why a request that is alone gets no pages."""
        num_tokens = len(request.tokens)
        needed = request.pages.missing(min(num_tokens, self.max_prefill_tokens), num_tokens)
        each = [
            f"{count} pages, no other request runs and {pool.num_free} of {pool.num_usable} are free"
            for count, pool in zip(needed, self.pools.pools, strict=True)
            if count > pool.num_free or len(needed) == 1
        ]
        what = f"request {request.id} needs {' and '.join(each)}"
        return f"{what}: release the pages taken from this pool outside the engine"
