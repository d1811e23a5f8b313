"""Workload `prefill`: tokens per second of prompts alone, and what a long prompt does to rows that decode meanwhile."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

import torch

from graphattn import LLM, SamplingParams

from .decode import decoding
from .rows import prompts, tokens_each
from .timing import quantile, spread

REPEATS = 5
PROMPTS = (16, 128, 512, 2048)  # tokens of prompts that are timed alone, beside a full step and the long one
CALM_STEPS = 16  # steps timed before the prompt comes


@dataclass(frozen=True, kw_only=True)
class Load:
    """Who decodes, and what comes.

    Attributes:
        decoding: rows that decode.
        context: tokens of their prompts.
        prompt: tokens of the prompt that comes.
    """

    decoding: int
    context: int
    prompt: int

    def steps(self, budget: int) -> int:
        """Steps that the rows must be able to make: some before, the prompt's chunks, some behind."""
        return CALM_STEPS + -(-self.prompt // budget) + 16

    def max_len(self, budget: int) -> int:
        """Tokens of the longest request."""
        lens = [self.context] * self.decoding
        return max(self.prompt + 8, self.context + tokens_each(lens, self.steps(budget), budget))


def alone(llm: LLM, num_tokens: int) -> dict:
    """Tokens per second of one prompt of `num_tokens`, from its arrival to its first token."""
    vocab, seconds = llm.model.config.get_text_config().vocab_size, []
    prompt = prompts([num_tokens], vocab)[0]
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        while llm.has_work:
            llm.step()
        seconds.append(time.perf_counter() - started)
    seconds_of = spread(seconds[1:])
    return {"prompt_tokens": num_tokens, "seconds": seconds_of, "tokens_per_s": num_tokens / seconds_of["p50"]}


def beside(llm: LLM, load: Load, budget: int) -> dict:
    """Time between the tokens of rows that decode, before and while a prompt comes in chunks.

    Args:
        llm: an engine whose `max_prefill_tokens` is `budget`.
        load: who decodes, and what comes.
        budget: prompt tokens a step.
    """
    vocab = llm.model.config.get_text_config().vocab_size
    prompt = prompts([load.prompt], vocab)[0]
    with decoding(llm, [load.context] * load.decoding, load.steps(budget), budget) as rows:
        calm = []
        for _ in range(CALM_STEPS):
            started = time.perf_counter()
            rows.step()
            calm.append(time.perf_counter() - started)
        last = dict.fromkeys(rows.requests, time.perf_counter())
        gaps: dict[int, list[float]] = defaultdict(list)
        added = time.perf_counter()
        newcomer = llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        first_token = None
        while first_token is None:
            deltas = llm.step()
            now = time.perf_counter()
            for delta in deltas:
                if delta.request_id == newcomer:
                    first_token = now - added
                else:
                    gaps[delta.request_id].append(now - last[delta.request_id])
                    last[delta.request_id] = now
    if len(gaps) != load.decoding:
        raise RuntimeError(f"{len(gaps)} of {load.decoding} rows had a token while the prompt came")
    every = [gap for each in gaps.values() for gap in each]
    return {
        "max_prefill_tokens": budget,
        "decoding": load.decoding,
        "context": load.context,
        "prompt_tokens": load.prompt,
        "first_token_s": first_token,
        "gap_ms": {"p50": quantile(every, 0.5) * 1e3, "p99": quantile(every, 0.99) * 1e3, "max": max(every) * 1e3},
        "calm_ms": spread(calm, 1e3),
    }


def measure(model: torch.nn.Module, load: Load, step_tokens: int, budgets: list[int], options: dict) -> dict:
    """Both parts, each budget in an engine of its own; `alone` runs in one step up to `step_tokens`, and in chunks."""
    found: dict = {"alone": [], "beside": []}
    sizes = {"max_batch": load.decoding + 1, "buckets": [load.decoding, load.decoding + 1], "prefix_cache": False}
    for budget in budgets:
        limit = max(load.max_len(budget), step_tokens + 8)
        with LLM(model, max_seq_len=limit, max_prefill_tokens=budget, **sizes, **options) as llm:
            if budget == budgets[0]:
                sizes_alone = [*(tokens for tokens in PROMPTS if tokens < step_tokens), step_tokens, load.prompt]
                found["alone"] = [alone(llm, tokens) | {"max_prefill_tokens": budget} for tokens in sizes_alone]
                found["explain"] = llm.explain().splitlines()
            alone(llm, min(load.prompt, budget))  # so that no kernel of this chunk size is first met while timed
            found["beside"].append(beside(llm, load, budget))
    return found
