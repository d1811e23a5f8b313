"""Which backend serves a bucket at how many tokens a row, and the choice of it from measured steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import InvalidArgumentError

MARGIN = 0.03  # of a step that a second captured backend must save


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one decode step with every row of a bucket at `context` tokens: 20, 50 and 80 % took no longer."""

    context: int
    p20: float
    p50: float
    p80: float


@dataclass(frozen=True, kw_only=True)
class BackendSpan:
    """A backend that serves a bucket from `context` tokens a row on, up to where the next span begins."""

    context: int
    backend: str


Spans = tuple[BackendSpan, ...]
BackendTable = Mapping[int, Sequence[BackendSpan]]  # by bucket


def checked_spans(spans: Sequence[BackendSpan]) -> Spans:
    """The spans as they are, if they say for every context who serves it.

    Raises:
        InvalidArgumentError: there is none, the first does not begin at 1, or they do not ascend.
    """
    starts = [span.context for span in spans]
    if not starts or starts[0] != 1 or sorted({*starts}) != starts:
        raise InvalidArgumentError(f"backends from {starts} tokens a row on: the first begins at 1, the others ascend")
    return tuple(spans)


def backend_at(spans: Sequence[BackendSpan], context: int) -> str:
    """Who serves rows of `context` tokens.

    Example:
        >>> spans = (BackendSpan(context=1, backend="fused"), BackendSpan(context=4096, backend="flashinfer"))
        >>> backend_at(spans, 4095), backend_at(spans, 4096)
        ('fused', 'flashinfer')
    """
    return next(span.backend for span in reversed(spans) if span.context <= context)


def best_spans(measured: Mapping[str, Sequence[StepTime]]) -> Spans:
    """Who serves a bucket best by what was measured there, with a second backend only where it clearly pays.

    One backend is in force everywhere but where another is clearly faster: the one whose steps are the fewest times the
    fastest's, summed over the contexts. Another serves a context if its step is shorter by `MARGIN` at the median, and
    80 % of its steps are shorter than 80 % of the other's. Between two measured contexts, only one of which it serves,
    it does not.

    Args:
        measured: steps by backend, the one that is preferred where two are alike first. Contexts that not all were
            measured at do not count.

    Raises:
        InvalidArgumentError: nothing was measured, or nothing at the same context.
    """
    times = {backend: {step.context: step for step in steps} for backend, steps in measured.items()}
    contexts = sorted(set.intersection(*map(set, times.values()))) if times else []
    if not contexts:
        at = {backend: sorted(steps) for backend, steps in times.items()}
        raise InvalidArgumentError(f"no context at which all backends were measured: {at}; measure them at the same")
    fastest = {context: min(steps[context].p50 for steps in times.values()) for context in contexts}
    base = min(times, key=lambda backend: sum(times[backend][context].p50 / fastest[context] for context in contexts))
    serving = []
    for context in contexts:
        usual, best = times[base][context], min(times, key=lambda backend: times[backend][context].p50)
        other = times[best][context]
        pays = other.p80 < usual.p20 and other.p50 <= (1 - MARGIN) * usual.p50
        serving.append((context, best if pays else base))
    spans = [BackendSpan(context=1, backend=serving[0][1])]
    for (before, _), (context, backend) in zip(serving, serving[1:], strict=False):
        if backend != spans[-1].backend:
            spans.append(BackendSpan(context=before + 1 if backend == base else context, backend=backend))
    return tuple(spans)
