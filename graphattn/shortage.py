"""When memory does not suffice: how that is recognised, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .capture import Capture
from .ledger import mib

SHORTAGES = ("out of memory", "can't allocate memory", "not enough memory")  # by the drivers, Triton, the CPU's malloc


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, says that memory of the device or the host did not suffice."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in SHORTAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """An exception's type and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def capture_shortage(
    failed: Mapping[tuple[int, str | None], str], captures: Sequence[Capture], *, max_batch: int, free: int | None
) -> str:
    """What to say about buckets that memory did not hold.

    Args:
        failed: how each of them failed, by bucket and backend; None for a backend if it is left with none.
        captures: those that fit.
        max_batch: rows that were asked for.
        free: bytes that are free now.
    """
    captured = sorted({capture.bucket for capture in captures})
    gone = sorted(bucket for bucket, backend in failed if backend is None)
    apart = [f"bucket {bucket} with {backend}" for bucket, backend in failed if backend and bucket not in gone]
    named = " and ".join([*([f"buckets {gone}"] if gone else []), *apart])
    text = (
        f"{named} could not be captured for want of memory ({next(iter(failed.values()))}); {mib(free)} MiB are free. "
    )
    if captured:
        size = mib(sum(capture.pool_bytes + capture.driver_bytes for capture in captures))
        text += f"{captured} fit, in {size} MiB, and stay usable: rows run at the next larger one"
        text += ", or with their bucket's other backend. " if apart else ". "
        if captured[-1] < max_batch:
            text += f"max_batch is lowered from {max_batch} to {captured[-1]}. "
    return (
        f"{text}To have all, leave them more memory: a smaller cache (kv_bytes, num_pages or memory_fraction), fewer "
        "buckets, a lower max_batch, or enforce_eager=True"
    )
