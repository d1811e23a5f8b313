"""Workload `step`: what a decode step is made of, from torch.profiler: kernels, idle device, host."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.profiler import ProfilerActivity, profile

from graphattn import LLM

from .decode import Decoding, decoding
from .timing import spread, wait

TOP = 20  # kernels listed
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the trace
WAITS = ("cudaEventSynchronize", "cudaStreamSynchronize")  # what waits for the whole device is ours


def steps_needed(steps: int) -> int:
    """Steps that the rows of a case must be able to make, for `steps` profiled ones."""
    return 4 * steps + 8


def measure(llm: LLM, cases: dict[str, list[int]], steps: int, device: str) -> list[dict]:
    """Host microseconds, kernels, and the device's idle share of `steps` decode steps of each case.

    On a CPU operators take the place of kernels, and nothing is said of idling.
    """
    num_layers = llm.model.config.get_text_config().num_hidden_layers
    rows = []
    for name, lens in cases.items():
        with decoding(llm, lens, steps_needed(steps)) as decoding_rows:
            wall, thread = _unprofiled(decoding_rows, 2 * steps)
            with _profiled(device, {}):  # the first profile sets CUPTI up
                decoding_rows.step()
            found: dict = {}
            with _profiled(device, found):
                for _ in range(steps):
                    decoding_rows.step()
        step_ms = spread(wall, 1e3)
        read = _device_share if device == "cuda" else _operators
        figures = read(found, steps, num_layers)
        if figures["busy_us"] is not None:
            figures["idle_share_unprofiled"] = max(0.0, 1 - figures["busy_us"] / (step_ms["p50"] * 1e3))
        row = {"case": name, "batch": len(lens), "context": lens[0] if len(set(lens)) == 1 else None, "steps": steps}
        rows.append(row | {"step_ms": step_ms, "thread_us": spread(thread, 1e6)} | figures)
    return rows


def _unprofiled(rows: Decoding, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step by the clock, and of this thread's processor time, spinning in a wait included."""
    wall, thread = [], []
    for _ in range(steps):
        started, thread_started = time.perf_counter(), time.thread_time()
        rows.step()
        wall.append(time.perf_counter() - started)
        thread.append(time.thread_time() - thread_started)
    return wall, thread


@contextmanager
def _profiled(device: str, found: dict) -> Iterator[None]:
    """Profiles its body into `found`: `seconds`, and `events` of the trace or `operators` on a CPU."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    wait(device)
    with profile(activities=[activity]) as profiler:
        started = time.perf_counter()
        yield
        found["seconds"] = time.perf_counter() - started
        wait(device)
    if device == "cpu":
        found["operators"] = [(each.key, each.count, each.self_cpu_time_total) for each in profiler.key_averages()]
        return
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        found["events"] = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def _device_share(found: dict, steps: int, num_layers: int) -> dict:
    kernels = sorted((event for event in found["events"] if event.get("cat") in ON_DEVICE), key=lambda e: e["ts"])
    if not kernels:
        raise RuntimeError("the profiler saw no kernel: CUPTI is missing, or another profiler holds it")
    busy, end = 0.0, kernels[0]["ts"]
    for event in kernels:
        busy += max(0.0, event["ts"] + event["dur"] - max(end, event["ts"]))
        end = max(end, event["ts"] + event["dur"])
    waited = sum(event["dur"] for event in found["events"] if event["name"] in WAITS)
    totals: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        totals[event["name"]].append(event["dur"])
    return {
        "kernels_per_step": len(kernels) / steps,
        "busy_us": busy / steps,
        "idle_share": 1 - busy / (end - kernels[0]["ts"]),
        "host_us": max(0.0, found["seconds"] * 1e6 - waited) / steps,
        "waited_us": waited / steps,
        "top": _top([(name, len(times), sum(times)) for name, times in totals.items()], steps, num_layers),
    }


def _operators(found: dict, steps: int, num_layers: int) -> dict:
    return {
        "kernels_per_step": sum(count for _, count, _ in found["operators"]) / steps,
        "busy_us": None,
        "idle_share": None,
        "host_us": found["seconds"] * 1e6 / steps,
        "waited_us": None,
        "top": _top(found["operators"], steps, num_layers),
    }


def _top(totals: list[tuple[str, int, float]], steps: int, num_layers: int) -> list[dict]:
    """The longest by their time in all steps, from (name, count, microseconds)."""
    return [
        {
            "name": name,
            "count_per_step": count / steps,
            "us_each": us / count,
            "us_per_step": us / steps,
            "us_per_layer": us / steps / num_layers,
        }
        for name, count, us in sorted(totals, key=lambda total: -total[2])[:TOP]
    ]
