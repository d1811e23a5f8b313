"""The draw inside the step: what `sample` draws, from numbers and sets that are sent only for rows that change."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from graphattn import draw
from graphattn.draw import sample
from graphattn.engine.draws import RowDraws
from graphattn.engine.idsets import BANNED, SEEN, IdSets, contains
from graphattn.engine.seats import seated
from graphattn.noise import keys_of, mix
from graphattn.sampling import Ask, RowSampling, SamplingParams

VOCAB = 64  # ends where a word of a set does
KINDS = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "min_p": 0.1},
    {"top_k": 1, "min_p": 0.9},
    {"temperature": 1e-38, "min_p": 1.0},
    {"temperature": 1e38},
    {"temperature": 2.5, "min_p": 1e-6},
    {"top_k": 5},
    {"top_k": 9, "top_p": 0.6},
    {"top_p": 0.8, "temperature": 1.4},
    {"top_p": 0.9, "min_p": 0.2, "top_k": 10**12},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"top_p": 0.9, "repetition_penalty": 0.7},
    {"temperature": 0, "top_p": 0.5},
)


@dataclass(eq=False)
class Text:
    """What a request is to the draw."""

    params: SamplingParams
    seed: int
    tokens: list[int]
    banned_until: int = 0
    stop_ids: frozenset[int] = frozenset()
    ask: Ask = field(init=False)

    def __post_init__(self) -> None:
        self.ask = Ask.of(self.params, self.seed, self.banned_until)

    def row(self) -> RowSampling:
        banned = tuple(self.stop_ids) if len(self.tokens) < self.banned_until else ()
        return RowSampling(self.params, self.seed, len(self.tokens), self.tokens, banned)


def some_texts(count: int, seed: int) -> list[Text]:
    rng = random.Random(seed)
    return [
        Text(
            SamplingParams(**rng.choice(KINDS)),
            rng.choice([0, 5, 2**63 - 1, rng.getrandbits(63)]),
            rng.choices(range(VOCAB), k=rng.randrange(1, 30)),
            rng.choice([0, 15]),
            frozenset(rng.choices(range(VOCAB), k=40)),
        )
        for _ in range(count)
    ]


def logits_of(count: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    logits = (torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    logits[:, 3::7] = -torch.inf
    return logits.round() if seed % 3 == 0 else logits  # many of the largest tie


class Drawer:
    """RowDraws as a step calls it."""

    def __init__(self, max_batch: int, dtype: torch.dtype = torch.float32):
        self.drawn = torch.full((max_batch + 3,), -1, dtype=torch.int32)
        self.row_draws = RowDraws(self.drawn, max_batch=max_batch, vocab=VOCAB, dtype=dtype)

    def launch(self, logits: torch.Tensor, texts: Sequence[Text], last: Sequence[int]) -> torch.Tensor:
        """Draws with as many rows of padding behind as there are logits for."""
        padding = [0] * (len(logits) - len(texts))
        token_ids = torch.tensor([*last, *padding], dtype=torch.int32)
        positions = torch.tensor([*(len(text.tokens) - 1 for text in texts), *padding], dtype=torch.int32)
        return self.row_draws(logits, token_ids, positions)[: len(texts)]

    def step(self, logits: torch.Tensor, texts: Sequence[Text]) -> list[int]:
        with self.row_draws.staged(texts):
            return self.launch(logits, texts, [text.tokens[-1] for text in texts]).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("elements", [1, 200, 1 << 22])
def test_draws_what_sample_draws(dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "_BLOCK_ELEMENTS", elements)
    drawer = Drawer(9, dtype)
    for seed in range(12):
        texts = some_texts(seed % 9 + 1, seed)
        logits, before = logits_of(len(texts), seed, dtype), drawer.drawn.clone()
        token_ids = drawer.step(logits, texts)
        assert token_ids == sample(logits, [text.row() for text in texts]).token_ids.tolist()
        assert drawer.drawn.tolist() == [*token_ids, *before[len(texts) :].tolist()]


def test_the_way_without_reading_back_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device without our kernel: every row takes the longest way."""
    texts, logits = some_texts(9, seed=3), logits_of(9, seed=4)
    want = Drawer(9).step(logits, texts)
    drawer = Drawer(9)
    monkeypatch.setattr(drawer.row_draws, "_reads", False)
    assert drawer.step(logits, texts) == want


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 2)), min_size=1))
def test_keys_are_those_of_rows(rows: list[tuple[int, int]]) -> None:
    seeds, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
    golden = 0x9E3779B97F4A7C15
    wanted = [mix(mix(seed + golden) + (position + 1) * golden) for seed, position in rows]
    assert [key % 2**64 for key in keys_of(seeds, positions).tolist()] == wanted


@given(st.sets(st.integers(0, 99)), st.sets(st.integers(0, 99)), st.integers(0, 1))
def test_sets_hold_what_was_put_last(first: set[int], second: set[int], which: int) -> None:
    sets = IdSets(3, 100, torch.device("cpu"))
    for ids in (first, second):
        sets.put(which, 1, list(ids))
    assert set(contains(sets.words_2RW[which], 100)[1].nonzero()[:, 0].tolist()) == second
    sets.words_2RW[which, 1] = 0
    assert not sets.words_2RW.any() and sets.num_sent == 2


def test_rows_that_nobody_was_in_ask_for_nothing() -> None:
    fields = Drawer(3).row_draws._mirror.fields[:, :3]
    seeds, floats = fields[0].tolist(), fields[1:].view(torch.float64).tolist()
    assert [Ask(*numbers) for numbers in zip(seeds, *floats, strict=True)] == [Ask(seed=0)] * 3


def test_only_rows_that_change_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    drawer, logits = Drawer(6), logits_of(6, seed=1)
    texts = [Text(SamplingParams(temperature=0.5 + row), 7 + row, [3]) for row in range(6)]

    def check(texts: list[Text], sent: int) -> None:
        before, some = drawer.row_draws.num_sent, logits[: len(texts)]
        assert drawer.step(some, texts) == sample(some, [text.row() for text in texts]).token_ids.tolist()
        assert drawer.row_draws.num_sent - before == sent

    check(texts, 2 * 6)  # seed and temperature; to begin with rows are greedy, with all else off
    check(texts, 0)
    check(texts[:4], 0)
    check([texts[5], *texts[1:]], 2)
    send = drawer.row_draws._mirror._send

    def interrupted(sends: bool, *args) -> None:
        if sends:
            send(*args)
        raise KeyboardInterrupt

    for sends in (True, False):
        with monkeypatch.context() as patched:
            patched.setattr(drawer.row_draws._mirror, "_send", partial(interrupted, sends))
            with pytest.raises(KeyboardInterrupt):
                drawer.step(logits, [texts[4], *texts[1:]])
        check([texts[5], *texts[1:]], 2)


def test_sets_are_sent_once_and_follow_the_tokens() -> None:
    drawer = Drawer(3)
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    texts = [Text(params, row, [row, 9], banned_until=5, stop_ids=frozenset({1, 2})) for row in range(2)]
    sent = []
    for seed in range(8):
        before = drawer.row_draws._sets.num_sent
        for text, token_id in zip(texts, drawer.step(logits_of(3, seed)[:3], texts), strict=True):
            text.tokens.append(token_id)
        sent.append(drawer.row_draws._sets.num_sent - before)
    assert sent == [4, *[0] * 7]
    seen, banned = (contains(drawer.row_draws._sets.words_2RW[which], VOCAB) for which in (SEEN, BANNED))
    for row, text in enumerate(texts):
        assert set(seen[row].nonzero()[:, 0].tolist()) == {*text.tokens[:-1]}
        assert set(banned[row].nonzero()[:, 0].tolist()) == {1, 2}


def test_a_place_is_another_for_who_asks_the_same() -> None:
    """One leaves, and one of the same seed and length whose text is another comes in its place."""
    drawer, params = Drawer(1), SamplingParams(temperature=0, repetition_penalty=5.0)
    first = Text(params, 1, [5, 6, 7])
    first.tokens += drawer.step(logits_of(1, 1), [first])
    second = Text(params, 1, [8, 9, 10, 11])
    assert first.ask == second.ask and len(first.tokens) == len(second.tokens)
    logits = torch.full((1, VOCAB), 1.0)
    logits[0, 8], logits[0, 5] = 4.0, 3.0
    assert drawer.step(logits, [second]) == sample(logits, [second.row()]).token_ids.tolist() == [5]


def test_padding_is_seen_by_nobody() -> None:
    drawer, params = Drawer(2), SamplingParams(temperature=0, repetition_penalty=5.0)
    first, second = (Text(params, row, [5, 6]) for row in range(2))
    logits = torch.full((2, VOCAB), 1.0)
    logits[:, 0], logits[:, 1] = 3.0, 2.0
    assert drawer.step(logits, [first, second]) == [0, 0]
    assert drawer.step(logits, [first]) == [0]  # beside a row of padding, where the second was
    second.tokens.append(7)
    assert drawer.step(logits, [first, second]) == [0, 0]


class Steps(RuleBasedStateMachine):
    """Texts come, go, change places and are set back; every step draws for each what `sample` draws for it alone.

    The last token of a text may be one that the host does not know, as where it reads what was drawn a step late.
    """

    MAX_BATCH = 4

    def __init__(self):
        super().__init__()
        self.drawer, self.rows, self.away, self.count = Drawer(self.MAX_BATCH), [], [], 0

    @precondition(lambda self: len(self.rows) < self.MAX_BATCH)
    @rule(kind=st.sampled_from(KINDS), seed=st.integers(0, 99), length=st.integers(1, 9), until=st.integers(0, 14))
    def join(self, kind: dict, seed: int, length: int, until: int) -> None:
        tokens = random.Random(seed).choices(range(VOCAB), k=length)
        self.rows = [*self.rows, Text(SamplingParams(**kind), seed, tokens, until, frozenset(range(seed % 9, 60)))]

    @precondition(lambda self: self.rows)
    @rule(at=st.integers(0, 3), back=st.booleans())
    def leave(self, at: int, back: bool) -> None:
        text = self.rows[at % len(self.rows)]
        self.rows = [each for each in self.rows if each is not text]
        self.away += [text] * back

    @precondition(lambda self: self.away and len(self.rows) < self.MAX_BATCH)
    @rule(grown=st.integers(0, 2))
    def come_back(self, grown: int) -> None:
        """Preempted and prefilled again, which drew a token or none."""
        text = self.away.pop()
        text.tokens += [17] * grown
        self.rows = [*self.rows, text]

    @precondition(lambda self: self.rows)
    @rule(order=st.permutations(range(4)))
    def change_places(self, order: list[int]) -> None:
        self.rows = [self.rows[at] for at in order if at < len(self.rows)]

    @precondition(lambda self: self.rows)
    @rule(read_late=st.booleans(), padding=st.integers(0, 3), ways=st.sampled_from(["runs", "fails", "runs and fails"]))
    def step(self, read_late: bool, padding: int, ways: str) -> None:
        self.count += 1
        bucket = min(len(self.rows) + padding, self.MAX_BATCH)
        logits, last = logits_of(bucket, self.count), [text.tokens[-1] for text in self.rows]
        wanted = [
            sample(one[None], [text.row()]).token_ids.item() for one, text in zip(logits, self.rows, strict=False)
        ]
        for text in self.rows if read_late else ():
            if len(text.tokens) > 1:  # the prompt is always known
                text.tokens[-1] = -1
        try:
            with self.drawer.row_draws.staged(self.rows):
                if ways != "fails":
                    token_ids = self.drawer.launch(logits, self.rows, last)
                if ways != "runs":
                    raise RuntimeError("the launch")
        except RuntimeError:
            token_ids = None
        for text, token_id in zip(self.rows, last, strict=True):
            text.tokens[-1] = token_id
        if token_ids is not None:
            assert token_ids.tolist() == wanted
        if ways == "runs":
            for text, token_id in zip(self.rows, wanted, strict=True):
                text.tokens.append(token_id)

    @invariant()
    def nobody_asks_for_more_than_was_sent(self) -> None:
        assert len(self.drawer.row_draws._next_lens) <= self.MAX_BATCH


TestSteps = Steps.TestCase


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
