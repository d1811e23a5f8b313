"""The draw inside the step: what `sample` draws, from numbers that are sent only for rows that change."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphattn.draw import _key as key_of_row
from graphattn.draw import keys_of, sample, sample_again
from graphattn.engine import draws
from graphattn.engine.draws import Ask, RowDraws, is_drawn_in_step
from graphattn.engine.executor import seated
from graphattn.sampling import RowSampling, SamplingParams

KINDS = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "min_p": 0.1},
    {"top_k": 1, "min_p": 0.9},
    {"temperature": 1e-38, "min_p": 1.0},
    {"temperature": 1e38},
    {"temperature": 2.5, "min_p": 1e-6},
)


def some_rows(count: int, seed: int) -> list[RowSampling]:
    rng = random.Random(seed)
    return [
        RowSampling(SamplingParams(**rng.choice(KINDS)), rng.choice([0, 5, 2**63 - 1, rng.getrandbits(63)]), position)
        for position in (rng.randrange(1, 5000) for _ in range(count))
    ]


def stage(row_draws: RowDraws, rows: list[RowSampling]) -> torch.Tensor:
    """Returns the positions of the tokens before those to be drawn."""
    row_draws.stage([Ask.of(row.params, row.seed) for row in rows])
    return torch.tensor([row.position - 1 for row in rows], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("elements", [1, 400, 1 << 22])
def test_draws_what_sample_draws(dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "BLOCK_ELEMENTS", elements)
    drawn = torch.full((12,), -1, dtype=torch.int32)
    row_draws = RowDraws(drawn, max_batch=9, dtype=dtype)
    for seed in range(12):
        generator, rows = torch.Generator().manual_seed(seed), some_rows(seed % 9 + 1, seed)
        logits = (torch.randn(len(rows), 190, generator=generator) * 3).to(dtype)
        logits[:, ::7] = -torch.inf
        if seed % 3 == 0:
            logits = logits.round()  # many of the largest tie
        before = drawn.clone()
        token_ids = row_draws(logits, stage(row_draws, rows))
        assert token_ids.dtype == torch.int64
        assert torch.equal(token_ids, sample(logits, rows).token_ids)
        assert drawn.tolist() == [*token_ids.tolist(), *before[len(rows) :].tolist()]


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 2)), min_size=1))
def test_keys_are_those_of_rows(rows: list[tuple[int, int]]) -> None:
    seeds, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
    wanted = [key_of_row(RowSampling(SamplingParams(), seed, position)) for seed, position in rows]
    assert [key % 2**64 for key in keys_of(seeds, positions).tolist()] == wanted


def test_only_rows_that_change_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    row_draws = RowDraws(torch.zeros(6, dtype=torch.int32), max_batch=6, dtype=torch.float32)
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    rows = [RowSampling(SamplingParams(temperature=0.5 + row), 7 + row, 3) for row in range(6)]

    def check(rows: list[RowSampling], sent: int) -> None:
        before = row_draws.num_sent
        assert row_draws(logits[: len(rows)], stage(row_draws, rows)).tolist() == (
            sample(logits[: len(rows)], rows).token_ids.tolist()
        )
        assert row_draws.num_sent - before == sent

    check(rows, 3 * 6)
    check(rows, 0)
    check(rows[:4], 0)
    check([rows[5], *rows[1:]], 2)
    send = row_draws._mirror._send

    def interrupted(sends: bool, *args) -> None:
        if sends:
            send(*args)
        raise KeyboardInterrupt

    for sends in (True, False):
        with monkeypatch.context() as patched:
            patched.setattr(row_draws._mirror, "_send", partial(interrupted, sends))
            with pytest.raises(KeyboardInterrupt):
                stage(row_draws, [rows[4], *rows[1:]])
        check([rows[5], *rows[1:]], 2)


@pytest.mark.parametrize(
    ("params", "inside"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0, "top_p": 0.5}, True),
        ({"min_p": 0.5}, True),
        ({"top_k": 1}, True),
        ({"top_k": 2}, False),
        ({"top_p": 0.5}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"temperature": 0, "logprobs": 0}, False),
    ],
    ids=str,
)
def test_what_is_drawn_in_the_step(params: dict, inside: bool) -> None:
    params = SamplingParams(**params)
    assert is_drawn_in_step(params) == inside
    ask = Ask.of(params, -1)
    assert ask.seed == 2**63 - 1
    assert (ask.temperature > 0) == (inside and not params.is_greedy)


def test_some_rows_are_drawn_again() -> None:
    logits = torch.randn(5, 60, generator=torch.Generator().manual_seed(1))
    kinds = ({"top_p": 0.5}, {"temperature": 0}, {"top_k": 3, "logprobs": 2}, {}, {"temperature": 0, "logprobs": 1})
    rows = [RowSampling(SamplingParams(**kind), 3, row) for row, kind in enumerate(kinds)]
    whole, token_ids = sample(logits, rows), torch.tensor([9, 9, 9, 9, 9])
    for chosen in ([0], [2, 0], [4], list(range(5))):
        some = sample_again(logits, token_ids, {row: rows[row] for row in sorted(chosen)})
        wanted = [whole.token_ids[row].item() if row in chosen else 9 for row in range(5)]
        assert some.token_ids.tolist() == wanted
        if chosen == [0]:
            assert some.logprobs is None and some.top_ids is None and some.top_logprobs is None
            continue
        for row in set(chosen) & {2, 4}:
            count = rows[row].params.logprobs
            assert some.logprobs[row] == whole.logprobs[row]
            assert torch.equal(some.top_ids[row, :count], whole.top_ids[row, :count])
            assert torch.equal(some.top_logprobs[row, :count], whole.top_logprobs[row, :count])
        assert some.logprobs[1].isnan() and (some.top_ids[1] == -1).all()
    assert token_ids.tolist() == [9] * 5


@given(st.data())
def test_seats(data) -> None:
    """Everybody has one seat and keeps it; nobody moves but to where one left, and then the last."""
    before, names = [], st.lists(st.integers(0, 12), unique=True, max_size=9)
    for _ in range(6):
        requests = data.draw(names)
        rows = seated(before, requests)
        assert sorted(rows) == sorted(requests)
        stayed = [request for request in before if request in requests]
        moved = [request for request in stayed if before.index(request) != rows.index(request)]
        assert len(moved) <= max(0, len(before) - len(rows))
        assert all(before.index(request) >= len(rows) for request in moved)
        before = rows
