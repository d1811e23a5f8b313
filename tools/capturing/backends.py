"""Which backends are measured, one engine after the other, and what that says together."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict

import torch
from rich.progress import Progress

from capturing.measure import measure, start
from graphattn import BackendError, BucketLadder, BucketProfile, CaptureProfile

BACKENDS = {"cuda": ("fused", "flashinfer"), "cpu": ("reference",)}


def candidates(asked: str, device: str) -> list[str]:
    """Names of the backends to try: those that can be captured, or what was asked with commas."""
    return list(BACKENDS[device]) if asked == "auto" else [name.strip() for name in asked.split(",")]


def measure_each(
    names: list[str],
    make: Callable[[], object],
    ladder: BucketLadder,
    options: dict,
    *,
    skips: bool,
    bars: Progress,
    **how,
) -> tuple[list[dict], list[dict], CaptureProfile]:
    """Starts an engine with each backend, one after the other, and measures its buckets.

    Args:
        names: the backends; the first is preferred where two are alike.
        make: gives the model, or where it is.
        ladder: the buckets.
        options: what else `LLM` takes.
        skips: leave out a backend that cannot serve the model, unless none can.
        bars: where bars are shown.
        how: what else `measure` takes.

    Returns:
        A dict of each engine: `backend`, and `start_s`, `explain` and `ledger`, as it was before steps were timed, or
        the `reason` that it was left out. A dict of each bucket: `bucket`, `spans`, who serves it, and `backends`, a
        dict of each as `measure` gives it, its steps with `serves` besides. The profile.

    Raises:
        BackendError: a backend cannot serve the model.
    """
    engines, found = [], []
    for name in names:
        try:
            llm, seconds = start(make, ladder, bars, name, options)
        except BackendError as error:
            if not skips or (name == names[-1] and not found):
                raise
            engines.append({"backend": name, "reason": str(error)})
            continue
        with llm:
            book = llm.ledger()
            bars.console.print(str(book), soft_wrap=True)
            found.append(measure(llm, bars=bars, **how))
            explained = llm.explain().splitlines()
            engines.append({"backend": name, "start_s": seconds, "explain": explained, "ledger": book.to_json()})
        del llm
        gc.collect()  # the next engine sizes its pages by what is free
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    profile = CaptureProfile.merge([each for _, each in found])
    rows = [
        {
            "bucket": bucket.bucket,
            "spans": [asdict(span) for span in bucket.spans],
            "backends": [with_serves(row, bucket) for row in of_backends],
        }
        for bucket, *of_backends in zip(profile.buckets, *(rows for rows, _ in found), strict=True)
    ]
    return engines, rows, profile


def with_serves(row: dict, bucket: BucketProfile) -> dict:
    """What a backend took, and at which contexts it serves the bucket."""
    steps = [step | {"serves": bucket.backend_at(step["context"]) == row["backend"]} for step in row["steps"]]
    return row | {"steps": steps}


def serving(row: dict) -> list[dict]:
    """The steps of a bucket by context, each of the backend that serves it there."""
    steps = [step for each in row["backends"] for step in each["steps"] if step["serves"]]
    return sorted(steps, key=lambda step: step["context"])


def captured(row: dict) -> list[dict]:
    """The backends that a bucket is captured with."""
    return [each for each in row["backends"] if each["backend"] in {span["backend"] for span in row["spans"]}]


def graph_bytes(row: dict) -> int:
    """Bytes of a bucket's graphs, one for each backend that it is captured with."""
    return sum(each["pool_bytes"] + each["driver_bytes"] for each in captured(row))
