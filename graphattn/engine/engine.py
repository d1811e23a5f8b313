"""The engine: every unfinished request, and what each step adds to it."""

from __future__ import annotations

import itertools
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, KeysView, Sequence
from contextlib import contextmanager
from operator import index

from ..draw import NOT_DRAWN, derive_seed
from ..errors import InvalidRequestError
from ..sampling import SamplingParams, stop_ids
from .executor import Executor
from .flight import Flight
from .request import Delta, FinishReason, Request
from .scheduler import Scheduler
from .text import TextStream
from .turn import Turn


class Engine:
    """Runs what the scheduler says and puts the deltas into each request's outbox.

    Threads may share it: calls that change anything wait for one another (`alone`).

    Args:
        executor: computes.
        scheduler: says what.
        max_seq_len: tokens of a request, prompt and generated.
        end_ids: ids that end a text.
        decode: ids to text; None without a tokenizer.
        overlap: read what a step drew only once the next one is launched, so that the device need not wait for the
            host. A request that ends by what it draws, and not by its length, runs one step more; nobody sees it.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        *,
        max_seq_len: int,
        end_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str] | None,
        overlap: bool,
    ):
        self._executor, self._scheduler, self._max_seq_len = executor, scheduler, max_seq_len
        self._end_ids, self._decode = tuple(end_ids), decode
        self._ids = itertools.count()
        self._requests: dict[int, list[Request]] = {}
        self._flights: deque[Flight] = deque()
        self._overlap, self._closed = overlap, False
        self._turn = Turn()
        self._to_abort: deque[int] = deque()

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Lets nobody else in, and holds interrupts back, until its body has ended; what was aborted meanwhile then
        ends.

        Raises:
            InvalidRequestError: this thread is in the body of another; names `what` was called.
        """
        with self._turn.taken(what):
            try:
                yield
            finally:
                while self._to_abort:
                    self._end_all(self._to_abort.popleft())

    def add(self, prompt: tuple[int, ...], params: SamplingParams, outbox: deque[Delta], *, streams: bool) -> int:
        """Queues the samples of a prompt that was checked; returns the id they share.

        Raises:
            InvalidRequestError: the engine is closed, or this is called from within a step.
        """
        with self.alone("add_request"):
            return self._add(prompt, params, outbox, streams=streams)

    def _add(self, prompt: tuple[int, ...], params: SamplingParams, outbox: deque[Delta], *, streams: bool) -> int:
        if self._closed:
            raise InvalidRequestError("the engine is closed: make a new LLM")
        request_id, seed = next(self._ids), secrets.randbits(63) if params.seed is None else params.seed
        room = self._max_seq_len - len(prompt)
        samples = [
            Request(
                id=request_id,
                index=index,
                prompt=prompt,
                params=params,
                seed=derive_seed(seed, index),
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                stop_ids=stop_ids(params, self._end_ids),
                pages=self._scheduler.pools.row(),
                text=None if self._decode is None else TextStream(self._decode, params.stop),
                streams=streams,
                outbox=outbox,
            )
            for index in range(params.n)
        ]
        self._requests[request_id] = list(samples)
        for request in samples:
            self._scheduler.add(request)
        return request_id

    @property
    def unfinished(self) -> KeysView[int]:
        """Ids of the requests in the engine."""
        return self._requests.keys()

    def drive(
        self,
        requests: Sequence[tuple[tuple[int, ...], SamplingParams]],
        *,
        streams: bool,
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[Delta]:
        """Queues checked requests and steps until they have ended; closing it aborts what is left.

        Args:
            requests: prompts and what is asked of each.
            streams: whether text is wanted as it comes.
            progress: called as `progress(ended, total)` when a sample ends.

        Raises:
            InvalidRequestError: `progress` cannot be called, the engine is closed, or a step that was cut short has
                lost requests.
        """
        if progress is not None and not callable(progress):
            raise InvalidRequestError(f"progress is a {type(progress).__name__}: give a function, or None")
        outbox: deque[Delta] = deque()
        mine: list[int] = []
        total = left = sum(params.n for _, params in requests)
        try:
            with self.alone("generate"):
                for ids, params in requests:
                    mine.append(self._add(ids, params, outbox, streams=streams))
            while left:
                if not outbox:
                    self.step()
                    are_gone = self._requests.keys().isdisjoint(mine)  # asked first: another thread's step may end them
                    if are_gone and not outbox:
                        raise InvalidRequestError(
                            f"{left} samples are gone, since a step was cut short (a second Ctrl-C?): make a new LLM"
                        )
                while outbox:
                    delta = outbox.popleft()
                    if delta.output is not None:
                        left -= 1
                        if progress is not None:
                            progress(total - left, total)
                    yield delta
        finally:
            self._abort(mine)

    def step(self) -> None:
        """One step: a chunk of prefill for requests that need it, one token for every one that decodes.

        If a forward pass raises, its requests go back to wait with nothing lost, and the error is raised. An interrupt
        (Ctrl-C) is raised once the step has ended, a second one at once.
        """
        with self.alone("step"):
            self._step()

    def _step(self) -> None:
        if not self._requests:
            return
        self._executor.check_model()
        earlier = len(self._flights)
        schedule = self._scheduler.schedule()
        if schedule.decode:
            self._launch(schedule.decode, lambda: self._executor.decode(schedule.decode))
        if schedule.prefill:
            chunks = schedule.prefill
            self._launch([chunk.request for chunk in chunks], lambda: self._executor.prefill(chunks))
        # Without anything to run beside it there is no reason to wait with reading.
        is_busy = any(not request.is_spent for request in self._scheduler.running)
        self.land(earlier if self._overlap and is_busy else None)

    def land(self, count: int | None = None) -> None:
        """Reads what the `count` oldest forward passes drew, or all."""
        while self._flights and count != 0:
            count = None if count is None else count - 1
            flight = self._flights[0]
            try:
                self._flights.popleft()
                for request, token_id, logprobs in flight.land():
                    if not request.is_ended:
                        self._accept(request, token_id, logprobs)
            except BaseException:
                self._recompute([request for each in (flight, *self._flights) for request in each.requests])
                self._flights.clear()
                raise

    def abort(self, request_id: int) -> None:
        """Ends every unfinished sample of a request; called from within a step, once that has ended.

        Raises:
            InvalidRequestError: no unfinished request has that id.
        """
        is_id = hasattr(request_id, "__index__") and not isinstance(request_id, bool)
        if not is_id or index(request_id) not in self._requests:
            raise InvalidRequestError(f"request {request_id!r} is not in the engine: it has ended, or never was")
        self._abort([index(request_id)])

    def _abort(self, request_ids: Iterable[int]) -> None:
        self._to_abort.extend(request_ids)
        if not self._turn.is_mine:  # a stream may be collected, and so closed, in the midst of a step
            with self.alone("abort"):
                pass

    def close(self) -> None:
        """Aborts what runs; nothing can be added any more. To be called within `alone`."""
        self._closed = True
        for request_id in list(self._requests):
            self._end_all(request_id)

    def _launch(self, requests: Sequence[Request], forward: Callable[[], Flight]) -> None:
        try:
            self._flights.append(forward())
        except BaseException:
            try:
                self.land()
            finally:
                self._recompute(requests)
            raise

    def _recompute(self, requests: Sequence[Request]) -> None:
        """Sends requests back to wait; what they drew and nobody read is drawn again, the same."""
        try:
            for request in requests:
                if not request.is_ended:
                    request.forget_unread()
        finally:
            self._scheduler.preempt(requests)

    def _accept(self, request: Request, token_id: int, logprobs: dict[int, float] | None) -> None:
        try:
            reason = request.accept(token_id, logprobs)
            delta = None if reason else request.progress(token_id)
        except Exception as error:  # NaN or a failing tokenizer in one request must not take the others along
            self._end(request, "error", () if token_id == NOT_DRAWN else (token_id,), error)
            return
        if delta is None:
            self._end(request, reason, (token_id,))
        else:
            request.outbox.append(delta)

    def _end_all(self, request_id: int) -> None:
        for request in list(self._requests.get(request_id, ())):
            self._end(request, "abort")

    def _end(
        self, request: Request, reason: FinishReason, new: tuple[int, ...] = (), error: Exception | None = None
    ) -> None:
        self._scheduler.remove(request)
        try:  # before it is gone: another thread may ask whether there is anything left to deliver
            request.outbox.append(request.end(reason, new, error))
        finally:
            samples = self._requests[request.id]
            samples.remove(request)
            if not samples:
                del self._requests[request.id]
            if not self._requests:
                self._flights.clear()  # of requests that have ended; nobody reads them
