"""The rows of a batch: how long each prompt is, written short, and its random tokens."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

WARM_TOKENS = 16  # tokens of each row before timing starts
PREFILL_TOKENS = 8192  # prompt tokens a step, LLM's default


class Row(NamedTuple):
    """Tokens of a row, how many of them it shares with the rows of its part, and which part of the case that is."""

    tokens: int
    shared: int
    part: int


def sharing_rows(case: str) -> list[Row]:
    """The rows of a case whose parts may also read "256x8192/256": 256 rows of 256 tokens behind 8192 that they share.

    Raises:
        ValueError: it is not written like that.
    """
    rows = []
    for index, part in enumerate(case.split("+")):
        found = re.fullmatch(r"([1-9]\d*)x(?:(\d+)/)?([1-9]\d*)", part)
        if found is None:
            raise ValueError(
                f"rows {case!r}: write ROWSxTOKENS or ROWSxSHARED/OWN, parts joined by +, like 8x1024 or 256x8192/256"
            )
        shared = int(found[2] or 0)
        rows += [Row(shared + int(found[3]), shared, index)] * int(found[1])
    return rows


def lengths(case: str) -> list[int]:
    """Tokens of each row: "8x1024" is eight rows of 1024, "1x32768+63x100" one of 32768 among 63 of 100.

    Raises:
        ValueError: it is not written like that.
    """
    parts = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part) for part in case.split("+")]
    if None in parts:
        raise ValueError(f"rows {case!r}: write ROWSxTOKENS, parts joined by +, like 8x1024 or 1x32768+63x100")
    return [int(part[2]) for part in parts for _ in range(int(part[1]))]


def prompts(lens: list[int], vocab_size: int) -> list[list[int]]:
    """Random token ids for each row, the same for every engine that is measured."""
    generator = torch.Generator().manual_seed(len(lens))
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lens]


def tokens_each(lens: list[int], tokens: int, prefill_tokens: int = PREFILL_TOKENS) -> int:
    """Tokens that let every request decode on while others are prefilled, and then through all timed steps."""
    return WARM_TOKENS + tokens + -(-sum(lens) // prefill_tokens) + 8
