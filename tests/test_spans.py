"""Which backend serves a bucket: the table, and the choice from measured steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphattn import BackendSpan, InvalidArgumentError, StepTime, best_spans
from graphattn.spans import MARGIN, backend_at, checked_spans


def time_at(context: int, p50: float, spread: float = 0.01) -> StepTime:
    return StepTime(context=context, p20=p50 * (1 - spread), p50=p50, p80=p50 * (1 + spread))


def chosen(measured: dict[str, dict[int, float]], spread: float = 0.01) -> list[tuple[int, str]]:
    times = {name: [time_at(*each, spread) for each in steps.items()] for name, steps in measured.items()}
    return [(span.context, span.backend) for span in best_spans(times)]


@pytest.mark.parametrize(
    ("ours", "theirs", "spans"),
    [
        ({512: 1, 2048: 2}, {512: 2, 2048: 3}, [(1, "ours")]),
        ({512: 2, 2048: 3}, {512: 1, 2048: 2}, [(1, "theirs")]),
        ({512: 1, 2048: 2}, {512: 1, 2048: 2}, [(1, "ours")]),  # alike: the first
        ({512: 1, 2048: 2, 8192: 4.0}, {512: 2, 2048: 3, 8192: 3.5}, [(1, "ours"), (8192, "theirs")]),
        ({512: 1, 2048: 2, 8192: 4.0}, {512: 0.8, 2048: 3, 8192: 5}, [(1, "theirs"), (513, "ours")]),
        ({512: 1, 2048: 2, 8192: 4.0}, {512: 3, 2048: 1.5, 8192: 9}, [(1, "ours"), (2048, "theirs"), (2049, "ours")]),
        ({512: 1, 2048: 2}, {512: 1.5, 2048: 1.96}, [(1, "ours")]),  # 2 % are not enough
        ({512: 1}, {512: 0.9, 2048: 9}, [(1, "theirs")]),  # a context of one alone does not count
    ],
)
def test_who_serves(ours: dict, theirs: dict, spans: list) -> None:
    assert chosen({"ours": ours, "theirs": theirs}) == spans


def test_steps_that_vary_more_than_they_gain_are_not_told_apart() -> None:
    measured = {"ours": {512: 1.0, 2048: 2.0}, "theirs": {512: 1.5, 2048: 1.8}}
    assert chosen(measured, spread=0.05) == [(1, "ours"), (2048, "theirs")]
    assert chosen(measured, spread=0.06) == [(1, "ours")]


CONTEXTS = st.lists(st.integers(1, 9999), min_size=1, max_size=6, unique=True).map(sorted)


@given(CONTEXTS.flatmap(lambda at: st.tuples(st.just(at), *[st.lists(st.floats(0.5, 2), min_size=len(at))] * 3)))
def test_the_choice_is_never_clearly_beaten(case) -> None:
    contexts, *times = case
    measured = {name: dict(zip(contexts, each, strict=False)) for name, each in zip("abc", times, strict=True)}
    spans = best_spans({name: [time_at(*each) for each in steps.items()] for name, steps in measured.items()})
    assert checked_spans(spans) == spans
    served = {backend_at(spans, context) for context in contexts}
    assert served == {span.backend for span in spans}, "nobody serves but where it was measured to be best"

    def regret(name: str) -> float:
        return sum(measured[name][at] / min(steps[at] for steps in measured.values()) for at in contexts)

    base = min(measured, key=regret)
    for context in contexts:
        name, best = backend_at(spans, context), min(steps[context] for steps in measured.values())
        assert measured[name][context] <= measured[base][context]
        clearly = best <= (1 - MARGIN) * measured[base][context] and best * 1.01 < measured[base][context] * 0.99
        assert measured[name][context] == (best if clearly else measured[base][context])
    for low, high in zip(contexts, contexts[1:], strict=False):
        if high > low + 1 and base in (backend_at(spans, low), backend_at(spans, high)):
            assert backend_at(spans, low + 1) == base or backend_at(spans, low) == backend_at(spans, high)


@pytest.mark.parametrize("measured", [{}, {"ours": {}}, {"ours": {512: 1}, "theirs": {2048: 1}}])
def test_nothing_to_choose_from(measured: dict) -> None:
    with pytest.raises(InvalidArgumentError, match="no context at which all backends were measured"):
        chosen(measured)


@pytest.mark.parametrize("starts", [[], [2], [1, 1], [1, 9, 4]])
def test_spans_must_cover_every_context(starts: list[int]) -> None:
    with pytest.raises(InvalidArgumentError, match="the first begins at 1, the others ascend"):
        checked_spans([BackendSpan(context=start, backend="ours") for start in starts])
