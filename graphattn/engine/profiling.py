"""What the steps of an engine take: time, capture."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from ..errors import InvalidArgumentError, OutOfPagesError
from ..groups import GroupPools
from ..profile import BackendProfile, BucketProfile, CaptureProfile, StartCosts, origin
from ..spans import StepTime, backend_at
from ..spec import check_counts
from .executor import Executor

WARM_STEPS = 3


def time_steps(
    executor: Executor, pools: GroupPools, num_rows: int, context: int, *, num_steps: int, eager: bool
) -> list[float]:
    """Seconds of each of `num_steps` decode steps; `LLM.time_steps` says of what.

    Keys and values are zeros, each row's in pages of its own. What ran here is in no count.
    """
    runner, state = executor.runner, executor.state
    check_counts(num_rows=num_rows, context=context, num_steps=num_steps)
    last = context + WARM_STEPS + num_steps - 1
    if last > state.max_seq_len:
        raise InvalidArgumentError(
            f"rows of {context} tokens grow to {last} in {num_steps} timed steps and {WARM_STEPS} before, max_seq_len "
            f"is {state.max_seq_len}: raise it, or ask for less"
        )
    runner.ladder.pick(num_rows)
    generator = torch.Generator().manual_seed(num_rows)
    vocab = executor.model.get_input_embeddings().num_embeddings
    fed = torch.randint(0, vocab, (num_rows,), generator=generator).tolist()
    drawn: list[int] | None = None  # where a row's last draw lies, from the second step on
    rows = [pools.row() for _ in range(num_rows)]
    for row in rows:
        row.drop_behind(context - 1)
    for of_one, pool in zip(rows[0].missing(last), pools.pools, strict=True):
        needed, there = num_rows * of_one, pool.num_usable
        if needed > there:
            raise OutOfPagesError(
                f"{needed} pages needed for {num_rows} rows of {last} tokens, the cache has {there} "
                f"(page_size={pool.page_size}): time fewer rows or a shorter context, or give the cache more"
            )
    counted = (runner.rows.copy(), runner.served.copy(), runner.counts.copy())
    marks = []
    try:
        for row in rows:
            row.grow(last)
        pages = [list(tables) for tables in zip(*(row.pages for row in rows), strict=True)]
        for cache, tables in zip(executor.caches, pages, strict=True):
            cache.clear([page for table in tables for page in table])
        executor.check_model()
        executor.draw_greedily(num_rows)
        for done in range(WARM_STEPS + num_steps):
            if done >= WARM_STEPS:
                marks.append(_mark(executor.device))
            runner.run(fed, [context + done] * num_rows, pages, drawn, eager=eager)
            drawn = list(range(num_rows))
        marks.append(_mark(executor.device))
        return _between(marks)
    finally:
        for row in rows:
            row.release()
        runner.rows, runner.served, runner.counts = counted


def _mark(device: torch.device) -> float | torch.cuda.Event:
    """Now, as the device counts it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(marks: list) -> list[float]:
    """Seconds from each mark to the next."""
    pairs = list(zip(marks, marks[1:], strict=False))
    if isinstance(marks[0], float):
        return [later - earlier for earlier, later in pairs]
    marks[-1].synchronize()
    return [earlier.elapsed_time(later) / 1e3 for earlier, later in pairs]


def profile_of(
    executor: Executor,
    costs: StartCosts,
    step_times: Mapping[int, Sequence[StepTime]],
    ladder: Sequence[int] | None,
) -> CaptureProfile:
    """What capture took at each bucket, with step times that were measured since."""
    if executor.cascade != "off":
        raise InvalidArgumentError(
            f"cascade={executor.cascade!r}: a profile says who serves a context, not what rows share; measure without"
        )
    planner, captures = executor.planner, executor.runner.captures
    captured = sorted({capture.bucket for capture in captures})
    unknown = sorted({*step_times} - {*captured})
    if unknown:
        raise InvalidArgumentError(f"step times of {unknown}, captured are {captured}: give those only")
    buckets = []
    for bucket in captured:
        spans, times = planner.spans(bucket), step_times.get(bucket, ())
        backends = tuple(
            BackendProfile(
                backend=capture.backend,
                capture_seconds=capture.seconds,
                workspace_bytes=capture.workspace_bytes,
                pool_bytes=capture.pool_bytes,
                driver_bytes=capture.driver_bytes,
                nvml_bytes=capture.nvml_bytes,
                steps=tuple(step for step in times if backend_at(spans, step.context) == capture.backend),
            )
            for capture in captures
            if capture.bucket == bucket
        )
        buckets.append(BucketProfile(bucket=bucket, backends=backends, spans=spans))
    return CaptureProfile(
        **origin(executor.model, planner.cache),
        ladder=tuple(captured) if ladder is None else tuple(ladder),
        buckets=tuple(buckets),
        costs=(costs,),
    )
