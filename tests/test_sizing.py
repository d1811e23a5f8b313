"""The cache is sized from what a start takes: on a made-up card whose every byte the tests know.

The card follows what the engine really holds (weights, buffers, pages, captured buckets) and refuses what it has not.
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny

import graphattn.engine.accounts
import graphattn.engine.executor
import graphattn.ledger
import graphattn.runner
from graphattn import LLM, CaptureMemoryError, DecodeRunner, DeviceMemoryError, OutOfPagesError, SamplingParams
from graphattn.capture import Capture
from graphattn.engine.executor import Executor
from graphattn.meters import Meters, Pool

MIB = 1 << 20
MAX_BATCH, BUCKETS = 16, (1, 4, 16)
PAGE = 16 * 2 * 8 * 8  # bytes: slots, keys and values, width, float64
LIMIT = 3000 * 16  # tokens of a request
POOL = (0, 5)
OPTIONS = {"max_batch": MAX_BATCH, "buckets": BUCKETS, "check": False}  # what the check takes is given back
PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def model(**config):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    positions = {"max_position_embeddings": LIMIT}  # one fits, 16 do not: memory is what limits
    return tiny("llama", num_layers=1, head_dim=8, **(sizes | positions | config))


class Card:
    """A device of `total` bytes on which one engine runs beside `others`."""

    def __init__(self, patch: pytest.MonkeyPatch, total: int = 128 * MIB, *, others: int = 0, hides: bool = False):
        self.total, self.others, self.hides = total, others, hides
        self.context, self.kernels, self.activations = 5 * MIB, 3 * MIB, 4 * MIB
        self.pool, self.graph = {16: 2 * MIB, 4: 0, 1: MIB}, {16: 2 * MIB, 4: MIB, 1: MIB}
        self.loaded, self.executor, self.prepared, self.on_lay_out = False, None, [], []
        self._cached, self._patch = 0, patch
        for place in (graphattn.ledger, graphattn.runner):
            patch.setattr(place, "read_meters", lambda *_, **__: self.read())
        patch.setattr(graphattn.engine.accounts, "_has_driver", lambda executor: True)
        self._follow(Executor, "__init__", self._created)
        self._follow(Executor, "lay_out", self._laid_out)
        self._follow(Executor, "capture", self._captured)
        self._follow(Executor, "release", self._released)
        self._follow(DecodeRunner, "_prepare", self._prepare)

    def _follow(self, kind: type, name: str, follower) -> None:
        real = getattr(kind, name)
        self._patch.setattr(kind, name, lambda it, *args, **options: follower(real, it, *args, **options))

    def _created(self, real, executor, *args, **options) -> None:
        self.executor = executor
        real(executor, *args, **options)

    def _laid_out(self, real, executor, caches, *args) -> None:
        if self.on_lay_out:
            self.on_lay_out.pop(0)()
        self._take(sum(self._segment(caches[0].num_pages * PAGE // 2)) * 2)
        real(executor, caches, *args)

    def _prepare(self, real, runner, bucket: int, backend: str) -> None:
        self.prepared.append(bucket)
        runner.pool = POOL
        self._take(self.pool[bucket] + self.graph[bucket] + (0 if self.loaded else self.kernels))
        self.loaded = True
        real(runner, bucket, backend)
        taken = {"pool_bytes": self.pool[bucket], "driver_bytes": self.graph[bucket]}
        runner.captures[-1] = Capture(bucket=bucket, backend=backend, seconds=1.0, **taken)

    def _captured(self, real, executor, *args, **options) -> None:
        real(executor, *args, **options)
        if self.activations > self.free:
            raise DeviceMemoryError("a prefill does not fit")
        self._cached = self.activations

    def _released(self, real, executor) -> None:
        real(executor)
        self._cached = 0

    def _take(self, size: int) -> None:
        if size > self.free:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")

    @staticmethod
    def _segment(size: int) -> tuple[int, int, int]:
        """Bytes that torch takes for a tensor: its own, what it keeps of the last 2 MiB, what is left for others."""
        left = -size % (2 * MIB) if size >= 10 * MIB else 0
        return size, left * (left <= MIB), left * (left > MIB)

    def read(self) -> Meters:
        executor, kept, cached, captures = self.executor, 0, self._cached, []
        parts = executor.weight_bytes if executor is not None else 0
        if executor is not None and "state" in vars(executor):
            parts = sum(executor.parts().values())
            _, kept, split = self._segment(executor.cache_bytes // 2)
            kept, cached, captures = 2 * kept, cached + 2 * split, executor.runner.captures
        pool = sum(capture.pool_bytes for capture in captures)
        outside = self.context + sum(capture.driver_bytes for capture in captures) + self.loaded * self.kernels
        reserved = parts + kept + cached + pool
        used = reserved + outside + self.others
        return Meters(
            device="cuda:0",
            source="driver",
            torch_allocated=parts + kept + pool,
            torch_reserved=reserved,
            private_pools={"0.5": Pool(reserved=pool, allocated=pool)} if pool else {},
            free=self.total - used,
            total=self.total,
            nvml_process=None if self.hides else reserved + outside,
            nvml_used=used,
            nvml_reserved=0,
            nvml_total=self.total,
        )

    @property
    def free(self) -> int:
        return self.read().free


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def wrong(llm: LLM) -> list:
    """Lines that did not come as predicted, to the byte."""
    return [line for line in llm.ledger().lines if line.predicted not in (None, line.bytes)]


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(
    total=st.integers(40, 185),  # from 193 on what requests can use is no more than half
    others=st.floats(0, 0.6),
    fraction=st.floats(0.3, 1.0),
    activations=st.integers(0, 8),
    pool=st.integers(0, 6),
    graph=st.integers(0, 6),
    hides=st.booleans(),
    is_lazy=st.booleans(),
)
def test_the_cache_takes_what_all_else_leaves_and_leaves_the_margin(
    total: int, others: float, fraction: float, activations: int, pool: int, graph: int, hides: bool, is_lazy: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        card = Card(patch, total * MIB, others=int(others * total * MIB), hides=hides)
        card.activations, card.pool[16], card.graph[16] = activations * MIB, pool * MIB, graph * MIB
        card.graph[4] = graph * MIB // 2
        free = card.free
        options = OPTIONS | {"capture": "lazy" if is_lazy else "all", "memory_fraction": fraction}
        try:
            llm = LLM(model(), **options)
        except (DeviceMemoryError, CaptureMemoryError):
            assert 0.3 * free < 32 * MIB or fraction > 0.99, "there was room for all"
            return
        with llm:
            margin, step = free * (1 - fraction), 2 * 2 * MIB  # torch takes 2 MiB at a time for each of 2 tensors
            later = sum(card.pool[4] + card.graph[4] for _ in BUCKETS[1:]) if is_lazy else 0
            weights = card.executor.weight_bytes  # which were loaded when the rest was measured
            left = card.free - later
            assert left >= margin - weights - 1
            if llm.pool.num_pages <= MAX_BATCH * 3000:
                step = max(step, 20 * MIB * (llm.pool.num_pages * PAGE < 40 * MIB))
                assert left < margin + step + PAGE + weights
            if llm.max_seq_len == LIMIT:
                assert not wrong(llm)
                assert llm.ledger().predicted_free == card.free
            else:  # buffers are for shorter requests than they were
                assert not any(line.is_off for line in llm.ledger().lines)
                assert llm.ledger().predicted_free < card.free
            assert sorted(set(card.prepared[-1:] if is_lazy else card.prepared)) == ([16] if is_lazy else [1, 4, 16])
            assert "measured by a first capture" in llm.explain()
            if not is_lazy:  # else the smallest bucket may take more than the second did
                assert len(llm.generate([[1, 2], [3]], PARAMS)) == 2


def test_a_start_captures_twice_only_where_memory_is_what_limits(card: Card) -> None:
    with LLM(model(), **OPTIONS, max_seq_len=64) as llm:
        assert card.prepared == [16, 4, 1] and llm.pool.num_usable == MAX_BATCH * 4
        assert "nothing but the cache is reserved" in llm.explain()
        assert not wrong(llm) and llm.ledger().predicted_free is None
    card.prepared.clear()
    for asked in ({"num_pages": 50}, {"kv_bytes": 50 * PAGE}):
        with LLM(model(), **OPTIONS, **asked) as llm:
            assert llm.pool.num_pages == 50 and "cache as asked" in llm.explain()
    assert card.prepared == [16, 4, 1] * 2
    card.prepared.clear()
    with LLM(model(), **OPTIONS, max_seq_len=64, capture="lazy"):
        assert card.prepared == [16]
    card.prepared.clear()
    with LLM(model(), **OPTIONS, capture="lazy"):
        assert card.prepared == [16, 4, 16], "two to know what the others will take, then the largest"


def test_the_first_capture_holds_nothing_when_the_cache_is_allocated(card: Card) -> None:
    held = []
    card.on_lay_out = [lambda: None, lambda: held.extend(layer.k_cache for layer in card.executor.binding.layers)]
    with LLM(model(), **OPTIONS):
        assert [pages.untyped_storage().nbytes() for pages in held] == [0]


def test_what_is_measured_is_reported_while_it_is(card: Card) -> None:
    seen = []
    with LLM(model(), **OPTIONS, progress=lambda *args: seen.append(args)):
        done = [(stage, done, 3) for stage in ("measure", "capture") for done in (1, 2, 3)]
        assert seen == [("load", 0, 1), ("load", 1, 1), *done]


def test_a_stored_profile_takes_the_place_of_the_first_capture(card: Card, tmp_path: Path) -> None:
    with LLM(model(), **OPTIONS) as llm:
        llm.profile().save(tmp_path / "profile")
        pages, card.prepared = llm.pool.num_pages, []
    options = {"max_batch": MAX_BATCH, "capture_profile": tmp_path / "profile", "check": False}
    card.loaded = False  # as in a new process
    with LLM(model(), **options) as llm:
        assert card.prepared == [16, 4, 1] and llm.pool.num_pages == pages
        assert "as the capture profile has it" in llm.explain()
        assert not wrong(llm) and llm.ledger().predicted_free == card.free
    for change in ({"max_prefill_tokens": 100}, {"enforce_eager": True}):
        card.prepared.clear()
        with LLM(model(), **options, **change) as llm:
            assert card.prepared == [16, 4, 1] * 2, "another start is measured anew"
            assert not wrong(llm)


def test_a_profile_of_shorter_requests_is_not_taken(card: Card, tmp_path: Path) -> None:
    """Buffers grow with what requests may reach."""
    with LLM(model(), **OPTIONS, max_seq_len=64) as llm:
        llm.profile().save(tmp_path / "profile")
    card.prepared.clear()
    with LLM(model(), max_batch=MAX_BATCH, capture_profile=tmp_path / "profile", check=False) as llm:
        assert card.prepared == [16, 4, 1] * 2 and not wrong(llm)


def test_lazy_starts_from_a_profile_leave_room_for_the_other_buckets(card: Card, tmp_path: Path) -> None:
    with LLM(model(), **OPTIONS) as llm:
        llm.profile().save(tmp_path / "profile")
        pages, card.loaded = llm.pool.num_pages, False
    with LLM(model(), max_batch=MAX_BATCH, capture_profile=tmp_path / "profile", capture="lazy", check=False) as llm:
        assert [capture.bucket for capture in llm._executor.runner.captures] == [16]
        assert llm.pool.num_pages == pages and not wrong(llm)


def test_another_process_with_half_the_card_halves_the_cache(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(model(), **OPTIONS) as llm:
        whole = llm.pool.num_pages
    card.others = 64 * MIB
    with LLM(model(), **OPTIONS) as llm:
        assert 0.3 * whole < llm.pool.num_pages < 0.5 * whole
        assert not wrong(llm)
        lines = {line.name: line.bytes for line in llm.ledger().lines}
        assert lines["other processes"] == 64 * MIB


@pytest.mark.parametrize("hides", [False, True])
def test_too_little_for_anything_is_an_error_with_the_numbers(monkeypatch, hides: bool) -> None:
    card = Card(monkeypatch, others=105 * MIB, hides=hides)
    loaded = model()
    with pytest.raises(DeviceMemoryError) as caught:
        LLM(loaded, **OPTIONS, memory_fraction=0.5)
    said = str(caught.value)
    assert "memory_fraction=0.5 of 18.0 MiB free of 128.0 on cuda:0 is 9.0 MiB" in said
    assert "MiB of that go to all but the cache (measured by a first capture)" in said
    assert ("105.0 MiB are of other processes" in said) == (not hides)
    assert "a lower max_prefill_tokens, max_batch or max_seq_len, fewer buckets" in said
    del caught
    gc.collect()
    card.others = 0
    with LLM(loaded, **OPTIONS) as llm:  # the model was let go of
        assert llm.pool.num_pages > 1000


def grab(card: Card, size: int):
    def take() -> None:
        card.others += size

    return take


@pytest.mark.parametrize("asked", [{}, {"num_pages": 40_000}, {"kv_bytes": 80 * MIB}], ids=str)
def test_memory_that_goes_between_measuring_and_allocating(monkeypatch, asked: dict) -> None:
    """The last lay-out is the real one; before it somebody takes 60 MiB."""
    for mode in ("raise", "shrink"):
        with pytest.MonkeyPatch.context() as patch:
            card = Card(patch)
            card.on_lay_out = [*([] if asked else [lambda: None]), grab(card, 60 * MIB)]
            loaded = model()
            if mode == "raise":
                with pytest.raises(DeviceMemoryError) as caught:
                    LLM(loaded, **OPTIONS, **asked)
                said = str(caught.value)
                assert "does not fit (OutOfMemoryError: CUDA out of memory." in said
                left = 63.0 if asked else 60.0  # kernels stay loaded from the first capture
                assert f"{left} MiB of cuda:0 are free now, 123.0 were when it was sized" in said
                assert "or pass on_kv_oom='shrink' to take what fits" in said
                LLM(loaded, **OPTIONS, num_pages=40).close()
                continue
            with pytest.warns(RuntimeWarning, match="does not fit"):
                llm = LLM(loaded, **OPTIONS, **asked, on_kv_oom="shrink")
            with llm:
                assert 0 < card.free and 10_000 < llm.pool.num_pages < 32_000
                assert "since memory went meanwhile" in llm.explain()
                assert not asked and not wrong(llm) or asked
                if not asked:
                    assert llm.ledger().predicted_free == card.free
                assert len(llm.generate([[1, 2], [3]], PARAMS)) == 2


def test_a_smaller_pool_that_holds_no_request_of_the_length_asked_is_refused(card: Card) -> None:
    card.on_lay_out = [grab(card, 103 * MIB)]
    with pytest.warns(RuntimeWarning), pytest.raises(OutOfPagesError, match="max_seq_len=40000 needs 2500 pages"):
        LLM(model(), **OPTIONS, num_pages=40_000, max_seq_len=40_000, on_kv_oom="shrink")


def test_nothing_left_is_an_error_whatever_was_asked(card: Card) -> None:
    card.on_lay_out = [lambda: grab(card, card.free - PAGE)()]
    with pytest.raises(DeviceMemoryError, match="About 0 pages would fit|not even the step's buffers"):
        LLM(model(), **OPTIONS, num_pages=40_000, on_kv_oom="shrink")


@pytest.mark.parametrize("mode", ["raise", "shrink"])
def test_buckets_that_do_not_fit_are_found_by_the_first_capture(card: Card, mode: str) -> None:
    card.pool[16] = 500 * MIB
    expected = pytest.warns(RuntimeWarning, match=r"max_batch is lowered from 16 to 4") if mode == "shrink" else None
    if expected is None:
        with pytest.raises(CaptureMemoryError, match=r"buckets \[16\] could not be captured"):
            LLM(model(), **OPTIONS)
        return
    with expected:
        llm = LLM(model(), **OPTIONS, on_capture_oom="shrink")
    with llm:
        assert card.prepared == [16, 4, 1, 4, 1]
        assert not any(line.is_off for line in llm.ledger().lines), "buffers are for fewer rows than they were"
        assert "max_batch is lowered from 16 to 4" in llm.explain()
        assert len(llm.generate([[1], [2], [3], [4], [5]], PARAMS)) == 5


def test_on_a_cpu_nothing_is_measured_first(monkeypatch) -> None:
    seen = []
    real = DecodeRunner._prepare
    monkeypatch.setattr(DecodeRunner, "_prepare", lambda *args: [seen.append(args[1]), real(*args)])
    with LLM(model(max_position_embeddings=512), **OPTIONS) as llm:
        assert seen == [16, 4, 1] and llm.pool.num_usable == MAX_BATCH * 32
        assert [line.name for line in llm.ledger().lines if line.predicted is not None] == ["weights", "KV pages"]


@pytest.mark.inductor
def test_measuring_first_compiles_once(card: Card) -> None:
    torch._dynamo.reset()
    with LLM(model(), **OPTIONS, compile=True) as llm:
        assert card.prepared == [16, 4, 1] * 2
        llm.generate([[1, 2], [3]], PARAMS)
        assert llm._executor.step.num_compiles == 1
