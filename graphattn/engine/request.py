"""One request on its way through the engine, and what the caller gets back."""

from __future__ import annotations

import time
from array import array
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from ..draw import NOT_DRAWN
from ..errors import NotANumberError
from ..groups import RowPages
from ..sampling import Ask, RowSampling, SamplingParams
from .text import TextStream

UNREAD = -1  # stands for a token that was drawn and not read yet
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds since the request was added, and what happened to it meanwhile.

    Attributes:
        first_token: until its first token; None if it had none.
        total: until it ended.
        cached_tokens: prompt tokens found in the prefix cache when it first ran.
        preemptions: how often it lost its pages and was recomputed.
    """

    first_token: float | None
    total: float
    cached_tokens: int
    preemptions: int


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A finished request.

    Attributes:
        request_id: what `add_request` returned.
        index: which of the `n` samples of that request this is.
        prompt_token_ids: the prompt.
        token_ids: what was generated, an end token included.
        text: the same as text, special tokens left out, cut before a stop string.
        finish_reason: "stop" (an end token or stop string), "length", "abort" or "error".
        logprobs: per generated token, token id -> log-probability of the drawn and the most likely ids; None if
            not asked for.
        timings: seconds.
        error: what failed, for "error"; the tokens are there, the text ends with what was streamed.
    """

    request_id: int
    index: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[dict[int, float], ...] | None
    timings: Timings
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step added to a request.

    Attributes:
        request_id, index: as in `RequestOutput`.
        token_ids: the new tokens.
        text: the new text; text that may still become part of a stop string is held back until it is clear.
        output: the whole result, with the last delta; None before.
    """

    request_id: int
    index: int
    token_ids: tuple[int, ...]
    text: str
    output: RequestOutput | None = None


def drained(outbox: deque[Delta]) -> list[Delta]:
    """What lies in an outbox, taken out of it; another thread may be taking from it too."""
    deltas = []
    with suppress(IndexError):
        while True:
            deltas.append(outbox.popleft())
    return deltas


@dataclass(eq=False)
class Request:
    """A request inside the engine.

    Attributes:
        tokens: prompt and generated ids; the last `num_unread` of them were drawn, but are not known here yet.
        num_computed: tokens whose keys and values are in the cache, or on the way there.
        pages: in every layer group.
        drawn_at: where in the step's state the last of them lies, if it is unread.
        stop_ids: ids that end it.
        max_tokens: tokens it may generate.
        text: turns tokens into text; None without a tokenizer.
        streams: whether its text is wanted as it comes, and not only at the end.
        outbox: where its deltas go.
        ask: what it asks of every draw.
    """

    id: int
    index: int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_ids: frozenset[int]
    pages: RowPages
    text: TextStream | None
    streams: bool
    outbox: deque[Delta]
    tokens: array = field(default_factory=lambda: array("q"))
    num_unread: int = 0
    num_computed: int = 0
    computed_as: int = 0
    drawn_at: int | None = None
    is_ended: bool = False
    logprobs: list[dict[int, float]] = field(default_factory=list)
    arrived: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    cached_tokens: int | None = None
    preemptions: int = 0
    ask: Ask = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = array("q", self.prompt)
        at_least = min(self.params.min_tokens, self.max_tokens)
        banned_until = len(self.prompt) + at_least if at_least and self.stop_ids else 0
        self.ask = Ask.of(self.params, self.seed, banned_until)

    @property
    def num_generated(self) -> int:
        """Tokens drawn, read or not."""
        return len(self.tokens) - len(self.prompt)

    @property
    def is_spent(self) -> bool:
        """Whether all it may generate is drawn; some of it may be unread."""
        return self.num_generated >= self.max_tokens

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 for a row that decodes."""
        return len(self.tokens) - self.num_computed

    @property
    def below_minimum(self) -> bool:
        return self.num_generated < self.params.min_tokens

    def row(self) -> RowSampling:
        """What it asks of the next draw."""
        return RowSampling(
            params=self.params,
            seed=self.seed,
            position=len(self.tokens),
            seen=self.tokens if self.params.repetition_penalty != 1.0 else (),
            banned=tuple(self.stop_ids) if self.below_minimum else (),
        )

    def computed(self, count: int) -> None:
        """`count` more tokens have their keys and values on the way to the cache."""
        self.num_computed += count
        self._commit()

    def draw(self, drawn_at: int) -> None:
        """Its next token is drawn, and lies at `drawn_at` in the step's state until it is read."""
        self.tokens.append(UNREAD)
        self.num_unread += 1
        self.drawn_at = drawn_at

    def forget_unread(self) -> None:
        """Undoes every `draw` that was not accepted."""
        self.tokens = self.tokens[: len(self.tokens) - self.num_unread]
        self.num_unread = 0

    def accept(self, token_id: int, logprobs: dict[int, float] | None) -> FinishReason | None:
        """Reads the first unread token; returns why the request ends with it, if it does.

        Raises:
            NotANumberError: it was `NOT_DRAWN`. Nobody finds what the request computed then.
        """
        if token_id == NOT_DRAWN:
            self.pages.disown(self.tokens)
            raise NotANumberError(
                f"token {len(self.tokens) - self.num_unread} could not be drawn, the model's logits hold NaN there: "
                "look for overflow in its dtype and for NaN in its weights"
            )
        if self.first_token is None:
            self.first_token = time.perf_counter() - self.arrived
        at = len(self.tokens) - self.num_unread
        below_minimum = at - len(self.prompt) < self.params.min_tokens
        self.tokens[at] = token_id
        self.num_unread -= 1
        self._commit()
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if self.text is not None:
            self.text.push(token_id, may_stop=not below_minimum)
            if self.text.stopped:
                return "stop"
        if token_id in self.stop_ids and not below_minimum:
            return "stop"
        return "length" if at + 1 - len(self.prompt) >= self.max_tokens else None

    def _commit(self) -> None:
        self.pages.commit(self.tokens, min(self.num_computed, len(self.tokens) - self.num_unread))

    def progress(self, token_id: int) -> Delta:
        """What the step added to a request that goes on."""
        text = self.text.take() if self.streams and self.text is not None else ""
        return Delta(request_id=self.id, index=self.index, token_ids=(token_id,), text=text)

    def end(self, reason: FinishReason, new: tuple[int, ...] = (), error: Exception | None = None) -> Delta:
        """The last delta; if the text cannot be decoded, that is the error it ends with."""
        piece, self.is_ended = "", True
        if self.text is not None and error is None:
            try:
                piece = self.text.take(final=True)
            except Exception as failed:
                error = failed
        output = RequestOutput(
            request_id=self.id,
            index=self.index,
            prompt_token_ids=self.prompt,
            token_ids=tuple(self.tokens[len(self.prompt) : len(self.tokens) - self.num_unread]),
            text="" if self.text is None else self.text.taken,
            finish_reason=reason if error is None else "error",
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
            timings=Timings(
                first_token=self.first_token,
                total=time.perf_counter() - self.arrived,
                cached_tokens=self.cached_tokens or 0,
                preemptions=self.preemptions,
            ),
            error=None if error is None else f"{type(error).__name__}: {error}",
        )
        return Delta(request_id=self.id, index=self.index, token_ids=new, text=piece, output=output)
