"""Seconds of repeated things, and the rate of a copy, which is the ceiling of anything bound by memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

SHARES = (0.2, 0.5, 0.8)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Decode steps that were timed.

    Attributes:
        seconds: of each step.
        token_ids: what the first row generated, from its first token on.
        note: how the times came about, where it was not around each step; None otherwise.
    """

    seconds: list[float]
    token_ids: list[int] = field(default_factory=list)
    note: str | None = None


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of the values lie below."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def spread(values: list[float], scale: float = 1.0) -> dict[str, float]:
    """p20, p50 and p80 of the values times `scale`."""
    return {f"p{round(100 * share)}": quantile(values, share) * scale for share in SHARES}


def wait(device: str) -> None:
    """Returns once the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def copy_rate(device: str) -> float:
    """Bytes per second of a large copy within the device, read and written bytes counted."""
    source = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        wait(device)
        started = time.perf_counter()
        target.copy_(source)
        wait(device)
        times.append(time.perf_counter() - started)
    return 2 * source.nbytes / quantile(times[2:], 0.5)
