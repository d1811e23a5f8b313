"""The best ladder for recorded traffic, against every ladder there is."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphattn import BucketLadder, InvalidArgumentError, LadderChoice, Traffic, best_ladder, best_ladders

TIMES = {1: 0.010, 2: 0.011, 4: 0.012, 8: 0.016}
TRAFFIC = Traffic(max_batch=8, steps={1: 10, 3: 100, 8: 5})


@st.composite
def cases(draw) -> tuple[Traffic, dict[int, float], dict[int, int] | None]:
    """Traffic, times in any order (with many ties, or with none) and bytes."""
    largest = draw(st.integers(1, 9))
    sizes = sorted({largest, *draw(st.sets(st.integers(1, largest)))})
    time = draw(st.sampled_from([st.integers(0, 3), st.floats(0, 10, allow_subnormal=False)]))
    rows = st.dictionaries(st.integers(1, largest), st.integers(1, 20), min_size=1)
    size_bytes = st.none() | st.fixed_dictionaries({size: st.integers(0, 9) for size in sizes})
    return (
        Traffic(max_batch=largest, steps=draw(rows)),
        {size: draw(time) for size in sizes},
        draw(size_bytes),
    )


def every(traffic: Traffic, times: dict[int, float], sizes_bytes: dict[int, int]) -> list[tuple]:
    """(exact seconds, buckets, bytes, sizes) of every ladder."""
    *others, largest = sorted(times)
    found = []
    for count in range(len(others) + 1):
        for chosen in combinations(others, count):
            ladder = BucketLadder(chosen, largest)
            seconds = sum(Fraction(times[ladder.pick(rows)]) * n for rows, n in traffic.steps.items())
            found.append((seconds, len(ladder), sum(sizes_bytes[size] for size in ladder), ladder.sizes))
    return found


@given(cases(), st.none() | st.integers(1, 9), st.none() | st.integers(0, 30))
def test_no_ladder_is_better(case, max_buckets: int | None, budget: int | None) -> None:
    traffic, times, size_bytes = case
    given_bytes = size_bytes or dict.fromkeys(times, 0)
    max_bytes = None if size_bytes is None or budget is None else budget + size_bytes[traffic.max_batch]
    found = best_ladders(traffic, times, bucket_bytes=size_bytes, max_buckets=max_buckets, max_bytes=max_bytes)
    allowed = [each for each in every(traffic, times, given_bytes) if max_bytes is None or each[2] <= max_bytes]
    for at_most in range(1, (max_buckets or len(times)) + 1):
        best = min(each[:3] for each in allowed if each[1] <= at_most)
        choice = found[min(at_most, len(found)) - 1]
        seconds, *rest, _ = next(each for each in allowed if each[3] == choice.sizes)
        if max_bytes is None:  # bytes are no matter then
            best, rest = best[:2], rest[:1]
        assert (seconds, *rest) == best
        assert choice.seconds == float(seconds) and choice.bytes == sum(given_bytes[size] for size in choice.sizes)
    assert len(found) <= len(times) and all(choice.sizes[-1] == traffic.max_batch for choice in found)
    assert len({choice.sizes for choice in found[-2:]}) == len(found[-2:]), "the last one gains nothing"


@given(cases())
def test_a_ladder_adds_up_what_its_steps_take(case) -> None:
    traffic, times, _ = case
    choice = best_ladder(traffic, times)
    assert choice.ladder.sizes == choice.sizes
    assert choice.ladder.seconds(traffic.steps, times) == pytest.approx(choice.seconds)


def test_the_table_says_what_each_further_bucket_buys() -> None:
    table = best_ladders(TRAFFIC, TIMES)
    assert [choice.sizes for choice in table] == [(8,), (4, 8), (1, 4, 8)]
    assert [choice.seconds for choice in table] == pytest.approx([115 * 0.016, 110 * 0.012 + 0.08, 0.1 + 1.2 + 0.08])
    assert best_ladder(TRAFFIC, TIMES, max_buckets=2) == table[1]
    assert isinstance(table[0], LadderChoice) and table[0].bytes == 0


def test_a_budget_can_leave_a_gap_in_the_table() -> None:
    size_bytes = {1: 4, 2: 1, 4: 4, 8: 2}
    table = best_ladders(TRAFFIC, TIMES, bucket_bytes=size_bytes, max_bytes=3)
    assert [(choice.sizes, choice.bytes) for choice in table] == [((8,), 2), ((2, 8), 3)]


def test_many_candidates() -> None:
    traffic = Traffic(max_batch=256, steps={rows: 1 + rows * 37 % 101 for rows in range(1, 257)})
    times = {rows: 0.001 + rows * 3e-5 for rows in range(4, 257, 4)}
    table = best_ladders(traffic, times, max_buckets=12)
    assert [len(choice.sizes) for choice in table] == list(range(1, 13))
    blocks = {rows: 2 + rows % 3 for rows in times}
    assert best_ladder(traffic, times, bucket_bytes=blocks, max_bytes=30).bytes <= 30


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"traffic": Traffic(max_batch=8, steps={})}, "the traffic has no steps: record some requests first"),
        ({"traffic": Traffic(max_batch=9, steps={1: 1})}, r"no step_seconds for 9 rows, only for \[1, 2, 4, 8\]"),
        ({"traffic": Traffic(max_batch=4, steps={1: 1})}, "bucket 8 is larger than max_batch=4"),
        ({"step_seconds": TIMES | {2: float("nan")}}, r"step_seconds\[2\]=nan: give a finite time"),
        ({"step_seconds": TIMES | {2: -1.0}}, r"step_seconds\[2\]=-1.0"),
        ({"max_buckets": 0}, "max_buckets=0: the largest batch takes one"),
        ({"max_bytes": 5}, "max_bytes=5 without bucket_bytes"),
        ({"bucket_bytes": {8: 1}}, r"no bucket_bytes for \[1, 2, 4\]"),
        ({"bucket_bytes": dict.fromkeys(TIMES, -1)}, r"bucket_bytes\[1\]=-1: give an int"),
        (
            {"bucket_bytes": {1: 1, 2: 1, 4: 1, 8: 6}, "max_bytes": 5},
            "max_bytes=5: the bucket of the largest batch, 8 rows, takes 6 alone .*; raise the budget or lower",
        ),
    ],
)
def test_what_cannot_be_chosen_from(options: dict, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        best_ladder(**({"traffic": TRAFFIC, "step_seconds": TIMES} | options))


def test_a_ladder_says_which_times_it_lacks() -> None:
    with pytest.raises(InvalidArgumentError, match=r"no step_seconds for \[6\], only for \[8\]: measure them"):
        BucketLadder([2, 6, 8]).seconds({5: 1, 8: 1}, {8: 1.0})


def test_traffic_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "batches.json"
    TRAFFIC.save(path)
    assert json.loads(path.read_text()) == {"schema_version": 1, "max_batch": 8, "steps": {"1": 10, "3": 100, "8": 5}}
    assert Traffic.load(path) == TRAFFIC and TRAFFIC.num_steps == 115


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a JSON list, not an object: give recorded batches"),
        ('{"schema_version": 2}', "has schema_version 2, this version of graphattn reads 1"),
        ("{}", "has schema_version None"),
        ('{"schema_version": 1, "steps": {}}', "lacks max_batch"),
        ('{"schema_version": 1, "max_batch": 4, "steps": [3]}', "they must be like"),
        ('{"schema_version": 1, "max_batch": 4, "steps": {"a": 3}}', "they must be like"),
        (
            '{"schema_version": 1, "max_batch": 4, "steps": {"5": 3}}',
            "3 steps of 5 rows: rows go from 1 to max_batch=4",
        ),
        ('{"schema_version": 1, "max_batch": 4, "steps": {"0": 3}}', "3 steps of 0 rows"),
        ('{"schema_version": 1, "max_batch": 4, "steps": {"3": -1}}', "-1 steps of 3 rows: give an int"),
        ('{"schema_version": 1, "max_batch": 0, "steps": {}}', "max_batch=0"),
    ],
)
def test_what_no_traffic_is(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "batches.json"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=words) as raised:
        Traffic.load(path)
    assert str(path) in str(raised.value)


def test_traffic_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be read as recorded batches: No such file"):
        Traffic.load(tmp_path / "no.json")
