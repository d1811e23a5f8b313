"""What the decode kernel computes, on a CPU (`valued.py`): over pages of bfloat16 and float16, and of fp8."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from dense import DenseRows, assert_close
from stored import StoredRows, scales_of
from valued import Valued

from graphattn import Planner
from graphattn.backends.fused import DecodePlan, allocate
from graphattn.kernels import decode
from graphattn.rope import Rotary
from graphattn.spec import AttentionSpec
from graphattn.state import StepState

HEADS = {"group 2": (4, 2), "group 3": (9, 3), "group 8": (8, 1), "group 16": (16, 1)}
LENS = [0, 15, 16, 63, 150]
CASES = (
    ("group 2", 64, {}, {}, 5),
    ("group 3", 128, {"softcap": 2.0}, {"layout": "HND"}, 7),
    ("group 16", 64, {"window": 20}, {"page_size": 1}, 5),
    ("group 8", 256, {}, {"dtype": torch.float16}, 140),
)


@pytest.fixture(autouse=True)
def by_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "decode_kernel", Valued(decode.decode_kernel))


def rows_of(heads: str, head_dim: int, is_fp8: bool, options: dict, sizes: dict) -> DenseRows:
    num_heads, num_kv_heads = HEADS[heads]
    spec = AttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **options)
    sizes = {"page_size": 16, "dtype": torch.bfloat16, "device": "cpu"} | sizes
    if is_fp8:
        return StoredRows(spec, LENS, [1] * len(LENS), scales_2K=scales_of(num_kv_heads), **sizes)
    return DenseRows(spec, LENS, [1] * len(LENS), **sizes)


def fused(rows: DenseRows, bucket: int, rotary: Rotary | None = None) -> torch.Tensor:
    spec, num_rows = rows.spec, len(rows.new)
    state = StepState(max_batch=bucket, max_seq_len=256, page_size=rows.pool.page_size, groups=[spec], device="cpu")
    plan = DecodePlan(0, spec, rows.cache.cache, bucket, allocate(spec, state))
    lens = [old + 1 for old in rows.cached]
    plan.plan(state.stage(bucket, [0] * num_rows, lens, [[table.pages for table in rows.tables]]))
    state.feed(bucket)
    padded = [torch.cat([each, each.new_ones(bucket - num_rows, *each.shape[1:])]) for each in rows.packed]
    return plan.attend(*padded, *rows.cache.layers[0], rotary, (), getattr(rows, "scales_2K", None))[:num_rows]


@pytest.mark.parametrize("is_fp8", [False, True], ids=["", "fp8"])
@pytest.mark.parametrize(("heads", "head_dim", "options", "sizes", "bucket"), CASES, ids=str)
def test_attends(heads: str, head_dim: int, options: dict, sizes: dict, bucket: int, is_fp8: bool) -> None:
    """Against dense attention in float32; of fp8 pages over what they hold, and that to the bit."""
    rows = rows_of(heads, head_dim, is_fp8, options, sizes)
    found = fused(rows, bucket)
    if is_fp8:
        rows.check_pages()
    plain = rows.attend(sizes.get("dtype", torch.bfloat16))
    assert_close(found, plain, rows.attend(torch.float32), floor=1e-4)


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_fp8_takes_queries_of_any_magnitude(factor: float) -> None:
    """They are multiplied as float16, whose range is far smaller than bfloat16's."""
    rows = rows_of("group 2", 64, True, {"scale": 0.125 / factor}, {})
    rows.q = [each * factor for each in rows.q]
    rows.q[0][:] = 0
    found = fused(rows, 5)
    assert_close(found, rows.attend(torch.bfloat16), rows.attend(torch.float32), floor=1e-4)
    rows.q[1][0, 0, 0] = torch.nan
    assert fused(rows, 5)[1, 0].isnan().all(), "NaN of a query was lost"


@pytest.mark.parametrize("turned", [64, 16], ids=["all", "some"])
def test_fp8_keys_are_stored_as_they_are_after_norm_and_rotation(turned: int) -> None:
    """Pages as the reference writes them, but where rounding on the way tells; values to the bit; and its attention."""
    weights = [torch.rand(64, generator=torch.Generator().manual_seed(at)).add(0.5).bfloat16() for at in range(2)]
    rotary = Rotary(10000.0 ** (-torch.arange(0, turned, 2) / turned), 1.2, *weights, 1e-6)
    rows, other = (rows_of("group 3", 64, True, {}, {}) for _ in range(2))
    found = fused(rows, 5, rotary)
    plan = Planner([other.spec], other.cache.cache, "cpu", "reference").prefill().groups[0]
    plan.plan(other.batch("cpu"))
    wanted = plan.attend(*other.packed, *other.cache.layers[0], rotary, (), other.scales_2K)
    ours, theirs = (each.pages[0][1:].float().nan_to_num(0) for each in (rows, other))
    assert (ours != theirs).float().mean() < 0.01
    rounded = theirs.abs() / 8 + theirs.abs().amax(-1, keepdim=True) * 2**-7  # e4m3, and bfloat16 before it
    assert ((ours - theirs).abs() <= rounded).all()
    assert torch.equal(rows.pages[1][1:].view(torch.uint8), other.pages[1][1:].view(torch.uint8))
    assert (found - wanted).abs().max() < 0.02
