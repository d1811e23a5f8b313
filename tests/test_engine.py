"""The engine against transformers' own generate, and every request against its lone run."""

from __future__ import annotations

import functools
import gc
import json
import math
import random
import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny
from transformers import PreTrainedModel

from graphattn import (
    LLM,
    BackendError,
    BlockTable,
    InvalidArgumentError,
    InvalidRequestError,
    OutOfPagesError,
    RequestOutput,
    SamplingParams,
    UnsupportedModelError,
    draw,
)
from graphattn.draw import derive_seed, sample
from graphattn.engine.executor import Executor
from graphattn.engine.flight import Flight
from graphattn.groups import RowPages
from graphattn.hf import attach
from graphattn.plan import choose_backend
from graphattn.spec import AttentionSpec, CacheSpec

pytestmark = pytest.mark.usefixtures("one_thread", "overlap")

VOCAB = 128


class Letters:
    """A tokenizer of 128 ids: ASCII, but for pieces of longer characters at 120 to 125 and a special token, 126."""

    PIECES = {120: b"\xe2", 121: b"\x82", 122: b"\xac", 123: b"\xf0\x9f", 124: b"\x98\x80", 125: b"ab ", 126: b""}
    chat_template = "one line per message"
    eos_token_id = None

    def __init__(self, poison: int | None = None):
        self.poison = poison

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        return {"input_ids": [126] * add_special_tokens + list(text.encode("ascii"))}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens and not clean_up_tokenization_spaces
        if self.poison in ids:
            raise KeyError(f"no piece for {self.poison}")
        return b"".join(self.PIECES.get(i, bytes([i])) for i in ids).decode("utf-8", "replace")

    def apply_chat_template(self, messages, add_generation_prompt: bool, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:" * add_generation_prompt

    def all(self, ids: Sequence[int]) -> str:
        return self.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def small(seed: int = 0, **config) -> PreTrainedModel:
    """One layer, heads 8 wide: a step takes a millisecond."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny("llama", num_layers=1, head_dim=8, seed=seed, **(sizes | config))


@functools.cache
def plain(family: str) -> PreTrainedModel:
    return tiny(family) if family != "small" else small()


def reference(model: PreTrainedModel, prompt: Sequence[int], max_tokens: int, **options) -> tuple[int, ...]:
    """What transformers' generate takes for the most likely tokens."""
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0} | options
    return tuple(model.generate(ids, max_new_tokens=max_tokens, **options)[0, len(prompt) :].tolist())


@functools.cache
def expected(family: str, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    return reference(plain(family), prompt, max_tokens)


def greedy(max_tokens: int = 12, **options) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(VOCAB), k=length))


def finish(llm: LLM, *, whole: bool = True) -> dict[int, RequestOutput]:
    """Steps until nothing is left; with `whole`, the deltas of each request must add up to its output."""
    outputs, tokens, texts = {}, defaultdict(tuple), defaultdict(str)
    while llm.has_work:
        for delta in llm.step():
            assert delta.request_id not in outputs, "a delta after the last"
            tokens[delta.request_id] += delta.token_ids
            texts[delta.request_id] += delta.text
            if delta.output is not None:
                outputs[delta.request_id] = delta.output
        llm.pool.check()
    assert llm.pool.num_used == 0
    if whole:
        assert tokens == {request_id: output.token_ids for request_id, output in outputs.items()}
        assert texts == {request_id: output.text for request_id, output in outputs.items()}
    return outputs


SHARED = prompt_of(37, seed=99)
PROMPTS = [
    *(prompt_of(length, seed=length) for length in (1, 1, 2, 4, 5, 6, 8, 15, 16, 17, 32, 41)),
    *(SHARED[:length] + prompt_of(3, seed=length) for length in (16, 20, 37)),
    SHARED,
    SHARED,
]


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["prefix", "no-prefix"])
@pytest.mark.parametrize("max_prefill_tokens", [5, 8192], ids=["chunked", "whole"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family, page_size, max_prefill_tokens, prefix_cache) -> None:
    params = [greedy(1 + 5 * at % 13) for at in range(len(PROMPTS))]
    want = [expected(family, prompt, one.max_tokens) for prompt, one in zip(PROMPTS, params, strict=True)]
    options = {"max_prefill_tokens": max_prefill_tokens, "prefix_cache": prefix_cache}
    with LLM(tiny(family), max_batch=5, page_size=page_size, num_pages=1 + 512 // page_size, **options) as llm:
        for again in (False, True):  # the second time prompts are cached whole
            hits = llm.pool.num_hits
            outputs = llm.generate(PROMPTS, params)
            assert [output.token_ids for output in outputs] == want
            assert [output.prompt_token_ids for output in outputs] == PROMPTS
            assert {output.finish_reason for output in outputs} == {"length"}
            if not prefix_cache:
                assert llm.pool.num_hits == 0
            else:
                assert llm.pool.num_hits > hits
                assert not again or all(
                    output.timings.cached_tokens == (len(prompt) - 1) // page_size * page_size
                    for prompt, output in zip(PROMPTS, outputs, strict=True)
                )
        llm.pool.check()
        assert llm.pool.num_used == 0


def test_a_sliding_window_is_obeyed_over_pages_and_chunks() -> None:
    model, config = tiny("mistral", sliding_window=6), {"max_batch": 4, "page_size": 4, "num_pages": 80}
    want = [reference(model, prompt, 12) for prompt in PROMPTS]
    assert want != [expected("mistral", prompt, 12) for prompt in PROMPTS]
    with LLM(model, max_prefill_tokens=7, **config) as llm:
        assert [output.token_ids for output in llm.generate(PROMPTS, greedy())] == want


@pytest.mark.parametrize(
    "options",
    [
        {"buckets": [3]},
        {"capture": "lazy", "enforce_eager": True},
        {"layout": "HND", "kv_cache_dtype": torch.float64},
        pytest.param({"compile": True}, marks=pytest.mark.inductor),
    ],
    ids=str,
)
def test_every_mode_gives_the_same_tokens(options: dict) -> None:
    with LLM(small(), max_batch=6, num_pages=80, **options) as llm:
        outputs = llm.generate(PROMPTS[:1], greedy()) + llm.generate(PROMPTS[1:], greedy())
        assert [output.token_ids for output in outputs] == [expected("small", prompt, 12) for prompt in PROMPTS]
        assert ("compiled, 1 graphs" in llm.explain()) == ("compile" in options)


def soak(num_requests: int, seed: int) -> None:
    """Random requests, greedy and seeded, through a small pool; each must get what it gets alone."""
    rng = random.Random(seed)
    prefixes = [tuple(rng.choices(range(VOCAB), k=rng.randint(4, 24))) for _ in range(6)]
    pool_of_prompts = [
        (rng.choice(prefixes)[: rng.randint(0, 24)] + tuple(rng.choices(range(VOCAB), k=rng.randint(1, 8))), one_seed)
        for one_seed in rng.choices([None, None, 1, 2], k=120)
    ]

    def params(one_seed: int | None, max_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0.0 if one_seed is None else 1.0, seed=one_seed, max_tokens=max_tokens)

    with LLM(small(), max_batch=1, num_pages=200, prefix_cache=False) as llm:
        alone = {
            key: llm.generate([key[0]], params(key[1], 24))[0].token_ids
            for key in sorted(set(pool_of_prompts), key=str)
        }
    for (prompt, one_seed), tokens in list(alone.items())[::10]:
        if one_seed is None:
            assert tokens == expected("small", prompt, 24)

    sent, aborted, outputs, streamed = {}, set(), {}, defaultdict(tuple)
    with LLM(small(), max_batch=7, num_pages=25, page_size=4, max_prefill_tokens=20) as llm:
        while len(sent) < num_requests or llm.has_work:
            for _ in range(rng.randint(0, 3) if len(sent) < num_requests else 0):
                key, max_tokens = rng.choice(pool_of_prompts), rng.randint(1, 24)
                sent[llm.add_request(key[0], params(key[1], max_tokens))] = (key, max_tokens)
            if rng.random() < 0.03 and (running := sorted(sent.keys() - outputs.keys() - aborted)):
                victim = rng.choice(running)
                aborted.add(victim)
                llm.abort(victim)
            for delta in llm.step():
                streamed[delta.request_id] += delta.token_ids
                if delta.output is not None:
                    assert delta.request_id not in outputs
                    outputs[delta.request_id] = delta.output
            llm.pool.check()
        assert llm.pool.num_used == 0
        assert llm._scheduler.num_preemptions > num_requests / 20
        assert llm.pool.num_hits > 0
        assert llm.pool.num_evictions > 0
    assert outputs.keys() == sent.keys()
    assert aborted
    for request_id, (key, max_tokens) in sent.items():
        output = outputs[request_id]
        assert streamed[request_id] == output.token_ids
        assert output.finish_reason == ("abort" if request_id in aborted else "length")
        want = alone[key][: len(output.token_ids) if request_id in aborted else max_tokens]
        assert output.token_ids == want, f"request {request_id}: {key}, preempted {output.timings.preemptions} times"
    assert sum(output.timings.preemptions for output in outputs.values()) > 0


def test_a_thousand_requests_through_a_small_pool() -> None:
    soak(1000, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_thousands_more(seed: int) -> None:
    soak(3000, seed)


# Sampling: every field of SamplingParams reaches the draw, and a draw depends on seed and position alone.


def seeded(seed: int, **options) -> SamplingParams:
    return SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_tokens=14, **options)


def test_seeded_draws_do_not_depend_on_neighbours_chunks_or_preemption() -> None:
    params = [seeded(at % 3) for at in range(len(PROMPTS))]
    with LLM(tiny("qwen3"), max_batch=1, num_pages=80) as llm:
        alone = [llm.generate([prompt], one)[0].token_ids for prompt, one in zip(PROMPTS, params, strict=True)]
    assert len(set(alone)) > len(PROMPTS) / 2
    for max_batch, num_pages, options in (
        (4, 200, {}),
        (17, 200, {"max_prefill_tokens": 3}),
        (9, 31, {"page_size": 4, "max_seq_len": 64}),
        (6, 90, {"page_size": 1, "max_prefill_tokens": 11, "prefix_cache": False}),
    ):
        with LLM(tiny("qwen3"), max_batch=max_batch, num_pages=num_pages, **options) as llm:
            order = random.Random(max_batch).sample(range(len(PROMPTS)), len(PROMPTS))
            outputs = llm.generate([PROMPTS[at] for at in order], [params[at] for at in order])
            assert [output.token_ids for output in outputs] == [alone[at] for at in order]
            assert (llm._scheduler.num_preemptions > 0) == (num_pages < 100)


def test_a_draw_depends_on_its_position_however_the_tokens_before_it_came() -> None:
    with LLM(small(), max_batch=4, num_pages=80) as llm:
        prompt, params = PROMPTS[7], SamplingParams(temperature=3.0, seed=11, max_tokens=20)
        whole = llm.generate([prompt], params)[0].token_ids
        for done in (1, 7, 19):
            assert llm.generate([prompt + whole[:done]], params)[0].token_ids[: 20 - done] == whole[done:]


def test_without_a_seed_draws_differ_and_with_one_they_are_the_same() -> None:
    with LLM(small(), max_batch=4, num_pages=80) as llm:
        free = [llm.generate([PROMPTS[5]], SamplingParams(max_tokens=20))[0].token_ids for _ in range(2)]
        bound = [llm.generate([PROMPTS[5]], SamplingParams(max_tokens=20, seed=7))[0].token_ids for _ in range(2)]
    assert free[0] != free[1]
    assert bound[0] == bound[1]


def test_samples_of_one_prompt_differ_and_come_in_order() -> None:
    with LLM(small(), max_batch=3, num_pages=80) as llm:
        outputs = llm.generate([PROMPTS[4], PROMPTS[7]], seeded(3, n=5))
        assert [(output.request_id, output.index) for output in outputs] == [(i, j) for i in range(2) for j in range(5)]
        assert len({output.token_ids for output in outputs[:5]}) == 5
        again = llm.generate([PROMPTS[4], PROMPTS[7]], seeded(3, n=5))
        assert [output.token_ids for output in outputs] == [output.token_ids for output in again]
        for output in outputs[5:]:
            lone = llm.generate([PROMPTS[7]], seeded(derive_seed(3, output.index)))[0]
            assert output.token_ids == lone.token_ids


@pytest.mark.parametrize("field", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}], ids=str)
def test_every_filter_reaches_the_draw(field) -> None:
    with LLM(small(), max_batch=2, num_pages=40) as llm:
        (output,) = llm.generate([PROMPTS[6]], SamplingParams(max_tokens=20, seed=1, **field))
        assert output.token_ids == expected("small", PROMPTS[6], 20)


def test_repetition_penalty_counts_prompt_and_generated_tokens() -> None:
    prompts, params = [PROMPTS[4], PROMPTS[-1]], greedy(24, repetition_penalty=1.7)
    want = [reference(plain("llama"), prompt, 24, repetition_penalty=1.7) for prompt in prompts]
    assert want != [expected("llama", prompt, 24) for prompt in prompts]
    with LLM(tiny("llama"), max_batch=2, max_prefill_tokens=9, page_size=4, num_pages=33, max_seq_len=80) as llm:
        assert [output.token_ids for output in llm.generate(prompts, params)] == want


def test_penalties_hold_under_pressure_and_when_read_late() -> None:
    """Rows that leave, are preempted, come back elsewhere and feed tokens that nobody has read yet."""
    want = [reference(plain("llama"), prompt, 16, repetition_penalty=1.6) for prompt in PROMPTS]
    with LLM(tiny("llama"), max_batch=7, page_size=4, num_pages=31, max_seq_len=80, max_prefill_tokens=30) as llm:
        outputs = llm.generate(PROMPTS, greedy(16, repetition_penalty=1.6))
        assert llm._scheduler.num_preemptions > 0
    assert [output.token_ids for output in outputs] == want


asked = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_k": st.sampled_from([0, 3, 20, 200]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "min_tokens": st.integers(0, 6),
        "max_tokens": st.integers(6, 14),
        "stop_token_ids": st.sampled_from([(), (1, 2), tuple(range(60))]),
        "logprobs": st.sampled_from([None, 1]),
        "seed": st.integers(0, 9),
    }
)


@functools.cache
def alone(prompt: tuple[int, ...], params: SamplingParams) -> tuple[int, ...]:
    with LLM(small(), max_batch=1, num_pages=60) as llm:
        return llm.generate([prompt], params)[0].token_ids


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    asks=st.lists(st.tuples(st.sampled_from(PROMPTS), asked), min_size=1, max_size=8),
    joins=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    lost=st.integers(0, 30),
)
def test_requests_that_come_at_any_time_get_what_they_get_alone(asks, joins, lost) -> None:
    asks = [(prompt, SamplingParams(**fields)) for prompt, fields in asks]
    with LLM(small(), max_batch=5, num_pages=28, page_size=4, max_seq_len=72, max_prefill_tokens=25) as llm:
        ids, outputs, steps = [], {}, 0
        for (prompt, params), wait in zip(asks, joins, strict=False):
            ids.append(llm.add_request(prompt, params))
            for _ in range(wait):
                steps += 1
                outputs |= {delta.request_id: delta.output for delta in llm.step() if delta.output is not None}
                if steps == lost:
                    llm.load_weights({})  # everybody's keys and values are computed anew
        outputs |= finish(llm, whole=False)
    assert [outputs[request_id].token_ids for request_id in ids] == [alone(*ask) for ask in asks]


@pytest.mark.parametrize("source", ["model", "tokenizer", "stop_token_ids"])
def test_end_tokens_end_unless_they_are_ignored_or_come_too_early(source: str) -> None:
    prompt, whole = PROMPTS[6], expected("llama", PROMPTS[6], 30)
    at = next(at for at in range(3, 20) if whole[at] not in whole[:at])
    end, later = whole[at], at + 4
    model, tokenizer, stops = tiny("llama", eos_token_id=end if source == "model" else None), None, {}
    if source == "tokenizer":
        tokenizer = Letters()
        tokenizer.eos_token_id = end
    elif source == "stop_token_ids":
        stops = {"stop_token_ids": [VOCAB - 1, end]}
    held_off = reference(
        plain("llama"), prompt, 30, min_new_tokens=later, eos_token_id=[end, *stops.get("stop_token_ids", ())]
    )
    assert len(held_off) > later and end not in held_off[:later]
    with LLM(model, tokenizer=tokenizer, max_batch=4, num_pages=40) as llm:
        params = [
            greedy(30, **stops),
            greedy(30, min_tokens=later, **stops),
            greedy(at + 1, **stops),
            greedy(at, **stops),
            greedy(30, ignore_eos=True),
        ]
        ended, later_ended, just, cut, ignored = llm.generate([prompt] * 5, params)
    assert (ended.token_ids, ended.finish_reason) == (whole[: at + 1], "stop")
    assert later_ended.token_ids == held_off
    assert (just.token_ids, just.finish_reason) == (whole[: at + 1], "stop")
    assert (cut.token_ids, cut.finish_reason) == (whole[:at], "length")
    assert (ignored.token_ids, ignored.finish_reason) == (whole, "length")


@pytest.mark.parametrize("token_id", [5000, -1])
def test_an_end_token_outside_the_vocabulary_ends_nothing(token_id: int) -> None:
    """Some configs name one; below min_tokens it would be banned, and there is nothing to ban."""
    with LLM(small(eos_token_id=token_id), max_batch=2, num_pages=40) as llm:
        (output,) = llm.generate([PROMPTS[6]], greedy(9, min_tokens=5))
        assert output.token_ids == expected("small", PROMPTS[6], 9)


def test_max_tokens_default_goes_on_to_max_seq_len() -> None:
    with LLM(small(), max_batch=2, num_pages=40, max_seq_len=31) as llm:
        outputs = llm.generate([PROMPTS[0], PROMPTS[5]], SamplingParams(temperature=0))
        assert [len(output.token_ids) for output in outputs] == [30, 25]
        assert {output.finish_reason for output in outputs} == {"length"}
        assert len(llm.generate([PROMPTS[5]], greedy(1000))[0].token_ids) == 25


@pytest.mark.parametrize("buckets", [(), (4, 8, 13)], ids=["prefill", "padded-prefill"])
@pytest.mark.parametrize("seed", [None, 4], ids=["greedy", "seeded"])
def test_logprobs_are_the_models_own(seed: int | None, buckets: tuple[int, ...]) -> None:
    """Against log_softmax of a teacher-forced forward, through chunks, prefixes and preemption."""
    drawing = {"temperature": 0.0} if seed is None else {"seed": seed, "top_p": 0.8, "repetition_penalty": 1.3}
    counts = [at % 4 if at % 5 else None for at in range(len(PROMPTS))]
    params = [SamplingParams(max_tokens=9, min_tokens=4, logprobs=count, **drawing) for count in counts]
    sizes = {"max_batch": 9, "page_size": 4, "num_pages": 19, "max_seq_len": 60, "max_prefill_tokens": 13}
    with LLM(tiny("qwen2"), **sizes, prefill_buckets=buckets) as llm:
        outputs = llm.generate(PROMPTS, params)
        assert llm._scheduler.num_preemptions > 0
        assert (llm._executor.prefill_runner.counts.total() > 0) == bool(buckets)
    for output, count in zip(outputs, counts, strict=True):
        if count is None:
            assert output.logprobs is None
            continue
        assert len(output.logprobs) == len(output.token_ids) == 9
        ids = torch.tensor([output.prompt_token_ids + output.token_ids])
        with torch.no_grad():
            rows = plain("qwen2")(ids).logits[0, len(output.prompt_token_ids) - 1 : -1].log_softmax(-1)
        for token_id, entry, row in zip(output.token_ids, output.logprobs, rows, strict=True):
            likely = row.topk(count).indices.tolist()
            assert set(entry) == {token_id, *likely}
            assert entry == pytest.approx({one: row[one].item() for one in entry}, abs=1e-6)


@pytest.mark.parametrize("buckets", [(), (2, 8, 30)], ids=["prefill", "padded-prefill"])
def test_requests_of_every_kind_share_a_step(buckets: tuple[int, ...]) -> None:
    """Below and above min_tokens, with anything that can be asked: each gets what it gets alone."""
    kinds = (
        {"temperature": 0},
        {"temperature": 1.3},
        {"temperature": 0.8, "min_p": 0.2},
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 1.1, "top_k": 9, "logprobs": 2},
        {"temperature": 0, "logprobs": 1},
        {"temperature": 0, "repetition_penalty": 1.4},
        {"temperature": 1.2, "min_tokens": 6, "stop_token_ids": range(0, 60)},
        {"temperature": 0, "min_tokens": 4, "stop_token_ids": range(40, 128)},
    )
    params = [SamplingParams(seed=at, max_tokens=8 + at, **kind) for at, kind in enumerate(kinds * 2)]
    with LLM(small(), max_batch=1, num_pages=60) as llm:
        alone = [llm.generate([prompt], one)[0] for prompt, one in zip(PROMPTS, params, strict=False)]
    sizes = {"max_batch": 12, "num_pages": 25, "page_size": 4, "max_seq_len": 80, "max_prefill_tokens": 30}
    with LLM(small(), **sizes, prefill_buckets=buckets) as llm:
        together = llm.generate(PROMPTS, [*params[: len(PROMPTS)]])
        assert llm._scheduler.num_preemptions > 0
    for output, lone in zip(together, alone, strict=True):
        assert output.token_ids == lone.token_ids
        assert (output.logprobs is None) == (lone.logprobs is None)
        for entry, lone_entry in zip(output.logprobs or (), lone.logprobs or (), strict=True):
            assert entry == pytest.approx(lone_entry, abs=1e-9)


def test_every_token_but_the_first_is_drawn_in_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = []
    monkeypatch.setattr(
        "graphattn.engine.executor.sample", lambda logits, rows: outside.extend(rows) or sample(logits, rows)
    )
    everything = {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "logprobs": 2, "min_tokens": 5}
    everything |= {"seed": 2, "max_tokens": 14, "stop_token_ids": range(90)}
    with LLM(small(), max_batch=4, num_pages=60) as llm:
        for params in (
            greedy(),
            seeded(1),
            SamplingParams(**everything),
        ):
            llm.generate(PROMPTS[:5], params)
    assert len(outside) == 3 * 3  # two prompts of one token have nothing to prefill


def test_rows_that_go_on_are_not_sent(overlap: bool) -> None:
    """A page as it begins; where tokens are read before the next step, each row's token and that it is to be taken."""
    with LLM(small(), max_batch=4, num_pages=80, page_size=4) as llm:
        state, drawing = llm._executor.state, llm._executor._draws
        for at in (5, 6, 7):
            llm.add_request(PROMPTS[at], SamplingParams(temperature=at - 5.0, seed=at, max_tokens=40))
        for _ in range(4):
            llm.step()
        for _ in range(30):
            before, pages = (state.num_sent, drawing.num_sent), llm.pool.num_used
            llm.step()
            new_pages = llm.pool.num_used - pages
            tokens = state.num_sent - before[0] - new_pages
            assert tokens == 0 if overlap else tokens <= 6
            assert drawing.num_sent == before[1]


def test_rows_beside_a_prompt_wait_for_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of a device where a decode step takes 1 and a chunk 10, launched by a host that takes no time."""
    clock, gaps = {"device": 0, "host": 0}, []

    def lasting(forward, duration: int):
        def timed(self: Executor, work) -> Flight:
            flight = forward(self, work)
            clock["device"] = flight.done = max(clock.values()) + duration
            return flight

        return timed

    def land(self: Flight, landed=Flight.land):
        clock["host"] = max(clock["host"], self.done)
        return landed(self)

    monkeypatch.setattr(Executor, "decode", lasting(Executor.decode, 1))
    monkeypatch.setattr(Executor, "prefill", lasting(Executor.prefill, 10))
    monkeypatch.setattr(Flight, "land", land)
    with LLM(small(), max_batch=2, num_pages=80, max_prefill_tokens=8) as llm:
        row = llm.add_request(PROMPTS[5], greedy(40))
        for _ in range(4):
            llm.step()
        llm.add_request(prompt_of(40, 0), greedy(1))
        while llm.has_work:
            before = clock["host"]
            gaps += [clock["host"] - before for delta in llm.step() if delta.request_id == row]
    assert max(gaps) == 11 and gaps.count(11) == 5


def test_what_fails_while_it_looks_at_the_tokens_leaves_them_to_be_gone_on_with(monkeypatch) -> None:
    """numpy's view of an array forbids that it is cut, for as long as a traceback holds it."""
    failing = []

    class Ids(np.ndarray):
        def __add__(self, other):
            if failing:
                raise failing.pop()
            return np.asarray(self) + other

    def made_by(make):
        return lambda *args, **options: make(*args, **options).view(Ids)

    numpy = SimpleNamespace(**vars(np) | {"array": made_by(np.array), "asarray": made_by(np.asarray)})
    prompts, params = [prompt_of(9, 0), prompt_of(5, 1)], [greedy(6, repetition_penalty=1.3), greedy(6)]
    with LLM(small(), max_batch=2, num_pages=80) as llm:
        want = [output.token_ids for output in llm.generate(prompts, params)]
        ids = [llm.add_request(*each) for each in zip(prompts, params, strict=True)]
        monkeypatch.setattr(draw, "np", numpy)
        failing.append(MemoryError("the host's"))
        with pytest.raises(MemoryError, match="the host's"):
            llm.step()
        found = finish(llm, whole=False)
        assert not failing and [found[request_id].token_ids for request_id in ids] == want
        llm.pool.check()


def test_ids_that_can_be_fed_and_not_drawn() -> None:
    """Of a model that draws from fewer than it embeds: nothing is refused for good behind a request's back."""
    model = small()
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 100, bias=False, dtype=model.dtype)
    with LLM(model, max_batch=2, num_pages=80) as llm:
        assert len(llm.generate([[5, 120, 7]], greedy(4))[0].token_ids) == 4
        with pytest.raises(InvalidRequestError, match="is for what can be drawn, and prompt 0 has 120"):
            llm.generate([[5, 120, 7]], greedy(4, repetition_penalty=1.2))
        with pytest.raises(InvalidRequestError, match="stop_token_ids of prompt 0 has 120 .* 0 to 99"):
            llm.generate([[5, 7]], greedy(4, stop_token_ids=(120,), min_tokens=2))


def test_a_second_interrupt_while_a_request_is_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes between any two instructions; the request waits on, and gives back what it had got."""
    with LLM(small(), max_batch=2, num_pages=80, page_size=4) as llm:
        want = llm.generate([PROMPTS[9]], greedy(4))[0].token_ids  # and leaves a prefix
        missing, interrupted = RowPages.missing, [KeyboardInterrupt]

        def interrupting(*args):
            if interrupted:
                raise interrupted.pop()
            return missing(*args)

        monkeypatch.setattr(RowPages, "missing", interrupting)
        request_id = llm.add_request(PROMPTS[9], greedy(4))
        with pytest.raises(KeyboardInterrupt):
            llm.step()
        assert finish(llm, whole=False)[request_id].token_ids == want
        assert llm.pool.num_used == 0


def test_another_thread_sees_work_until_the_last_output_is_there() -> None:
    seen = []

    class Looking(Letters):
        def decode(self, ids, **options):
            seen.append(llm.has_work)
            return super().decode(ids, **options)

    with LLM(small(), tokenizer=Looking(), max_batch=2, num_pages=80) as llm:
        llm.add_request(PROMPTS[1], greedy(3))
        while llm.has_work:
            llm.step()
        assert seen and all(seen)


@pytest.mark.parametrize(
    ("max_seq_len", "lens"), [(300, [300, 212]), (512, [512]), (257, [257, 255]), (100, [100] * 4)]
)
def test_the_longest_prefill_is_what_a_start_runs(max_seq_len: int, lens: list[int], monkeypatch) -> None:
    """Or memory is measured and kept for a shorter one than steps will compute."""
    seen, logits = [], Executor.logits
    with LLM(small(), max_batch=4, max_seq_len=max_seq_len, num_pages=200, max_prefill_tokens=512) as llm:
        monkeypatch.setattr(Executor, "logits", lambda self, *args: seen.append(args[0]) or logits(self, *args))
        llm._executor._warm_up(512)
    assert seen[0].qo_indptr_B1.diff().tolist() == lens


def test_rows_keep_their_place_when_one_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(small(), max_batch=6, num_pages=80) as llm:
        ids = [llm.add_request(PROMPTS[1], SamplingParams(temperature=1.0, seed=at, max_tokens=30)) for at in range(5)]
        seen, decode = [], llm._executor.decode

        def watched(requests):
            flight = decode(requests)
            seen.append([request.id for request in flight.requests])
            return flight

        monkeypatch.setattr(llm._executor, "decode", watched)
        for _ in range(3):
            llm.step()
        llm.abort(ids[1])
        llm.step()
        llm.step()
        ids.append(llm.add_request(PROMPTS[2], greedy(9)))
        for _ in range(3):
            llm.step()
        assert seen[0] == ids[:5] and [ids[0], ids[4], ids[2], ids[3]] in seen
        assert seen[-1] == [ids[0], ids[4], ids[2], ids[3], ids[5]]


# Text


def test_stop_strings_across_tokens_and_streamed_text() -> None:
    tokenizer, prompts = Letters(), [prompt for prompt in PROMPTS if len(prompt) > 3]
    with LLM(tiny("llama"), tokenizer=tokenizer, max_batch=4, num_pages=80) as llm:
        free = llm.generate(prompts, greedy(30))
        texts = [output.text for output in free]
        assert texts == [tokenizer.all(output.token_ids) for output in free]
        stops = [("never there", text[7:10], text[9:11]) for text in texts]
        assert all(len(text) > 14 for text in texts)
        params = [greedy(30, stop=stop) for stop in stops]
        ended = llm.generate(prompts, params)
        ids = {llm.add_request(prompt, one): at for at, (prompt, one) in enumerate(zip(prompts, params, strict=True))}
        streamed = {ids[request_id]: output for request_id, output in finish(llm).items()}
        for at, (output, whole, text, stop) in enumerate(zip(ended, free, texts, stops, strict=True)):
            assert output.finish_reason == "stop"
            assert output.token_ids == whole.token_ids[: len(output.token_ids)]
            assert output.text == text[: min(text.find(one) for one in stop if one in text)]
            seen = tokenizer.all(output.token_ids)
            assert any(one in seen for one in stop)
            assert not any(one in tokenizer.all(output.token_ids[:-1]).rstrip("\ufffd") for one in stop)
            assert (streamed[at].token_ids, streamed[at].text) == (output.token_ids, output.text)


def test_min_tokens_holds_for_stop_strings() -> None:
    whole = expected("llama", PROMPTS[6], 30)
    text = Letters().all(whole)
    stop = text[1:3]
    with LLM(tiny("llama"), tokenizer=Letters(), max_batch=2, num_pages=80) as llm:
        early, late = llm.generate([PROMPTS[6]] * 2, [greedy(30, stop=stop), greedy(30, stop=stop, min_tokens=20)])
    assert early.text == text[: text.find(stop)]
    assert len(late.token_ids) >= 20
    assert late.text.startswith(text[:3])


def test_a_streams_deltas_add_up_and_come_as_they_are_drawn() -> None:
    prompts = [PROMPTS[3], PROMPTS[8], PROMPTS[12]]
    with LLM(tiny("llama"), tokenizer=Letters(), max_batch=3, num_pages=80) as llm:
        want = llm.generate(prompts, seeded(2, n=2))
        stream = llm.generate(prompts, seeded(2, n=2), stream=True)
        first = next(stream)
        assert first.output is None and len(first.token_ids) == 1
        deltas = [first, *stream]
        assert len(deltas) == sum(len(output.token_ids) for output in want)
        base = min(delta.request_id for delta in deltas)
        for output in want:
            mine = [d for d in deltas if (d.request_id - base, d.index) == (output.request_id, output.index)]
            assert sum((delta.token_ids for delta in mine), ()) == output.token_ids
            assert "".join(delta.text for delta in mine) == output.text
            assert [delta.output is not None for delta in mine] == [False] * (len(mine) - 1) + [True]
            assert mine[-1].output.text == output.text


def test_text_prompts_and_chat() -> None:
    tokenizer = Letters()
    with LLM(tiny("llama"), tokenizer=tokenizer, max_batch=3, num_pages=80) as llm:
        one, two = llm.generate(["Hello", "a b"], greedy(5))
        assert one.prompt_token_ids == (126, *b"Hello")
        assert llm.generate("Hello", greedy(5))[0].text == one.text == tokenizer.all(one.token_ids)
        messages = [{"role": "user", "content": "Hi"}]
        (answer,) = llm.chat(messages, greedy(5))
        assert answer.prompt_token_ids == tuple(b"user: Hi\nassistant:")  # the template has the special tokens
        assert answer.token_ids == expected("llama", answer.prompt_token_ids, 5)
        both = llm.chat([messages, messages * 2], [greedy(5), greedy(3)])
        assert both[0].token_ids == answer.token_ids and len(both[1].token_ids) == 3
        assert "".join(delta.text for delta in llm.chat(messages, greedy(5), stream=True)) == answer.text
        with pytest.raises(TypeError, match="temperature"):
            llm.chat(messages, temperature=0)
        assert llm.chat([]) == []
        for wrong in (None, [[]], "Hi"):
            with pytest.raises(InvalidRequestError, match="chat takes messages like"):
                llm.chat(wrong)
        with pytest.raises(InvalidRequestError, match="template refused the messages: KeyError: 'content'"):
            llm.chat([{"role": "user"}])


# Requests that come and go


def test_a_closed_stream_aborts_what_is_left() -> None:
    with LLM(small(), max_batch=2, num_pages=80) as llm:
        other = llm.add_request(PROMPTS[5], greedy(20))
        stream = llm.generate(PROMPTS[:6], greedy(20), stream=True)
        for _ in range(9):
            next(stream)
        stream.close()
        llm.pool.check()
        assert set(llm._engine.unfinished) == {other}
        outputs = finish(llm)
        assert list(outputs) == [other]
        assert outputs[other].token_ids == expected("small", PROMPTS[5], 20)


def test_generate_leaves_other_requests_and_their_deltas_alone() -> None:
    with LLM(small(), max_batch=3, num_pages=80) as llm:
        ids = {llm.add_request(prompt, greedy(17)): prompt for prompt in PROMPTS[3:6]}
        llm.step()
        mine = llm.generate(PROMPTS[6:9], greedy(6))
        assert [output.token_ids for output in mine] == [expected("small", prompt, 6) for prompt in PROMPTS[6:9]]
        got = defaultdict(tuple)
        outputs = {}
        while llm.has_work:
            for delta in llm.step():
                got[delta.request_id] += delta.token_ids
                outputs |= {delta.request_id: delta.output} if delta.output else {}
        for request_id, prompt in ids.items():
            whole = expected("small", prompt, 17)
            assert outputs[request_id].token_ids == whole
            assert whole[-len(got[request_id]) :] == got[request_id] and len(got[request_id]) >= 16


def test_two_streams_and_steps_take_turns() -> None:
    """Whoever steps, each gets its own deltas; nobody waits for what another one was given."""
    with LLM(small(), max_batch=8, num_pages=80) as llm:
        texts = {name: [] for name in ("first", "second", "third")}
        streams = {
            "first": llm.generate([PROMPTS[5]], greedy(9), stream=True),
            "second": llm.generate([PROMPTS[6]], greedy(5), stream=True),
        }
        third = llm.add_request(PROMPTS[7], greedy(12))
        texts["first"] += next(streams["first"]).token_ids
        texts["second"] += next(streams["second"]).token_ids
        for delta in streams["first"]:  # runs the second to its end on the way
            texts["first"] += delta.token_ids
        steps = llm._executor.runner.counts.total()
        for delta in streams["second"]:
            texts["second"] += delta.token_ids
        assert llm._executor.runner.counts.total() == steps
        while llm.has_work:
            for delta in llm.step():
                assert delta.request_id == third
                texts["third"] += delta.token_ids
    want = [expected("small", PROMPTS[at], length) for at, length in ((5, 9), (6, 5), (7, 12))]
    assert [tuple(tokens) for tokens in texts.values()] == want


def test_abort_anywhere_gives_what_there_was(overlap: bool) -> None:
    with LLM(small(), tokenizer=Letters(), max_batch=2, num_pages=80, max_prefill_tokens=10) as llm:
        running, prefilling, waiting = (llm.add_request(PROMPTS[at], greedy(20, n=2)) for at in (1, 11, 5))
        for _ in range(4):
            llm.step()
        for request_id in (waiting, prefilling, running):
            llm.abort(request_id)
        llm.pool.check()
        assert llm.pool.num_used == 0
        deltas = llm.step()
        assert [delta.request_id for delta in deltas] == [waiting] * 2 + [prefilling] * 2 + [running] * 2
        assert {delta.output.finish_reason for delta in deltas} == {"abort"}
        read = 3 if overlap else 4
        assert [len(delta.output.token_ids) for delta in deltas] == [0, 0, 0, 0, read, read]
        assert deltas[-1].output.token_ids == expected("small", PROMPTS[1], read)
        assert not llm.has_work and llm.step() == []
        for gone in (running, 99, True, "x"):
            with pytest.raises(InvalidRequestError, match=f"request {gone!r} is not in the engine"):
                llm.abort(gone)


def test_a_streams_request_can_be_aborted_from_outside() -> None:
    with LLM(small(), max_batch=2, num_pages=80) as llm:
        deltas = []
        for delta in llm.generate(PROMPTS[4:6], greedy(12), stream=True):
            deltas.append(delta)
            if len(deltas) == 5:
                llm.abort(0)
        reasons = {delta.request_id: delta.output.finish_reason for delta in deltas if delta.output}
        assert reasons == {0: "abort", 1: "length"}


def test_timings_and_progress() -> None:
    with LLM(small(), max_batch=2, num_pages=80, page_size=4) as llm:
        seen = []
        outputs = llm.generate(PROMPTS[:5], greedy(4, n=2), progress=lambda done, total: seen.append((done, total)))
        assert seen == [(done, 10) for done in range(1, 11)]
        assert all(0 < output.timings.first_token <= output.timings.total for output in outputs)
        assert llm.generate([SHARED], greedy(1))[0].timings.cached_tokens == 0
        assert llm.generate([SHARED], greedy(1))[0].timings.cached_tokens == 36
        llm.add_request(SHARED)
        llm.abort(11 - 4)
        (aborted,) = finish(llm).values()
        assert aborted.timings.first_token is None


# Failures


class Fault(Exception):
    pass


def failing_at(model: PreTrainedModel, calls: set[int], *, inside: bool) -> Callable[[], None]:
    """Makes some forwards of the model raise, before they start or when half of their keys are written."""
    count = 0

    def hook(*_):
        nonlocal count
        count += 1
        if count in calls:
            raise Fault(count)

    target = model.model.layers[-1] if inside else model
    return target.register_forward_pre_hook(hook).remove


@pytest.mark.parametrize("inside", [False, True], ids=["before", "half-way"])
@pytest.mark.parametrize("page_size", [1, 4])
def test_a_forward_that_raises_loses_nothing(inside: bool, page_size: int) -> None:
    model = tiny("llama")
    with LLM(model, tokenizer=Letters(), max_batch=4, num_pages=1 + 120 // page_size, page_size=page_size) as llm:
        remove = failing_at(model, {1, 3, 4, 9, 10, 15, 22}, inside=inside)
        greedy_ids = {llm.add_request(prompt, greedy()): prompt for prompt in PROMPTS}
        seeded_ids = {llm.add_request(prompt, seeded(1)): prompt for prompt in PROMPTS}
        outputs, streamed, faults = {}, defaultdict(tuple), 0
        while llm.has_work:
            try:
                deltas = llm.step()
            except Fault:
                faults += 1
                llm.pool.check()
                continue
            for delta in deltas:
                streamed[delta.request_id] += delta.token_ids
                outputs |= {delta.request_id: delta.output} if delta.output else {}
        remove()
        assert faults == 7
        assert llm.pool.num_used == 0
        for request_id, prompt in greedy_ids.items():
            assert streamed[request_id] == outputs[request_id].token_ids == expected("llama", prompt, 12)
        again = llm.generate(PROMPTS, seeded(1))
        for request_id, output in zip(seeded_ids, again, strict=True):
            assert streamed[request_id] == outputs[request_id].token_ids == output.token_ids


def test_a_forward_that_raises_in_generate_ends_only_what_it_asked() -> None:
    model = small()
    with LLM(model, max_batch=4, num_pages=60) as llm:
        other = llm.add_request(PROMPTS[7], greedy(9))
        remove = failing_at(model, {5}, inside=False)
        with pytest.raises(Fault):
            llm.generate(PROMPTS[:3], greedy())
        remove()
        assert set(llm._engine.unfinished) == {other}
        outputs = finish(llm)
        assert list(outputs) == [other] and outputs[other].token_ids == expected("small", PROMPTS[7], 9)
        assert llm.generate([PROMPTS[2]], greedy())[0].token_ids == expected("small", PROMPTS[2], 12)


def test_an_interrupt_between_draw_and_delivery_loses_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(small(), max_batch=4, num_pages=60) as llm:
        ids = {llm.add_request(prompt, greedy()): prompt for prompt in PROMPTS[4:8]}
        llm.step()
        accept, calls = llm._engine._accept, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            accept(*args)

        monkeypatch.setattr(llm._engine, "_accept", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.step()
        monkeypatch.undo()
        outputs = finish(llm, whole=False)
        assert {i: output.token_ids for i, output in outputs.items()} == {
            i: expected("small", prompt, 12) for i, prompt in ids.items()
        }


@pytest.mark.parametrize("options", [{}, {"stop": "never there"}], ids=["at-the-end", "while-it-runs"])
@pytest.mark.parametrize("how", ["generate", "stream", "step"])
def test_a_tokenizer_that_raises_ends_one_request(how: str, options: dict) -> None:
    prompts = PROMPTS[3:9]
    want = [expected("llama", prompt, 12) for prompt in prompts]
    poison = next(token for token in want[2][2:] if not any(token in other for other in want[:2] + want[3:]))
    params = greedy(12, **options)
    with LLM(tiny("llama"), tokenizer=Letters(poison), max_batch=4, num_pages=60) as llm:
        if how == "step":
            ids = [llm.add_request(prompt, params) for prompt in prompts]
            done = finish(llm)
            outputs = [done[request_id] for request_id in ids]
        elif how == "stream":
            last = {d.request_id: d.output for d in llm.generate(prompts, params, stream=True) if d.output}
            outputs = [last[request_id] for request_id in sorted(last)]
        else:
            outputs = llm.generate(prompts, params)
        assert llm.pool.num_used == 0 and not llm.has_work
    failed = outputs.pop(2)
    assert failed.finish_reason == "error" and failed.error == f"KeyError: 'no piece for {poison}'"
    at = want[2].index(poison)
    late = how == "generate" and not options
    assert failed.token_ids == (want[2] if late else want[2][: at + 1])
    assert Letters().all(failed.token_ids).startswith(failed.text)
    for output, tokens in zip(outputs, want[:2] + want[3:], strict=True):
        assert (output.finish_reason, output.error, output.token_ids) == ("length", None, tokens)
        assert output.text == Letters().all(tokens)


@pytest.mark.parametrize("where", ["prompt", "draw"])
@pytest.mark.parametrize(
    "sampled", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9, "logprobs": 2}], ids=["greedy", "drawn"]
)
def test_nan_ends_one_request(where: str, overlap: bool, sampled: dict) -> None:
    """A weight is NaN that one token reads, in the prompt or drawn on the way; nobody else notices, also not later."""
    model, params = tiny("llama"), replace(greedy(30), **sampled)
    prompts = [list(prompt) for prompt in PROMPTS[11:15]]
    with LLM(model, max_batch=4, num_pages=60, page_size=4) as llm:
        want = [output.token_ids for output in llm.generate(prompts, params)]
    at, spoilt = next(
        (at, token)
        for at, tokens in enumerate(want)
        for token in tokens[3:]
        if not any(token in other for other in (*prompts, tokens[:3], *want[:at], *want[at + 1 :]))
    )
    with LLM(model, max_batch=4, num_pages=60, page_size=4) as llm:
        right = model.model.embed_tokens.weight[spoilt].clone()
        model.model.embed_tokens.weight.data[spoilt] = math.nan
        if where == "prompt":
            prompts[at][2] = spoilt
        outputs = llm.generate(prompts, params)
        llm.pool.check()
        assert llm.pool.num_used == 0 and not llm.has_work
        failed, tokens = outputs.pop(at), want.pop(at)
        count = 0 if where == "prompt" else tokens.index(spoilt) + 1
        assert failed.finish_reason == "error" and failed.token_ids == tokens[:count]
        assert failed.error.startswith(f"NotANumberError: token {len(prompts[at]) + count} could not be drawn")
        assert [output.token_ids for output in outputs] == want
        model.model.embed_tokens.weight.data[spoilt] = right
        again = llm.generate(prompts, params)
        assert [output.finish_reason for output in again] == ["length"] * 4
        assert again.pop(at).timings.cached_tokens == 0
        assert [output.token_ids for output in again] == want


@pytest.mark.parametrize("page_size", [4, 16])
def test_nan_behind_a_window_is_not_found_again(page_size: int) -> None:
    """Pages that every window has left are no longer the request's when it ends."""
    model, prompt = tiny("mistral", sliding_window=8), list(prompt_of(81, seed=5))
    spoilt = prompt[2]
    with LLM(model, max_batch=2, num_pages=60, page_size=page_size, max_prefill_tokens=16) as llm:
        want = llm.generate([prompt], greedy(6))[0].token_ids
        llm.pools.clear_prefixes()
        right = model.model.embed_tokens.weight[spoilt].clone()
        model.model.embed_tokens.weight.data[spoilt] = math.nan
        assert llm.generate([[*prompt[:78], spoilt]], greedy(6))[0].finish_reason == "error"
        model.model.embed_tokens.weight.data[spoilt] = right
        again = llm.generate([[*prompt[:78], spoilt], prompt], greedy(6))
        assert [output.finish_reason for output in again] == ["length", "length"]
        assert again[1].token_ids == want
        llm.pool.check()


def test_bad_requests_are_refused_and_nothing_else_notices() -> None:
    with LLM(small(), max_batch=4, num_pages=60, max_seq_len=48) as llm:
        going = {llm.add_request(prompt, greedy()): prompt for prompt in PROMPTS[4:8]}
        llm.step()
        for prompt, params, complaint in (
            ([], None, "the prompt is empty"),
            ([1, VOCAB], None, "token 128 at position 1: ids go from 0 to 127"),
            ([-1], None, "token -1 at position 0"),
            ([1, True], None, "True and False are no ids"),
            (torch.tensor([True, False]), None, "True and False are no ids"),
            ([1, "a"], None, "neither text nor a sequence of token ids: 'str'"),
            (None, None, "neither text nor a sequence of token ids: 'NoneType'"),
            ([1.5], None, "neither text nor a sequence of token ids: 'float'"),
            ([1] * 48, None, "48 tokens, max_seq_len is 48: there is no room"),
            ("text", None, "the prompt is text and there is no tokenizer"),
            ([1], greedy(stop="x"), "stop strings need a tokenizer; use stop_token_ids"),
            ([1], greedy(stop_token_ids=[3, 400]), "stop_token_ids of the prompt has 400 at position 1"),
            ([1], {"temperature": 0}, "the params of the prompt are a dict: give SamplingParams"),
        ):
            with pytest.raises(InvalidRequestError, match=complaint):
                llm.add_request(prompt, params)
            for call in (llm.generate, functools.partial(llm.generate, stream=True)):
                with pytest.raises(InvalidRequestError, match=complaint.replace("the prompt", "prompt 1")):
                    call([[1], prompt], [None, params])
        with pytest.raises(InvalidRequestError, match="2 SamplingParams for 1 prompts: give one, or one each"):
            llm.generate([[1]], [greedy(), greedy()])
        with pytest.raises(InvalidRequestError, match="the prompts are neither text nor a sequence"):
            llm.generate(3)
        with pytest.raises(InvalidRequestError, match="chat needs a tokenizer with a chat template"):
            llm.chat([{"role": "user", "content": "Hi"}])
        with pytest.raises(TypeError, match="max_token"):
            llm.generate([[1]], max_token=3)
        outputs = finish(llm, whole=False)
        assert {i: output.token_ids for i, output in outputs.items()} == {
            i: expected("small", prompt, 12) for i, prompt in going.items()
        }
        assert llm.generate([]) == []


def test_ids_may_be_any_integers() -> None:
    import numpy as np

    with LLM(small(), max_batch=2, num_pages=40) as llm:
        want = expected("small", PROMPTS[5], 4)
        for prompts in (PROMPTS[5], np.array(PROMPTS[5]), [torch.tensor(PROMPTS[5])], torch.tensor([PROMPTS[5]])):
            assert [output.token_ids for output in llm.generate(prompts, greedy(4))] == [want]


def test_a_request_the_whole_cache_cannot_hold_is_refused_before_it_runs() -> None:
    with LLM(small(), max_batch=2, num_pages=6, page_size=4) as llm:
        assert llm.max_seq_len == 20
        with pytest.raises(
            OutOfPagesError, match="has 20 tokens and needs 6 pages to generate one more, the cache has 5"
        ):
            llm.add_request([1] * 20)
        with pytest.raises(InvalidRequestError, match="513 tokens, max_seq_len is 512"):
            llm.add_request([1] * 513)
        (output,) = llm.generate([[1] * 19], greedy())
        assert (len(output.token_ids), output.finish_reason) == (1, "length")


def test_pages_held_outside_the_engine_are_named() -> None:
    with LLM(small(), max_batch=2, num_pages=6, page_size=4) as llm:
        held = llm.pool.allocate(4)
        request_id = llm.add_request(PROMPTS[5], greedy(4))
        with pytest.raises(OutOfPagesError, match="release the pages taken from this pool outside the engine"):
            llm.step()
        llm.pool.release(held)
        assert finish(llm)[request_id].token_ids == expected("small", PROMPTS[5], 4)


def test_a_minimum_beyond_any_number_stops_nobody_else() -> None:
    """What is banned below it is banned as long as there is room."""
    endless = SamplingParams(temperature=0, max_tokens=None, min_tokens=10**400, stop_token_ids=[5])
    with LLM(small(), max_batch=2, num_pages=40, max_seq_len=40) as llm:
        first, second = llm.generate([PROMPTS[0], PROMPTS[5]], [endless, greedy(4)])
    assert len(first.token_ids) == 40 - len(PROMPTS[0]) and 5 not in first.token_ids
    assert second.token_ids == expected("small", PROMPTS[5], 4)


# Making and closing an engine


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"max_batch": 0}, InvalidArgumentError, "max_batch=0"),
        ({"max_batch": 2.5}, InvalidArgumentError, "max_batch=2.5: it must be an int"),
        ({"buckets": 2}, InvalidArgumentError, "buckets=2: give a sequence of batch sizes"),
        ({"page_size": 2**70}, InvalidArgumentError, "page_size=1180591620717411303424: it must be an int, at least 1"),
        ({"prefix_cache": "off"}, InvalidArgumentError, "prefix_cache='off': it must be True or False"),
        ({"enforce_eager": None}, InvalidArgumentError, "enforce_eager=None: it must be True or False"),
        ({"check": 1}, InvalidArgumentError, "check=1: it must be True or False"),
        ({"compile": 1}, InvalidArgumentError, "compile=1: choose auto, True or False"),
        ({"memory_fraction": True}, InvalidArgumentError, "memory_fraction=True: it must be above 0"),
        ({"progress": 5}, InvalidArgumentError, "progress is a int: give a function"),
        ({"record_batches": 5}, InvalidArgumentError, "record_batches is a int: give the path"),
        ({"record_batches": "/none/x.json"}, InvalidArgumentError, "'/none/x.json': no file can be written there"),
        ({"buckets": ["2"]}, InvalidArgumentError, "batch size '2': it must be an int"),
        ({"memory_fraction": 2}, InvalidArgumentError, "memory_fraction=2: it must be above 0 and at most 1"),
        ({"page_size": 16.0}, InvalidArgumentError, "page_size=16.0: it must be an int"),
        ({"tokenizer": 5}, InvalidArgumentError, "tokenizer is a int"),
        ({"max_seq_len": 0}, InvalidArgumentError, "max_seq_len=0"),
        ({"max_seq_len": 513}, InvalidArgumentError, "max_seq_len=513: the model's positions end at 512"),
        ({"max_prefill_tokens": 0}, InvalidArgumentError, "max_prefill_tokens=0"),
        ({"page_size": 0}, InvalidArgumentError, "page_size=0"),
        ({"num_pages": 1}, InvalidArgumentError, "num_pages=1"),
        ({"num_pages": 4, "max_seq_len": 64}, OutOfPagesError, "max_seq_len=64 needs 4 pages, the cache has 3"),
        ({"num_pages": 9, "kv_bytes": 1 << 20}, InvalidArgumentError, "num_pages=9 and kv_bytes=1048576: give one"),
        ({"kv_bytes": 100}, InvalidArgumentError, "fewer than 2 pages"),
        ({"backend": "flashinfer"}, BackendError, "it needs a CUDA device, this is cpu"),
        ({"backend": "flash"}, InvalidArgumentError, "'flash': choose auto, fused, flashinfer, reference or cascade"),
        ({"capture": "some"}, InvalidArgumentError, "capture='some': choose all or lazy"),
        ({"layout": "HDN"}, InvalidArgumentError, "layout='HDN': choose auto, NHD or HND"),
        (
            {"kv_cache_dtype": "fp4"},
            InvalidArgumentError,
            "kv_cache_dtype='fp4': choose 'auto' for the model's own, torch.float64, or 'fp8' for torch.float8_e4m3fn",
        ),
        ({"compile": "yes"}, InvalidArgumentError, "compile='yes'"),
        ({"buckets": [300]}, InvalidArgumentError, "bucket 300 is larger than max_batch=256"),
        ({"device": "cpu"}, InvalidArgumentError, "this model is loaded"),
        ({"gpu_memory_utilization": 0.9}, TypeError, "gpu_memory_utilization"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named_and_leave_the_model_alone(options, error, complaint) -> None:
    model = small()
    config, modules = model.config, list(model.modules())
    with pytest.raises(error, match=complaint):
        LLM(model, **({"num_pages": 40} | options if "kv_bytes" not in options else options))
    assert model.config is config and list(model.modules()) == modules
    assert reference(model, PROMPTS[5], 4) == expected("small", PROMPTS[5], 4)


def test_cuda_without_flashinfer_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphattn.backends.flashinfer.find_spec", lambda name: None)
    spec, cache = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64), CacheSpec(num_pages=9)
    with pytest.raises(BackendError, match=r"(?s)not installed: pip install .*reference: can serve it"):
        choose_backend("auto", spec, cache, torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_named_before_anything_is_loaded(tmp_path) -> None:
    with pytest.raises(InvalidArgumentError, match="device='cuda': torch .* sees no CUDA device"):
        LLM(tmp_path, device="cuda")


def test_two_engines_interleave() -> None:
    texts = {family: [expected(family, prompt, 12) for prompt in PROMPTS] for family in ("llama", "qwen3")}
    options = {"max_batch": 9, "num_pages": 20, "page_size": 4, "max_seq_len": 64, "max_prefill_tokens": 16}
    with LLM(tiny("llama"), **options) as first, LLM(tiny("qwen3"), **options) as second:
        outputs = {"llama": {}, "qwen3": {}}
        for prompt in PROMPTS:
            first.add_request(prompt, greedy())
            second.add_request(prompt, greedy())
        while first.has_work or second.has_work:
            for family, llm in (("llama", first), ("qwen3", second), ("qwen3", second)):
                outputs[family] |= {delta.request_id: delta.output for delta in llm.step() if delta.output}
        assert first._scheduler.num_preemptions > 0
    for family, done in outputs.items():
        assert [done[request_id].token_ids for request_id in sorted(done)] == texts[family]


def test_an_engine_and_an_attached_model_interleave() -> None:
    attached = tiny("qwen3")
    with attach(attached, page_size=4), LLM(tiny("llama"), max_batch=4, num_pages=60, page_size=4) as llm:
        ids = {llm.add_request(prompt, greedy()): prompt for prompt in PROMPTS[3:9]}
        outputs = {}
        for prompt in PROMPTS[6:12]:
            outputs |= {delta.request_id: delta.output for delta in llm.step() if delta.output}
            assert reference(attached, prompt, 12) == expected("qwen3", prompt, 12)
        outputs |= finish(llm, whole=False)
        assert {i: o.token_ids for i, o in outputs.items()} == {i: expected("llama", p, 12) for i, p in ids.items()}
    assert reference(attached, PROMPTS[5], 12) == expected("qwen3", PROMPTS[5], 12)


def test_one_model_cannot_be_in_two_engines() -> None:
    model = small()
    with LLM(model, max_batch=2, num_pages=40) as llm:
        with pytest.raises(UnsupportedModelError, match="attached already: detach it first"):
            LLM(model, max_batch=2, num_pages=40)
        assert llm.generate([PROMPTS[5]], greedy(4))[0].token_ids == expected("small", PROMPTS[5], 4)


def test_new_weights_change_results_and_drop_prefixes() -> None:
    other, prompt = small(seed=8), PROMPTS[-1]
    want = {name: reference(model, prompt, 12) for name, model in (("old", small()), ("new", small(seed=8)))}
    assert want["old"] != want["new"]
    with LLM(small(), max_batch=4, num_pages=60, page_size=4) as llm:
        assert llm.generate([prompt], greedy())[0].token_ids == want["old"]
        addresses = [weight.data_ptr() for weight in llm.model.parameters()]
        llm.load_weights(other.state_dict().items())
        assert [weight.data_ptr() for weight in llm.model.parameters()] == addresses
        assert llm.pool.num_cached == 0
        (output,) = llm.generate([prompt], greedy())
        assert (output.token_ids, output.timings.cached_tokens) == (want["new"], 0)
        llm.load_weights((name, weight.float()) for name, weight in small().state_dict().items())
        with pytest.raises(InvalidArgumentError, match="weight 'model.norm.bias': the model has none of that name"):
            llm.load_weights({"model.norm.bias": torch.zeros(16)}.items())
        with pytest.raises(
            InvalidArgumentError, match=r"weight 'model.norm.weight' is \(17,\), the model's is \(16,\)"
        ):
            llm.load_weights([("model.norm.weight", torch.ones(17))])


def test_new_weights_reach_requests_that_run() -> None:
    """From then on they are what the new weights make of the tokens so far, with nothing of the old in the cache."""
    other, prompt = small(seed=8), PROMPTS[-1]
    with LLM(small(), max_batch=4, num_pages=60, page_size=4) as llm:
        request_id = llm.add_request(prompt, greedy())
        for _ in range(5):
            llm.step()
        llm.load_weights(other.state_dict().items())
        outputs = finish(llm, whole=False)
    before = expected("small", prompt, 5)
    assert outputs[request_id].token_ids == before + reference(other, prompt + before, 7)


def test_close_restores_the_model_and_ends_what_runs() -> None:
    model = small()
    config, modules = model.config, list(model.modules())
    llm = LLM(model, max_batch=2, num_pages=40)
    stream = llm.generate([PROMPTS[4]], greedy(), stream=True)
    next(stream)
    request_id = llm.add_request(PROMPTS[5], greedy())
    llm.step()
    assert model.config is not config
    llm.close()
    llm.close()
    assert model.config is config and list(model.modules()) == modules
    assert llm.pool.num_used == 0
    assert llm._executor.cache_bytes == 0
    assert [delta.output.finish_reason for delta in stream if delta.output] == ["abort"]
    assert {i: output.finish_reason for i, output in finish(llm, whole=False).items()} == {request_id: "abort"}
    for call in (lambda: llm.add_request([1]), lambda: llm.generate([[1]])):
        with pytest.raises(InvalidRequestError, match="the engine is closed: make a new LLM"):
            call()
    assert reference(model, PROMPTS[5], 12) == expected("small", PROMPTS[5], 12)
    with LLM(model, max_batch=2, num_pages=40) as again:
        assert again.generate([PROMPTS[5]], greedy())[0].token_ids == expected("small", PROMPTS[5], 12)
    assert model.config is config


def test_leaving_the_context_restores_the_model_after_an_error() -> None:
    model = small()
    config = model.config
    with pytest.raises(Fault), LLM(model, max_batch=2, num_pages=40) as llm:
        llm.add_request([1])
        raise Fault
    assert model.config is config


def test_explain_says_what_is_in_force() -> None:
    with LLM(small(), max_batch=6, num_pages=25, page_size=4, max_seq_len=64) as llm:
        llm.generate(PROMPTS, greedy())
        lines = dict(line.split(maxsplit=1) for line in llm.explain().splitlines())
        run_steps, scheduler = llm._executor.runner.counts["eager"], llm._scheduler
        assert lines["decode"] == "eager (no CUDA graphs), not compiled"
        assert lines["backend"] == "reference on cpu" and lines["linears"] == "all by torch"
        assert lines["layers"].startswith("1 x AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8")
        steps_at = dict(re.findall(r"(\d+) reference \((\d+) steps\)", lines["buckets"]))
        assert list(steps_at) == ["1", "2", "4", "6"] and sum(map(int, steps_at.values())) == run_steps
        assert lines["pages"] == f"24 of 4 tokens (NHD), 0 in use, {llm.pool.num_cached} cached; max_seq_len 64"
        assert lines["steps"].startswith(f"0 replayed, {run_steps} eager, 0 stopped by the plan guard; ")
        assert f"{scheduler.num_preemptions} preemptions, {llm.pool.num_hits} tokens" in lines["steps"]
        assert run_steps > 0 and scheduler.num_preemptions > 0 and llm.pool.num_hits > 0


def test_batches_are_recorded_when_the_engine_closes(tmp_path) -> None:
    path = tmp_path / "batches.json"
    with LLM(small(), max_batch=4, num_pages=40, record_batches=path) as llm:
        llm.generate(PROMPTS[:2], greedy(5))
        llm.generate(PROMPTS[:1], greedy(3))
        run_rows = dict(llm._executor.runner.rows)
    assert json.loads(path.read_text()) == {
        "schema_version": 1,
        "max_batch": 4,
        "steps": {str(rows): count for rows, count in sorted(run_rows.items())},
    }
    assert run_rows[2] > 0 and run_rows[1] > 0


def test_an_engine_that_is_dropped_leaves_the_model_as_it_was() -> None:
    model = small()
    config = model.config
    llm = LLM(model, max_batch=2, num_pages=40)
    llm.generate(PROMPTS[0], greedy(2))
    del llm
    gc.collect()
    assert model.config is config
    LLM(model, max_batch=2, num_pages=40).close()


def test_close_gives_the_pages_back_while_the_engine_is_still_held() -> None:
    model = small()
    with LLM(model, max_batch=2, num_pages=40) as llm:
        llm.generate(PROMPTS[0], greedy(2))
        held = [weakref.ref(tensor) for cache in llm._executor.caches for pair in cache.layers for tensor in pair]
        held += [weakref.ref(llm._executor.runner.state), weakref.ref(llm._executor.runner.planner)]
    gc.collect()
    assert not any(ref() is not None for ref in held)
    for call in (llm.explain, llm.ledger):
        with pytest.raises(InvalidArgumentError, match="the LLM is closed"):
            call()


def test_close_detaches_whatever_happens_while_requests_are_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    config, llm = model.config, LLM(model, max_batch=2, num_pages=40)
    llm.add_request(PROMPTS[0], greedy())
    with monkeypatch.context() as patched:
        patched.setattr(BlockTable, "release", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.close()
    assert model.config is config
    llm.close()


def _interrupt(*args) -> None:
    raise KeyboardInterrupt


def test_a_model_set_to_another_implementation_is_noticed() -> None:
    model = small()
    with LLM(model, max_batch=2, num_pages=40) as llm:
        model.set_attn_implementation("eager")
        with pytest.raises(InvalidArgumentError, match="set to attn_implementation='eager' while an LLM runs it"):
            llm.generate(PROMPTS[0], greedy(2))
        model.set_attn_implementation("graphattn")
        assert llm.generate(PROMPTS[5], greedy())[0].token_ids == expected("small", PROMPTS[5], 12)


@pytest.mark.parametrize("family", ["bart", "llama4_text"])
def test_models_with_positions_by_place_are_refused(family: str) -> None:
    """Their tokens cannot share a row with other requests'; bart reads no position_ids, Llama 4 scales by the place."""
    own = {
        "bart": {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96},
        "llama4_text": {"layer_types": ["full_attention"] * 2, "no_rope_layers": [0, 0], "num_local_experts": 2},
    }
    options = {"is_decoder": True, "is_encoder_decoder": False, "forced_eos_token_id": None}
    model = tiny(family, **own[family], **(options if family == "bart" else {}))
    with pytest.raises(UnsupportedModelError, match="takes positions from a token's place in the row"):
        LLM(model, max_batch=2, num_pages=40)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_default_dtype_and_device_are_no_matter(dtype: torch.dtype) -> None:
    model = small()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), LLM(model, max_batch=2, num_pages=40) as llm:
            output = llm.generate(PROMPTS[5], greedy(logprobs=1))[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert output.token_ids == expected("small", PROMPTS[5], 12)


def test_ledger_counts_weights_pages_and_buffers() -> None:
    model = small()
    with LLM(model, max_batch=6, num_pages=25, page_size=4) as llm:
        lines = {line.name: line.bytes for line in llm.ledger().lines}
        buffers = {buffer.data_ptr(): buffer.nbytes for buffer in plain("small").buffers()}
        assert lines["weights"] == sum(weight.nbytes for weight in model.parameters()) + sum(buffers.values())
        assert lines["KV pages"] == 25 * 4 * 2 * 8 * 8  # pages, slots, keys and values, width, float64
        assert lines["step buffers"] > 6 * VOCAB * 8
        assert "KV pages" in str(llm.ledger())


def test_kv_bytes_and_free_memory_size_the_cache() -> None:
    page_bytes = 16 * 2 * 8 * 8
    with LLM(small(), max_batch=2, kv_bytes=10 * page_bytes + 5) as llm:
        assert llm.pool.num_pages == 10
    with LLM(small(), max_batch=3, max_seq_len=40) as llm:
        assert llm.pool.num_usable == 3 * 3
    with LLM(small(), max_batch=3) as llm:
        assert (llm.pool.num_usable, llm.max_seq_len) == (3 * 32, 512)


def test_loading_and_capturing_report_progress() -> None:
    seen = []
    with LLM(small(), max_batch=4, num_pages=40, progress=lambda *args: seen.append(args)):
        assert seen == [("load", 0, 1), ("load", 1, 1), *(("capture", done, 3) for done in (1, 2, 3))]
