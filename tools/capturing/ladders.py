"""Which buckets are measured, and the ladders that can be made of them."""

from __future__ import annotations

from dataclasses import asdict

from graphattn import BucketLadder, Traffic, best_ladders

MOST_CANDIDATES = 64
CHOSEN = "chosen"


def alternatives(max_batch: int) -> dict[str, BucketLadder]:
    """Ladders that need no trace, by name."""
    return {
        "powers of two": BucketLadder([2**power for power in range((max_batch - 1).bit_length())], max_batch),
        "step 8": BucketLadder(range(8, max_batch, 8), max_batch),
        "step 16": BucketLadder(range(16, max_batch, 16), max_batch),
        "default": BucketLadder.default(max_batch),
    }


def candidates(max_batch: int, traffic: Traffic | None) -> BucketLadder:
    """Every bucket of the alternatives, and the batch sizes that most steps had, 64 in all or what the former are."""
    sizes = {size for ladder in alternatives(max_batch).values() for size in ladder}
    seen = [] if traffic is None else sorted(traffic.steps, key=lambda rows: (-traffic.steps[rows], rows))
    new = [rows for rows in seen if rows not in sizes]
    return BucketLadder([*sizes, *new[: max(0, MOST_CANDIDATES - len(sizes))]], max_batch)


def waste_saved(ladder: BucketLadder, traffic: Traffic) -> dict[int, float | None]:
    """By bucket, how much more of the rows computed would be padding without it; None for the largest."""
    whole = ladder.waste(traffic.steps)
    return {
        size: None
        if size == ladder.max
        else BucketLadder([other for other in ladder if other != size], ladder.max).waste(traffic.steps) - whole
        for size in ladder
    }


def choose(
    traffic: Traffic,
    step_seconds: dict[int, float],
    bucket_bytes: dict[int, int],
    *,
    max_buckets: int | None,
    max_bytes: int | None,
) -> dict:
    """The best ladder beside the alternatives, and what each further bucket buys.

    Returns:
        `table`, a dict of the best ladder of at most 1, 2, ... buckets each, and `ladders`, one of the chosen ladder
        and of each alternative: `name`, `sizes`, `bytes`, `step_ms` expected per step, `waste`. Bytes and time are
        None where a bucket was not measured.
    """
    found = best_ladders(traffic, step_seconds, bucket_bytes=bucket_bytes, max_buckets=max_buckets, max_bytes=max_bytes)
    table = [
        {
            "max_buckets": count,
            **asdict(choice),
            "step_ms": choice.seconds / traffic.num_steps * 1e3,
            "waste": choice.ladder.waste(traffic.steps),
        }
        for count, choice in enumerate(found, start=1)
    ]
    ladders = {CHOSEN: found[-1].ladder, **alternatives(traffic.max_batch)}
    return {
        "table": table,
        "ladders": [_account(*each, traffic, step_seconds, bucket_bytes) for each in ladders.items()],
    }


def _account(
    name: str, ladder: BucketLadder, traffic: Traffic, step_seconds: dict[int, float], bucket_bytes: dict[int, int]
) -> dict:
    is_measured = all(size in step_seconds for size in ladder)
    return {
        "name": name,
        "sizes": list(ladder),
        "bytes": sum(bucket_bytes[size] for size in ladder) if is_measured else None,
        "step_ms": ladder.seconds(traffic.steps, step_seconds) / traffic.num_steps * 1e3 if is_measured else None,
        "waste": ladder.waste(traffic.steps),
    }
