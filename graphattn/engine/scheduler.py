"""Who runs in the next step: continuous batching, chunked prefill, preemption by recomputation."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OutOfPagesError
from ..pages import PagePool
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

    A request is admitted with pages for all its tokens, or waits. A row with one token to compute decodes, others
    prefill. A preempted request loses its pages and is recomputed from its tokens, so its text stays what it was.

    Args:
        pool: the pages.
        max_batch: requests that run at once.
        max_prefill_tokens: prompt tokens computed in one step.
        length_rule: what rotary frequencies that depend on a request's length mean for it; None if they do not.

    Attributes:
        waiting: requests without pages, the next to be admitted first.
        running: requests with pages, in the order they were admitted.
        num_preemptions: how often a request lost its pages.
    """

    def __init__(
        self, pool: PagePool, *, max_batch: int, max_prefill_tokens: int, length_rule: LengthRule | None = None
    ):
        self._length_rule = length_rule
        self.pool, self.max_batch, self.max_prefill_tokens = pool, max_batch, max_prefill_tokens
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
        request.table.release()

    def schedule(self) -> Schedule:
        """The next step's work; admits and preempts as pages allow.

        Raises:
            OutOfPagesError: nothing runs and still the first request gets no pages, since something else holds them.
        """
        decode = self._decoding()
        budget, prefill = self.max_prefill_tokens, []
        for request in self.running:
            if request.num_pending > 1 and not request.is_spent and budget > 0:
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
        if self.waiting and not self.running and not self.waiting[0].num_unread:
            needed = self.pool.pages_for(len(self.waiting[0].tokens))
            raise OutOfPagesError(
                f"request {self.waiting[0].id} needs {needed} pages, no other request runs and {self.pool.num_free} of "
                f"{self.pool.num_usable} are free: release the pages taken from this pool outside the engine"
            )
        return Schedule(prefill, decode)

    def preempt(self, requests: Sequence[Request]) -> None:
        """Sends those of the requests that run back to wait, in their order; they will be recomputed."""
        chosen = set(requests)
        preempted = [request for request in self.running if request in chosen]
        self.running = [request for request in self.running if request not in chosen]
        self.waiting.extendleft(reversed(preempted))
        for request in reversed(preempted):
            request.table.release()
            request.num_computed = 0
            request.preemptions += 1
        self.num_preemptions += len(preempted)

    def _decoding(self) -> list[Request]:
        """Running requests with one token to compute, each given the page that it needs."""
        decode, at = [], 0
        while at < len(self.running):  # what is preempted meanwhile stands at `at` or behind it
            request = self.running[at]
            if self._outgrows(request):
                self.preempt([request])
                continue
            if request.num_pending == 1 and not request.is_spent and self._make_room(request):
                decode.append(request)
            at += 1
        return decode

    def _outgrows(self, request: Request) -> bool:
        """Whether what is computed of a request is not what its next token must see."""
        rule = self._length_rule
        return rule is not None and not request.is_spent and rule.outgrows(request.computed_as, len(request.tokens))

    def _make_room(self, request: Request) -> bool:
        """Gives a request the page its next token needs, preempting the youngest first; False if it was itself."""
        while True:
            try:
                request.table.grow(len(request.tokens))
                return True
            except OutOfPagesError:
                youngest = self.running[-1]
                self.preempt([youngest])
                if youngest is request:
                    return False

    def _admit(self) -> Request | None:
        """Moves the first waiting request to the running ones if all its tokens are known and it gets their pages."""
        # One page to spare for each running row, or it would be preempted again at once.
        request, spare = self.waiting[0], len(self.running)
        if request.num_unread or self.pool.num_free <= spare:
            return None
        rule, num_tokens = self._length_rule, len(request.tokens)
        key = 0 if rule is None else rule.prefix_key(len(request.prompt), num_tokens)
        cached = request.table.reuse_prefix(request.tokens, key)
        missing = self.pool.pages_for(len(request.tokens)) - len(request.table.pages)
        if missing + spare > self.pool.num_free:
            request.table.release()
            self.pool.num_hits -= cached  # it was not used, and is asked for again at the next step
            return None
        request.table.grow(len(request.tokens))
        request.num_computed, request.computed_as = cached, num_tokens
        if request.cached_tokens is None:
            request.cached_tokens = cached
        self.running.append(self.waiting.popleft())
        return request
