"""Static buffers, padding and the runner, on a CPU: the same code that a GPU captures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphattn import (
    AttentionSpec,
    BackendError,
    BucketError,
    BucketLadder,
    CacheSpec,
    CaptureError,
    DecodeRunner,
    InvalidArgumentError,
    Planner,
    StepState,
    ragged_batch,
)
from graphattn.backends.reference import ReferenceBackend

SPEC = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4)
CACHE = CacheSpec(num_pages=8, page_size=4, dtype=torch.float32)


def new_state(max_batch: int = 6, groups: int = 1) -> StepState:
    return StepState(max_batch=max_batch, max_seq_len=20, page_size=4, groups=[SPEC] * groups, device="cpu")


def expected_csr(lens: list[int], tables: list[list[int]], page_size: int) -> tuple[list[int], list[int], list[int]]:
    indptr, indices, last = [0], [], []
    for length, table in zip(lens, tables, strict=True):
        pages = 1
        while pages * page_size < length:
            pages += 1
        indices += table[:pages]
        indptr.append(len(indices))
        last.append(length - (pages - 1) * page_size)
    return indptr, indices, last


@settings(max_examples=60)
@given(st.data())
def test_staged_buffers_hold_the_rows_and_padding(data) -> None:
    """Several steps through the ring, two groups with pages of their own; addresses never change."""
    state = new_state(groups=2)
    addresses = {bucket: state.token_ids(bucket).data_ptr() for bucket in range(1, 7)}
    for _ in range(data.draw(st.integers(1, 4))):
        bucket = data.draw(st.integers(1, 6))
        lens = data.draw(st.lists(st.integers(1, 20), max_size=bucket))
        tokens = [data.draw(st.integers(0, 99)) for _ in lens]
        tables = [
            [
                [data.draw(st.integers(1, 99)) for _ in range(-(-length // 4) + data.draw(st.integers(0, 2)))]
                for length in lens
            ]
            for _ in range(2)
        ]
        ids = torch.randint(0, 99, state.drawn.shape, dtype=torch.int32)
        state.drawn.copy_(ids)
        drawn = [data.draw(st.sampled_from([None, 0, row, state.drawn.shape[1] + row])) for row in range(len(lens))]
        batch = state.stage(bucket, tokens, lens, tables, drawn=drawn)
        state.feed(bucket)
        tokens = [token if at is None else ids.flatten()[at].item() for token, at in zip(tokens, drawn, strict=True)]
        padding = bucket - len(lens)
        assert batch.qo_indptr_B1.tolist() == list(range(bucket + 1))
        assert batch.token_ids_N.tolist() == tokens + [0] * padding
        assert batch.positions_N.tolist() == [length - 1 for length in lens] + [0] * padding
        assert batch.rows_N.tolist() == list(range(bucket))
        assert batch.qo_indptr_B1.tolist() == list(range(bucket + 1))
        assert batch.token_ids_N.data_ptr() == addresses[bucket] == state.token_ids(bucket).data_ptr()
        for group in range(2):
            indptr, indices, last = expected_csr(lens + [1] * padding, tables[group] + [[0]] * padding, 4)
            for side in (batch.groups[group], batch.groups_host[group]):
                assert side.indptr_B1.tolist() == indptr
                assert side.indices_P[: len(indices)].tolist() == indices
                assert side.last_page_len_B.tolist() == last
                assert side.kv_lens(4).tolist() == lens + [1] * padding
            assert len(batch.groups_host[group].indices_P) == len(indices)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=5), st.sampled_from([1, 4, 16]))
def test_ragged_batch(rows: list[tuple[int, int]], page_size: int) -> None:
    starts = [start for start, _ in rows]
    tokens = [[10 * row + index for index in range(count)] for row, (_, count) in enumerate(rows)]
    lens = [start + count for start, count in rows]
    tables = [[100 * row + index for index in range(40)] for row in range(len(rows))]
    batch = ragged_batch(tokens, starts, [tables], page_size=page_size, device="cpu")
    assert batch.token_ids_N.tolist() == sum(tokens, [])
    assert batch.positions_N.tolist() == [position for start, count in rows for position in range(start, start + count)]
    assert batch.rows_N.tolist() == [row for row, (_, count) in enumerate(rows) for _ in range(count)]
    assert batch.qo_indptr_B1.tolist() == [sum(count for _, count in rows[:row]) for row in range(len(rows) + 1)]
    indptr, indices, last = expected_csr(lens, tables, page_size)
    assert batch.groups[0].indptr_B1.tolist() == indptr
    assert batch.groups[0].indices_P.tolist() == indices
    assert batch.groups[0].last_page_len_B.tolist() == last


@pytest.mark.parametrize(
    ("bucket", "tokens", "lens", "tables", "words"),
    [
        (2, [1, 2, 3], [1, 1, 1], [[1], [2], [3]], "3 rows at bucket 2"),
        (7, [1], [1], [[1]], "at bucket 7: the bucket must hold them and be at most 6"),
        (2, [1, 2], [1, 21], [[1], [1] * 6], "row 1: 21 tokens, max_seq_len is 20"),
        (2, [1, 2], [4, 5], [[1], [2]], r"row 1: 5 tokens need 2 pages \(page_size=4\), its table has 1"),
        (2, [1], [0], [[1]], "row 0: 0 tokens"),
        (2, [1, 2], [1], [[1], [2]], r"2 token ids, 1 lengths and tables of \[2\] rows: give one length per row"),
        (2, [1, 2], [1, 1], [[1]], r"2 token ids, 2 lengths and tables of \[1\] rows"),
    ],
)
def test_what_cannot_be_staged(bucket, tokens, lens, tables, words) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        new_state().stage(bucket, tokens, lens, [tables])


@pytest.mark.parametrize("drawn", [[0], [0, -1], [0, 10**6]])
def test_places_of_drawn_tokens_are_checked(drawn: list[int]) -> None:
    with pytest.raises(InvalidArgumentError, match="2 rows: give each a place, 0 to 127, or None"):
        new_state().stage(2, [1, 2], [1, 1], [[[1], [2]]], drawn=drawn)


def test_as_many_tables_as_groups() -> None:
    for tables in ([], [[[1]], [[1]]]):
        with pytest.raises(InvalidArgumentError, match="for each of 1 layer groups, one table per row"):
            new_state().stage(2, [1], [1], tables)


def test_empty_prefill_rows() -> None:
    with pytest.raises(InvalidArgumentError, match="each with at least one token"):
        ragged_batch([[1], []], [0, 0], [[[1], [2]]], page_size=4, device="cpu")


@pytest.mark.parametrize("name", ["max_batch", "max_seq_len", "page_size"])
def test_state_sizes(name: str) -> None:
    sizes = {"max_batch": 2, "max_seq_len": 8, "page_size": 4} | {name: 0}
    with pytest.raises(InvalidArgumentError, match=f"{name}=0"):
        StepState(**sizes, groups=[SPEC], device="cpu")


def new_runner(step_fn, **options) -> DecodeRunner:
    state = new_state()
    return DecodeRunner(step_fn, state, Planner([SPEC], CACHE, "cpu"), ladder=BucketLadder([1, 4], 6), **options)


def rows(count: int) -> tuple[list[int], list[int], list]:
    return list(range(count)), [1] * count, [[[1]] * count]


def test_runs_at_the_bucket_and_cuts_the_padding() -> None:
    seen = []

    def step(token_ids, positions):
        seen.append(len(token_ids))
        return torch.stack([token_ids, positions], dim=1), token_ids * 2

    runner = new_runner(step)
    calls = []
    assert [capture.bucket for capture in runner.capture(lambda done, total: calls.append((done, total)))] == [6, 4, 1]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    pairs, doubled = runner.run(*rows(3))
    assert seen == [4]
    assert pairs.tolist() == [[0, 0], [1, 0], [2, 0]]
    assert doubled.tolist() == [0, 2, 4]
    runner.verify(*rows(6))
    assert runner.served == {(4, "reference"): 1, (6, "reference"): 1}
    assert runner.counts == {"eager": 2}
    address = runner.run(*rows(1))[1].data_ptr()
    assert runner.run(*rows(5))[1].data_ptr() == address, "all buckets share their outputs"


def test_one_output_comes_alone() -> None:
    runner = new_runner(lambda token_ids, positions: token_ids + 1)
    assert runner.run(*rows(2)).tolist() == [1, 2]


def test_lazy_prepares_the_largest_first_and_others_on_use() -> None:
    runner = new_runner(lambda token_ids, positions: token_ids, capture="lazy")
    runner.capture()
    assert [capture.bucket for capture in runner.captures] == [6]
    runner.run(*rows(2))
    assert [capture.bucket for capture in runner.captures] == [6, 4]


def test_verify_sees_a_step_that_changes() -> None:
    extra = torch.zeros(6, dtype=torch.int32)

    def step(token_ids, positions):
        changed = token_ids + extra[: len(token_ids)]
        extra[1] += steps_differ
        return changed

    steps_differ = 0
    runner = new_runner(step)
    runner.capture()
    runner.verify(*rows(2))
    steps_differ = 1
    with pytest.raises(CaptureError, match=r"output 0 .* rows \[1\]"):
        runner.verify(*rows(2))


def test_verify_feeds_both_runs_the_same() -> None:
    """The first moves the rows on, and the second must not see that."""
    seen = []

    def step(token_ids, positions):
        seen.append((token_ids.tolist(), positions.tolist()))
        return token_ids * 100 + positions

    runner = new_runner(step)
    runner.capture()
    for length in (1, 2, 3, 3, 2, 9):
        seen.clear()
        runner.verify([length, 7], [length, length + 1], [[[1, 2, 3], [4, 5, 6]]])
        assert seen == [([length, 7, 0, 0], [length - 1, length, 0, 0])] * 2


class Fault(Exception):
    pass


@pytest.mark.parametrize("drawing", [False, True], ids=["tokens", "drawn"])
def test_a_step_that_raises_can_be_run_again(drawing: bool) -> None:
    seen, faults = [], set()

    def step(token_ids, positions):
        seen.append((token_ids.tolist(), positions.tolist()))
        if len(seen) in faults:
            raise Fault
        if drawing:
            runner.state.drawn[0, : len(token_ids)] = token_ids + 1
        return token_ids

    runner = new_runner(step)
    runner.capture()
    seen.clear()
    faults |= {2, 3, 7}
    tables, length, sent = [[[1, 2, 3, 4], [5, 6, 7, 1], [2, 3, 4, 5]]], 4, []
    while length < 12:
        drawn = [0, 1, 2] if drawing and length > 4 else None
        before = runner.state.num_sent
        try:
            runner.run([length, length + 10, length + 20], [length] * 3, tables, drawn)
        except Fault:
            continue
        finally:
            sent.append(runner.state.num_sent - before)
        assert seen[-1] == ([length, length + 10, length + 20, 0], [length - 1] * 3 + [0])
        length += 1
    if drawing:
        assert sent[-3:] == [3, 0, 0], "nothing but new pages"


class Replayed:
    """A graph as the runner sees one: what was captured runs, and no Python of the runner or the state."""

    def __init__(self, runner: DecodeRunner, bucket: int, prepared):
        self.runner, self.bucket, self.prepared = runner, bucket, prepared

    def replay(self) -> None:
        state, (output,) = self.runner.state, self.runner._outputs
        state._derive(self.bucket)
        output[: self.bucket] = self.runner._step_fn(state.token_ids(self.bucket), state.positions(self.bucket))


def test_replays_move_rows_on_and_captures_do_not(monkeypatch) -> None:
    """The guard's capture runs steps of its own: they see padding alone, and leave what was drawn."""
    seen = []

    def step(token_ids, positions):
        seen.append((token_ids.tolist(), positions.tolist()))
        runner.state.drawn[0, : len(token_ids)] = token_ids + 1
        return token_ids.clone()

    def capture(runner, bucket, prepared):
        with runner._rehearsal(bucket):
            for _ in range(2):
                runner._call(prepared)
        prepared.graph, prepared.signature = Replayed(runner, bucket, prepared), prepared.plan.signature
        return {}

    monkeypatch.setattr(DecodeRunner, "_capture_graph", capture)
    runner = new_runner(step)
    runner.uses_graphs = True
    runner.capture()
    tables = [[[1, 2, 3, 4], [5, 6, 7, 1], [2, 3, 4, 5]]]
    for length in range(4, 16):
        if length in (7, 12):
            prepared = runner._buckets[4, "reference"]
            graph, prepared.signature = prepared.graph, ("another plan",)
        seen.clear()
        found = runner.run([4, 14, 24], [length] * 3, tables, None if length == 4 else [0, 1, 2])
        assert found.tolist() == [length, length + 10, length + 20]
        step_of_rows = ([*found.tolist(), 0], [length - 1] * 3 + [0])
        assert seen == [([0] * 4, [0] * 4)] * (2 * (length in (7, 12))) + [step_of_rows]
    assert runner.counts == {"replay": 10, "guard": 2}
    assert runner._buckets[4, "reference"].graph is not graph
    runner.verify([1, 2], [3, 4], [tables[0][:2]])


def test_a_failing_row_leaves_the_runner_usable() -> None:
    runner = new_runner(lambda token_ids, positions: token_ids)
    with pytest.raises(BucketError, match="a batch of 7 rows: the ladder covers 1 to 6"):
        runner.run(*rows(7))
    with pytest.raises(InvalidArgumentError, match="its table has 1"):
        runner.run([1], [9], [[[1]]])
    for page in (-1, CACHE.num_pages):
        with pytest.raises(InvalidArgumentError, match=f"hold pages {page} to {page}, the cache has pages 0 to 7"):
            runner.run([1], [1], [[[page]]])
    assert runner.run(*rows(2)).tolist() == [0, 1]


def test_nothing_runs_after_close() -> None:
    runner = new_runner(lambda token_ids, positions: token_ids)
    runner.capture()
    runner.close()
    with pytest.raises(CaptureError, match="the runner is closed"):
        runner.run(*rows(2))


def test_what_no_runner_is(monkeypatch) -> None:
    with pytest.raises(InvalidArgumentError, match="its first dimension must be the 6 rows"):
        new_runner(lambda token_ids, positions: token_ids.sum()).capture()
    for returned, kind in ((None, "NoneType"), ({"logits": torch.zeros(6)}, "dict"), ((torch.zeros(6), 1), "tuple")):
        with pytest.raises(InvalidArgumentError, match=f"step_fn returned a {kind}: return a tensor or a tuple of"):
            new_runner(lambda token_ids, positions, it=returned: it).capture()
    for step_fn, words in (
        (
            lambda _, positions: (positions,) * (1 + (len(positions) == 6)),
            "returned 1 tensors, 2 before: return as many",
        ),
        (lambda _, positions: positions[: 1 if len(positions) < 6 else 6], "its first dimension must be the 4 rows"),
    ):
        runner = new_runner(step_fn)
        runner.capture()
        with pytest.raises(InvalidArgumentError, match=words):
            runner.run([1] * 3, [1] * 3, [[[1]] * 3])
    with pytest.raises(InvalidArgumentError, match="groups is one AttentionSpec: give a list"):
        Planner(SPEC, CACHE, "cpu")
    with pytest.raises(InvalidArgumentError, match="capture='some': choose all or lazy"):
        new_runner(lambda token_ids, positions: token_ids, capture="some")
    with pytest.raises(InvalidArgumentError, match="the ladder ends at 4, the state holds 6 rows"):
        DecodeRunner(lambda t, p: t, new_state(), Planner([SPEC], CACHE, "cpu"), ladder=BucketLadder([4]))


def test_parts_that_disagree() -> None:
    state, ladder = new_state(), BucketLadder([6])
    for planner, words in (
        (Planner([SPEC], replace(CACHE, page_size=8), "cpu"), "the state has page_size 4, the planner 8"),
        (Planner([replace(SPEC, window=3)], CACHE, "cpu"), "the state has layer groups"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            DecodeRunner(lambda t, p: t, state, planner, ladder=ladder)


def test_the_reference_is_not_captured(monkeypatch) -> None:
    """As on CUDA, where the reference's plan makes tensors of the rows' lengths."""
    state, planner = new_state(), Planner([SPEC], CACHE, "cpu")
    for part in (state, planner):
        monkeypatch.setattr(part, "device", torch.device("cuda"))
    assert not ReferenceBackend.capturable
    with pytest.raises(BackendError, match="backend reference cannot run inside a CUDA graph: pass enforce_eager=True"):
        DecodeRunner(lambda t, p: t, state, planner, ladder=BucketLadder([6]))
