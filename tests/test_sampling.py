"""Sampling against transformers' processors, exact probabilities and the promise that neighbours change nothing."""

from __future__ import annotations

import dataclasses
import math
from array import array

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from graphattn import draw, filters
from graphattn.draw import NOT_DRAWN, derive_seed, sample
from graphattn.errors import InvalidArgumentError
from graphattn.noise import exponentials, keys_of
from graphattn.sampling import Ask, RowSampling, SamplingParams, stop_ids

INF = math.inf
MASK, GOLDEN, MUL_1, MUL_2 = 2**64 - 1, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def row(seed: int = 0, position: int = 0, seen=(), banned=(), **params) -> RowSampling:
    return RowSampling(SamplingParams(**params), seed, position, seen, banned)


def normal(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def noise_of(rows: list[RowSampling], vocab: int) -> torch.Tensor:
    seeds, positions = [Ask.of(r.params, r.seed).seed for r in rows], [r.position for r in rows]
    return exponentials(keys_of(torch.tensor(seeds), torch.tensor(positions)), vocab)


def filtered(logits: torch.Tensor, rows: list[RowSampling]) -> torch.Tensor:
    edited, asks = draw._edited(logits, rows), [Ask.of(r.params, r.seed) for r in rows]
    _, temperature, log_min_p, top_k, tail, *_ = (
        torch.tensor(column, dtype=torch.float64)[:, None] for column in zip(*asks, strict=True)
    )
    x = edited if edited.dtype == torch.float64 else edited.float()
    x = x / temperature.masked_fill(temperature == 0, 1).to(x.dtype)
    left = filters.filtered(x, log_min_p, top_k, tail, logits.shape[1])
    for like, count in draw.alike(asks, logits.shape[1]):  # as `sample` does, which orders no more than it needs
        some = (each[like] for each in (x, log_min_p, top_k, tail))
        assert torch.equal(filters.filtered(*some, count), left[like])
    return left


def oracle(logits_V: torch.Tensor, r: RowSampling) -> torch.Tensor:
    """What transformers' own processors, in the order of generate, leave of one row."""
    from transformers.generation import logits_process as hf

    p, scores, ids = r.params, logits_V[None].clone(), torch.tensor([list(r.seen)], dtype=torch.int64)
    scores[0, list(r.banned)] = -INF
    steps = [
        (p.repetition_penalty != 1 and len(r.seen), hf.RepetitionPenaltyLogitsProcessor, p.repetition_penalty),
        (p.temperature != 1, hf.TemperatureLogitsWarper, p.temperature),
        (p.top_k, hf.TopKLogitsWarper, p.top_k),
        (p.top_p < 1, hf.TopPLogitsWarper, p.top_p),
        (p.min_p, hf.MinPLogitsWarper, p.min_p),
    ]
    for wanted, make, value in steps:
        if wanted:
            scores = make(value)(ids, scores)
    return scores[0]


def ids_of(vocab: int):
    return st.lists(st.integers(0, vocab - 1), max_size=6)


def drawing(**fixed):
    """Params of any mixture of filters; each filter is off about half the time."""
    fields = {
        "temperature": st.floats(0.2, 3),
        "top_k": st.just(0) | st.integers(2, 40),
        "top_p": st.just(1.0) | st.floats(0.05, 0.999),
        "min_p": st.just(0.0) | st.floats(0.001, 1.0),
        "repetition_penalty": st.just(1.0) | st.floats(0.5, 2.0),
    }
    return st.builds(SamplingParams, **fields, **fixed)


def rows_of(vocab: int, params):
    ids = ids_of(vocab)
    return st.builds(RowSampling, params, st.integers(0, 2**63 - 1), st.integers(0, 10**6), ids, ids)


# Filters


@settings(max_examples=120)
@given(st.data(), st.integers(0, 2**32), st.sampled_from([3, 30, 300]))
def test_filters_are_those_of_transformers(data, seed, vocab):
    rows = data.draw(st.lists(rows_of(vocab, drawing()), min_size=1, max_size=4))
    rows = [r if len(set(r.banned)) < vocab else dataclasses.replace(r, banned=()) for r in rows]
    logits = normal(len(rows), vocab, seed=seed, dtype=torch.float64)
    ours = filtered(logits, rows)
    for i, r in enumerate(rows):
        theirs = oracle(logits[i], r)
        assert torch.equal(ours[i] > -INF, theirs > -INF), f"row {i}: other tokens are left"
        torch.testing.assert_close(ours[i].softmax(-1), theirs.softmax(-1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7, "temperature": 0.6},
        {"top_k": 20},
        {"top_k": 5000},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1},
    ],
)
def test_filters_in_float32_are_bit_equal_to_transformers(params):
    logits = normal(3, 2000, seed=1)
    rows = [row(seen=[5, 5, 7, 1999], banned=[3, i], **params) for i in range(3)]
    for ours, logits_V, r in zip(filtered(logits, rows), logits, rows, strict=True):
        assert torch.equal(ours, oracle(logits_V, r))


def test_tokens_that_tie_with_the_last_one_kept_stay():
    logits = torch.tensor([[2.0, 1.0, 0.0, 1.0, 2.0, 1.0]])
    for params, kept in [
        ({"top_k": 3}, [0, 1, 3, 4, 5]),
        ({"top_k": 2}, [0, 4]),
        ({"top_p": 1e-9}, [0, 4]),
        ({"top_p": 0.7}, [0, 1, 3, 4, 5]),
        ({"top_k": 3, "top_p": 0.97}, [0, 1, 3, 4, 5]),
        ({"top_k": 3, "top_p": 0.7}, [0, 1, 3, 4, 5]),  # that three tie counts in the total
        ({"top_k": 3, "top_p": 0.5}, [0, 4]),
        ({"min_p": 1.0}, [0, 4]),
        ({"min_p": 0.3}, [0, 1, 3, 4, 5]),
    ]:
        left = filtered(logits, [row(**params)])[0] > -INF
        assert [i for i in range(6) if left[i]] == kept, params


def test_minus_infinity_in_the_logits_is_never_drawn_and_harms_no_filter():
    logits = torch.full((300, 50), -INF)
    logits[:, [4, 9]] = torch.tensor([0.0, 1.0])
    choices = [{}, {"top_k": 10}, {"top_p": 0.99}, {"min_p": 1e-9}, {"top_k": 10, "top_p": 0.999}, {"temperature": 0.0}]
    choices += [{"temperature": 1e300}, {"temperature": 5e-324}, {"repetition_penalty": 1e300}]
    choices += [{"repetition_penalty": 5e-324}]
    rows = [row(i, seen=[4, 8], **choices[i % len(choices)]) for i in range(300)]
    assert set(sample(logits, rows).token_ids.tolist()) == {4, 9}
    assert not filtered(logits, rows).isnan().any()
    everything = [row(i, banned=[0, 1], **c) for i, c in enumerate(choices)]
    assert sample(normal(len(choices), 2), everything).token_ids.tolist() == [0] * len(choices)


def test_nothing_is_drawn_from_nan():
    rows, logits = busy_rows(), normal(7, 30)
    expected = sample(logits, rows)
    for at in range(7):
        for value in (math.nan, -math.nan):
            spoilt = logits.clone()
            spoilt[at, 5 * at % 30] = value
            found = sample(spoilt, rows)
            others = torch.arange(7) != at
            assert found.token_ids[at] == NOT_DRAWN == -1
            assert found.token_ids[others].equal(expected.token_ids[others])
            assert found.logprobs[others].allclose(expected.logprobs[others], equal_nan=True)
    spoilt = logits.clone()
    spoilt[0, 3] = math.nan  # a token that row 0 bans
    assert sample(spoilt, rows).token_ids.equal(expected.token_ids)
    assert sample(logits.fill_(math.nan), [row(temperature=0.0)] * 7).token_ids.tolist() == [NOT_DRAWN] * 7


def test_a_row_without_top_p_keeps_its_unlikeliest_token_beside_one_with():
    logits = torch.tensor([[0.0, -50, -60, -70, -80]]).repeat(4, 1)
    left = filtered(logits, [row(top_k=3), row(top_p=0.5), row(), row(top_k=4, top_p=0.5)]) > -INF
    assert left.sum(-1).tolist() == [3, 1, 5, 1]


def test_weights_add_up_to_the_same_bits_in_any_order():
    """On a GPU the order in which floats are added depends on the batch size and on where a row starts."""
    logits = normal(1, 5000)
    orders = [torch.randperm(5000, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    sums = [filters.weights(logits[:, order], logits.amax(-1, keepdim=True), 5000).sum().item() for order in orders]
    assert len(set(sums)) == 1
    assert filters.weights(torch.zeros(1, 1), torch.zeros(1, 1), 2**31).item() * 2**31 < 2**63


def test_the_logits_given_are_left_as_they_are():
    logits = normal(4, 30)
    before = logits.clone()
    sample(logits, [row(i, seen=[1], banned=[2], repetition_penalty=2.0, top_p=0.5, logprobs=2) for i in range(4)])
    assert torch.equal(logits, before)


# Greedy


def test_greedy_takes_the_first_of_the_largest_after_bans_and_penalty():
    logits = torch.tensor([[1.0, 4.0, 3.0, 4.0, 2.0]]).repeat(5, 1)
    rows = [
        row(temperature=0.0),
        row(top_k=1),
        row(temperature=0.0, banned=frozenset({1})),
        row(temperature=0, repetition_penalty=2.0, seen=array("q", [1, 3, 1])),
        row(temperature=0, repetition_penalty=2.0, seen=np.array([3]), banned=(1, 2)),
    ]
    assert sample(logits, rows).token_ids.tolist() == [1, 1, 3, 2, 3]
    assert sample(logits.bfloat16(), rows).token_ids.tolist()[:4] == [1, 1, 3, 2]


class Ops(TorchDispatchMode):
    """Records the name of each op and the shapes of its tensors."""

    def __enter__(self) -> Ops:
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        self.calls.append((func.name().removeprefix("aten::"), shapes))
        return func(*args, **(kwargs or {}))

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        return [shapes[0] for op, shapes in self.calls if op.split(".")[0] == name]


def test_a_plain_greedy_batch_is_an_argmax_and_a_look_for_nan():
    logits = normal(4, 30)
    with Ops() as ops:
        sample(logits, [row(temperature=0.0), row(top_k=1), row(temperature=0.0), row(top_k=1)])
    assert [op for op, _ in ops.calls] == ["argmax", "amax", "isnan", "masked_fill_.Scalar"]


def test_only_rows_that_ask_are_sorted_and_drawn():
    rows = [row(temperature=0.0), row(), row(min_p=0.1), row(top_k=4), row(top_k=6, top_p=0.5), row(top_p=0.9)]
    with Ops() as ops:
        sample(normal(6, 30), rows)
    assert ops.shapes("topk") == [(2, 30)] and ops.shapes("sort") == [(1, 30)]
    assert sum(shape[0] for shape in ops.shapes("log_")) == 5
    with Ops() as ops:
        sample(normal(6, 30), [row(min_p=0.1)] * 6)
    assert not ops.shapes("topk") and not ops.shapes("sort")


# What reads a device tensor on the host, or gives a shape that only the device knows.
SYNCS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}


def busy_rows() -> list[RowSampling]:
    everything = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    rows = [
        row(1, 5, seen=[1, 2], banned=[3], logprobs=3, **everything),
        row(2, top_p=0.5),
        row(3),
        row(temperature=0.0),
    ]
    return rows + [row(4, logprobs=0, min_p=0.2, banned=[7]), row(5, top_k=3), row(6, top_k=1, seen=[1], logprobs=1)]


def test_no_op_reads_the_device():
    logits, rows = normal(7, 40), busy_rows()
    with Ops() as ops:
        sample(logits, rows)
    names = {op.split(".")[0] for op, _ in ops.calls}
    assert len(names) > 20 and not names & SYNCS


# The draw


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of Pearson's chi-square; cells expected fewer than 5 times go into one."""
    expected = probabilities.double() * counts.sum()
    few = expected < 5
    counts = torch.cat([counts[~few].double(), counts[few].sum()[None].double()])
    expected = torch.cat([expected[~few], expected[few].sum()[None]])
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 2.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2, "temperature": 0.8, "repetition_penalty": 3.0},
    ],
)
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_draws_follow_the_exact_probabilities(params, vary):
    logits_V, first = normal(40, seed=2, scale=1.5), row(11, seen=[0, 1, 2], banned=[4], **params)
    places = [(11, i) if vary == "position" else (i, 0) for i in range(20_000)]
    rows = [RowSampling(first.params, *place, first.seen, first.banned) for place in places]
    ids = sample(logits_V.expand(20_000, 40), rows).token_ids
    exact = oracle(logits_V.double(), first).softmax(-1)
    assert p_value(torch.bincount(ids, minlength=40), exact) > 1e-3
    top = exact.argmax()  # is a draw the most likely token, and the next one?
    pairs = torch.bincount((ids[::2] == top) * 2 + (ids[1::2] == top), minlength=4)
    likely = torch.stack([1 - exact[top], exact[top]])
    assert p_value(pairs, torch.outer(likely, likely).flatten()) > 1e-3


def test_small_noise_keeps_its_precision():
    """Rare tokens are drawn through the smallest exponentials; uniforms of 24 bits would make these steps of 6e-8."""
    noise = noise_of([row(3, i) for i in range(8)], 2**18)
    gaps = noise.flatten().sort().values[:4096].diff() * noise.numel()
    assert (gaps > 0).all()
    assert abs(gaps.mean() - 1) < 0.08 and abs(gaps.std() - 1) < 0.1


def test_noise_is_exponential_and_uncorrelated_along_seeds_positions_and_vocabulary():
    rows = {}
    rows["position"] = [row(9, i) for i in range(256)]
    rows["seed"] = [row(i, 9) for i in range(256)]
    rows["sample"] = [row(derive_seed(9, i), 9) for i in range(256)]
    for name, along in rows.items():
        noise = noise_of(along, 1024)
        count = noise.numel()
        assert (noise > 0).all() and noise.isfinite().all()
        assert abs(noise.mean() - 1) < 4 / count**0.5 and abs(noise.var() - 1) < 4 * 8**0.5 / count**0.5, name
        assert p_value(torch.histc((-noise).exp(), 64, 0, 1).long(), torch.full((64,), 1 / 64)) > 1e-3, name
        for axis in (0, 1):
            for lag in (1, 2, 8):
                near, far = (
                    noise.narrow(axis, 0, noise.shape[axis] - lag),
                    noise.narrow(axis, lag, noise.shape[axis] - lag),
                )
                correlation = torch.corrcoef(torch.stack([near.flatten(), far.flatten()]))[0, 1]
                assert abs(correlation) < 4.5 / near.numel() ** 0.5, (name, axis, lag)


def mix(z: int) -> int:
    z &= MASK
    z = (z ^ z >> 30) * MUL_1 & MASK
    z = (z ^ z >> 27) * MUL_2 & MASK
    return z ^ z >> 31


def unmix(z: int) -> int:
    for shift, factor in ((31, MUL_2), (27, MUL_1), (30, 1)):
        known = z
        for _ in range(64 // shift + 1):
            known = z ^ known >> shift
        z = known * pow(factor, -1, 2**64) & MASK
    return z


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_noise_is_splitmix64_of_seed_position_and_vocabulary_index(seed, position):
    noise = noise_of([row(seed, position)], 5)[0]
    key = mix(mix(seed % 2**63 + GOLDEN) + (position + 1) * GOLDEN)
    expected = [-math.log1p(-max(mix(key + (v + 1) * GOLDEN) >> 11, 0.5) / 2**53) for v in range(5)]
    torch.testing.assert_close(noise, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_a_hash_of_zero_draws_no_banned_token():
    """The one input in 2**53 for which the uniform is 0, whose exponential would beat any probability, even none."""
    position, vocab, zero_at = 0, 8, 3
    while True:
        base = (unmix(-(zero_at + 1) * GOLDEN & MASK) - (position + 1) * GOLDEN) & MASK
        seed = (unmix(base) - GOLDEN) & MASK
        if seed < 2**63:
            break
        position += 1
    noise = noise_of([row(seed, position)], vocab)[0]
    assert noise[zero_at] == 2.0**-54
    assert sample(normal(1, vocab), [row(seed, position)]).token_ids.item() == zero_at
    assert sample(normal(1, vocab), [row(seed, position, banned=[zero_at])]).token_ids.item() != zero_at


def test_seeds_mean_the_same_in_every_release():
    logits = torch.arange(1000).remainder(7)[None].float().expand(8, 1000)
    rows = [row(seed, position) for seed in (0, 1, 2**62 + 1, 2**63 - 1) for position in (0, 1000)]
    assert sample(logits, rows).token_ids.tolist() == [817, 941, 380, 733, 426, 62, 950, 468]
    assert [derive_seed(5, i) for i in range(3)] == [5, 8541643345690126371, 279202168721407136]


def test_seeds_and_positions_give_different_tokens():
    places = [(seed, position) for seed in range(8) for position in range(8)]
    places += [(derive_seed(0, i), 0) for i in range(1, 9)]
    ids = sample(torch.zeros(72, 1 << 14), [row(*place) for place in places]).token_ids
    assert len(ids.unique()) > 69
    assert len({derive_seed(3, i) for i in range(1000)}) == 1000


def test_derived_seeds():
    assert derive_seed(17, 0) == 17 and derive_seed(-1, 0) == 2**63 - 1
    assert all(0 <= derive_seed(s, i) < 2**63 for s in (0, -5, 2**80) for i in range(50))
    with pytest.raises(InvalidArgumentError, match=r"index must be .*>= 0, got -1"):
        derive_seed(1, -1)


# Neighbours


@settings(max_examples=150)
@given(st.data(), st.integers(0, 2**32), st.sampled_from([2, 7, 33, 1000]), st.booleans())
def test_a_row_is_the_same_alone_and_in_any_batch(data, seed, vocab, coarse):
    mixed = rows_of(vocab, drawing() | drawing(logprobs=st.integers(0, 5)) | st.just(SamplingParams(temperature=0.0)))
    rows = data.draw(st.lists(mixed, min_size=2, max_size=8))
    logits = normal(len(rows), vocab, seed=seed)
    if coarse:  # as bfloat16 models give them: many ties
        logits = logits.bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "_BLOCK_ELEMENTS", data.draw(st.sampled_from([1, 3 * vocab, 1 << 22])))
        together, filtered_together = sample(logits, rows), filtered(logits, rows)
    for i, r in enumerate(rows):
        alone, k = sample(logits[i : i + 1], [r]), r.params.logprobs
        assert together.token_ids[i] == alone.token_ids[0]
        if not r.params.is_greedy:
            assert torch.equal(filtered_together[i], filtered(logits[i : i + 1], [r])[0])
        if k is not None:
            assert together.logprobs[i] == alone.logprobs[0]
            assert torch.equal(together.top_ids[i, :k], alone.top_ids[0])
            assert torch.equal(together.top_logprobs[i, :k], alone.top_logprobs[0])


# Log-probabilities


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_are_of_the_raw_distribution(dtype):
    logits = normal(4, 500, dtype=dtype)
    logits[:, 17] = -INF
    asked = [None, 0, 5, 2]
    rows = [
        row(i, seen=range(50), banned=[0], logprobs=k, temperature=0.3, top_k=9, repetition_penalty=2.0)
        for i, k in enumerate(asked)
    ]
    got, exact = sample(logits, rows), logits.double().log_softmax(-1)
    assert got.token_ids.dtype == got.top_ids.dtype == torch.int64
    assert got.logprobs.dtype == got.top_logprobs.dtype == torch.float32
    assert got.top_ids.shape == got.top_logprobs.shape == (4, 5)
    assert got.logprobs[0].isnan() and got.top_logprobs[0].isnan().all() and (got.top_ids[0] == -1).all()
    for i in (1, 2, 3):
        k = asked[i]
        torch.testing.assert_close(got.logprobs[i].double(), exact[i, got.token_ids[i]], rtol=1e-6, atol=1e-7)
        by_rank = sorted(range(500), key=lambda v: (-logits[i, v].item(), v))[:k]
        assert got.top_ids[i, :k].tolist() == by_rank
        torch.testing.assert_close(got.top_logprobs[i, :k].double(), exact[i, by_rank], rtol=1e-6, atol=1e-7)


def test_logprobs_only_if_asked_and_no_more_than_there_are():
    nothing = sample(normal(2, 9), [row(), row(top_p=0.5)])
    assert nothing.logprobs is nothing.top_ids is nothing.top_logprobs is None
    assert sample(normal(1, 9), [row(logprobs=0)]).top_ids.shape == (1, 0)
    assert sample(normal(1, 9), [row(logprobs=50)]).top_ids.shape == (1, 9)
    impossible = sample(torch.tensor([[0.0, -INF]]), [row(logprobs=2)])
    assert impossible.logprobs.tolist() == [0.0] and impossible.top_logprobs.tolist() == [[0.0, -INF]]


# What may be asked


def test_params_are_normalised():
    params = SamplingParams(stop="END", stop_token_ids=[np.int64(3), 4], seed=-1, temperature=1, top_k=np.int32(7))
    assert params.stop == ("END",) and params.stop_token_ids == (3, 4) and params.seed == 2**63 - 1
    assert type(params.temperature) is float and type(params.top_k) is int
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b") and SamplingParams(seed=2**70 + 3).seed == 3
    assert hash(params) == hash(dataclasses.replace(params)) and dataclasses.replace(params) == params
    assert SamplingParams(temperature=0).is_greedy and SamplingParams(top_k=1).is_greedy
    assert not SamplingParams(top_k=2).is_greedy and not SamplingParams().is_greedy
    with pytest.raises(TypeError):
        SamplingParams(max_new_tokens=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3


NOT_NUMBERS = [True, None, "1", math.nan]
NOT_INTS = [*NOT_NUMBERS[:1], "1", 1.0, math.nan]
WRONG = {
    "temperature": [*NOT_NUMBERS, -0.1, INF, 10**400],
    "top_k": [*NOT_INTS, None, -1],
    "top_p": [*NOT_NUMBERS, 0, 1.01, -0.5],
    "min_p": [*NOT_NUMBERS, -0.01, 1.01],
    "repetition_penalty": [*NOT_NUMBERS, 0, -1.0, INF],
    "max_tokens": [*NOT_INTS, 0, -1],
    "min_tokens": [*NOT_INTS, None, -1],
    "stop": ["", ["a", ""], [1], None, b"a", {"a"}],
    "stop_token_ids": [3, "3", b"3", None, [-1], [True], [1.0], ["1"]],
    "ignore_eos": [1, None, "yes"],
    "seed": [*NOT_INTS],
    "n": [*NOT_INTS, None, 0, -1, 65537, 10**9],
    "logprobs": [*NOT_INTS, -1, 101],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_params_are_named(name, value):
    given = value[0] if name == "stop_token_ids" and isinstance(value, list) else value
    with pytest.raises(InvalidArgumentError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(f"{name} must be ") and str(error.value).endswith(f", got {given!r}")


def test_every_field_has_a_wrong_value_tested():
    assert set(WRONG) == {field.name for field in dataclasses.fields(SamplingParams)}


def test_min_tokens_above_max_tokens():
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    with pytest.raises(InvalidArgumentError, match="min_tokens must be <= max_tokens=4, got 5"):
        SamplingParams(min_tokens=5, max_tokens=4)


@pytest.mark.parametrize(
    ("logits", "rows"),
    [
        (torch.zeros(3), [row()] * 3),
        (torch.zeros(2, 5), [row()]),
        (torch.zeros(1, 0), [row()]),
        (torch.zeros(1, 5, dtype=torch.int64), [row()]),
    ],
)
def test_wrong_logits(logits, rows):
    with pytest.raises(
        InvalidArgumentError, match=r"logits must be floating point \[B=\d \(one per row\), V >= 1\], got"
    ):
        sample(logits, rows)


@pytest.mark.parametrize("bad", [5, -1])
def test_ids_outside_the_vocabulary(bad):
    with pytest.raises(InvalidArgumentError, match=f"banned id {bad} of row 1 is not in the vocabulary, 0 to 4"):
        sample(torch.zeros(2, 5), [row(), row(banned=[1, bad])])
    with pytest.raises(InvalidArgumentError, match=f"seen id {bad} of row 0 is not in the vocabulary, 0 to 4"):
        sample(torch.zeros(2, 5), [row(seen=[bad], repetition_penalty=2.0), row()])
    sample(torch.zeros(1, 5), [row(seen=[bad])])  # not read


def test_no_rows():
    assert sample(torch.zeros(0, 5), []).token_ids.shape == (0,)


def test_stop_ids():
    params = SamplingParams(stop_token_ids=[7, 2])
    assert stop_ids(params, [1, 2]) == {1, 2, 7}
    assert stop_ids(dataclasses.replace(params, ignore_eos=True), [1, 2]) == {2, 7}


# The device


@pytest.mark.gpu
def test_cuda_draws_the_same_without_a_sync():
    logits, rows = normal(7, 4001, seed=3).bfloat16(), busy_rows()
    expected, on_device = sample(logits, rows), logits.cuda()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = sample(on_device, rows)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(got.token_ids.cpu(), expected.token_ids)
    assert torch.equal(got.top_ids.cpu(), expected.top_ids)
    torch.testing.assert_close(got.logprobs.cpu(), expected.logprobs, equal_nan=True)
    torch.testing.assert_close(got.top_logprobs.cpu(), expected.top_logprobs, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [4001, 151_936])
def test_cuda_rows_do_not_depend_on_the_batch(vocab):
    logits = normal(70, vocab, seed=4).bfloat16().cuda()
    rows = [dataclasses.replace(busy_rows()[i % 7], seed=i) for i in range(70)]
    together = sample(logits, rows)
    for i, r in enumerate(rows):
        alone, k = sample(logits[i : i + 1], [r]), r.params.logprobs
        assert together.token_ids[i] == alone.token_ids[0]
        if k is not None:
            assert together.logprobs[i] == alone.logprobs[0]
            assert torch.equal(together.top_ids[i, :k], alone.top_ids[0])
            assert torch.equal(together.top_logprobs[i, :k], alone.top_logprobs[0])
