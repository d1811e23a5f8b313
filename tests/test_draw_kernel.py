"""The draw in one pass against `sample`: compiled on a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

import math

import interpreter
import numpy as np
import pytest
import torch
from interpreter import DEVICE, runs

from graphattn import draw
from graphattn.draw import sample
from graphattn.errors import InvalidArgumentError
from graphattn.sampling import RowSampling, SamplingParams

triton = pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")
import triton.language as tl  # noqa: E402

from graphattn.kernels import draw as kernels  # noqa: E402
from graphattn.kernels.draw import draw_gumbel, upload_rows  # noqa: E402

INF = math.inf
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of inf and nan in the interpreter
MIXED = ({"temperature": 0}, {}, {"temperature": 0.7, "min_p": 0.05}, {"top_k": 1}, {"temperature": 2.0, "min_p": 1e-4})


def rows_of(count: int, params=MIXED, seed: int = 0) -> list[RowSampling]:
    return [RowSampling(SamplingParams(**params[i % len(params)]), seed + 7919 * i, 3 * i) for i in range(count)]


def keys_of(rows: list[RowSampling]) -> list[int]:
    return [draw._mix(draw._mix(row.seed + draw._GOLDEN) + (row.position + 1) * draw._GOLDEN) for row in rows]


def normal(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def drawn(logits: torch.Tensor, rows: list[RowSampling]) -> list[int]:
    """Ids from the kernel; the logits go to the device with the strides and the offset they have."""
    everything = logits.as_strided((logits.untyped_storage().nbytes() // logits.element_size(),), (1,), 0)
    logits = everything.to(DEVICE).as_strided(logits.shape, logits.stride(), logits.storage_offset())
    token_ids = draw_gumbel(logits, *upload_rows(rows, keys_of(rows), DEVICE))
    assert token_ids.dtype == torch.int64 and token_ids.shape == (len(rows),)
    return token_ids.tolist()


def expected(logits: torch.Tensor, rows: list[RowSampling]) -> list[int]:
    return sample(logits, rows).token_ids.tolist()


@interpreter.alone
def test_in_the_interpreter():
    interpreter.run(__file__)


@runs
@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 33, 1024, 1025, 5000, 20011])
def test_draws_what_sample_draws(vocab: int, dtype: torch.dtype):
    for seed, scale in enumerate((3.0, 0.0)):
        rows, logits = rows_of(5, seed=seed), normal(5, vocab, seed=seed, scale=scale, dtype=dtype)
        assert drawn(logits, rows) == expected(logits, rows)


@runs
@quiet
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e37])
def test_no_block_that_holds_the_best_is_passed_over(scale: float, monkeypatch: pytest.MonkeyPatch):
    """Whatever the size of the scores, and wherever in the vocabulary they rise or fall."""
    monkeypatch.setattr(kernels, "_BLOCK", 32)
    monkeypatch.setattr(kernels, "_MAX_SPLITS", 1)
    params = [{"temperature": t, "min_p": p} for t in (1e-38, 0.3, 1.0, 3.0, 50.0, 1e38) for p in (0.0, 0.1)]
    rows, noise = rows_of(12, params), normal(12, 700, scale=1.0)
    slope = torch.linspace(-10, 10, 700)
    for logits in (noise * scale, noise + slope * scale, noise - slope * scale, (noise + 100) * scale):
        logits = logits.clamp(-3e38, 3e38)
        assert drawn(logits, rows) == expected(logits, rows)


@runs
@quiet
def test_banned_tokens_are_never_drawn():
    rows, logits = rows_of(10), torch.full((10, 20011), -INF)
    assert drawn(logits, rows) == [0] * 10
    for i in range(10):
        logits[i, 20010 - 2001 * i] = -3.0 * i
    assert drawn(logits, rows) == [20010 - 2001 * i for i in range(10)]


@runs
@quiet
def test_the_lowest_of_equals_is_drawn():
    rows = rows_of(4, [{"temperature": 0}, {"temperature": 1e-30}, {"temperature": 1e-30, "min_p": 0.5}, {"top_k": 1}])
    logits = torch.full((4, 20011), -5.0)
    logits[:, 1999::2000] = 7e9  # over 1e-30 this is inf
    assert drawn(logits, rows) == [1999] * 4
    assert drawn(torch.full((4, 20011), INF), rows) == [0] * 4


@runs
@quiet
@pytest.mark.parametrize("log_min_p", [True, False])
def test_strides(log_min_p: bool):
    rows = rows_of(5, MIXED if log_min_p else MIXED[:2])
    wide = normal(10, 7000)
    for logits in (wide[::2, :3001], wide[1::2, 5:3006], wide[:5, ::2], wide[:, :5].t(), wide[:1, :3001].expand(5, -1)):
        assert drawn(logits, rows[: len(logits)]) == expected(logits, rows[: len(logits)])


@runs
@quiet
def test_a_row_draws_the_same_alone():
    rows, logits = rows_of(7), normal(7, 5000, dtype=torch.bfloat16)
    together = drawn(logits, rows)
    assert [drawn(logits[i : i + 1], rows[i : i + 1])[0] for i in range(7)] == together
    assert drawn(logits.flip(0), rows[::-1]) == together[::-1]


@runs
@quiet
@pytest.mark.parametrize("vocab", [1, 1025, 5000])
def test_from_seeds_and_positions_on_the_device(vocab: int):
    """As inside a step: keys are hashed in the kernel, floats come wider than they are used, ids go to two places."""
    seeds = [0, 1, 2**63 - 1, 2**62 + 12345, 7]
    rows = [RowSampling(SamplingParams(**MIXED[i]), seeds[i], (1, 2, 300, 4095, 2**20)[i]) for i in range(5)]
    logits = normal(5, vocab, seed=vocab, dtype=torch.bfloat16)
    sent = upload_rows(rows, seeds, DEVICE)
    positions_B = torch.tensor([row.position - 1 for row in rows], dtype=torch.int32, device=DEVICE)
    drawn_B = torch.full((7,), -1, dtype=torch.int32, device=DEVICE)
    params = [row.params for row in rows]
    exact = [[0 if p.is_greedy else p.temperature for p in params], [math.log(p.min_p or 1e-300) for p in params]]
    exact = [torch.tensor(column, dtype=torch.float64, device=DEVICE) for column in exact]
    for floats in ((sent.temperature_B, sent.log_min_p_B), exact):
        token_ids = draw_gumbel(logits.to(DEVICE), sent.keys_B, *floats, positions_B=positions_B, drawn_B=drawn_B[1:6])
        assert token_ids.tolist() == expected(logits, rows)
        assert drawn_B.tolist() == [-1, *token_ids.tolist(), -1]
        drawn_B.fill_(-1)


@triton.jit
def exponentials(bits_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + index, kernels._exponential(tl.load(bits_ptr + index).to(tl.uint64)))


@runs
def test_noise_is_exact_to_the_last_places():
    edges = [k << 11 for n in range(54) for k in (2**n - 1, 2**n, 2**n + 1) if k < 2**53]
    random = np.random.default_rng(0).integers(0, 2**64, 1024 - len(edges), dtype=np.uint64)
    bits = np.concatenate([np.array(edges, np.uint64), random])
    out = torch.empty(1024, dtype=torch.float64, device=DEVICE)
    exponentials[(1,)](torch.from_numpy(bits.view(np.int64)).to(DEVICE), out, 1024)
    exact = -np.log1p(-np.maximum(bits >> np.uint64(11), 0.5) * 2.0**-53)
    np.testing.assert_array_max_ulp(out.cpu().numpy(), exact, maxulp=2)


def test_rows_are_packed_as_sample_reads_them():
    rows = rows_of(3, [{"temperature": 1e-38, "min_p": 0.1}, {"temperature": 1e38}, {"top_k": 1, "min_p": 0.5}])
    keys_B, temperature_B, log_min_p_B = upload_rows(rows, [2**64 - 1, -1, 5], "cpu")
    assert keys_B.tolist() == [-1, -1, 5]
    assert torch.equal(temperature_B, torch.tensor([1e-30, 1e30, 0.0]))
    assert torch.equal(log_min_p_B, torch.tensor([math.log(0.1), -INF, -INF]))
    assert upload_rows(rows[1:], [1, 2], "cpu").log_min_p_B is None


@runs
def test_no_rows():
    assert drawn(torch.empty(0, 5), []) == []


@pytest.mark.parametrize(
    ("logits", "complaint"),
    [
        (torch.zeros(5), r"got torch.float32 \(5,\)"),
        (torch.zeros(2, 0), r"got torch.float32 \(2, 0\)"),
        (torch.zeros(2, 5, dtype=torch.float64), "got torch.float64"),
        (torch.zeros(2, 5), r"positions must be contiguous torch.int32 \[B=2\], got torch.int64"),
        (torch.zeros(3, 5), r"keys must be contiguous torch.int64 \[B=3\], got torch.int64 \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(logits: torch.Tensor, complaint: str):
    with pytest.raises(InvalidArgumentError, match=complaint):
        draw_gumbel(logits, *upload_rows(rows_of(2), [1, 2], "cpu"), positions_B=torch.tensor([1, 2]))


# At the size of a model's vocabulary


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 33, 256])
def test_a_large_vocabulary(count: int, dtype: torch.dtype):
    for params in (MIXED, MIXED[:2], MIXED[1:2]):
        rows, logits = rows_of(count, params, seed=count), normal(count, 151936, seed=count, dtype=dtype)
        together = drawn(logits, rows)
        assert together == expected(logits, rows)
        some = range(0, count, max(1, count // 8))
        assert [drawn(logits[i : i + 1], rows[i : i + 1])[0] for i in some] == [together[i] for i in some]


@pytest.mark.gpu
def test_a_large_vocabulary_of_other_strides():
    rows, wide = rows_of(33), normal(66, 152064, dtype=torch.bfloat16)
    assert drawn(wide[::2, :151936], rows) == expected(wide[::2, :151936], rows)
    assert drawn(wide[1::2, 7:151936], rows) == expected(wide[1::2, 7:151936], rows)


@pytest.mark.gpu
def test_a_captured_draw_follows_its_inputs_and_waits_for_nothing():
    first, second = rows_of(9), rows_of(9, seed=5)
    logits = normal(9, 5000).cuda()
    given, new = (upload_rows(rows, keys_of(rows), "cuda") for rows in (first, second))
    draw_gumbel(logits, *given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_ids = draw_gumbel(logits, *given)
    for mine, theirs in zip(given, new, strict=True):
        mine.copy_(theirs)
    graph.replay()
    assert token_ids.tolist() == expected(logits.cpu(), second)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw_gumbel(logits, *upload_rows(first, keys_of(first), "cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
