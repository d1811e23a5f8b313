"""Memory, as it is asked about from outside: the ledger, the leak check, and how many pages fit.

>>> from graphattn import memory
>>> with memory.watch("cpu"):
...     print(memory.ledger("cpu").lines[0].name)
other resident memory of this process
"""

from __future__ import annotations

from .errors import InvalidArgumentError
from .ledger import Ledger, LedgerLine, check_bytes, ledger, tensor_bytes
from .meters import Meters, Pool, read_meters
from .watch import Growth, Watch, watch

__all__ = [
    "Growth",
    "Ledger",
    "LedgerLine",
    "Meters",
    "Pool",
    "Watch",
    "ledger",
    "pages_that_fit",
    "read_meters",
    "tensor_bytes",
    "watch",
]

SEGMENT = 2 << 20  # bytes: torch takes large tensors from the driver in multiples of it,
SMALL = 10 << 20  # and tensors below so many bytes from segments that they share


def pages_that_fit(
    *,
    page_bytes: int,
    kv_bytes: int | None = None,
    free: int | None = None,
    memory_fraction: float = 0.9,
    reserve: int = 0,
    num_tensors: int | None = None,
) -> int:
    """How many pages fit in `kv_bytes`, taken whole, or in `memory_fraction` of the `free` bytes less `reserve`.

    Args:
        page_bytes: bytes of a page in all layers together.
        kv_bytes: bytes of the cache.
        free: bytes to take a share of, instead.
        memory_fraction: that share; the rest of `free` is the margin, which is left to others.
        reserve: bytes of the share that something else needs.
        num_tensors: over how many tensors of one size pages are spread, if each is to end with a multiple of the 2 MiB
            that torch takes at a time, so that no more is taken than was planned.

    Raises:
        InvalidArgumentError: that is fewer than 2 pages (the null page and one more), or an argument is out of range.

    >>> pages_that_fit(page_bytes=1000, free=10_000, memory_fraction=0.5, reserve=2_000)
    3
    """
    given = {"page_bytes": page_bytes, "kv_bytes": kv_bytes, "free": free, "reserve": reserve}
    asked = f"{given}, memory_fraction={memory_fraction}"
    if (kv_bytes is None) == (free is None) or not 0 < memory_fraction <= 1:
        raise InvalidArgumentError(f"{asked}: pass one of kv_bytes and free, and a memory_fraction in (0, 1]")
    check_bytes((name, size) for name, size in given.items() if size is not None)
    part, whole = memory_fraction.as_integer_ratio()
    budget = free * part // whole - reserve if kv_bytes is None else kv_bytes
    if not 0 < 2 * page_bytes <= budget:
        few = f"{budget} bytes hold fewer than 2 pages (the null page and one more)"
        raise InvalidArgumentError(f"{asked}: {few}; raise the budget, free memory or make the pages smaller")
    pages = budget // page_bytes
    if num_tensors is not None and budget >= num_tensors * SMALL:  # smaller ones share segments
        pages = min(pages, budget // num_tensors // SEGMENT * SEGMENT * num_tensors // page_bytes)
    return pages
