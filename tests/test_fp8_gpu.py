"""An fp8 cache on a GPU: every backend against attention over what the cache holds, eager and captured."""

from __future__ import annotations

import pytest
import torch
from dense import assert_close
from stored import StoredRows, StoredSharedRows, forced_logits, scales_of
from tiny import tiny

from graphattn import (
    LLM,
    Attention,
    BackendError,
    BucketLadder,
    DecodeRunner,
    Planner,
    SamplingParams,
    StepState,
    active_plans,
    calibrate,
)
from graphattn.rope import Rotary
from graphattn.spec import FP8, AttentionSpec
from graphattn.variants import attention_sinks

pytestmark = pytest.mark.gpu

DEVICE, DTYPE, FLOOR = "cuda", torch.bfloat16, 1e-3
HEADS = {"one each": (2, 2), "group 2": (4, 2), "group 3": (9, 3), "group 8": (8, 1), "group 16": (16, 1)}
LENS = [0, 15, 16, 31, 32, 63, 64, 300, 1500]  # tokens before the new one: around pages, blocks and chunks
DECODE = ("fused", "flashinfer", "cascade")


@pytest.fixture(autouse=True)
def converts() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 caches take compute capability 8.9")


def spec_of(heads: str, head_dim: int, **options) -> AttentionSpec:
    num_heads, num_kv_heads = HEADS[heads]
    return AttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **options)


def rows_of(spec: AttentionSpec, new: list[int] | None = None, **options) -> StoredRows:
    sizes = {"page_size": 16, "dtype": DTYPE, "device": DEVICE, "scales_2K": scales_of(spec.num_kv_heads)} | options
    return StoredRows(spec, LENS, new or [1] * len(LENS), **sizes)


def layer_over(rows: StoredRows, rotary: Rotary | None = None) -> Attention:
    spec, (k_scale, v_scale) = rows.spec, rows.scales_2K
    sizes = {"num_kv_heads": spec.num_kv_heads, "window": spec.window, "softcap": spec.softcap, "rotary": rotary}
    sizes |= {"variant": spec.variant}
    layer = Attention(spec.num_heads, spec.head_dim, spec.scale, **sizes, k_scale=k_scale, v_scale=v_scale).to(DEVICE)
    layer.bind(*rows.cache.layers[0])
    return layer


def decoded(rows: StoredRows, backend: str, padding: int = 0, rotary: Rotary | None = None) -> torch.Tensor:
    """The rows as a decode step at a bucket that may be larger."""
    num_rows, bucket, page_size = len(rows.new), len(rows.new) + padding, rows.pool.page_size
    state = StepState(max_batch=bucket, max_seq_len=2048, page_size=page_size, groups=[rows.spec], device=DEVICE)
    plan = Planner([rows.spec], rows.cache.cache, DEVICE, backend).decode(state, bucket)
    lens = [old + 1 for old in rows.cached]
    plan.plan(state.stage(bucket, [0] * num_rows, lens, [[table.pages for table in rows.tables]]))
    state.feed(bucket)
    padded = [torch.cat([each, each.new_ones(padding, *each.shape[1:])]) for each in rows.packed]
    with active_plans(plan.groups):
        return layer_over(rows, rotary)(*padded)[:num_rows]


def check(rows: StoredRows, found: torch.Tensor) -> None:
    rows.check_pages()
    assert_close(found, rows.attend(DTYPE), rows.attend(torch.float32), floor=FLOOR)


@pytest.mark.parametrize("backend", DECODE)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", HEADS)
def test_decode(heads: str, head_dim: int, backend: str) -> None:
    rows = rows_of(spec_of(heads, head_dim))
    check(rows, decoded(rows, backend))


@pytest.mark.parametrize("backend", DECODE)
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"softcap": 2.0}, {}),
        ({"scale": 0.3}, {"layout": "HND"}),
        ({"window": 20}, {"page_size": 32}),
        ({}, {"page_size": 1}),
        ({}, {"dtype": torch.float16}),
    ],
    ids=str,
)
def test_decode_options(options: dict, sizes: dict, backend: str) -> None:
    if backend == "cascade" and "window" in options:
        pytest.skip("a cascade has no window")
    rows = rows_of(spec_of("group 3", 128, **options), **sizes)
    dtype = sizes.get("dtype", DTYPE)
    found = decoded(rows, backend)
    rows.check_pages()
    assert_close(found, rows.attend(dtype), rows.attend(torch.float32), floor=FLOOR)


@pytest.mark.parametrize("padding", [0, 7, 40, 300])
def test_fused_at_every_split(padding: int) -> None:
    rows = rows_of(spec_of("group 3", 64))
    check(rows, decoded(rows, "fused", padding))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_fused_takes_queries_of_any_magnitude(head_dim: int) -> None:
    """They are multiplied as float16, whose range is far smaller than bfloat16's."""
    for factor in (2.0**-60, 2.0**60):
        spec = spec_of("group 2", head_dim, scale=head_dim**-0.5 / factor)
        rows = rows_of(spec)
        rows.q = [each * factor for each in rows.q]
        rows.q[0][:] = 0
        check(rows, decoded(rows, "fused"))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_prefill(head_dim: int, layout: str) -> None:
    rows = rows_of(spec_of("group 3", head_dim), [7, 1, 130, 3, 1, 2, 65, 9, 300], layout=layout)
    plan = Planner([rows.spec], rows.cache.cache, DEVICE, "flashinfer").prefill()
    plan.plan(rows.batch(DEVICE))
    with active_plans(plan.groups):
        check(rows, layer_over(rows)(*rows.packed))


@pytest.mark.parametrize("new", [[1] * len(LENS), [7, 1, 130, 3, 1, 2, 65, 9, 300]], ids=["decode", "prefill"])
def test_a_variant(new: list[int]) -> None:
    """Sinks through FlashInfer's JIT against the reference in float32, and that in bfloat16 beside."""
    sinks = attention_sinks(torch.linspace(-2, 3, 9))

    def attended(backend: str, dtype: torch.dtype) -> torch.Tensor:
        rows = rows_of(spec_of("group 3", 128, variant=sinks), new)
        rows.cast(dtype)
        plan = Planner([rows.spec], rows.cache.cache, DEVICE, backend).prefill()
        plan.plan(rows.batch(DEVICE))
        with active_plans(plan.groups):
            return layer_over(rows)(*rows.packed)

    exact, plain = attended("reference", torch.float32), attended("reference", DTYPE)
    assert_close(attended("flashinfer", DTYPE), plain, exact, floor=FLOOR)


def test_fa3_is_refused_by_name() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("fa3 is for compute capability 9.0")
    rows = rows_of(spec_of("group 3", 128))
    with pytest.raises(BackendError, match="it takes fp8 keys with fp8 queries only"):
        Planner([rows.spec], rows.cache.cache, DEVICE, "flashinfer").prefill("fa3")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_cascade_of_shared_pages(head_dim: int, layout: str) -> None:
    spec = spec_of("group 2", head_dim)
    prefixes, own = ["a" * 70] * 20 + ["a" * 70 + "b" * 9] * 25 + [""] * 3, [1 + 37 * row % 90 for row in range(48)]
    sizes = {"page_size": 16, "dtype": DTYPE, "device": DEVICE, "num_pages": 600, "layout": layout}
    rows = StoredSharedRows(spec, prefixes, own, scales_2K=scales_of(2), **sizes)
    check(rows, decoded(rows, "cascade", padding=3))


@pytest.mark.parametrize("has_norm", [False, True], ids=["rotated", "normed and rotated"])
@pytest.mark.parametrize(("heads", "head_dim", "turned"), [("group 3", 64, 64), ("group 8", 128, 96)])
def test_rotation_goes_before_the_scale(heads: str, head_dim: int, turned: int, has_norm: bool) -> None:
    """Against the reference in float32, which rotates, stores and attends in torch; that in bfloat16 beside."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.rand(head_dim, generator=generator).add(0.5).to(DEVICE) for _ in "qk"]
    inv_freq = 10000.0 ** (-torch.arange(0, turned, 2, device=DEVICE) / turned)

    def step(backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        rows = rows_of(spec_of(heads, head_dim))
        rows.cast(dtype)
        norms = [each.to(dtype) for each in weights] if has_norm else [None, None]
        found = decoded(rows, backend, rotary=Rotary(inv_freq, 1.2, *norms, 1e-6))
        return found, rows.pages[0][1:].float().nan_to_num(0)

    exact, plain, ours = step("reference", torch.float32), step("reference", DTYPE), step("fused", DTYPE)
    # Where a key rounds to the other of two e4m3 numbers its error is the step between them, for ours and for torch's.
    assert_close(ours[0], plain[0], exact[0], floor=5e-3)
    differs = (ours[1] != exact[1]).float().mean().item()
    assert differs <= 2 * (plain[1] != exact[1]).float().mean().item() + 1e-3


@pytest.mark.parametrize("backend", DECODE)
def test_a_captured_step_is_the_eager_one_to_the_bit_and_reads_its_scales(backend: str) -> None:
    spec = spec_of("group 2", 64)
    rows = rows_of(spec)
    state = StepState(max_batch=12, max_seq_len=2048, page_size=16, groups=[spec], device=DEVICE)
    layer, projection = layer_over(rows), torch.randn(3, 64, spec.num_heads * 64, device=DEVICE).to(DTYPE)

    def step_fn(token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q, k, v = (table[token_ids].unflatten(1, (-1, 64)) for table in projection)
        return layer(q, k[:, :2].contiguous(), v[:, :2].contiguous()).flatten(1)

    planner = Planner([spec], rows.cache.cache, DEVICE, backend)
    runner = DecodeRunner(step_fn, state, planner, ladder=BucketLadder([1, 12]))
    runner.capture()
    feed = (list(range(9)), [old + 1 for old in rows.cached], [[table.pages for table in rows.tables]])
    runner.verify(*feed)
    before = runner.run(*feed).clone()
    layer.set_scales(k_scale=0.02, v_scale=2 * rows.scales_2K[1])
    runner.verify(*feed)
    assert not torch.equal(before, runner.run(*feed)), "the graph holds the old scales"
    runner.close()


@pytest.mark.parametrize("backend", DECODE)
def test_an_engine(backend: str) -> None:
    """Captured decode over an fp8 cache: the log-probabilities are those of a prefill of the same tokens over it."""
    model = tiny("qwen3", dtype=DTYPE, head_dim=64).to(DEVICE)
    texts = [[7, 3, 9] * count for count in (1, 5, 20, 33)]
    options = {"kv_cache_dtype": "fp8", "kv_scales": calibrate(model, texts), "compile": False, "backend": backend}
    with LLM(model, max_batch=4, num_pages=64, **options) as llm:
        assert llm._executor.caches[0].layers[0][0].dtype == FP8
        outputs = llm.generate(texts, SamplingParams(temperature=0, max_tokens=40, logprobs=0, ignore_eos=True))
    for text, output in zip(texts, outputs, strict=True):
        logits = forced_logits(model, [*text, *output.token_ids], **options)
        rows = logits.log_softmax(-1)[len(text) - 1 : -1]
        forced = [row[token].item() for row, token in zip(rows, output.token_ids, strict=True)]
        ours = [row[token] for row, token in zip(output.logprobs, output.token_ids, strict=True)]
        errors = torch.tensor(ours) - torch.tensor(forced)
        assert errors.square().mean().sqrt() < 0.1 and errors.abs().max() < 0.5
