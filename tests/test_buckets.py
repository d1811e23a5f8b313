"""The ladder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphattn import BucketError, BucketLadder, InvalidArgumentError


@given(st.integers(1, 600))
def test_default_ends_at_the_exact_maximum_and_covers_everything(max_batch: int) -> None:
    ladder = BucketLadder.default(max_batch)
    assert ladder.max == max_batch
    assert list(ladder) == sorted(set(ladder))
    for rows in range(1, max_batch + 1):
        bucket = ladder.pick(rows)
        assert bucket >= rows
        assert not any(rows <= smaller < bucket for smaller in ladder)


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(50, 60))
def test_given_sizes_get_the_maximum_too(sizes: list[int], max_batch: int) -> None:
    assert BucketLadder(sizes, max_batch).sizes == tuple(sorted({*sizes, max_batch}))


@pytest.mark.parametrize("rows", [0, -1, 7])
def test_outside_the_ladder(rows: int) -> None:
    with pytest.raises(BucketError, match=f"a batch of {rows} rows: the ladder covers 1 to 6"):
        BucketLadder([1, 2, 4], 6).pick(rows)


@pytest.mark.parametrize(
    ("sizes", "max_batch", "words"),
    [
        ([1], 0, "max_batch=0"),
        ([], None, "at least one is needed"),
        ([0, 2], None, "at least one is needed, each at least 1"),
        ([1, 9], 8, "bucket 9 is larger than max_batch=8"),
    ],
)
def test_what_no_ladder_is(sizes: list[int], max_batch: int | None, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        BucketLadder(sizes, max_batch)


def test_waste_is_the_share_of_padding() -> None:
    ladder = BucketLadder([1, 4])
    assert ladder.waste({1: 3}) == 0
    assert ladder.waste({2: 1, 4: 1}) == pytest.approx(2 / 8)
    assert ladder.waste({}) == 0
