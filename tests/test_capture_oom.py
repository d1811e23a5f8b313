"""Memory that ends during capture, injected: what stays usable, what is said, and that nothing is kept of what failed.

A made-up device holds so many bytes; each bucket's graph takes some of them.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_runner import CACHE, SPEC, Replayed, rows
from tiny import tiny

from graphattn import (
    LLM,
    BucketError,
    BucketLadder,
    CaptureError,
    CaptureMemoryError,
    DecodeRunner,
    DeviceMemoryError,
    InvalidArgumentError,
    Planner,
    SamplingParams,
    StepState,
)
from graphattn.capture import Capture, taken
from graphattn.meters import Meters, Pool
from graphattn.shortage import is_out_of_memory

SIZES = (1, 2, 4, 6, 8)
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"


class Memory:
    """So many bytes, taken by the graphs of a runner; what fails leaves nothing taken."""

    def __init__(self, room: int, costs: dict[int, int]):
        self.room, self.costs, self.tried, self.held = room, costs, [], []

    def capture_graph(self, runner: DecodeRunner, bucket: int, prepared) -> dict:
        self.tried.append(bucket)
        held = torch.zeros(100)  # what a step's frames hold when it fails
        ring: list = [held]  # which only the collector takes apart
        ring.append(ring)
        self.held.append(weakref.ref(held))
        if self.costs[bucket] > self.room:
            try:
                raise torch.OutOfMemoryError(OOM)
            except torch.OutOfMemoryError as error:
                raise CaptureError(f"the step at bucket {bucket} runs but cannot be captured") from error
        self.room -= self.costs[bucket]
        prepared.graph, prepared.signature = Replayed(runner, bucket, prepared), prepared.plan.signature
        return {"pool_bytes": self.costs[bucket]}


def new_runner(patch: pytest.MonkeyPatch, memory: Memory, **options) -> DecodeRunner:
    patch.setattr(DecodeRunner, "_capture_graph", lambda *args: memory.capture_graph(*args))
    state = StepState(max_batch=SIZES[-1], max_seq_len=20, page_size=4, groups=[SPEC], device="cpu")
    ladder = BucketLadder(SIZES)
    runner = DecodeRunner(lambda ids, _: ids * 2, state, Planner([SPEC], CACHE, "cpu"), ladder=ladder, **options)
    runner.uses_graphs = True
    return runner


COSTS = st.fixed_dictionaries({size: st.integers(0, 10) for size in SIZES})


@given(room=st.integers(0, 40), costs=COSTS, mode=st.sampled_from(["raise", "shrink"]), lazy=st.booleans())
def test_whatever_fits_is_captured_and_stays_usable(room: int, costs: dict, mode: str, lazy: bool) -> None:
    """Largest first; what does not fit leaves the ladder; every batch then runs at the next larger one or raises."""
    fitting, left = [], room
    for size in sorted(SIZES, reverse=True):
        if costs[size] <= left and not (lazy and fitting):
            left -= costs[size]
            fitting.insert(0, size)
    with pytest.MonkeyPatch.context() as patch:
        memory = Memory(room, costs)
        runner = new_runner(patch, memory, on_capture_oom=mode, capture="lazy" if lazy else "all")
        failed = [size for size in SIZES if size not in fitting and (not lazy or not fitting or size > fitting[-1])]
        if failed and (mode == "raise" or not fitting):
            with pytest.raises(CaptureMemoryError) as caught:
                runner.capture()
            assert (caught.value.failed, caught.value.captured) == (tuple(failed), tuple(fitting))
        else:
            with pytest.warns(RuntimeWarning, match="could not be captured") if failed else nullcontext():
                runner.capture()
        assert memory.room == left
        assert [capture.bucket for capture in runner.captures] == fitting[::-1]
        assert (runner.shortage is None) == (not failed)
        if not fitting:
            assert runner.ladder.sizes == SIZES
            return
        expected = tuple(size for size in SIZES if size not in failed)
        assert runner.ladder.sizes == expected
        assert all(len(output) == expected[-1] for output in runner._outputs), "no rows of a batch that cannot run"
        if lazy:
            return
        for num_rows in range(1, SIZES[-1] + 1):
            if num_rows > expected[-1]:
                with pytest.raises(BucketError):
                    runner.run(*rows(num_rows))
                continue
            assert runner.run(*rows(num_rows)).tolist() == [2 * row for row in range(num_rows)]
        assert set(runner.counts) == {"replay"}
        assert memory.tried == sorted(SIZES, reverse=True), "nothing was tried again"


def test_the_report_names_what_failed_what_fits_and_what_to_do(monkeypatch) -> None:
    memory = Memory(10 << 20, {1: 1 << 20, 2: 1 << 20, 4: 1 << 20, 6: 3 << 20, 8: 20 << 20})
    runner = new_runner(monkeypatch, memory)
    with pytest.raises(CaptureMemoryError) as caught:
        runner.capture()
    said = str(caught.value)
    assert said.startswith("buckets [8] could not be captured for want of memory (CaptureError: the step at bucket 8 ")
    assert "MiB are free. [1, 2, 4, 6] fit, in 6.0 MiB, and stay usable: rows run at the next larger one." in said
    assert "max_batch is lowered from 8 to 6" in said
    assert "a smaller cache (kv_bytes, num_pages or memory_fraction)" in said
    assert isinstance(caught.value, (CaptureError, DeviceMemoryError))
    assert runner.run(*rows(5)).tolist() == [0, 2, 4, 6, 8]


def test_nothing_of_a_failed_capture_is_kept(monkeypatch) -> None:
    memory = Memory(10, {1: 1, 2: 11, 4: 11, 6: 1, 8: 11})
    runner = new_runner(monkeypatch, memory, on_capture_oom="shrink")
    gc.disable()
    try:
        with pytest.warns(RuntimeWarning, match=r"buckets \[2, 4, 8\]"):
            runner.capture()
        alive = [size for size, held in zip(memory.tried, memory.held, strict=True) if held() is not None]
    finally:
        gc.enable()
    assert alive == [1], "captured last, with nothing that failed after it"


def test_a_bucket_that_fails_when_it_is_first_used(monkeypatch) -> None:
    costs = {1: 1, 2: 11, 4: 11, 6: 1, 8: 1}
    runner = new_runner(monkeypatch, Memory(10, costs), capture="lazy", on_capture_oom="shrink")
    runner.capture()
    with pytest.warns(RuntimeWarning) as warned:
        assert runner.run(*rows(2)).tolist() == [0, 2]
    assert [str(each.message).split(" could")[0] for each in warned] == ["buckets [2]", "buckets [4]"]
    assert runner.ladder.sizes == (1, 6, 8) and runner.served == {(6, "reference"): 1}
    runner = new_runner(monkeypatch, Memory(10, costs), capture="lazy")
    runner.capture()
    for failed in (2, 4):
        with pytest.raises(CaptureMemoryError, match=rf"buckets \[{failed}\] could not be captured"):
            runner.run(*rows(2))
    assert runner.run(*rows(2)).tolist() == [0, 2], "the next larger one that fits"


def test_what_is_captured_is_not_tried_again(monkeypatch) -> None:
    memory = Memory(100, dict.fromkeys(SIZES, 1))
    runner = new_runner(monkeypatch, memory)
    runner.capture(max_buckets=2)
    assert memory.tried == [8, 6]
    runner.capture()
    assert memory.tried == [8, 6, 4, 2, 1]


def test_other_errors_are_not_taken_for_it(monkeypatch) -> None:
    runner = new_runner(monkeypatch, Memory(0, {}), on_capture_oom="shrink")
    with pytest.raises(KeyError):
        runner.capture()
    with pytest.raises(InvalidArgumentError, match="on_capture_oom='ignore': choose raise or shrink"):
        new_runner(monkeypatch, Memory(0, {}), on_capture_oom="ignore")


def chained(error: Exception, *, implicit: bool = False) -> Exception:
    try:
        try:
            raise error
        except Exception as inner:
            if implicit:
                raise ValueError("while handling") from None
            raise ValueError("over it") from inner
    except ValueError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError(OOM), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA error: operation failed due to a previous error during capture"), False),
        (ValueError("out of memory"), False),
        (chained(torch.OutOfMemoryError(OOM)), True),
        (chained(torch.OutOfMemoryError(OOM), implicit=True), True),
        (chained(RuntimeError("CUDA error: an illegal memory access")), False),
        (None, False),
    ],
    ids=repr,
)
def test_how_a_shortage_is_told_from_other_errors(error: Exception | None, is_it: bool) -> None:
    assert is_out_of_memory(error) == is_it


def test_a_real_shortage_of_the_host_is_told() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def reading(pool: int | None, free: int | None, process: int | None, reserved: int) -> Meters:
    pools = {} if pool is None else {"0.7": Pool(reserved=pool, allocated=0)}
    return Meters(
        device="cuda:0",
        source="driver",
        free=free,
        private_pools=pools,
        nvml_process=process,
        torch_reserved=reserved,
    )


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (reading(None, 100, 50, 20), reading(8, 85, 65, 28), (8, 7, 15)),
        (reading(8, 100, None, 28), reading(12, 96, None, 32), (4, 0, None)),
        (reading(8, None, 50, 28), reading(12, None, 54, 32), (4, 0, 4)),
        (reading(8, 100, 50, 28), reading(8, 110, 40, 28), (0, 0, 0)),
    ],
)
def test_what_a_capture_took_by_each_meter(before: Meters, after: Meters, found: tuple) -> None:
    took = taken(before, after, (0, 7))
    assert (took["pool_bytes"], took["driver_bytes"], took["nvml_bytes"]) == found


def test_captures_of_one_bucket_add_up() -> None:
    bucket = {"bucket": 4, "backend": "fused"}
    first = Capture(**bucket, seconds=1.0, workspace_bytes=4, pool_bytes=5, driver_bytes=6, nvml_bytes=11)
    both = Capture(**bucket, seconds=2.0, workspace_bytes=1, pool_bytes=1, driver_bytes=2, nvml_bytes=3).after(first)
    assert both == Capture(**bucket, seconds=3.0, workspace_bytes=5, pool_bytes=6, driver_bytes=8, nvml_bytes=14)
    assert Capture(**bucket, seconds=2.0).after(first).nvml_bytes is None


@pytest.mark.parametrize("mode", ["raise", "shrink"])
def test_an_engine_lowers_its_max_batch_or_is_never_made(monkeypatch, mode: str) -> None:
    memory = Memory(3, {8: 9, 6: 1, 4: 9, 2: 1, 1: 1})
    monkeypatch.setattr(DecodeRunner, "_prepare", preparing(memory, DecodeRunner._prepare))
    model = tiny("llama", num_layers=1)
    options = {"max_batch": 8, "buckets": SIZES, "num_pages": 60, "on_capture_oom": mode, "check": False}
    if mode == "raise":
        with pytest.raises(CaptureMemoryError, match=r"\[1, 2, 6\] fit"):
            LLM(model, **options)
        memory.costs, memory.room = dict.fromkeys(SIZES, 0), 0
        LLM(model, **options).close()  # the model was let go of
        return
    with pytest.warns(RuntimeWarning, match="max_batch is lowered from 8 to 6"):
        llm = LLM(model, **options)
    with llm:
        assert "max_batch is lowered from 8 to 6" in llm.explain()
        outputs = llm.generate([[row + 1] for row in range(11)], SamplingParams(max_tokens=3, ignore_eos=True))
        assert [len(output.token_ids) for output in outputs] == [3] * 11
        assert max(llm._executor.runner.rows) == 6 and llm.profile().ladder == (1, 2, 6)


def preparing(memory: Memory, real):
    """Takes a bucket's bytes before it is prepared."""

    def prepare(runner: DecodeRunner, bucket: int, backend: str) -> None:
        if memory.costs[bucket] > memory.room:
            raise torch.OutOfMemoryError(OOM)
        memory.room -= memory.costs[bucket]
        real(runner, bucket, backend)

    return prepare
