"""Who runs in the next step: continuous batching, chunked prefill, preemption by recomputation."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..errors import OutOfPagesError
from ..pages import PagePool
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

    A request is admitted with pages for all its tokens, or waits. A row with one token to compute decodes, others
    prefill. A preempted request loses its pages and is recomputed from its tokens, so its text stays what it was.

    Args:
        pool: the pages.
        max_batch: requests that run at once.
        max_prefill_tokens: prompt tokens computed in one step.

    Attributes:
        waiting, running: requests, oldest first.
        num_preemptions: how often a request lost its pages.
    """

    def __init__(self, pool: PagePool, *, max_batch: int, max_prefill_tokens: int):
        self.pool, self.max_batch, self.max_prefill_tokens = pool, max_batch, max_prefill_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is, and its pages back."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        request.table.release()

    def schedule(self) -> Schedule:
        """The next step's work; admits and preempts as pages allow."""
        decode: list[Request] = []
        for request in list(self.running):
            if request.num_pending == 1 and request in self.running and self._make_room(request):
                decode.append(request)
        decode = [request for request in decode if request in self.running]
        budget, prefill = self.max_prefill_tokens, []
        for request in self.running:
            if request.num_pending > 1 and budget > 0:
                prefill.append(Chunk(request, min(request.num_pending, budget)))
                budget -= prefill[-1].num_tokens
        while budget > 0 and self.waiting and len(self.running) < self.max_batch:
            request = self._admit()
            if request is None:
                break
            if request.num_pending == 1:
                decode.append(request)
            else:
                prefill.append(Chunk(request, min(request.num_pending, budget)))
                budget -= prefill[-1].num_tokens
        return Schedule(prefill, decode)

    def preempt(self, request: Request) -> None:
        """Sends a running request back to wait; it will be recomputed."""
        self.running.remove(request)
        request.table.release()
        request.num_computed = 0
        request.preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def _make_room(self, request: Request) -> bool:
        """Gives a decoding request the page its next token needs, preempting from the youngest on; False if itself."""
        while True:
            try:
                request.table.grow(len(request.tokens))
                return True
            except OutOfPagesError:
                youngest = self.running[-1]
                self.preempt(youngest)
                if youngest is request:
                    return False

    def _admit(self) -> Request | None:
        """Moves the oldest waiting request to the running ones if it gets all its pages."""
        request = self.waiting[0]
        cached = request.table.reuse_prefix(request.tokens)
        missing = self.pool.pages_for(len(request.tokens)) - len(request.table.pages)
        # One page to spare for each running row, or it would be preempted again at once.
        if missing + len(self.running) > self.pool.num_free:
            request.table.release()
            return None
        request.table.grow(len(request.tokens))
        request.num_computed = cached
        if request.cached_tokens is None:
            request.cached_tokens = cached
        self.running.append(self.waiting.popleft())
        return request
