"""Workload `nano`, nano-vLLM's bench: requests of mixed lengths, all sent at once, tokens per second."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from graphattn import LLM, SamplingParams

TEMPERATURE = 0.6
CASE = "requests of mixed lengths"
MAX_BATCH = 256
STEP_TOKENS = 16384  # of prefill, nano-vLLM's own default


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Prompts and how many tokens to generate for each.

    Args:
        num_requests: how many; 256 in nano-vLLM's bench.
        longest: tokens of a prompt, and of an answer, at most; 1024 there.
        vocab_size: ids are drawn below it, and below 10001.
    """

    num_requests: int
    longest: int
    vocab_size: int

    def draw(self) -> tuple[list[list[int]], list[int]]:
        """The prompts, and the tokens to generate, of 100 (or `longest`) to `longest` tokens each, seed 0."""
        rng, lens = random.Random(0), (min(100, self.longest), self.longest)
        top = min(10000, self.vocab_size - 1)
        prompts = [[rng.randint(0, top) for _ in range(rng.randint(*lens))] for _ in range(self.num_requests)]
        return prompts, [rng.randint(*lens) for _ in prompts]


def sizes(requests: Requests) -> dict:
    """Sizes of an engine for them, as `LLM` takes them."""
    return {
        "max_batch": min(MAX_BATCH, requests.num_requests),
        "max_seq_len": 2 * requests.longest,
        "max_prefill_tokens": STEP_TOKENS,
    }


def measure(llm: LLM, requests: Requests) -> list[dict]:
    """Output tokens per second over all requests, drawn at temperature 0.6."""
    prompts, counts = requests.draw()
    params = [
        SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=count, seed=index)
        for index, count in enumerate(counts)
    ]
    llm.generate(prompts[:8], SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=4))
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - started
    num_tokens = sum(len(output.token_ids) for output in outputs)
    return [
        {
            "case": CASE,
            "requests": len(prompts),
            "longest": requests.longest,
            "prompt_tokens": sum(map(len, prompts)),
            "output_tokens": num_tokens,
            "seconds": seconds,
            "tokens_per_s": num_tokens / seconds,
        }
    ]
