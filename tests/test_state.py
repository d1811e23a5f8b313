"""Rows that the device moves on by itself, against what plain Python says they are, whatever is asked and fails."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from graphattn import AttentionSpec, InvalidArgumentError, StepState
from graphattn.batch import csr_arrays
from graphattn.mirror import UNKNOWN, Mirror

SPEC = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4)
PAGE, LONGEST, ROWS, GROUPS, PAGES = 4, 40, 7, 2, 500


class Fault(Exception):
    pass


class Row:
    """What a row is, in Python alone."""

    def __init__(self, rng: random.Random):
        self.rng, self.length = rng, rng.randint(1, LONGEST)
        self.tables: list[list[int]] = [[] for _ in range(GROUPS)]
        self.token, self.place = rng.randint(0, 99), None
        self.grow()

    def grow(self, spare: int = 0) -> None:
        for table in self.tables:
            while len(table) * PAGE < self.length or spare:
                table.append(self.rng.randrange(1, PAGES))
                spare = max(0, spare - 1)


class Steps(RuleBasedStateMachine):
    """Joins, leaves, moves, jumps, failures; after every `feed` the device has what it should."""

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.state = StepState(
            max_batch=ROWS, max_seq_len=LONGEST, page_size=PAGE, groups=[SPEC] * GROUPS, device="cpu"
        )
        self.rows: list[Row] = []
        self.state.drawn.copy_(torch.randint(100, 200, self.state.drawn.shape, dtype=torch.int32))

    def stage(self, spare: int, checked: bool = False) -> int:
        self.bucket = min(ROWS, max(1, len(self.rows) + spare))
        tables = [[row.tables[group] for row in self.rows] for group in range(GROUPS)]
        if self.rng.random() < 0.2:
            tables = [[tuple(table) for table in group] for group in tables]
        drawn = [row.place for row in self.rows]
        self.batch = self.state.stage(
            self.bucket,
            [row.token for row in self.rows],
            [row.length for row in self.rows],
            tables,
            drawn=None if drawn.count(None) == len(drawn) and self.rng.random() < 0.5 else drawn,
            num_pages=[PAGES] * GROUPS if checked else self.rng.choice([None, [PAGES] * GROUPS]),
        )
        return self.bucket

    @precondition(lambda self: len(self.rows) < ROWS)
    @rule(at=st.integers(0, ROWS))
    def join(self, at: int) -> None:
        self.rows.insert(at, Row(self.rng))

    @precondition(lambda self: self.rows)
    @rule(at=st.integers(0, ROWS - 1), moves=st.booleans())
    def leave(self, at: int, moves: bool) -> None:
        row = self.rows.pop(at % len(self.rows))
        if moves and self.rows:
            self.rows[at % len(self.rows)] = row

    @rule()
    def shuffle(self) -> None:
        self.rng.shuffle(self.rows)

    @precondition(lambda self: self.rows)
    @rule(at=st.integers(0, ROWS - 1), length=st.integers(1, LONGEST))
    def jump(self, at: int, length: int) -> None:
        row = self.rows[at % len(self.rows)]
        row.length = length
        row.grow()

    @precondition(lambda self: self.rows)
    @rule(at=st.integers(0, ROWS - 1), spare=st.integers(0, 3))
    def other_pages(self, at: int, spare: int) -> None:
        row = self.rows[at % len(self.rows)]
        for table in row.tables:
            del table[self.rng.randint(0, len(table)) :]
        row.grow(spare)

    @precondition(lambda self: self.rows)
    @rule(at=st.integers(0, ROWS - 1), count=st.integers(1, 9))
    def window_moves_on(self, at: int, count: int) -> None:
        """Pages of one group are given back, and the null page takes their places."""
        table = self.rows[at % len(self.rows)].tables[-1]
        count = min(count, len(table) - 1)
        table[:count] = [0] * count

    @precondition(lambda self: self.rows)
    @rule(at=st.integers(0, ROWS - 1), source=st.sampled_from(["token", "own", "any"]))
    def source(self, at: int, source: str) -> None:
        row = self.rows[at % len(self.rows)]
        row.token = self.rng.randint(0, 99)
        any_place = self.rng.randrange(self.state.drawn.numel())
        row.place = {"token": None, "own": self.rows.index(row), "any": any_place}[source]

    @rule(spare=st.integers(0, 3))
    def stage_only(self, spare: int) -> None:
        self.stage(spare)

    @rule(spare=st.integers(0, 3), sent=st.booleans())
    def stage_interrupted(self, spare: int, sent: bool) -> None:
        send = self.state._mirror._send

        def interrupted(*args) -> None:
            if sent:
                send(*args)
            raise Fault

        kept = [(row, row.tables) for row in self.rows]
        for row in self.rows:
            if self.rng.random() < 0.5:
                row.tables = [[page % 9 + 1 for page in table] for table in row.tables]
        self.state._mirror._send = interrupted
        try:
            self.stage(spare)
        except Fault:
            for row, tables in kept:  # what was asked before is asked again
                row.tables = tables
        finally:
            del self.state._mirror._send

    @precondition(lambda self: self.rows)
    @rule(spare=st.integers(0, 3))
    def stage_refused(self, spare: int) -> None:
        row = self.rng.choice(self.rows)
        table, row.tables[-1] = row.tables[-1], []
        with pytest.raises(InvalidArgumentError, match="its table has 0"):
            self.stage(spare)
        row.tables[-1] = table

    @rule(spare=st.integers(0, 3), done=st.booleans(), captured=st.booleans())
    def feed_raises(self, spare: int, done: bool, captured: bool) -> None:
        bucket, derive = self.stage(spare), self.state._derive

        def failing(bucket: int) -> None:
            if done:
                derive(bucket)
            raise Fault

        self.state._derive = failing
        with pytest.raises(Fault):
            if captured:
                with self.state.fed(bucket):
                    self.state._derive(bucket)
            else:
                self.state.feed(bucket)
        del self.state._derive

    @rule(spare=st.integers(0, 3), goes_on=st.booleans(), captured=st.booleans())
    def step(self, spare: int, goes_on: bool, captured: bool, checked: bool = False) -> None:
        bucket = self.stage(spare, checked)
        known = self.state.drawn.flatten().tolist()
        if captured:
            with self.state.fed(bucket):
                self.state._derive(bucket)
        else:
            self.state.feed(bucket)
        padding = bucket - len(self.rows)
        lens = [row.length for row in self.rows] + [1] * padding
        tokens = [row.token if row.place is None else known[row.place] for row in self.rows] + [0] * padding
        assert self.state.token_ids(bucket).tolist() == self.batch.token_ids_N.tolist() == tokens
        assert self.state.positions(bucket).tolist() == [length - 1 for length in lens]
        assert self.batch.kv_lens_B.tolist() == lens
        for group in range(GROUPS):
            expected = csr_arrays([row.tables[group] for row in self.rows] + [[0]] * padding, lens, PAGE)
            for csr in (self.state.csr(bucket, group), self.batch.groups_host[group]):
                found = (csr.indptr_B1, csr.indices_P[: len(expected[1])], csr.last_page_len_B)
                assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        self.state.drawn[0, :bucket] = torch.randint(100, 200, (bucket,), dtype=torch.int32)
        if not goes_on:
            return
        for at, row in enumerate(self.rows):
            row.length, row.place = min(row.length + 1, LONGEST), at
            row.grow()

    @precondition(lambda self: self.rows)
    @rule(count=st.integers(1, 5))
    def steps_alone(self, count: int) -> None:
        """Rows that go on as they did are not sent, but for their new pages."""
        for row in self.rows:
            row.length = min(row.length, LONGEST - 6)
        self.step(0, True, True, checked=True)
        for captured in range(count):
            before = self.state.num_sent
            new_pages = sum(row.length % PAGE == 1 for row in self.rows) * GROUPS
            self.step(0, True, captured % 2 == 0, checked=True)
            assert self.state.num_sent - before <= new_pages


Steps.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestSteps = Steps.TestCase


def test_what_does_not_change_is_not_sent() -> None:
    state = StepState(max_batch=5, max_seq_len=64, page_size=4, groups=[SPEC], device="cpu")
    tables, lens = [[1, 2], [3], [4, 5, 6]], [5, 1, 9]
    state.stage(5, [7, 8, 9], lens, [tables])
    assert state.num_sent == 6 + 3 * 4 - 1, "pages; length, whether active, where the token is (not row 0's), token"
    state.feed(5)
    for step in range(1, 39):
        before = state.num_sent
        grown = 0
        for row, length in enumerate(lens):
            if (length + step) > 4 * len(tables[row]):
                tables[row].append(10 * step + row)
                grown += 1
        state.stage(5, [0, 0, 0], [length + step for length in lens], [tables], drawn=[0, 1, 2])
        assert state.num_sent - before == grown
        state.feed(5)
    before = state.num_sent
    state.stage(5, [0, 0], [lens[0] + 39, lens[2] + 39], [[tables[0], tables[2]]], drawn=[0, 2])
    assert state.num_sent - before == len(tables[2]) + 3, "the moved row's pages, length and source; one row left"


def test_only_the_pages_that_were_given_back_are_sent_when_a_window_moves_on() -> None:
    state = StepState(max_batch=1, max_seq_len=64, page_size=4, groups=[SPEC, SPEC], device="cpu")
    tables = [[[*range(1, 17)]], [[*range(17, 33)]]]
    state.stage(1, [7], [50], tables)
    state.feed(1)
    before = state.num_sent
    tables[1][0][:3] = [0, 0, 0]
    state.stage(1, [7], [51], tables, drawn=[0])
    assert state.num_sent - before == 3
    state.feed(1)
    assert [state.csr(1, group).indices_P[:13].tolist() for group in (0, 1)] == [
        [*range(1, 14)],
        [0, 0, 0, *range(20, 30)],
    ]


def test_more_than_is_sent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphattn.mirror.CHUNK", 7)
    state = StepState(max_batch=5, max_seq_len=64, page_size=4, groups=[SPEC, SPEC], device="cpu")
    tables = [[list(range(20 * row + group, 20 * row + group + 16)) for row in range(5)] for group in range(2)]
    state.stage(5, [1, 2, 3, 4, 5], [64] * 5, tables)
    state.feed(5)
    for group in range(2):
        assert state.csr(5, group).indices_P.tolist() == sum(tables[group], [])
    assert state.token_ids(5).tolist() == [1, 2, 3, 4, 5]


def test_tables_are_checked_against_another_cache() -> None:
    """Also those that were sent before, and pages that were not needed then."""
    state = StepState(max_batch=2, max_seq_len=16, page_size=4, groups=[SPEC], device="cpu")
    tables = [[[1, 9]]]
    state.stage(1, [0], [3], tables, num_pages=[8])
    with pytest.raises(InvalidArgumentError, match="hold pages 9 to 9, the cache has pages 0 to 7"):
        state.stage(1, [0], [5], tables, num_pages=[8])
    state.stage(1, [0], [5], tables)
    with pytest.raises(InvalidArgumentError, match="hold pages 1 to 9, the cache has pages 0 to 7"):
        state.stage(1, [0], [5], tables, num_pages=[8])
    state.stage(1, [0], [4], tables, num_pages=[8])
    with pytest.raises(InvalidArgumentError, match="hold pages 9 to 9"):
        state.stage(1, [0], [5], tables, num_pages=[8])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (([1.5], [1], [[[1]]]), "token_ids: 1.5 is among them"),
        (([2**40], [1], [[[1]]]), "token_ids: they go from"),
        (([1], [1.5], [[[1]]]), "seq_lens: 1.5 is among them"),
        (([1], ["1"], [[[1]]]), "seq_lens: '1' is among them"),
        (([1], [1], [[None]]), "tables of layer group 0 are NoneType: give table.pages"),
        (([1], [1], [[[1.5]]]), "tables of layer group 0: 1.5 is among them"),
        (([1], [1], [[[1]]], [0.5]), "drawn: 0.5 is among them"),
    ],
    ids=str,
)
def test_numbers_that_are_no_ints_are_refused(rows: tuple, words: str) -> None:
    state = StepState(max_batch=2, max_seq_len=8, page_size=4, groups=[SPEC], device="cpu")
    ids, lens, tables, *drawn = rows
    with pytest.raises(InvalidArgumentError, match=words):
        state.stage(2, ids, lens, tables, **({"drawn": drawn[0]} if drawn else {}))
    state.stage(2, [1], [1], [[[1]]])


def test_a_batch_keeps_its_own_host_numbers() -> None:
    """A plan may ask after the tables that it was staged from have changed."""
    state = StepState(max_batch=2, max_seq_len=16, page_size=4, groups=[SPEC], device="cpu")
    table = [1, 2]
    batch = state.stage(2, [0], [5], [[table]])
    table[1] = 7
    state.stage(2, [0], [6], [[table]])
    assert batch.groups_host[0].indices_P.tolist() == [1, 2, 0]
    assert batch.groups_host[0].last_page_len_B.tolist() == [1, 1]
    assert batch.groups_host is batch.groups_host


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_mirror_of_either_width(dtype: torch.dtype) -> None:
    rng, held = np.random.default_rng(0), np.zeros((3, 5), np.int64)
    mirror = Mirror(3, 5, tail=9, dtype=dtype, device="cpu")
    tail = np.zeros(9, np.int64)
    for _ in range(30):
        width = int(rng.integers(0, 6))
        wanted = mirror.known[:, :width].copy()
        chosen = rng.random(wanted.shape) < 0.3
        wanted[chosen] = rng.integers(-(2**31), 2**31, chosen.sum()) * (1 if dtype == torch.int32 else 2**20)
        places = rng.permutation(9)[: int(rng.integers(0, 4))]
        values = rng.integers(0, 99, len(places))
        before, changes = mirror.num_sent, int((wanted != held[:, :width]).sum())
        mirror.send(wanted, mirror.tail_at + places, values)
        assert mirror.num_sent - before == changes + len(places)
        held[:, :width], tail[places] = wanted, values
        assert np.array_equal(mirror.known, held)
        for index in range(3):
            assert mirror.field(index)[:5].tolist() == held[index].tolist()
        assert mirror.numbers[mirror.tail_at :].tolist() == tail.tolist()
    mirror.known[1, 2] = UNKNOWN
    mirror.field(1)[2] = 12345
    mirror.send(held)
    assert mirror.field(1)[2] == held[1, 2]
