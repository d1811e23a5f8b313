"""The draw in one pass against `sample`: compiled on a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

import math

import interpreter
import numpy as np
import pytest
import torch
from interpreter import DEVICE, runs

from graphattn import filters
from graphattn.draw import NOT_DRAWN, packed, sample
from graphattn.errors import InvalidArgumentError
from graphattn.sampling import Ask, RowSampling, SamplingParams

triton = pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")
import triton.language as tl  # noqa: E402

from graphattn.kernels import draw as kernels  # noqa: E402
from graphattn.kernels import noise, rank  # noqa: E402
from graphattn.kernels.draw import Edits, draw_gumbel  # noqa: E402

INF = math.inf
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of inf and nan in the interpreter
MIXED = ({"temperature": 0}, {}, {"temperature": 0.7, "min_p": 0.05}, {"top_k": 1}, {"temperature": 2.0, "min_p": 1e-4})

EVERYTHING = (
    {"top_k": 5},
    {"top_p": 0.9},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.5, "top_p": 0.5, "min_p": 0.3},
    {},
    {"top_k": 10**12, "temperature": 2.0},
    {"top_k": 700, "temperature": 3.0},
    {"top_p": 1e-9},
    {"top_p": 1e-20, "top_k": 3},
    {"top_p": 1 - 2**-53},
    {"min_p": 0.1},
    {"top_k": 2, "temperature": 1e-38, "top_p": 0.5},
    {"top_p": 0.99, "temperature": 1e38},
)


def rows_of(count: int, params=MIXED, seed: int = 0) -> list[RowSampling]:
    return [RowSampling(SamplingParams(**params[i % len(params)]), seed + 7919 * i, 3 * i) for i in range(count)]


def asks_of(rows: list[RowSampling]) -> torch.Tensor:
    asks = [Ask.of(row.params, row.seed) for row in rows]
    return torch.from_numpy(packed(asks) if asks else np.zeros((7, 0), np.int64)).to(DEVICE)


def positions_of(rows: list[RowSampling]) -> torch.Tensor:
    return torch.tensor([row.position - 1 for row in rows], dtype=torch.int64, device=DEVICE)


def normal(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def drawn(logits: torch.Tensor, rows: list[RowSampling]) -> list[int]:
    """Ids from the kernel; the logits go to the device with the strides and the offset they have."""
    everything = logits.as_strided((logits.untyped_storage().nbytes() // logits.element_size(),), (1,), 0)
    logits = everything.to(DEVICE).as_strided(logits.shape, logits.stride(), logits.storage_offset())
    token_ids = draw_gumbel(logits, asks_of(rows), positions_of(rows))
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
    for name, size in (("_BLOCK", 32), ("_CHUNK", 8), ("_MAX_SPLITS", 1)):
        monkeypatch.setattr(kernels, name, size)
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
@pytest.mark.parametrize("vocab", [33, 5000])
def test_nothing_is_drawn_from_nan(vocab: int):
    """Wherever it stands, whatever the row asks; neighbours draw as ever, and what is fed stays in the vocabulary."""
    params = [*MIXED, *EVERYTHING]
    for turn, at in enumerate((0, vocab // 2, vocab - 1)):
        rows, logits = rows_of(len(params), params), normal(len(params), vocab)
        logits[turn::2, at] = math.nan if turn else -math.nan
        want = expected(logits, rows)
        assert want[turn::2] == [NOT_DRAWN] * len(want[turn::2]) and want.count(NOT_DRAWN) == len(want[turn::2])
        fed = torch.full((len(rows),), 7, dtype=torch.int32, device=DEVICE)
        found = draw_gumbel(logits.to(DEVICE), asks_of(rows), positions_of(rows), drawn_B=fed).tolist()
        assert found == want
        assert fed.tolist() == [max(token_id, 0) for token_id in want]
    rows = rows_of(len(params), params)
    assert drawn(torch.full((len(params), vocab), math.nan), rows) == [NOT_DRAWN] * len(params)


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


# Top-k, top-p and what is done to the logits before


SMALL = (("_BLOCK", 64), ("_CHUNK", 8), ("_WIDE", 64), ("_MAX_SPLITS", 2))


@runs
@quiet
@pytest.mark.parametrize("vocab", [1, 33, 1025])
def test_filters_keep_what_those_of_sample_keep(vocab: int):
    count = len(EVERYTHING)
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        rows, logits = rows_of(count, EVERYTHING, seed=seed), normal(count, vocab, seed=seed, dtype=dtype)
        logits[:, ::3] = -INF if vocab > 1 else 0
        assert drawn(logits, rows) == expected(logits, rows)


@runs
@quiet
@pytest.mark.parametrize(
    ("kind", "room"),
    [("ties", 8), ("flat", 8), ("rising", 1000), ("steep", 8), ("holes", 1000), ("infinite", 8), ("zeros", 1000)]
    + [("nothing", 8), ("normal", 8)],
)
def test_thresholds_are_exact_whatever_is_held(kind: str, room: int, monkeypatch: pytest.MonkeyPatch):
    """With more than there is room for and without, in many blocks of everything."""
    for name, size in (*SMALL, ("_ROOM", room)):
        monkeypatch.setattr(kernels, name, size)
    count, vocab = len(EVERYTHING), 110
    logits = normal(count, vocab, seed=room)
    match kind:
        case "ties":
            logits = logits.round()
        case "flat":
            logits = logits * 1e-4
        case "rising":
            logits = logits + torch.linspace(-20, 20, vocab)
        case "steep":
            logits = logits * 1e30
        case "holes":
            logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.97] = -INF
        case "infinite":
            logits[:, 17::50] = INF
        case "zeros":
            logits = torch.where(logits > 0, 0.0, -0.0)
        case "nothing":
            logits[:] = -INF
    rows = rows_of(count, EVERYTHING, seed=31 * room)
    assert drawn(logits, rows) == expected(logits, rows)


@runs
@quiet
def test_no_token_more_or_less_is_kept():
    """Where all tokens are about as likely, one that should not be kept is soon drawn."""
    rows = rows_of(36, ({"top_k": 2}, {"top_k": 4, "top_p": 0.6}, {"top_p": 0.05}))
    logits = normal(36, 60, seed=2, scale=0.01)
    assert drawn(logits, rows) == expected(logits, rows)


@runs
@quiet
@pytest.mark.parametrize(("vocab", "dtype"), [(1, torch.float32), (40, torch.bfloat16), (1100, torch.float32)], ids=str)
def test_penalty_and_bans_from_sets(vocab: int, dtype: torch.dtype):
    """As inside a step: the last token counts as seen and is added to the set, ids go to two places."""
    generator, count = np.random.default_rng(vocab), len(EVERYTHING)
    params = [{**one, "repetition_penalty": (3.0, 1.0, 0.6)[i % 3]} for i, one in enumerate(EVERYTHING)]
    logits = normal(count, vocab, seed=vocab, dtype=dtype)
    rows, asks, last = [], [], []
    flags = np.zeros((2, count + 1, -(-vocab // 32) * 32), np.uint8)
    for i, row in enumerate(rows_of(count, params)):
        row = RowSampling(row.params, row.seed, 3 * i + 1)
        seen, banned = ({*generator.integers(0, vocab, 9).tolist()} for _ in range(2))
        last.append(int(logits[i].argmax() if i % 2 else generator.integers(0, vocab)))
        banned.discard(last[-1])
        is_banned = i % 2 == 1
        for which, ids in enumerate((seen, banned)):
            flags[which, i, list(ids)] = 1
        asks.append(Ask.of(row.params, row.seed, row.position + is_banned))
        seen = (*seen, last[-1])
        rows.append(RowSampling(row.params, row.seed, row.position, seen, tuple(banned) if is_banned else ()))
    sets = torch.from_numpy(np.packbits(flags, axis=-1, bitorder="little").view("<i4")).to(DEVICE)
    before, ids = sets.cpu().clone(), torch.tensor(last, dtype=torch.int32, device=DEVICE)
    drawn_B = torch.full((count + 2,), -1, dtype=torch.int32, device=DEVICE)
    given = torch.from_numpy(packed(asks)).to(DEVICE), positions_of(rows).int()
    token_ids = draw_gumbel(logits.to(DEVICE), *given, edits=Edits(ids, sets), drawn_B=drawn_B[1:-1])
    assert token_ids.tolist() == expected(logits, rows)
    assert drawn_B.tolist() == [-1, *token_ids.tolist(), -1]
    for i, token_id in enumerate(last):
        if params[i]["repetition_penalty"] != 1 and i > 0:  # the first row is at position 0, as padding is
            before[0, i, token_id // 32] |= torch.tensor(1).bitwise_left_shift(token_id % 32).int()
    assert torch.equal(sets.cpu(), before)


@triton.jit
def weigh(x_ptr, peak, out_ptr, BITS: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + index, rank.weight(tl.load(x_ptr + index), peak, BITS))


@runs
@quiet
@pytest.mark.parametrize("peak", [0.0, 17.25, -3e38, 3e38, INF])
def test_weights_are_those_of_filters_bit_by_bit(peak: float):
    peak = float(np.float32(peak))
    x = (peak if peak < INF else 3e38) - normal(4096, seed=3, scale=12.0).abs()
    x[:9] = torch.tensor([peak, -INF, -3e38, 0.0, peak, 1.0, -1.0, 5e-39, -5e-39]).clamp(max=peak)
    out = torch.empty(4096, dtype=torch.int64, device=DEVICE)
    weigh[(1,)](x.to(DEVICE), peak, out, filters.weight_bits(151936), 4096, enable_fp_fusion=False)
    wanted = filters.weights(x, torch.tensor(peak), 151936)
    assert torch.equal(out.cpu(), wanted)
    exact = (x.double().clamp(max=3.4028234663852886e38) - min(peak, 3.4028234663852886e38)).exp()
    error = wanted.double() * 2.0 ** -filters.weight_bits(151936) - exact
    assert (error.abs() <= 1e-6 * exact + 2.0**-43).all()


@triton.jit
def exponentials(bits_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + index, noise.exponential(tl.load(bits_ptr + index).to(tl.uint64)))


@runs
def test_noise_is_exact_to_the_last_places():
    edges = [k << 11 for n in range(54) for k in (2**n - 1, 2**n, 2**n + 1) if k < 2**53]
    random = np.random.default_rng(0).integers(0, 2**64, 1024 - len(edges), dtype=np.uint64)
    bits = np.concatenate([np.array(edges, np.uint64), random])
    out = torch.empty(1024, dtype=torch.float64, device=DEVICE)
    exponentials[(1,)](torch.from_numpy(bits.view(np.int64)).to(DEVICE), out, 1024)
    exact = -np.log1p(-np.maximum(bits >> np.uint64(11), 0.5) * 2.0**-53)
    np.testing.assert_array_max_ulp(out.cpu().numpy(), exact, maxulp=2)


@runs
def test_no_rows():
    assert drawn(torch.empty(0, 5), []) == []


@pytest.mark.parametrize(
    ("logits", "complaint"),
    [
        (torch.zeros(5), r"got torch.float32 \(5,\)"),
        (torch.zeros(2, 0), r"got torch.float32 \(2, 0\)"),
        (torch.zeros(2, 5, dtype=torch.float64), "got torch.float64"),
    ],
)
def test_logits_that_do_not_fit_are_refused(logits: torch.Tensor, complaint: str):
    with pytest.raises(InvalidArgumentError, match=complaint):
        draw_gumbel(logits, asks_of(rows_of(2)), positions_of(rows_of(2)))


def test_what_does_not_fit_the_logits_is_refused():
    logits, asks, positions = torch.zeros(2, 65), asks_of(rows_of(2)).cpu(), positions_of(rows_of(2)).cpu()
    int32 = torch.zeros(2, dtype=torch.int32)
    for complaint, call in (
        (r"positions must be contiguous torch.int32 or torch.int64 \[B=2\]", lambda: (logits, asks, positions.short())),
        (r"asks must be int64 \[7, B=2\], rows side by side", lambda: (logits, asks[:, :1], positions)),
        (r"asks must be int64 \[7, B=2\], rows side by side", lambda: (logits, asks.t().contiguous().t(), positions)),
    ):
        with pytest.raises(InvalidArgumentError, match=complaint):
            draw_gumbel(*call())
    for complaint, options in (
        (r"drawn must be contiguous torch.int32 \[B=2\], got torch.int64", {"drawn_B": positions}),
        (r"token_ids must be contiguous torch.int32 \[B=2\]", {"edits": Edits(int32[:1], int32.expand(2, 2, 2))}),
        (r"sets must be .* got torch.int32 \(2, 2, 2\)", {"edits": Edits(int32, torch.zeros(2, 2, 2).int())}),
        (r"sets must be .* got torch.int32 \(2, 1, 3\)", {"edits": Edits(int32, torch.zeros(2, 1, 3).int())}),
    ):
        with pytest.raises(InvalidArgumentError, match=complaint):
            draw_gumbel(logits, asks, positions, **options)


# At the size of a model's vocabulary


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 33, 100])
def test_a_large_vocabulary(count: int, dtype: torch.dtype):
    for params in (MIXED, MIXED[:2], MIXED[1:2], EVERYTHING):
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
    first, second = rows_of(9, EVERYTHING), rows_of(9, EVERYTHING[3:], seed=5)
    logits = normal(9, 5000).cuda()
    given, new = ((asks_of(rows), positions_of(rows)) for rows in (first, second))
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
        draw_gumbel(logits, *given)
        sample(logits, first)
    finally:
        torch.cuda.set_sync_debug_mode("default")
