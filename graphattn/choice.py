"""Which ladder suits the traffic best, exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from .buckets import BucketLadder
from .errors import InvalidArgumentError
from .traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class LadderChoice:
    """A ladder and what it comes to.

    Attributes:
        sizes: its buckets, the last of them the largest batch.
        seconds: all steps of the traffic, each at its bucket.
        bytes: of its buckets together.
    """

    sizes: tuple[int, ...]
    seconds: float
    bytes: int

    @property
    def ladder(self) -> BucketLadder:
        return BucketLadder(self.sizes)


class _Path(NamedTuple):
    """Buckets up to one of them, and what the rows that they hold come to."""

    bytes: int
    time: int
    num_buckets: int
    size: int
    before: _Path | None


def best_ladder(
    traffic: Traffic,
    step_seconds: Mapping[int, float],
    *,
    bucket_bytes: Mapping[int, int] | None = None,
    max_buckets: int | None = None,
    max_bytes: int | None = None,
) -> LadderChoice:
    """The ladder with which the traffic takes the least time; the last of `best_ladders`, which see.

    Example:
        >>> traffic = Traffic(max_batch=8, steps={1: 10, 3: 100, 8: 5})
        >>> best_ladder(traffic, {1: 0.010, 2: 0.011, 3: 0.011, 4: 0.012, 8: 0.016}, max_buckets=2).sizes
        (3, 8)
    """
    limits = {"bucket_bytes": bucket_bytes, "max_buckets": max_buckets, "max_bytes": max_bytes}
    return best_ladders(traffic, step_seconds, **limits)[-1]


def best_ladders(
    traffic: Traffic,
    step_seconds: Mapping[int, float],
    *,
    bucket_bytes: Mapping[int, int] | None = None,
    max_buckets: int | None = None,
    max_bytes: int | None = None,
) -> list[LadderChoice]:
    """The best ladder of at most 1, 2, 3, ... buckets: what each further bucket buys.

    The best is the one with which all steps of the traffic together take the least time, each at the smallest bucket
    that holds its rows; of equal ones the one with fewer buckets. It is found exactly, whatever the
    times are: larger buckets may be faster. Times are compared as the rational numbers that the floats are.

    With m candidates and the answer's n buckets this takes O(n m^2) steps. With `max_bytes` it is a knapsack along a
    path, and each step handles the bytes and times of which neither dominates another (Pareto): never more than there
    are different sums of bytes within the budget, which may be 2^m if hardly two buckets cost the same, and is small
    where bytes come in blocks, as a GPU's do.

    Args:
        traffic: steps by rows.
        step_seconds: seconds of a step at each bucket that may be chosen.
        bucket_bytes: bytes that each of them takes; None for 0.
        max_buckets: buckets of the ladder; None for any number.
        max_bytes: bytes of its buckets together; None for any.

    Returns:
        The best with at most 1, 2, ... buckets, up to `max_buckets` or to where one more gains nothing, whichever
        comes first. With a budget of bytes one more may gain nothing where two more do; the list goes on to the best.

    Raises:
        InvalidArgumentError: no steps, no candidate for the largest batch, a time or size that is none, or a budget
            that does not hold the largest batch's bucket.
    """
    sizes = _checked(traffic, step_seconds, bucket_bytes, max_buckets, max_bytes)
    steps_until = [0, *accumulate(traffic.steps.get(rows, 0) for rows in range(1, traffic.max_batch + 1))]
    fractions = [float(step_seconds[size]).as_integer_ratio() for size in sizes]
    unit = math.lcm(*(whole for _, whole in fractions))
    times = [part * (unit // whole) for part, whole in fractions]
    costs = [0 if max_bytes is None else bucket_bytes[size] for size in sizes]

    def extended(paths: Iterable[_Path], index: int) -> list[_Path]:
        size, cost = sizes[index], costs[index]
        return [
            _Path(
                path.bytes + cost,
                path.time + (steps_until[size] - steps_until[path.size]) * times[index],
                path.num_buckets + 1,
                size,
                path,
            )
            for path in paths
            if max_bytes is None or path.bytes + cost <= max_bytes
        ]

    known: list[list[_Path]] = [[] for _ in sizes]  # what no shorter path to the bucket dominates
    latest = [extended([_Path(0, 0, 0, 0, None)], index) for index in range(len(sizes))]
    bests: list[_Path] = []
    while any(latest) and (max_buckets is None or len(bests) < max_buckets):
        for index, paths in enumerate(latest):
            known[index], latest[index] = _undominated(known[index], paths)
        bests.append(min([*bests[-1:], *latest[-1]], key=lambda path: (path.time, path.num_buckets, path.bytes)))
        shorter, latest = latest, []
        for index in range(len(sizes)):
            latest.append(extended((path for paths in shorter[:index] for path in paths), index))
    while len(bests) > 1 and bests[-1] is bests[-2]:
        bests.pop()
    return [_choice(path, unit, bucket_bytes or {}) for path in bests]


def _undominated(known: list[_Path], new: list[_Path]) -> tuple[list[_Path], list[_Path]]:
    """Of paths to one bucket those with less time than any with as few bytes: of all, and of the new ones."""
    kept: list[_Path] = []
    for path in sorted([*known, *new], key=lambda path: path[:3]):
        if not kept or path.time < kept[-1].time:
            kept.append(path)
    fresh = set(map(id, new))
    return kept, [path for path in kept if id(path) in fresh]


def _choice(path: _Path, unit: int, bucket_bytes: Mapping[int, int]) -> LadderChoice:
    sizes, last = [], path
    while last.before is not None:
        sizes.append(last.size)
        last = last.before
    sizes.reverse()
    return LadderChoice(
        sizes=tuple(sizes), seconds=path.time / unit, bytes=sum(bucket_bytes.get(size, 0) for size in sizes)
    )


def _checked(
    traffic: Traffic,
    step_seconds: Mapping[int, float],
    bucket_bytes: Mapping[int, int] | None,
    max_buckets: int | None,
    max_bytes: int | None,
) -> list[int]:
    """The candidates in order, if everything is as `best_ladders` takes it."""
    if not traffic.steps:
        raise InvalidArgumentError("the traffic has no steps: record some requests first, with record_batches=PATH")
    sizes, largest = list(BucketLadder(step_seconds, traffic.max_batch)), traffic.max_batch
    if largest not in step_seconds:
        raise InvalidArgumentError(
            f"no step_seconds for {largest} rows, only for {sorted(step_seconds)}: the largest batch is always a "
            "bucket; measure it too"
        )
    for size, seconds in step_seconds.items():
        if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise InvalidArgumentError(f"step_seconds[{size}]={seconds!r}: give a finite time, 0 or more")
    if max_buckets is not None and max_buckets < 1:
        raise InvalidArgumentError(f"max_buckets={max_buckets}: the largest batch takes one; give at least 1")
    if max_bytes is not None and bucket_bytes is None:
        raise InvalidArgumentError(f"max_bytes={max_bytes} without bucket_bytes: say what each bucket takes")
    if bucket_bytes is not None:
        missing = [size for size in sizes if size not in bucket_bytes]
        if missing:
            raise InvalidArgumentError(f"no bucket_bytes for {missing}, which have step_seconds: give both or neither")
        for size in sizes:
            if not isinstance(bucket_bytes[size], int) or bucket_bytes[size] < 0:
                raise InvalidArgumentError(f"bucket_bytes[{size}]={bucket_bytes[size]!r}: give an int, 0 or more")
        if max_bytes is not None and bucket_bytes[largest] > max_bytes:
            raise InvalidArgumentError(
                f"max_bytes={max_bytes}: the bucket of the largest batch, {largest} rows, takes {bucket_bytes[largest]}"
                " alone and is always captured; raise the budget or lower max_batch"
            )
    return sizes
