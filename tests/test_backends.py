"""Every backend against dense attention, over ragged rows and a cache poisoned with NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dense import DenseRows, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from graphattn import Attention
from graphattn.errors import BackendError, InvalidArgumentError
from graphattn.ops import active_plans
from graphattn.plan import Planner, choose_backend
from graphattn.rope import Rotary
from graphattn.spec import AttentionSpec, CacheSpec
from graphattn.state import StepState

CUDA_BACKENDS = ("flashinfer", "fused")
HEADS = {"group 3": (9, 3), "group 2": (4, 2), "one each": (2, 2), "group 7": (7, 1)}
ROPE = {"pos_encoding": "rope_llama", "rope_theta": 500.0, "rope_scale": 2.0}
RAGGED = {
    "prefill": ([0, 0, 0, 0], [1, 16, 33, 7]),
    "chunks over prefixes": ([16, 5, 0, 31], [3, 27, 2, 1]),
    "decode": ([0, 15, 16, 40, 63], [1, 1, 1, 1, 1]),
}


def spec_of(heads: str, head_dim: int, **options) -> AttentionSpec:
    num_heads, num_kv_heads = HEADS[heads]
    return AttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **options)


def run_ragged(rows: DenseRows, backend: str) -> torch.Tensor:
    device = rows.q[0].device
    plan = Planner([rows.spec], rows.cache.cache, device, backend).prefill()
    plan.plan(rows.batch(device))
    with active_plans(plan.groups):
        return torch.ops.graphattn.attend(*rows.packed, *rows.cache.layers[0], 0)


def run_decode(rows: DenseRows, backend: str, padding: int, max_seq_len: int = 512) -> torch.Tensor:
    """The rows as a decode step at a bucket that is `padding` rows larger."""
    device, num_rows = rows.q[0].device, len(rows.new)
    bucket = num_rows + padding
    state = StepState(
        max_batch=bucket, max_seq_len=max_seq_len, page_size=rows.pool.page_size, groups=[rows.spec], device=device
    )
    plan = Planner([rows.spec], rows.cache.cache, device, backend).decode(state, bucket)
    lens = [old + 1 for old in rows.cached]
    plan.plan(state.stage(bucket, [0] * num_rows, lens, [[table.pages for table in rows.tables]]))
    state.feed(bucket)
    padded = [torch.cat([tensor, tensor.new_ones(padding, *tensor.shape[1:])]) for tensor in rows.packed]
    with active_plans(plan.groups):
        out = torch.ops.graphattn.attend(*padded, *rows.cache.layers[0], 0)
    assert out.isfinite().all(), "padded rows are rows like any other: finite"
    return out[:num_rows]


def check(rows: DenseRows, ours: torch.Tensor, *, floor: float) -> None:
    dtype = ours.dtype
    exact = rows.attend(torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32)
    assert_close(ours, rows.attend(dtype), exact, floor=floor)
    held = torch.cat([rows.pages[0][table.pages].flatten(0, 1) for table in rows.tables])
    poisoned = held.isnan().flatten(1).all(1).sum()
    slots = sum(table.num_slots for table in rows.tables)
    tokens = sum(rows.cached) + sum(rows.new)
    assert poisoned == slots - tokens, "the append wrote slots that no token owns, or missed some"


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("ragged", RAGGED)
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 2.0}, {"scale": 0.3}, ROPE], ids=str)
def test_reference(heads: str, ragged: str, options: dict) -> None:
    rows = DenseRows(spec_of(heads, 8, **options), *RAGGED[ragged], page_size=16, dtype=torch.float32, device="cpu")
    check(rows, run_ragged(rows, "reference"), floor=1e-6)
    if ragged == "decode":
        rows = DenseRows(rows.spec, *RAGGED[ragged], page_size=16, dtype=torch.float32, device="cpu")
        check(rows, run_decode(rows, "reference", padding=3), floor=1e-6)


@pytest.mark.parametrize("ragged", RAGGED)
def test_reference_with_heads_before_slots(ragged: str) -> None:
    options = {"page_size": 16, "dtype": torch.float32, "device": "cpu", "layout": "HND"}
    rows = DenseRows(spec_of("group 3", 8), *RAGGED[ragged], **options)
    check(rows, run_ragged(rows, "reference"), floor=1e-6)
    if ragged == "decode":
        rows = DenseRows(rows.spec, *RAGGED[ragged], **options)
        check(rows, run_decode(rows, "reference", padding=3), floor=1e-6)


def test_reference_blocks_of_queries() -> None:
    """A row longer than one block of queries, over a prefix."""
    rows = DenseRows(spec_of("group 2", 8), [9, 600], [1100, 2], page_size=16, dtype=torch.float32, device="cpu")
    check(rows, run_ragged(rows, "reference"), floor=1e-6)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=6),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([None, 1, 4, 17]),
    st.integers(0, 99),
)
def test_reference_random_rows(lens, page_size, window, seed) -> None:
    cached, new = zip(*lens, strict=True)
    rows = DenseRows(
        spec_of("group 2", 4, window=window),
        list(cached),
        list(new),
        page_size=page_size,
        dtype=torch.float64,
        device="cpu",
        seed=seed,
    )
    check(rows, run_ragged(rows, "reference"), floor=1e-12)


SKEWED = ([32767, *[99] * 63], [1] * 64)  # one of 32k tokens among 63 of 100


def test_reference_skewed() -> None:
    rows = DenseRows(spec_of("group 2", 4), *SKEWED, page_size=16, dtype=torch.float32, device="cpu")
    check(rows, run_decode(rows, "reference", padding=0, max_seq_len=32768), floor=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_skewed(backend: str) -> None:
    rows = DenseRows(spec_of("group 2", 64), *SKEWED, page_size=16, dtype=torch.bfloat16, device="cuda")
    check(rows, run_decode(rows, backend, padding=0, max_seq_len=32768), floor=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("ragged", RAGGED)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (128, 16), (128, 1), (64, 32), (256, 16)])
def test_flashinfer(heads: str, ragged: str, head_dim: int, page_size: int, dtype) -> None:
    if dtype == torch.float16 and head_dim != 64:
        pytest.skip("one head_dim is enough for float16")
    rows = DenseRows(spec_of(heads, head_dim), *RAGGED[ragged], page_size=page_size, dtype=dtype, device="cuda")
    check(rows, run_ragged(rows, "flashinfer"), floor=1e-3)
    if ragged == "decode":
        for backend in CUDA_BACKENDS:
            rows = DenseRows(rows.spec, *RAGGED[ragged], page_size=page_size, dtype=dtype, device="cuda")
            check(rows, run_decode(rows, backend, padding=3), floor=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"window": 20}, {"softcap": 2.0}, {"scale": 0.3}, ROPE, ROPE | {"window": 20, "softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("ragged", RAGGED)
def test_flashinfer_options(options: dict, ragged: str) -> None:
    rows = DenseRows(
        spec_of("group 2", 128, **options), *RAGGED[ragged], page_size=16, dtype=torch.bfloat16, device="cuda"
    )
    check(rows, run_ragged(rows, "flashinfer"), floor=1e-3)
    if ragged == "decode":
        for backend in CUDA_BACKENDS if "pos_encoding" not in options else ("flashinfer",):
            rows = DenseRows(rows.spec, *RAGGED[ragged], page_size=16, dtype=torch.bfloat16, device="cuda")
            check(rows, run_decode(rows, backend, padding=3), floor=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("ragged", RAGGED)
def test_flashinfer_with_heads_before_slots(ragged: str) -> None:
    options = {"page_size": 16, "dtype": torch.bfloat16, "device": "cuda", "layout": "HND"}
    rows = DenseRows(spec_of("group 3", 128), *RAGGED[ragged], **options)
    check(rows, run_ragged(rows, "flashinfer"), floor=1e-3)
    if ragged == "decode":
        for backend in CUDA_BACKENDS:
            rows = DenseRows(rows.spec, *RAGGED[ragged], **options)
            check(rows, run_decode(rows, backend, padding=3), floor=1e-3)


@pytest.mark.gpu
def test_flashinfer_skewed_and_long() -> None:
    """One long row among short ones: the split over the context, in a step of many rows."""
    generator = torch.Generator().manual_seed(1)
    cached = [5000, *torch.randint(0, 200, (40,), generator=generator).tolist()]
    spec = AttentionSpec(num_heads=16, num_kv_heads=8, head_dim=128)
    for new in ([1] * len(cached), [300, *[2] * 40]):
        rows = DenseRows(spec, cached, new, page_size=16, dtype=torch.bfloat16, device="cuda")
        check(rows, run_ragged(rows, "flashinfer"), floor=1e-3)
    for backend in CUDA_BACKENDS:
        rows = DenseRows(spec, cached, [1] * len(cached), page_size=16, dtype=torch.bfloat16, device="cuda")
        check(rows, run_decode(rows, backend, padding=7, max_seq_len=8192), floor=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [0, 7, 40, 300])
def test_fused_at_every_split(padding: int) -> None:
    """Rows from one token to many chunks, at buckets that split them differently; twice, so that counters are reset."""
    spec = spec_of("group 3", 64)
    lens = [0, 1, 63, 64, 127, 128, 500, 1500, 5000]
    for _ in range(2):
        rows = DenseRows(spec, lens, [1] * len(lens), page_size=16, dtype=torch.bfloat16, device="cuda")
        check(rows, run_decode(rows, "fused", padding=padding, max_seq_len=8192), floor=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("has_norm", [False, True], ids=["rotated", "normed and rotated"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_norm_and_rotation_in_the_kernel(head_dim: int, layout: str, has_norm: bool) -> None:
    """Against norm and rotation outside in float32, and attention over what that gives; bf16 outside it beside."""
    spec = spec_of("group 2", head_dim)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(head_dim, generator=generator).add(0.5).cuda() for _ in range(2)]
    inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2, device="cuda") / head_dim)

    def step(backend: str, dtype) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"page_size": 16, "dtype": torch.bfloat16, "device": "cuda", "layout": layout}
        rows = DenseRows(spec, [0, 15, 16, 40, 700], [1] * 5, **options)
        cache = replace(rows.cache.cache, dtype=dtype, query_dtype=dtype)
        pages = [tensor.to(dtype) for tensor in rows.cache.layers[0]]
        state = StepState(max_batch=5, max_seq_len=1024, page_size=16, groups=[spec], device="cuda")
        plan = Planner([spec], cache, "cuda", backend).decode(state, 5)
        tables = [[table.pages for table in rows.tables]]
        plan.plan(state.stage(5, [0] * 5, [old + 1 for old in rows.cached], tables))
        state.feed(5)
        norms = [weight.to(dtype) for weight in weights] if has_norm else [None, None]
        with active_plans(plan.groups):
            layer = Attention(4, head_dim, num_kv_heads=2, rotary=Rotary(inv_freq, 1.2, *norms, 1e-6))
            layer.bind(*pages)
            out = layer(*(tensor.to(dtype) for tensor in rows.packed))
        return out, pages[0].nan_to_num(0.0)

    exact, plain, ours = (
        step("reference", torch.float32),
        step("reference", torch.bfloat16),
        step("fused", torch.bfloat16),
    )
    for got, beside, right in zip(ours, plain, exact, strict=True):
        assert_close(got, beside, right, floor=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", ["group 3", "group 7"])
def test_flashinfer_plans_ahead(heads: str, monkeypatch) -> None:
    """Rows that grow across pages, and one that a shorter row replaces, under plans made for longer ones."""
    from graphattn.backends.flashinfer import decode

    plans = []
    fast_decode_plan = decode.fast_decode_plan
    monkeypatch.setattr(decode, "fast_decode_plan", lambda *a, **k: (plans.append(1), fast_decode_plan(*a, **k)))
    spec, lens = spec_of(heads, 128), [0, 15, 700, 1500, 2047]
    state = StepState(max_batch=8, max_seq_len=4096, page_size=16, groups=[spec], device="cuda")
    plan, num_steps = None, 0
    for grown in (*range(0, 70, 3), 0):
        cached = [length + grown for length in lens]
        rows = DenseRows(spec, cached, [1] * 5, page_size=16, dtype=torch.bfloat16, device="cuda", seed=grown)
        plan = plan or Planner([spec], rows.cache.cache, "cuda", "flashinfer").decode(state, 8)
        tables = [table.pages for table in rows.tables]
        plan.plan(state.stage(8, [0] * 5, [length + 1 for length in cached], [tables]))
        state.feed(8)
        padded = [torch.cat([tensor, tensor.new_ones(3, *tensor.shape[1:])]) for tensor in rows.packed]
        with active_plans(plan.groups):
            check(rows, torch.ops.graphattn.attend(*padded, *rows.cache.layers[0], 0)[:5], floor=1e-3)
        num_steps += 1
    assert 2 <= len(plans) < num_steps / 2


@pytest.mark.gpu
def test_flashinfer_plan_that_is_interrupted_is_made_again(monkeypatch) -> None:
    from graphattn.backends.flashinfer import decode

    fast_decode_plan = decode.fast_decode_plan

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(decode, "fast_decode_plan", fast_decode_plan)
        raise KeyboardInterrupt

    spec = spec_of("group 2", 128)
    state = StepState(max_batch=2, max_seq_len=4096, page_size=16, groups=[spec], device="cuda")
    rows = DenseRows(spec, [1500, 3000], [1, 1], page_size=16, dtype=torch.bfloat16, device="cuda")
    plan = Planner([spec], rows.cache.cache, "cuda", "flashinfer").decode(state, 2)
    batch = state.stage(2, [0, 0], [1501, 3001], [[table.pages for table in rows.tables]])
    monkeypatch.setattr(decode, "fast_decode_plan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan.plan(batch)
    plan.plan(batch)
    state.feed(2)
    with active_plans(plan.groups):
        check(rows, torch.ops.graphattn.attend(*rows.packed, *rows.cache.layers[0], 0), floor=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("has_norm", [False, True], ids=["rotated", "normed and rotated"])
@pytest.mark.parametrize("by_length", [False, True], ids=["", "by length"])
@pytest.mark.parametrize(("head_dim", "turned"), [(64, 64), (256, 256), (64, 16), (128, 80), (128, 96)])
def test_norm_and_rotation_before_prefill(head_dim: int, turned: int, by_length: bool, has_norm: bool) -> None:
    """Strided rows of a merged projection, head counts that are no power of two, positions up to a million."""
    from graphattn.kernels.rotate import rotate

    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(700, (9 + 3 + 3) * head_dim, generator=generator).bfloat16().cuda()
    q, k, _ = (x.unflatten(1, (-1, head_dim)) for x in qkv.split([heads * head_dim for heads in (9, 3, 3)], dim=1))
    positions = torch.randint(0, 1 << 20, (700,), generator=generator, dtype=torch.int32).cuda()
    weights = [torch.rand(head_dim, generator=generator).add(0.5).bfloat16().cuda() for _ in "qk"]
    inv_freq = 1e6 ** (-torch.arange(0, turned, 2, device="cuda") / turned)
    inv_freq = torch.stack((inv_freq, inv_freq * 0.5, inv_freq * 0.2)) if by_length else inv_freq
    lengths = positions + torch.randint(1, 1000, (700,), generator=generator, dtype=torch.int32).cuda()
    rotary, exact = (
        Rotary(inv_freq, 1.2, *([weight.to(dtype) for weight in weights] if has_norm else [None, None]), 1e-6, 1 << 19)
        for dtype in (torch.bfloat16, torch.float32)
    )
    found = (
        rotate(rotary, q, k, positions, lengths),
        rotary.rotate(q, k, positions, lengths),
        exact.rotate(q.float(), k.float(), positions, lengths),
    )
    for ours, plain, right in zip(*found, strict=True):
        assert_close(ours, plain, right, floor=1e-3)


def test_a_plan_for_another_cache_is_refused() -> None:
    rows = DenseRows(spec_of("group 2", 8), [4], [1], page_size=16, dtype=torch.float32, device="cpu")
    other = DenseRows(rows.spec, [4], [1], page_size=16, dtype=torch.float32, device="cpu", layout="HND")
    plan = Planner([rows.spec], other.cache.cache, "cpu").prefill()
    plan.plan(rows.batch("cpu"))
    with (
        active_plans(plan.groups),
        pytest.raises(InvalidArgumentError, match=r"pages of \[16, 2, 8\], the plan .*\[2, 16, 8\]"),
    ):
        torch.ops.graphattn.attend(*rows.packed, *rows.cache.layers[0], 0)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = CacheSpec(num_pages=4), CacheSpec(num_pages=4, dtype=torch.float32)


def test_auto_is_reference_on_cpu() -> None:
    assert choose_backend("auto", spec_of("group 2", 64), FP32, CPU).name == "reference"


@pytest.mark.parametrize(
    ("name", "spec", "cache", "device", "words"),
    [
        ("flashinfer", spec_of("group 2", 64), BF16, CPU, ["CUDA device", "cpu", "backend='reference'"]),
        ("flashinfer", spec_of("group 2", 80), BF16, CUDA, ["head_dim 80", "64, 128, 256"]),
        ("auto", spec_of("group 2", 64), FP32, CUDA, ["float32", "torch.bfloat16"]),
        ("fused", spec_of("group 2", 96), BF16, CUDA, ["head_dim 96: its decode kernel is for 64, 128, 256"]),
        ("fused", replace(spec_of("group 7", 64), num_heads=17), BF16, CUDA, ["17 query heads share a kv head"]),
    ],
)
def test_rejections_are_listed(name, spec, cache, device, words) -> None:
    with pytest.raises(BackendError) as error:
        choose_backend(name, spec, cache, device)
    for word in words:
        assert word in str(error.value)


def test_cuda_without_flashinfer(monkeypatch) -> None:
    import graphattn.backends.flashinfer as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r'not installed: pip install "graphattn\[cuda\]"'):
        choose_backend("auto", spec_of("group 2", 64), BF16, CUDA)


def test_unknown_backend() -> None:
    with pytest.raises(InvalidArgumentError, match="backend='flash': choose auto, fused, flashinfer, reference"):
        choose_backend("flash", spec_of("group 2", 64), FP32, CPU)
