"""Workload `decode`: time of one decode step through `LLM.step()`, every row decoding."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from graphattn import LLM, Delta, SamplingParams

from .rows import PREFILL_TOKENS, WARM_TOKENS, prompts, tokens_each
from .shape import step_bytes
from .timing import Timed, spread


class Decoding:
    """Requests that all decode, each beyond its token `WARM_TOKENS`.

    Attributes:
        token_ids: what the first of them generated so far.
    """

    def __init__(self, llm: LLM, lens: list[int], tokens: int, prefill_tokens: int):
        count = tokens_each(lens, tokens, prefill_tokens)
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        vocab = llm.model.config.get_text_config().vocab_size
        self._llm, self.token_ids = llm, []
        self.requests = [llm.add_request(prompt, params) for prompt in prompts(lens, vocab)]
        counts: Counter[int] = Counter()
        while len(counts) < len(lens) or min(counts.values()) < WARM_TOKENS:
            for delta in self._step():
                counts[delta.request_id] += len(delta.token_ids)

    def step(self) -> None:
        """One step, which gives every row a token.

        Raises:
            RuntimeError: it did not: a request ended, or lost its pages to another.
        """
        deltas = self._step()
        if len(deltas) != len(self.requests):
            raise RuntimeError(
                f"a step gave {len(deltas)} of {len(self.requests)} rows a token: the cache holds too few pages, or "
                "the requests ended"
            )

    def _step(self) -> list[Delta]:
        deltas = self._llm.step()
        self.token_ids += [id for delta in deltas if delta.request_id == self.requests[0] for id in delta.token_ids]
        return deltas


@contextmanager
def decoding(llm: LLM, lens: list[int], tokens: int, prefill_tokens: int = PREFILL_TOKENS) -> Iterator[Decoding]:
    """Rows with prompts of `lens` tokens that can make `tokens` more steps; aborted at the end.

    Args:
        llm: the engine.
        lens: tokens of each prompt.
        tokens: steps.
        prefill_tokens: the engine's `max_prefill_tokens`.
    """
    rows = Decoding(llm, lens, tokens, prefill_tokens)
    try:
        yield rows
    finally:
        for request_id in rows.requests:
            llm.abort(request_id)
        llm.step()


def time_steps(llm: LLM, lens: list[int], tokens: int) -> Timed:
    """`tokens` decode steps of rows with prompts of `lens` tokens."""
    times = []
    with decoding(llm, lens, tokens) as rows:
        for _ in range(tokens):
            started = time.perf_counter()
            rows.step()
            times.append(time.perf_counter() - started)
    return Timed(seconds=times, token_ids=rows.token_ids)


def sizes(cases: dict[str, list[int]], tokens: int) -> dict:
    """Sizes of an engine for these cases, as `LLM` takes them."""
    buckets = sorted({len(lens) for lens in cases.values()})
    longest = max(max(lens) + tokens_each(lens, tokens) for lens in cases.values())
    return {"max_batch": buckets[-1], "max_seq_len": longest, "buckets": buckets}


def peer_sizes(cases: dict[str, list[int]], tokens: int) -> dict:
    """Sizes for peers, which may prefill in smaller steps and so decode on for longer."""
    longest = max(max(lens) + tokens_each(lens, tokens, PREFILL_TOKENS // 2) for lens in cases.values())
    return {"max_batch": max(map(len, cases.values())), "max_len": longest}


def measure(llm: LLM, cases: dict[str, list[int]], tokens: int, rate: float) -> list[dict]:
    """Time per decode step of each case, beside what its bytes take at the copy rate."""
    rows = []
    time_steps(llm, max(cases.values(), key=len), 1)
    for name, lens in cases.items():
        timed = time_steps(llm, lens, tokens)
        step_ms = spread(timed.seconds, 1e3)
        middle = [length + WARM_TOKENS + tokens // 2 for length in lens]
        rows.append(
            {
                "case": name,
                "batch": len(lens),
                "context": lens[0] if len(set(lens)) == 1 else None,
                "steps": len(timed.seconds),
                "step_ms": step_ms,
                "tokens_per_s": len(lens) / step_ms["p50"] * 1e3,
                "floor_ms": step_bytes(llm, middle) / rate * 1e3,
                "token_ids": timed.token_ids,
            }
        )
    return rows
