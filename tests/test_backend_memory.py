"""Memory of buckets with two backends: both graphs are foreseen, and one that does not fit is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_profile import Twin, steps
from test_runner import CACHE, SPEC, Replayed
from test_sizing import BUCKETS, MAX_BATCH, MIB, OPTIONS, PARAMS, Card, model, wrong

from graphattn import (
    LLM,
    BackendSpan,
    BucketLadder,
    CaptureMemoryError,
    CaptureProfile,
    DecodeRunner,
    Planner,
    StartCosts,
    StepState,
)
from graphattn.engine.forecast import stored_costs
from graphattn.plan import BACKENDS

TIMES = {
    "reference": {1: steps(c10=1, c40=1), 4: steps(c10=1, c40=1), 16: steps(c10=2, c40=3)},
    "twin": {1: steps(c10=2, c40=2), 4: steps(c10=2, c40=2), 16: steps(c10=1, c40=4)},
}
BOTH = [(16, "twin"), (16, "reference"), (4, "reference"), (1, "reference")]


class TwoBackends(Card):
    """The card with a second backend, whose graphs may be refused."""

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__(patch)
        self.refused: set[tuple[int, str]] = set()
        patch.setitem(BACKENDS, "twin", Twin)

    def _prepare(self, real, runner, bucket: int, backend: str) -> None:
        if (bucket, backend) in self.refused:
            self.prepared.append((bucket, backend))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes")
        super()._prepare(real, runner, bucket, backend)
        self.prepared[-1] = bucket, backend


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> TwoBackends:
    return TwoBackends(monkeypatch)


@pytest.fixture
def profile(card: TwoBackends, tmp_path: Path) -> Path:
    """Bucket 16 is the twin's for rows of few tokens and the reference's for others, which are measured apart."""
    found = []
    for backend, times in TIMES.items():
        with LLM(model(), **OPTIONS, backend=backend) as llm:
            found.append(llm.profile(times))
    merged = CaptureProfile.merge(found)
    merged.save(tmp_path / "profile")
    assert merged.costs == (*found[0].costs, *found[1].costs) and len(merged.costs) == 2
    assert CaptureProfile.load(tmp_path / "profile") == merged
    card.loaded, card.prepared = False, []
    return tmp_path / "profile"


def start(profile: Path, **options) -> LLM:
    # The card that is played knows the profile's buckets, and not that of the comparison with eager attention.
    return LLM(model(), max_batch=MAX_BATCH, capture_profile=profile, check=False, **options)


def test_a_start_from_the_profile_foresees_both_graphs(card: TwoBackends, profile: Path) -> None:
    with start(profile) as llm:
        assert card.prepared == BOTH and "as the capture profile has it" in llm.explain()
        assert not wrong(llm) and llm.ledger().predicted_free == card.free
        lines = {line.name: line.bytes for line in llm.ledger().lines}
        graphs = sum(card.graph[bucket] for bucket, _ in BOTH)
        assert lines["graphs and kernels"] == graphs + llm._executor.kernel_bytes
        assert len(llm.generate([[1, 2], [3]] * 8, PARAMS)) == 16
        assert llm.profile().costs[0].backends == ("reference", "twin")
        pages = llm.pool.num_pages
    card.loaded, card.prepared = False, []
    with start(profile, capture="lazy") as llm:
        assert card.prepared == BOTH[:2] and llm.pool.num_pages == pages and not wrong(llm)


def test_a_first_capture_has_every_backend_of_a_bucket_too(card: TwoBackends, profile: Path) -> None:
    with start(profile, max_prefill_tokens=100) as llm:
        assert card.prepared == BOTH * 2 and "measured by a first capture" in llm.explain()
        assert not wrong(llm) and llm.ledger().predicted_free == card.free
        llm.profile().save(profile)
    card.loaded, card.prepared = False, []
    with start(profile, max_prefill_tokens=100) as llm:  # an engine's own profile has the costs of both together
        assert card.prepared == BOTH and not wrong(llm)
    card.prepared.clear()
    with start(profile, capture="lazy"):
        assert card.prepared == [*BOTH[:3], *BOTH[:2]]


def test_lazy_buckets_that_are_not_captured_yet_count_with_all_their_backends(card: TwoBackends, profile: Path) -> None:
    found = CaptureProfile.load(profile)
    spans = (BackendSpan(context=1, backend="twin"), BackendSpan(context=40, backend="reference"))
    for both in ((), (1, 4)):
        buckets = [replace(each, spans=spans) if each.bucket in both else each for each in found.buckets]
        replace(found, buckets=tuple(buckets)).save(profile)
        for options in ({}, {"max_prefill_tokens": 100}):  # stored, and measured
            card.loaded = False
            with start(profile, capture="lazy", **options) as llm:
                graphs = [bucket for bucket in (1, 4) for _ in llm._executor.planner.names(bucket)]
                measured = [4 if options else bucket for bucket in graphs]
                assert len(graphs) == (4 if both else 2) and not wrong(llm)
                left = card.free - sum(card.pool[bucket] + card.graph[bucket] for bucket in measured)
                assert 0 <= left - 0.1 * (card.total - card.context) < 8 * MIB


@pytest.mark.parametrize("mode", ["raise", "shrink"])
def test_a_second_graph_that_does_not_fit_is_left_out(card: TwoBackends, profile: Path, mode: str) -> None:
    card.refused = {(16, "twin")}
    said = "bucket 16 with twin could not be captured for want of memory"
    options = {"on_capture_oom": mode, "max_prefill_tokens": 100}
    if mode == "raise":
        with pytest.raises(CaptureMemoryError, match=said) as caught:
            start(profile, **options)
        assert (caught.value.failed, caught.value.captured) == ((16,), BUCKETS)
        return
    with pytest.warns(RuntimeWarning, match=said) as warned:
        llm = start(profile, **options)
    with llm:
        assert card.prepared == [*BOTH, *BOTH[1:]] and len(warned) == 1, "it was tried once"
        assert "or with their bucket's other backend" in llm.explain() and "16 reference (0 steps)" in llm.explain()
        assert llm._scheduler.max_batch == 16 and not wrong(llm)
        assert len(llm.generate([[1, 2], [3]] * 8, PARAMS)) == 16
        assert llm.profile().backends[16] == (BackendSpan(context=1, backend="reference"),)


def test_what_was_left_out_is_served_by_the_others() -> None:
    def left(*spans: tuple[int, str], without: str) -> list[tuple[int, str]]:
        planner = Planner([SPEC], CACHE, "cpu", {2: [BackendSpan(context=at, backend=name) for at, name in spans]})
        planner.leave_out(2, without)
        return [(span.context, span.backend) for span in planner.spans(2)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "twin", Twin)
        patch.setitem(BACKENDS, "triplet", Twin)
        assert left((1, "twin"), (9, "reference"), without="twin") == [(1, "reference")]
        assert left((1, "reference"), (5, "twin"), (9, "reference"), without="twin") == [(1, "reference")]
        three = [(1, "reference"), (5, "twin"), (9, "triplet"), (12, "reference")]
        assert left(*three, without="twin") == [(1, "reference"), (9, "triplet"), (12, "reference")]
        assert left(*three, without="reference") == [(1, "twin"), (9, "triplet")]


SIZES, NAMES = (1, 2, 4, 8), ("reference", "twin")
COSTS = st.fixed_dictionaries({(size, name): st.integers(0, 10) for size in SIZES for name in NAMES})


@pytest.mark.filterwarnings("ignore:.*could not be captured")
@settings(max_examples=25)  # what fails is collected, which takes long
@given(room=st.integers(0, 40), costs=COSTS, is_lazy=st.booleans())
def test_whatever_fits_serves_every_batch(room: int, costs: dict, is_lazy: bool) -> None:
    """Each graph that fits is kept; a bucket without any has left the ladder; no graph is tried twice."""
    held, tried = {}, []
    with pytest.MonkeyPatch.context() as patch:

        def capture_graph(runner: DecodeRunner, bucket: int, prepared) -> dict:
            key = bucket, prepared.backend
            tried.append(key)
            if costs[key] > room - sum(held.values()):
                raise torch.OutOfMemoryError("CUDA out of memory")
            held[key] = costs[key]
            prepared.graph, prepared.signature = Replayed(runner, bucket, prepared), prepared.plan.signature
            return {}

        patch.setattr(DecodeRunner, "_capture_graph", capture_graph)
        patch.setitem(BACKENDS, "twin", Twin)
        spans = [BackendSpan(context=1, backend="reference"), BackendSpan(context=3, backend="twin")]
        state = StepState(max_batch=8, max_seq_len=20, page_size=4, groups=[SPEC], device="cpu")
        planner = Planner([SPEC], CACHE, "cpu", dict.fromkeys(SIZES, spans))
        options = {"capture": "lazy" if is_lazy else "all", "on_capture_oom": "shrink"}
        runner = DecodeRunner(lambda ids, _: ids * 2, state, planner, ladder=BucketLadder(SIZES), **options)
        runner.uses_graphs = True
        try:
            runner.capture()
        except CaptureMemoryError:
            assert not held and runner.ladder.sizes == SIZES and planner.names(8) == NAMES, "all may be tried again"
            return
        for num_rows in range(1, runner.ladder.max + 1):
            for length in (1, 20):
                ran = runner.run(list(range(num_rows)), [length] * num_rows, [[[1] * 5] * num_rows])
                assert ran.tolist() == [2 * row for row in range(num_rows)]
        assert sorted(set(tried)) == sorted(tried) and set(runner.counts) == {"replay"}
        for bucket in runner.ladder:
            kept = {name for size, name in held if size == bucket}
            assert kept and (is_lazy or kept == set(planner.names(bucket)))
        if not is_lazy:
            assert {bucket for bucket, _ in held} == set(runner.ladder)


def test_costs_of_two_backends_that_were_measured_apart(card: TwoBackends, profile: Path) -> None:
    """Workspaces and kernels add up; of other lines the larger is taken; other settings know nothing."""
    found = CaptureProfile.load(profile)

    def costs(*backends: str, seq_len: int = 9, settings: int = 1, **growth: int) -> StartCosts:
        lines = {name.replace("_", " "): size for name, size in growth.items()}
        return StartCosts(backends=backends, settings={"a": settings}, max_seq_len=seq_len, growth=lines)

    ours = costs("reference", workspaces=1, graphs_and_kernels=5, logits=7, other_torch=-3)
    theirs = costs("twin", seq_len=8, workspaces=2, graphs_and_kernels=1, logits=6, other_torch=2)
    together = stored_costs(replace(found, costs=(ours, theirs)), {"a": 1})
    sums = {"workspaces": 3, "graphs and kernels": 6, "logits": 7, "other torch": 2}
    assert together.growth == sums and together.max_seq_len == 8
    alone = stored_costs(replace(found, ladder=(4,), costs=(ours, theirs)), {"a": 1})
    assert alone.growth == ours.growth | {"graphs and kernels": 6} and alone.max_seq_len == 9
    both = costs("reference", "twin", workspaces=3, logits=4)
    assert stored_costs(replace(found, costs=(both,)), {"a": 1}).growth == both.growth
    for none in ((), (ours,), (ours, costs("twin", settings=2))):
        assert stored_costs(replace(found, costs=none), {"a": 1}) is None
