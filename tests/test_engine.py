"""The engine against transformers' own generate, and every request against its lone run."""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest
import torch
from tiny import FAMILIES, tiny
from transformers import PreTrainedModel

from graphattn import (
    LLM,
    BackendError,
    InvalidArgumentError,
    InvalidRequestError,
    OutOfPagesError,
    RequestOutput,
    SamplingParams,
    UnsupportedModelError,
)
from graphattn.hf import attach
from graphattn.plan import choose_backend
from graphattn.draw import derive_seed
from graphattn.spec import AttentionSpec, CacheSpec

VOCAB = 128
END = 5  # in no greedy text unless a test asks for it


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run no faster on more, and much slower where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def run(llm: LLM) -> dict[int, RequestOutput]:
    """Steps until nothing is left; deltas must add up to the outputs."""
    outputs, tokens, texts = {}, defaultdict(tuple), defaultdict(str)
    while llm.has_work:
        for delta in llm.step():
            key = delta.request_id, delta.index
            assert key not in outputs, "a delta after the last"
            tokens[key] += delta.token_ids
            texts[key] += delta.text
            if delta.output is not None:
                outputs[key] = delta.output
        llm.pool.check()
    for key, output in outputs.items():
        assert tokens[key] == output.token_ids
        assert texts[key] == output.text
    assert llm.pool.num_used == 0
    return {request_id: output for (request_id, _), output in outputs.items()}


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
            key: llm.generate([key[0]], params(key[1], 24))[0].token_ids for key in sorted(set(pool_of_prompts), key=str)
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
                aborted.add(rng.choice(running))
                llm.abort(max(aborted, key=lambda one: one in running and one))
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
