"""Rotation inside attention: the cache has keys that were not turned, so a page holds at any place in a row."""

from __future__ import annotations

import pytest
import torch
from dense import DenseRows, assert_close

from graphattn import (
    Attention,
    AttentionSpec,
    BackendError,
    CacheSpec,
    InvalidArgumentError,
    Planner,
    Rotary,
    active_plans,
    ragged_batch,
)
from graphattn.backends.flashinfer import FlashInferBackend
from graphattn.backends.fused import FusedBackend
from graphattn.variants import alibi

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, pos_encoding="rope_llama", rope_theta=500.0)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_page_that_slides_to_another_place(device: str) -> None:
    """A row that loses its second page: the tokens behind it move up by a page, and nothing of them is recomputed."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = DenseRows(SPEC, [0, 0], [64, 48], page_size=16, dtype=dtype, device=device)
    for whole, rest in ((rows.k, "k"), (rows.v, "v")):
        kept = torch.cat((whole[0][:16], whole[0][32:]))
        setattr(rows, rest, [whole[0], kept])
    rows.q[1] = torch.cat((rows.q[0][:16], rows.q[0][32:]))
    plan = Planner([SPEC], rows.cache.cache, device).prefill()
    layer = Attention(4, 64, num_kv_heads=2, pos_encoding="rope_llama", rope_theta=500.0)
    layer.bind(*rows.cache.layers[0])

    def step(tables, starts, q, k, v):
        tokens = [[0] * (len(q) // len(tables))] * len(tables)
        plan.plan(ragged_batch(tokens, starts, [tables], page_size=16, device=device))
        with active_plans(plan.groups):
            return layer(q, k, v)

    plan.plan(rows.batch(device))
    with active_plans(plan.groups):
        layer(*rows.packed)
    slid = rows.tables[0].pages.copy()
    del slid[1]
    for table in rows.tables:
        table.grow(80)
    # The next token of the slid row, and of the one that was computed without that page.
    q, k, v = (torch.randn(1, heads, 64, device=device, dtype=dtype) for heads in (4, 2, 2))
    spare = rows.tables[0].pages[4]
    found = [step([pages], [48], q, k, v) for pages in ([*slid, spare], rows.tables[1].pages)]
    assert torch.equal(*found)
    rows.q, rows.cached, rows.new = [q], [48], [1]
    rows.k, rows.v = ([torch.cat((each[1], new))] for each, new in ((rows.k, k), (rows.v, v)))
    assert_close(found[0], rows.attend(dtype), rows.attend(torch.float64), floor=1e-6 if device == "cpu" else 1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pos_encoding": "yarn"}, "pos_encoding='yarn': choose none or rope_llama"),
        ({"pos_encoding": "rope_llama", "rope_theta": 0.0}, "rope_theta=0.0: it must be a positive number"),
        ({"pos_encoding": "rope_llama", "rope_scale": float("inf")}, "rope_scale=inf"),
        ({"pos_encoding": "rope_llama", "head_dim": 7}, "turns pairs, head_dim is 7"),
        ({"pos_encoding": "rope_llama", "rotary": Rotary(torch.ones(32))}, "would turn twice: give one of them"),
    ],
)
def test_what_cannot_be_turned(options: dict, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        Attention(4, **({"head_dim": 64} | options))


def test_who_serves_it() -> None:
    cache, device = CacheSpec(num_pages=2), torch.device("cpu")
    said = " ".join(FusedBackend.rejections(SPEC, cache, device))
    assert "its decode kernel caches keys that were turned" in said
    both = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, pos_encoding="rope_llama", variant=alibi(4))
    assert "variant Alibi with pos_encoding rope_llama: rotate before the layer" in " ".join(
        FlashInferBackend.rejections(both, cache, device)
    )
    with pytest.raises(BackendError, match="its decode kernel caches keys that were turned"):
        Planner([SPEC], cache, device, "fused")
