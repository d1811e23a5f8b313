"""Our linears of few rows, and the gate: on a GPU in bfloat16, in Triton's interpreter elsewhere."""

from __future__ import annotations

import interpreter
import pytest
import torch
from dense import assert_close
from interpreter import IS_GPU, runs
from torch import Tensor
from torch.nn import functional as F

import graphattn.ops  # noqa: F401

pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")

DEVICE, DTYPE, EXACT = ("cuda", torch.bfloat16, torch.float32) if IS_GPU else ("cpu", torch.float32, torch.float64)
# norm, gated, residual, bias
PARTS = [(0, 0, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0), (0, 1, 0, 1), (0, 0, 1, 0), (1, 1, 1, 1)]
SHAPES = [(96, 384), (32, 128)]
# With two of the parts alone, since each is a compilation; one for each kind of blocks.
LARGE = [(4096, 1024), (2048, 1536), (1024, 2048), (1024, 3072), (2048, 8192), (4096, 2560)] if IS_GPU else []


@interpreter.alone
def test_in_the_interpreter():
    interpreter.run(__file__)


def by_torch(dtype: torch.dtype, x: Tensor, weight: Tensor, bias, norm, gated: bool, residual) -> Tensor:
    x, weight, bias, norm, residual = (t if t is None else t.to(dtype) for t in (x, weight, bias, norm, residual))
    if norm is not None:
        wide = x.to(torch.promote_types(dtype, torch.float32))
        x = norm * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
    out = F.linear(x, weight, bias)
    if gated:
        first, second = out.chunk(2, -1)
        out = F.silu(first) * second
    return out if residual is None else out + residual


class TestLinear:
    pytestmark = runs

    @pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 32, 33, 100])
    @pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "".join(map(str, parts)))
    def test_is_what_torch_computes(self, num_rows: int, parts: tuple[int, ...]):
        """Through the op, which leaves many rows to cuBLAS; inputs are columns of a wider tensor."""
        from graphattn.kernels.linear import linear

        if not IS_GPU and num_rows > 1:
            pytest.skip("tensor cores have no interpreter, and many rows are left to cuBLAS")
        has_norm, gated, has_residual, has_bias = parts
        generator = torch.Generator().manual_seed(num_rows)
        for num_out, num_in in SHAPES + (LARGE if parts in PARTS[-2:] else []):
            halves = 2 if gated else 1

            def random(*shape: int) -> Tensor:
                return torch.randn(*shape, generator=generator).to(DTYPE).to(DEVICE)

            x = random(1, num_rows, num_in + 64)[..., :num_in]
            weight = random(halves * num_out, num_in) * num_in**-0.5
            bias = random(halves * num_out) if has_bias else None
            norm = random(num_in) if has_norm else None
            residual = random(1, num_rows, num_out) if has_residual else None
            if IS_GPU:
                ours = torch.ops.graphattn.linear(x, weight, bias, norm, 1e-6, bool(gated), residual)
            else:
                options = {"norm_K": norm, "eps": 1e-6, "gated": bool(gated), "residual": residual}
                ours = linear(x, weight, bias, **options)
            plain, exact = (by_torch(dtype, x, weight, bias, norm, gated, residual) for dtype in (DTYPE, EXACT))
            assert_close(ours, plain, exact, floor=1e-5)

    @pytest.mark.parametrize("num_rows", [1, 3, 100])
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_a_pair_is_two(self, num_rows: int, has_bias: bool):
        generator = torch.Generator().manual_seed(num_rows)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DTYPE).to(DEVICE)

        x, residual = random(1, num_rows, 256), random(1, num_rows, 384)
        weight, next_weight, norm = random(384, 256) / 16, random(1024, 384) / 20, random(384)
        bias, next_bias = (random(384), random(1024)) if has_bias else (None, None)
        ours = torch.ops.graphattn.linear_pair(x, residual, weight, bias, norm, 1e-6, next_weight, next_bias, True)

        def twice(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            total = by_torch(dtype, x, weight, bias, None, False, residual)
            return total, by_torch(dtype, total, next_weight, next_bias, norm, True, None)

        for each, plain, exact in zip(ours, twice(DTYPE), twice(EXACT), strict=True):
            assert_close(each, plain, exact, floor=1e-5)

    @pytest.mark.parametrize("width", [96, 1024, 5120])
    def test_add_norm(self, width: int):
        from graphattn.kernels.norm import add_norm, rms_norm

        generator = torch.Generator().manual_seed(width)
        x, wide, weight = (torch.randn(*s, generator=generator) for s in ((3, width), (3, 2 * width), (width,)))
        x, residual, weight = x.to(DTYPE).to(DEVICE), wide.to(DTYPE).to(DEVICE)[:, :width], weight.to(DTYPE).to(DEVICE)
        total, normed = add_norm(x, residual, weight, 1e-6)
        assert torch.equal(total, x + residual)
        plain, exact = (F.rms_norm(total.to(dtype), (width,), weight.to(dtype), 1e-6) for dtype in (DTYPE, EXACT))
        assert_close(normed, plain, exact, floor=1e-6)
        plain, exact = (F.rms_norm(residual.to(dtype), (width,), weight.to(dtype), 1e-6) for dtype in (DTYPE, EXACT))
        assert_close(rms_norm(residual, weight, 1e-6), plain, exact, floor=1e-6)

    def test_gate(self):
        from graphattn.kernels.gate import gate

        x = torch.randn(3, 2 * 1100, generator=torch.Generator().manual_seed(0)).to(DTYPE).to(DEVICE)
        plain, exact = (F.silu(t[:, :1100]) * t[:, 1100:] for t in (x, x.to(EXACT)))
        assert_close(gate(x), plain, exact, floor=1e-6)

    @pytest.mark.skipif(not IS_GPU, reason="needs CUDA graphs")
    def test_a_captured_chain_waits_where_it_must(self):
        """Each launch starts before the one ahead has ended; what it reads must be what that wrote, in every replay."""
        generator = torch.Generator(device="cuda").manual_seed(0)
        options = {"dtype": torch.bfloat16, "device": "cuda", "generator": generator}
        weights = [torch.randn(1024, 1024, **options) / 32 for _ in range(40)]
        for num_rows in (1, 8, 32):
            start = torch.randn(num_rows, 1024, **options)

            def chain(start: Tensor = start) -> Tensor:
                x = start
                for weight in weights:
                    x = torch.ops.graphattn.linear(x, weight, None, None, 0.0, False, x)
                return x

            expected, graph = chain().clone(), torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                out = chain()
            for _ in range(50):
                out.fill_(float("nan"))
                graph.replay()
                assert torch.equal(out, expected)
