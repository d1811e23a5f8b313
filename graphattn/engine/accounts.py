"""Where an engine's bytes are, and what its start added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..cache import KVCache
from ..ledger import CACHE, Ledger, ledger
from ..meters import Meters

if TYPE_CHECKING:
    from .executor import Executor

KERNELS, WORKSPACES, PREFILL_POOL = "graphs and kernels", "workspaces", "prefill graph pool"
# Lines that a start adds to, beside the cache.
GROWING = (WORKSPACES, "step buffers", "logits", "graph pool", PREFILL_POOL, KERNELS, CACHE, "other torch")


def page_lines(caches: Sequence[KVCache]) -> dict[str, int]:
    """Bytes of pages by line of the ledger: one for all, or one for each window where layers differ in that."""
    windows = [cache.spec.window for cache in caches]
    if len(set(windows)) == 1:
        return {"KV pages": sum(cache.num_bytes for cache in caches)}
    lines: dict[str, int] = {}
    for window, cache in zip(windows, caches, strict=True):
        name = "KV pages, all tokens" if window is None else f"KV pages, window {window}"
        lines[name] = lines.get(name, 0) + cache.num_bytes
    return lines


def engine_ledger(executor: Executor) -> Ledger:
    """Where the bytes of the device are, beside what the start was to take."""
    pools = {"graph pool": executor.runner.pool, PREFILL_POOL: executor.prefill_runner.pool}
    forecast = executor.forecast
    options: dict = {}
    if _has_driver(executor):
        options["pools"] = {name: pool for name, pool in pools.items() if pool is not None}
        # One line, since the driver keeps what a first capture's graphs took and gives it to what comes next.
        options["driver_parts"] = {KERNELS: executor.kernel_bytes + _graph_bytes(executor)}
    if forecast is not None:
        options |= {"predicted": forecast.lines, "predicted_free": forecast.free}
    return ledger(executor.device, executor.parts(), **options)


def _has_driver(executor: Executor) -> bool:
    return executor.device.type == "cuda"


def _graph_bytes(executor: Executor) -> int:
    return sum(capture.driver_bytes for capture in executor.runner.captures)


def base_ledger(executor: Executor) -> Ledger:
    """The same before anything but the weights is there."""
    return ledger(executor.device, {"weights": executor.weight_bytes})


def growth(executor: Executor, base: Ledger) -> dict[str, int]:
    """Bytes that the start added to each line, cache aside; keeps what kernels took of that."""
    executor.kernel_bytes = 0
    book = engine_ledger(executor)
    now, before = ({line.name: line.bytes for line in each.lines} for each in (book, base))
    if KERNELS in now:
        graphs = _graph_bytes(executor)
        executor.kernel_bytes = max(0, outside_growth(base.meters, book.meters) - graphs)
        now[KERNELS] = executor.kernel_bytes + graphs
    return {name: now[name] - before.get(name, 0) for name in GROWING if name in now}


def outside_growth(before: Meters, after: Meters) -> int:
    """By how much the device's memory outside torch grew: by NVML's figures for this process, or else the driver's."""
    if None not in (before.nvml_process, after.nvml_process):
        held = [meters.nvml_process for meters in (before, after)]
    elif None not in (before.free, after.free):
        held = [-meters.free for meters in (before, after)]
    else:
        return 0
    return held[1] - after.torch_reserved - (held[0] - before.torch_reserved)
