"""Which batch sizes are captured, and which of them a batch runs at."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

from .errors import BucketError, InvalidArgumentError


class BucketLadder:
    """The sorted batch sizes ("buckets") that are captured; the exact maximum is always among them.

    Args:
        sizes: the buckets, in any order; doubles are dropped.
        max_batch: the largest batch that will ever be asked for; it is added to the sizes. None: the largest size.

    Raises:
        InvalidArgumentError: no size, a size below 1, or one above `max_batch`.

    Example:
        >>> ladder = BucketLadder([1, 2, 4], max_batch=6)
        >>> ladder.sizes, ladder.pick(3), ladder.pick(5)
        ((1, 2, 4, 6), 4, 6)
    """

    def __init__(self, sizes: Iterable[int], max_batch: int | None = None):
        sizes = set(sizes)
        for size in (*sizes, *(() if max_batch is None else (max_batch,))):
            if not isinstance(size, int) or isinstance(size, bool):
                raise InvalidArgumentError(f"batch size {size!r}: it must be an int")
        if max_batch is not None:
            if max_batch < 1:
                raise InvalidArgumentError(f"max_batch={max_batch}: a batch has at least one row")
            sizes.add(max_batch)
        if not sizes or min(sizes) < 1:
            raise InvalidArgumentError(f"buckets {sorted(sizes)}: at least one is needed, each at least 1")
        if max_batch is not None and max(sizes) > max_batch:
            raise InvalidArgumentError(
                f"bucket {max(sizes)} is larger than max_batch={max_batch}: raise max_batch or drop the bucket"
            )
        self.sizes: tuple[int, ...] = tuple(sorted(sizes))

    @classmethod
    def default(cls, max_batch: int) -> BucketLadder:
        """A ladder fine where padding hurts most: 1, 2, 4, 6, 8, 12, 16, by 8 to 64, by 16 to 256, then by 32."""
        if not isinstance(max_batch, int):
            raise InvalidArgumentError(f"max_batch={max_batch!r}: it must be an int")
        steps = [1, 2, 4, 6, 8, 12, 16, *range(24, 65, 8), *range(80, 257, 16), *range(288, max_batch, 32)]
        return cls([size for size in steps if size < max_batch], max_batch)

    @property
    def max(self) -> int:
        return self.sizes[-1]

    def pick(self, num_rows: int) -> int:
        """The smallest bucket that holds `num_rows`.

        Raises:
            BucketError: `num_rows` is 0 or more than the largest bucket.
        """
        if not 1 <= num_rows <= self.max:
            raise BucketError(
                f"a batch of {num_rows} rows: the ladder covers 1 to {self.max}; split the batch or raise max_batch"
            )
        return self.sizes[bisect_left(self.sizes, num_rows)]

    def waste(self, histogram: Mapping[int, int]) -> float:
        """Share of computed rows that are padding, for `histogram[rows] = steps`."""
        used = sum(rows * steps for rows, steps in histogram.items())
        computed = sum(self.pick(rows) * steps for rows, steps in histogram.items())
        return 1 - used / computed if computed else 0.0

    def seconds(self, histogram: Mapping[int, int], step_seconds: Mapping[int, float]) -> float:
        """Time of all steps of `histogram[rows] = steps`, for `step_seconds[bucket]`.

        Raises:
            InvalidArgumentError: a bucket that steps run at has no time.
        """
        steps = Counter()
        for rows, count in histogram.items():
            steps[self.pick(rows)] += count
        missing = [bucket for bucket in steps if bucket not in step_seconds]
        if missing:
            raise InvalidArgumentError(f"no step_seconds for {missing}, only for {sorted(step_seconds)}: measure them")
        return sum(count * step_seconds[bucket] for bucket, count in steps.items())

    def __iter__(self):
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __repr__(self) -> str:
        return f"BucketLadder({list(self.sizes)})"
