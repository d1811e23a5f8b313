"""The kernel that feeds a step against the same in torch: compiled on a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

import random

import interpreter
import pytest
import torch
from interpreter import DEVICE, runs

from graphattn import AttentionSpec, StepState

pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")

SPEC = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=64)


@interpreter.alone
def test_in_the_interpreter():
    interpreter.run(__file__)


def states(**sizes) -> tuple[StepState, StepState]:
    """One that feeds by the kernel, one by torch."""
    kernel, plain = (StepState(**sizes, device=DEVICE) for _ in range(2))
    kernel._in_kernel, plain._in_kernel = True, False
    return kernel, plain


def integers(state: StepState) -> list[torch.Tensor]:
    """All that `feed` writes, but for the place in indices that nobody reads."""
    csr = [state.csr(state.max_batch, group) for group in range(len(state.groups))]
    tables = [tensor for each in csr for tensor in (each.indptr_B1, each.indices_P, each.last_page_len_B)]
    fed = [state.token_ids(state.max_batch), state.positions(state.max_batch)]
    return [state._mirror.numbers, state._arrivals, state._order, *fed, *tables]


@runs
@pytest.mark.parametrize(
    ("max_batch", "groups", "page_size"), [(1, 1, 16), (6, 2, 4), (33, 1, 1), (40, 3, 16), (20, 1, 256)]
)
def test_feeds_what_torch_feeds(max_batch: int, groups: int, page_size: int):
    rng = random.Random(max_batch)
    longest = 600 if page_size in (1, 256) else 90
    sizes = {"max_batch": max_batch, "max_seq_len": longest, "page_size": page_size, "groups": [SPEC] * groups}
    kernel, plain = states(**sizes)
    ids = torch.randint(0, 10**6, kernel.drawn.shape, dtype=torch.int32).to(DEVICE)
    for state in (kernel, plain):
        state.drawn.copy_(ids)
    for _ in range(6):
        bucket = rng.randint(1, max_batch)
        num_rows = rng.randint(0, bucket)
        lens = [rng.randint(1, longest - 3) for _ in range(num_rows)]
        tables = [
            [[rng.randint(1, 999) for _ in range(-(-longest // page_size))] for _ in range(num_rows)]
            for _ in range(groups)
        ]
        tokens = [rng.randint(0, 999) for _ in range(num_rows)]
        drawn = [rng.choice([None, rng.randrange(ids.numel())]) for _ in range(num_rows)]
        for state in (kernel, plain):
            state.stage(bucket, tokens, lens, tables, drawn=drawn)
        for _ in range(4):  # the last three move on by themselves
            for state in (kernel, plain):
                state.feed(bucket)
            for ours, theirs in zip(integers(kernel), integers(plain), strict=True):
                assert torch.equal(ours, theirs)
            lens = [length + 1 for length in lens]
        assert kernel.csr(bucket, 0).kv_lens(page_size).tolist() == [n - 1 for n in lens] + [1] * (bucket - num_rows)
