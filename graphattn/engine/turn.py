"""One call at a time in an engine, from its beginning to its end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InvalidRequestError


class Turn:
    """What a call takes that changes requests, pages or what the device holds.

    Other threads wait for it. A call from within it, by a hook of the model or a tokenizer, would find requests half
    moved, and is refused.
    """

    def __init__(self):
        # The collector may close a stream of this very thread once the lock is held and before the owner is known.
        self._lock = threading.RLock()
        self._owner: int | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this thread is within a turn."""
        return self._owner == threading.get_ident()

    @contextmanager
    def taken(self, what: str) -> Iterator[None]:
        """Holds the turn.

        Raises:
            InvalidRequestError: this thread holds it already; names `what` was called.
        """
        if self.is_mine:
            raise InvalidRequestError(
                f"{what} was called from within a step of the same LLM, by a hook or a tokenizer: call it once the "
                "step has returned"
            )
        with self._lock, interrupts_held():
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Holds SIGINT (Ctrl-C) back until its body has ended; the second one is let through at once.

    Python raises KeyboardInterrupt between any two instructions, also between two that belong together. Only the main
    thread gets it, and only where a handler of Python's is installed.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    held = 0

    def hold(number: int, frame) -> None:
        nonlocal held
        held += 1
        if held > 1:
            usual(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if held == 1:
            usual(signal.SIGINT, None)
