"""The append kernel of fp8 caches against `scales.quantised`, bit for bit: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dense import DenseRows
from interpreter import DEVICE, alone, run, runs

from graphattn.scales import quantised
from graphattn.spec import FP8, AttentionSpec


@alone
def test_in_the_interpreter() -> None:
    run(__file__)


def stored(heads: int, head_dim: int, layout: str, merged: torch.Tensor, scales: torch.Tensor) -> None:
    """Appends columns of a merged projection, `[10, 3 * heads, head_dim]`, to rows of uneven lengths."""
    from graphattn.kernels.append import append_fp8

    spec = AttentionSpec(num_heads=heads, num_kv_heads=heads, head_dim=head_dim)
    sizes = {"page_size": 4, "dtype": torch.bfloat16, "device": DEVICE, "layout": layout}
    rows = DenseRows(spec, [0, 5, 11], [3, 1, 6], **sizes)
    k, v = merged[:, heads : 2 * heads], merged[:, 2 * heads :]
    pages = [torch.full_like(each, 1.0).to(FP8) for each in rows.cache.layers[0]]
    wanted = [each.clone() for each in pages]
    batch = rows.batch(DEVICE)
    csr, where = batch.groups[0], (batch.rows_N, batch.positions_N)
    append_fp8(k, v, *where, tuple(pages), csr.indptr_B1, csr.indices_P, scales, layout=layout)
    size = rows.pool.page_size
    for turned, new, scale in zip(wanted, (k, v), scales, strict=True):
        slots = turned.transpose(1, 2) if layout == "HND" else turned
        for row, position, x in zip(batch.rows_N.tolist(), batch.positions_N.tolist(), new, strict=True):
            slots[rows.tables[row].pages[position // size], position % size] = quantised(x, scale)
    for found, expected in zip(pages, wanted, strict=True):
        differs = found.view(torch.uint8) != expected.view(torch.uint8)
        assert not differs.any(), (found[differs].float(), expected[differs].float())


CASES = pytest.mark.parametrize(("heads", "head_dim", "layout"), [(1, 64, "NHD"), (3, 128, "NHD"), (3, 64, "HND")])


@runs
@CASES
def test_every_number_goes_over_its_scale_to_its_slot(heads: int, head_dim: int, layout: str) -> None:
    """Of numbers that are stored exactly, or beyond 448: Triton's interpreter rounds others to e4m3 in its own way."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([[0.25, 0.5, 2.0], [1.0, 0.0625, 8.0]])[:, :heads].contiguous()
    drawn = torch.randn(10, 3, heads, head_dim, generator=generator) * 8
    drawn = drawn.to(FP8).float().abs().clamp_min(1) * drawn.sign()
    drawn[:, :, 0, ::7] *= 1e4
    drawn[0, 1:, 0, 1] = torch.inf
    factor = torch.cat([torch.ones(1, heads), scales])[..., None]
    stored(heads, head_dim, layout, (drawn * factor).flatten(1, 2).bfloat16().to(DEVICE), scales.to(DEVICE))


@pytest.mark.gpu
@CASES
def test_rounds_as_torch_does(heads: int, head_dim: int, layout: str) -> None:
    """Ties, the smallest numbers and NaN, over scales that are no powers of two."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("below compute capability 9.0 numbers are rounded to float16 on the way")
    scales = torch.tensor([[0.25, 0.3, 2.0], [1.0, 0.011, 7.5]], device=DEVICE)[:, :heads].contiguous()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(10, 3 * heads, head_dim, generator=generator) * torch.logspace(-12, 11, head_dim, base=2.0)
    drawn[0, heads, :3] = torch.tensor([17.0, 19.0, torch.nan]) * 0.25  # 16, 20 and NaN
    stored(heads, head_dim, layout, drawn.bfloat16().to(DEVICE), scales)
