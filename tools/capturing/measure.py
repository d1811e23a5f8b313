"""What each bucket takes: its capture, its memory, its step at each context."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from benchmark.shape import step_bytes
from benchmark.timing import spread
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from capturing.sharing import alone
from graphattn import LLM, BucketLadder, CaptureProfile, OutOfPagesError, StepTime

WARM_TOKENS = 3  # that LLM.time_steps decodes before it times


def longest(contexts: list[int], num_steps: int) -> int:
    """Tokens that a row reaches."""
    return max(contexts) + WARM_TOKENS + num_steps


def start(
    make: Callable[[], object], ladder: BucketLadder, bars: Progress, backend: str, options: dict
) -> tuple[LLM, float]:
    """An engine with those buckets and that backend, and the seconds that it took with its model.

    Args:
        make: gives the model, or where it is.
        ladder: the buckets.
        bars: where a bar is shown.
        backend: who attends.
        options: what else `LLM` takes.

    Raises:
        BackendError: the backend cannot serve the model here.
    """
    sizes, bar = sorted(ladder, reverse=True), bars.add_task(f"{backend}: loading", total=len(ladder))

    def show(stage: str, done: int, total: int) -> None:
        if stage == "measure":
            bars.update(bar, description=f"{backend}: a first capture, {done} of {total} buckets", completed=done)
        elif stage == "capture" or done == total:
            done = done if stage == "capture" else 0
            said = f"capturing bucket {sizes[done]}" if done < len(sizes) else f"captured {len(sizes)} buckets"
            bars.update(bar, description=f"{backend}: {said}", completed=done)

    started = time.perf_counter()
    shape = {"max_batch": ladder.max, "buckets": list(ladder), "prefix_cache": False}
    llm = LLM(make(), backend=backend, progress=show, **shape, **options)
    return llm, time.perf_counter() - started


def measure(
    llm: LLM, contexts: list[int], num_steps: int, *, rate: float, compares: bool, bars: Progress
) -> tuple[list[dict], CaptureProfile]:
    """Every bucket's capture and steps, all its rows at one context and no other rows running.

    Args:
        llm: an engine with one backend.
        contexts: tokens of each row; the shortest must fit at every bucket, others are left out where they do not.
        num_steps: timed steps of each bucket and context.
        rate: bytes per second of a copy within the device.
        compares: time the eager step too.
        bars: where a bar is shown.

    Raises:
        OutOfPagesError: the largest bucket at the shortest context does not fit.
    """
    captured = {each.bucket: each.backends[0] for each in llm.profile().buckets}
    backend = captured[max(captured)].backend
    bar = bars.add_task(f"{backend}: timing", total=len(captured) * len(contexts))
    rows, times, largest = [], {}, max(captured)
    output_bytes = llm.ledger().size_of("logits")
    for bucket in sorted(captured, reverse=True):  # what does not fit fails first
        steps = []
        for context in sorted(contexts):
            bars.update(bar, description=f"{backend}: timing bucket {bucket} at {context} tokens")
            try:
                seconds = llm.time_steps(bucket, context, num_steps=num_steps)
            except OutOfPagesError as error:
                if context == min(contexts):
                    raise
                steps.append({"context": context, "reason": str(error)})
            else:
                floor = step_bytes(llm, [context] * bucket) / rate
                eager = llm.time_steps(bucket, context, num_steps=num_steps, eager=True) if compares else None
                steps.append(
                    {
                        "context": context,
                        "step_ms": spread(seconds, 1e3),
                        "eager_ms": None if eager is None else spread(eager, 1e3),
                        "floor_ms": floor * 1e3,
                    }
                )
                times.setdefault(bucket, []).append(StepTime(context=context, **spread(seconds)))
            bars.advance(bar)
        rows.append(
            {
                "bucket": bucket,
                "backend": backend,
                "capture_s": captured[bucket].capture_seconds,
                "workspace_bytes": captured[bucket].workspace_bytes,
                "output_bytes": output_bytes if bucket == largest else 0,  # the others use that
                "pool_bytes": captured[bucket].pool_bytes,
                "driver_bytes": captured[bucket].driver_bytes,
                "nvml_bytes": captured[bucket].nvml_bytes,
                "steps": steps,
            }
        )
    bars.update(bar, description=f"{backend}: timed {len(captured)} buckets")
    found = llm.profile(times)
    kernels(llm, largest, min(contexts))  # the first profile sets CUPTI up
    for row in rows:  # when all is timed, since a profiler slows what comes after it
        row["kernels"], row["alone"] = kernels(llm, row["bucket"], min(contexts)), alone(llm, row["bucket"])
    return rows[::-1], found


def kernels(llm: LLM, bucket: int, context: int) -> int | None:
    """Kernels of a step, by torch.profiler; None on a CPU."""
    if llm.model.device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        llm.time_steps(bucket, context, num_steps=1)
        torch.cuda.synchronize()
    ran = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in ran) // (WARM_TOKENS + 1)


def progress(console) -> Progress:
    """A bar that names the bucket."""
    columns = (TextColumn("{task.description:<46}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)
