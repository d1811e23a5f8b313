"""What a request asks of sampling, and what one of its rows asks at one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

from .errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request draws its tokens and when it ends.

    Example:
        >>> params = SamplingParams(temperature=0.7, top_p=0.9, stop="END", max_tokens=64, seed=1)
        >>> params.stop, params.is_greedy
        (('END',), False)

    Attributes:
        temperature: Divides the logits, >= 0; 0 takes the most likely token, the rest work as if in [1e-30, 1e30].
        top_k: Keep the k most likely tokens and those that tie with the last; 0 is off.
        top_p: Keep the most likely tokens that together have this probability, in (0, 1]; ties with the last are kept.
        min_p: Keep tokens at least this fraction as likely as the most likely, in [0, 1].
        repetition_penalty: Divides positive, multiplies negative logits of ids seen, > 0; as if in [1e-30, 1e30].
        max_tokens: Tokens to generate at most, >= 1; None goes on until max_seq_len.
        min_tokens: Tokens before eos and stop ids may be drawn, at most `max_tokens`.
        stop: Text or texts that end the request; kept as a tuple.
        stop_token_ids: Ids that end the request beside eos; kept as a tuple.
        ignore_eos: Whether eos does not end the request.
        seed: Any int, taken modulo 2**63; None lets the engine choose.
        n: Samples per prompt, from 1 to 65536; sample i draws from `derive_seed(seed, i)`.
        logprobs: None for none; k from 0 to 100 for the drawn token's log-probability and those of the k most likely.

    Raises:
        InvalidArgumentError: A field has the wrong type or is outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        finite = math.isfinite
        self._number("temperature", float, "a finite number >= 0 (0 is greedy)", lambda x: finite(x) and x >= 0)
        self._number("top_k", int, "an int >= 0 (0 is off)", lambda x: x >= 0)
        self._number("top_p", float, "a number in (0, 1] (1 is off)", lambda x: 0 < x <= 1)
        self._number("min_p", float, "a number in [0, 1] (0 is off)", lambda x: 0 <= x <= 1)
        self._number("repetition_penalty", float, "a finite number > 0 (1 is off)", lambda x: finite(x) and x > 0)
        self._number("max_tokens", int, "an int >= 1, or None (until max_seq_len)", lambda x: x >= 1, optional=True)
        self._number("min_tokens", int, "an int >= 0", lambda x: x >= 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidArgumentError(f"min_tokens must be <= max_tokens={self.max_tokens}, got {self.min_tokens}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise InvalidArgumentError(f"stop must be a non-empty str or a sequence of them, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(stop))
        ids, allowed = self.stop_token_ids, "a sequence of ints >= 0"
        if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
            raise InvalidArgumentError(f"stop_token_ids must be {allowed}, got {ids!r}")
        ids = tuple(_checked("stop_token_ids", i, int, allowed, lambda x: x >= 0) for i in ids)
        object.__setattr__(self, "stop_token_ids", ids)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidArgumentError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        self._number("seed", int, "an int, or None", lambda x: True, optional=True)
        if self.seed is not None:
            object.__setattr__(self, "seed", self.seed % 2**63)
        self._number("n", int, "an int in [1, 65536]", lambda x: 1 <= x <= 65536)
        self._number("logprobs", int, "an int in [0, 100], or None", lambda x: 0 <= x <= 100, optional=True)

    def _number(self, name: str, kind: type, allowed: str, inside: Callable, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is not None or not optional:
            object.__setattr__(self, name, _checked(name, value, kind, allowed, inside))

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken (the first, where several tie)."""
        return self.temperature == 0 or self.top_k == 1


@dataclass(frozen=True, slots=True)
class RowSampling:
    """What one row asks for at one step.

    Attributes:
        params: The request's parameters.
        seed: The request's seed, resolved (`params.seed` may be None); taken modulo 2**63.
        position: Index in the sequence of the token being drawn.
        seen: Prompt and generated ids; read only if `params.repetition_penalty != 1`. An `array.array("q")` is cheap
            to read, a list costs its length every step.
        banned: Ids not allowed now: eos and stop ids below `min_tokens`.
    """

    params: SamplingParams
    seed: int
    position: int
    seen: Collection[int] = ()
    banned: Collection[int] = ()


class Ask(NamedTuple):
    """The numbers that decide how a row draws, in the order in which kernels read them.

    Attributes:
        seed: in [0, 2**63).
        temperature: in [1e-30, 1e30], or 0 for the most likely token, whatever the filters are.
        log_min_p: -inf where it is off.
        top_k: 0 where it is off.
        tail: 1 - top_p, or -1 where it is off.
        penalty: of ids seen, in [1e-30, 1e30]; 1 where it is off.
        banned_until: eos and stop ids are not drawn at positions before it.
    """

    seed: int
    temperature: float = 0.0
    log_min_p: float = -math.inf
    top_k: float = 0.0
    tail: float = -1.0
    penalty: float = 1.0
    banned_until: float = 0.0

    @classmethod
    def of(cls, params: SamplingParams, seed: int, banned_until: int = 0) -> Ask:
        """What `params` ask; filters that are on but remove nothing are off."""
        seed, penalty = seed % 2**63, _within(params.repetition_penalty)
        if params.is_greedy:
            return cls(seed, penalty=penalty, banned_until=banned_until)
        return cls(
            seed=seed,
            temperature=_within(params.temperature),
            log_min_p=math.log(params.min_p) if params.min_p else -math.inf,
            top_k=min(params.top_k, 2**31 - 1),  # more than any vocabulary
            tail=1 - params.top_p if params.top_p < 1 else -1.0,
            penalty=penalty,
            banned_until=banned_until,
        )


def stop_ids(params: SamplingParams, eos_token_ids: Iterable[int]) -> frozenset[int]:
    """Ids that end the request: its `stop_token_ids`, and the model's eos unless `ignore_eos`."""
    return frozenset(params.stop_token_ids).union(() if params.ignore_eos else eos_token_ids)


def _within(factor: float) -> float:
    """Nearer to 1 where float32 would make 0 or inf of it."""
    return min(max(factor, 1e-30), 1e30)


def _checked(name: str, value: object, kind: type, allowed: str, inside: Callable[[float], bool]) -> int | float:
    if isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool):
        try:
            number = kind(value)
        except OverflowError:
            number = math.inf
        if inside(number):
            return number
    raise InvalidArgumentError(f"{name} must be {allowed}, got {value!r}")
