"""Numbers that users give, as numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np

from .errors import InvalidArgumentError


def integers(numbers: Sequence[int], what: str) -> np.ndarray:
    """The numbers as int64.

    Raises:
        InvalidArgumentError: one is no int; numpy would cut a page of 1.5 to 1, which is another row's.
    """
    found = np.asarray(numbers)
    if found.size and found.dtype.kind not in "iu":
        bad = next((each for each in numbers if not isinstance(each, Integral)), numbers[0])
        raise InvalidArgumentError(f"{what}: {bad!r} is among them, give ints of 32 bits")
    return found.astype(np.int64, copy=False)


def integers32(numbers: Sequence[int], what: str) -> np.ndarray:
    """Likewise as int32, where nobody has looked yet whether they fit.

    Raises:
        InvalidArgumentError: one does not, or is no int.
    """
    found, most = integers(numbers, what), np.iinfo(np.int32).max
    if found.size and not -most <= found.min() <= found.max() <= most:
        raise InvalidArgumentError(f"{what}: they go from {found.min()} to {found.max()}, give ints of 32 bits")
    return found.astype(np.int32)
