"""The decode kernel against dense attention, on a GPU: Gluon has no interpreter."""

from __future__ import annotations

import pytest
import torch
from dense import DenseRows, assert_close

from graphattn.backends.fused import HEAD_DIMS, DecodePlan, allocate, split
from graphattn.plan import Planner
from graphattn.rope import Rotary
from graphattn.spec import AttentionSpec
from graphattn.state import StepState

pytestmark = pytest.mark.gpu

DEVICE, DTYPE, EXACT, FLOOR = "cuda", torch.bfloat16, torch.float32, 1e-3
HEADS = {"one each": (2, 2), "group 2": (4, 2), "group 3": (9, 3), "group 8": (8, 1), "group 16": (16, 1)}
OPTIONS = ({}, {"window": 20}, {"softcap": 2.0})
PAIRS = [(heads, head_dim) for heads in HEADS for head_dim in HEAD_DIMS]
CASES = [(*pair, OPTIONS[index % len(OPTIONS)], torch.bfloat16) for index, pair in enumerate(PAIRS)]
CASES += [("group 3", head_dim, {}, torch.float16) for head_dim in HEAD_DIMS]
LENS = [0, 15, 16, 31, 32, 63, 64, 300]  # tokens before the new one: around pages, blocks and chunks


def fused(rows: DenseRows, rotary: Rotary | None = None, bucket: int = 9) -> torch.Tensor:
    """The rows as a decode step at a bucket that may be larger."""
    spec, num_rows = rows.spec, len(rows.new)
    state = StepState(max_batch=bucket, max_seq_len=512, page_size=rows.pool.page_size, groups=[spec], device=DEVICE)
    plan = DecodePlan(0, spec, rows.cache.cache, bucket, allocate(spec, state))
    lens = [old + 1 for old in rows.cached]
    plan.plan(state.stage(bucket, [0] * num_rows, lens, [[table.pages for table in rows.tables]]))
    state.feed(bucket)
    padded = [torch.cat([each, each.new_ones(bucket - num_rows, *each.shape[1:])]) for each in rows.packed]
    return plan.attend(*padded, *rows.cache.layers[0], rotary)[:num_rows]


def new_rows(heads: str, head_dim: int, *, dtype=DTYPE, page_size: int = 16, layout: str = "NHD", **options):
    num_heads, num_kv_heads = HEADS[heads]
    spec = AttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **options)
    sizes = {"page_size": page_size, "dtype": dtype, "device": DEVICE, "layout": layout}
    return DenseRows(spec, LENS, [1] * len(LENS), **sizes)


@pytest.mark.parametrize(("heads", "head_dim", "options", "dtype"), CASES, ids=str)
def test_attends_as_dense_attention(heads: str, head_dim: int, options: dict, dtype: torch.dtype) -> None:
    rows = new_rows(heads, head_dim, dtype=dtype, **options)
    assert_close(fused(rows), rows.attend(dtype), rows.attend(EXACT), floor=FLOOR)


@pytest.mark.parametrize(
    ("page_size", "layout", "bucket"), [(1, "NHD", 8), (16, "HND", 40), (32, "NHD", 300), (256, "NHD", 8)]
)
def test_every_page_and_split(page_size: int, layout: str, bucket: int) -> None:
    rows = new_rows("group 2", 256, page_size=page_size, layout=layout)
    assert split(8, rows.spec).near > split(40, rows.spec).near == 1
    assert_close(fused(rows, bucket=bucket), rows.attend(DTYPE), rows.attend(EXACT), floor=FLOOR)


@pytest.mark.parametrize("has_norm", [False, True], ids=["rotated", "normed and rotated"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "turned"),
    [("group 3", 64, 64), ("group 8", 128, 128), ("group 3", 256, 256), ("group 3", 64, 16), ("group 8", 128, 96)],
)
@pytest.mark.parametrize("by_length", [False, True], ids=["", "by length"])
def test_norms_and_rotates(heads: str, head_dim: int, turned: int, by_length: bool, has_norm: bool) -> None:
    """Against the reference backend, which does that in torch; keys and values end up in the cache the same."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.rand(head_dim, generator=generator).add(0.5).to(DEVICE) for _ in "qk"]
    inv_freq = 10000.0 ** (-torch.arange(0, turned, 2, device=DEVICE) / turned)
    if by_length:  # from 40 tokens on, and from 41
        inv_freq = torch.stack((inv_freq, inv_freq * 0.5, inv_freq * 0.2))

    def rotary(dtype: torch.dtype) -> Rotary:
        return Rotary(inv_freq, 1.2, *([each.to(dtype) for each in weights] if has_norm else [None, None]), 1e-6, 39)

    def reference(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        rows = new_rows(heads, head_dim)
        pages = [each.to(dtype) for each in rows.cache.layers[0]]
        plan = Planner([rows.spec], rows.cache.cache, DEVICE, "reference").prefill().groups[0]
        plan.plan(rows.batch(DEVICE))
        return plan.attend(*(each.to(dtype) for each in rows.packed), *pages, rotary(dtype)), pages[0]

    rows = new_rows(heads, head_dim)
    found = (fused(rows, rotary(DTYPE)), rows.cache.layers[0][0]), reference(DTYPE), reference(EXACT)
    (ours, keys), (plain, plain_keys), (exact, exact_keys) = found
    assert_close(ours, plain, exact, floor=FLOOR)
    held = ~exact_keys[1:].isnan()  # of the null page the padding writes, which only one of them has
    assert_close(keys[1:][held], plain_keys[1:][held], exact_keys[1:][held], floor=FLOOR)
    assert keys[1:][~held].isnan().all(), "it wrote slots that no token owns"
