"""The decode kernel against dense attention: on a GPU in bfloat16, in Triton's interpreter elsewhere."""

from __future__ import annotations

import interpreter
import pytest
import torch
from dense import DenseRows, assert_close
from interpreter import DEVICE, IS_GPU, runs

from graphattn.backends.fused import BLOCKS, DecodePlan, allocate, split
from graphattn.plan import Planner
from graphattn.rope import Rotary
from graphattn.spec import AttentionSpec
from graphattn.state import StepState

pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")

DTYPE, EXACT, FLOOR = (torch.bfloat16, torch.float32, 1e-3) if IS_GPU else (torch.float32, torch.float64, 1e-5)
HEADS = {"one each": (2, 2), "group 2": (4, 2), "group 3": (9, 3), "group 8": (8, 1), "group 16": (16, 1)}
if IS_GPU:  # each is compiled
    CASES = [(heads, head_dim, {}, DTYPE) for heads in HEADS for head_dim in BLOCKS]
    CASES += [("group 2", head_dim, {}, torch.float16) for head_dim in BLOCKS]
    CASES += [
        (heads, head_dim, options, DTYPE)
        for heads in ("group 3", "group 8")
        for head_dim in BLOCKS
        for options in ({"window": 20}, {"softcap": 2.0})
    ]
else:  # the interpreter takes a second for each
    CASES = [
        ("group 3", 64, {}, DTYPE),
        ("one each", 128, {"window": 20}, DTYPE),
        ("group 3", 256, {"window": 20}, DTYPE),
        ("group 8", 256, {"softcap": 2.0}, DTYPE),
        ("group 16", 256, {}, DTYPE),
    ]
LENS = [0, 15, 16, 31, 32, 63, 64, 300]  # tokens before the new one: around pages, blocks and chunks


@interpreter.alone
def test_in_the_interpreter():
    interpreter.run(__file__)


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


class TestDecode:
    pytestmark = runs

    @pytest.mark.parametrize(("heads", "head_dim", "options", "dtype"), CASES, ids=str)
    def test_attends_as_dense_attention(self, heads: str, head_dim: int, options: dict, dtype: torch.dtype) -> None:
        rows = new_rows(heads, head_dim, dtype=dtype, **options)
        assert_close(fused(rows), rows.attend(dtype), rows.attend(EXACT), floor=FLOOR)

    @pytest.mark.parametrize(("page_size", "layout", "bucket"), [(1, "NHD", 8), (16, "HND", 40), (32, "NHD", 8)])
    def test_every_page_and_split(self, page_size: int, layout: str, bucket: int) -> None:
        rows = new_rows("group 2", 256, page_size=page_size, layout=layout)
        assert split(8 * 2).eager and not split(40 * 2).eager
        assert_close(fused(rows, bucket=bucket), rows.attend(DTYPE), rows.attend(EXACT), floor=FLOOR)

    @pytest.mark.parametrize("has_norm", [False, True], ids=["rotated", "normed and rotated"])
    @pytest.mark.parametrize(("heads", "head_dim"), [("group 3", 64), ("group 8", 128), ("group 3", 256)])
    def test_norms_and_rotates(self, heads: str, head_dim: int, has_norm: bool) -> None:
        """Against the reference backend, which does that in torch; keys and values end up in the cache the same."""
        generator = torch.Generator().manual_seed(1)
        weights = [torch.rand(head_dim, generator=generator).add(0.5).to(DEVICE) for _ in "qk"]
        inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)

        def rotary(dtype: torch.dtype) -> Rotary:
            return Rotary(inv_freq, 1.2, *([each.to(dtype) for each in weights] if has_norm else [None, None]), 1e-6)

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
