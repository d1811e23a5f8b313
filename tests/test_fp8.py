"""An fp8 cache on a CPU: attention over what it holds, its scales, and all that is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from dense import assert_close
from stored import NUMBERS, StoredRows, StoredSharedRows, nearest, scales_of, stored

from graphattn import Attention, BackendError, CacheSpec, InvalidArgumentError, KVCache, KVScales, Planner, active_plans
from graphattn.backends.flashinfer import FlashInferBackend
from graphattn.backends.fused import FusedBackend
from graphattn.scales import dequantised, quantised
from graphattn.spec import FP8, AttentionSpec
from graphattn.variants import attention_sinks

SPEC = AttentionSpec(num_heads=6, num_kv_heads=3, head_dim=16)
SIZES = {"page_size": 4, "device": "cpu"}
SCALES = scales_of(3)
ROPE = {"pos_encoding": "rope_llama", "rope_theta": 100.0}


def test_numbers_are_the_nearest_of_e4m3_and_saturate() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(5, 3, 4000, generator=generator) * torch.logspace(-14, 14, 4000, base=2.0)
    middles = (NUMBERS[1:] + NUMBERS[:-1]) / 2
    for x in (drawn, drawn.bfloat16(), torch.cat([NUMBERS, middles, -middles]).float().expand(1, 3, -1)):
        for scale in (torch.ones(3), torch.tensor([0.25, 0.013, 3.0])):
            found = quantised(x, scale)
            assert found.dtype == FP8 and torch.equal(found.double(), stored(x, scale))
    beyond = torch.tensor([[448.0, 449.0, 480.0, 1e30, torch.inf]] * 3)
    for sign in (1, -1):
        assert (quantised(sign * beyond, torch.ones(3)).float() == sign * 448).all()
    assert quantised(torch.full((3, 1), torch.nan), torch.ones(3)).isnan().all()
    assert torch.equal(nearest(torch.tensor([17.0, 19.0])), torch.tensor([16.0, 20.0]).double())


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 5, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("new", [[3, 1, 9, 4], [1, 1, 1, 1]], ids=["prefill", "decode"])
def test_attends_to_what_the_cache_holds(new: list[int], options: dict, dtype: torch.dtype, layout: str) -> None:
    """Against float32 attention over stored values times their scales; the pages are as they should be to the bit."""
    spec = AttentionSpec(num_heads=6, num_kv_heads=3, head_dim=16, **options)
    rows = StoredRows(spec, [0, 4, 7, 30], new, dtype=dtype, layout=layout, scales_2K=SCALES, **SIZES)
    layer = layer_over(rows)
    found = attended(layer, rows)
    rows.check_pages()
    exact = rows.attend(torch.float64 if dtype == torch.float32 else torch.float32)
    assert_close(found, rows.attend(dtype), exact, floor=1e-6 if dtype == torch.float32 else 1e-3)


def layer_over(rows: StoredRows, **options) -> Attention:
    spec, (k_scale, v_scale) = rows.spec, rows.scales_2K
    sizes = {"num_kv_heads": spec.num_kv_heads, "window": spec.window, "softcap": spec.softcap}
    layer = Attention(spec.num_heads, spec.head_dim, **sizes, k_scale=k_scale, v_scale=v_scale, **options)
    layer.bind(*rows.cache.layers[0])
    return layer


def attended(layer: Attention, rows: StoredRows, backend: str = "reference") -> torch.Tensor:
    plan = Planner([rows.spec], rows.cache.cache, "cpu", backend).prefill()
    plan.plan(rows.batch("cpu"))
    with active_plans(plan.groups):
        return layer(*rows.packed)


def test_one_scale_is_that_of_every_head_and_none_is_one() -> None:
    for given, wanted in ((0.02, 0.02), (None, 1.0)):
        rows = StoredRows(SPEC, [6], [2], dtype=torch.float32, scales_2K=torch.full((2, 3), wanted), **SIZES)
        layer = Attention(6, 16, num_kv_heads=3, k_scale=given, v_scale=given)
        layer.bind(*rows.cache.layers[0])
        assert_close(attended(layer, rows), rows.attend(torch.float32), rows.attend(torch.float64), floor=1e-6)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_cascade_attends_to_what_the_cache_holds(layout: str) -> None:
    from graphattn.state import StepState

    prefixes, own = ["AB", "AB", "AC", "", "AB"], [1, 5, 3, 6, 4]
    options = {"num_pages": 40, "dtype": torch.float32, "layout": layout, "scales_2K": SCALES}
    rows = StoredSharedRows(SPEC, prefixes, own, **options, **SIZES)
    layer, state = layer_over(rows), StepState(max_batch=5, max_seq_len=64, page_size=4, groups=[SPEC], device="cpu")
    plan = Planner([SPEC], rows.cache.cache, "cpu", "cascade").decode(state, 5)
    plan.plan(state.stage(5, [0] * 5, [old + 1 for old in rows.cached], [[table.pages for table in rows.tables]]))
    state.feed(5)
    assert plan.groups[0].cascade.levels[0], "no pages were shared"
    with active_plans(plan.groups):
        found = layer(*rows.packed)
    rows.check_pages()
    assert_close(found, rows.attend(torch.float32), rows.attend(torch.float64), floor=1e-6)


@pytest.mark.parametrize(
    "options", [{"variant": attention_sinks(torch.linspace(-2, 3, 6))}, ROPE], ids=["sinks", "rope"]
)
def test_variants_and_rotation_inside_attention_see_what_it_stands_for(options: dict) -> None:
    """As over a float32 cache that has the stored numbers times their scales."""
    spec = AttentionSpec(num_heads=6, num_kv_heads=3, head_dim=16, **options)
    rows = StoredRows(spec, [6, 0, 30], [2, 5, 1], dtype=torch.float32, scales_2K=SCALES, **SIZES)
    plain = Attention(6, 16, num_kv_heads=3, **options)
    wide = replace(rows.cache.cache, dtype=torch.float32)
    pages = [each.float() * scale[:, None] for each, scale in zip(rows.pages, SCALES, strict=True)]
    plain.bind(*pages)
    fresh = [
        torch.cat([row[old:] for row, old in zip(each, rows.cached, strict=True)]).float() for each in (rows.k, rows.v)
    ]
    plan = Planner([spec], wide, "cpu", "reference").prefill()
    plan.plan(rows.batch("cpu"))
    with active_plans(plan.groups):
        wanted = plain(torch.cat(rows.q), *fresh)
    assert_close(attended(layer_over(rows, **options), rows), wanted, wanted.double(), floor=1e-6)


def test_scales_change_where_they_lie() -> None:
    rows = StoredRows(SPEC, [6], [2], dtype=torch.float32, scales_2K=SCALES, **SIZES)
    layer = layer_over(rows)
    held = layer.kv_scales
    before = attended(layer, rows)
    layer.set_scales(v_scale=2 * SCALES[1])
    assert layer.kv_scales is held and torch.equal(held, torch.stack([SCALES[0], 2 * SCALES[1]]))
    rows.k[0], rows.v[0] = rows.k[0][:6], rows.v[0][:6]
    assert not torch.equal(attended(layer, rows), before)
    with pytest.raises(InvalidArgumentError, match="positive and finite"):
        layer.set_scales(k_scale=5.0, v_scale=-1.0)
    assert torch.equal(held[0], SCALES[0]), "half of a refused change was made"


def test_one_compiled_layer_serves_all_scales() -> None:
    compiles = []

    def count(graph, inputs):
        compiles.append(graph)
        return graph.forward

    def call(layer, q, k, v):
        return layer(q, k, v)

    traced = torch.compile(call, backend=count, fullgraph=True)
    for scale in (1.0, 0.02, SCALES[0]):
        rows = StoredRows(SPEC, [6], [2], dtype=torch.float32, scales_2K=SCALES, **SIZES)
        layer = layer_over(rows)
        layer.set_scales(scale)
        plan = Planner([SPEC], rows.cache.cache, "cpu", "reference").prefill()
        plan.plan(rows.batch("cpu"))
        with active_plans(plan.groups):
            found = traced(layer, *rows.packed)
            assert torch.equal(found, layer(*rows.packed))
    assert len(compiles) == 1


def test_the_op_is_what_its_schema_says() -> None:
    rows = StoredRows(SPEC, [6], [2], dtype=torch.float32, scales_2K=SCALES, **SIZES)
    plan = Planner([SPEC], rows.cache.cache, "cpu", "reference").prefill()
    plan.plan(rows.batch("cpu"))
    with active_plans(plan.groups):
        arguments = (*rows.packed, *rows.cache.layers[0], 0, SCALES)
        torch.library.opcheck(torch.ops.graphattn.attend.default, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (0.0, r"_scale=0.0: scales must be positive and finite"),
        (-1.0, "positive"),
        (float("nan"), "finite"),
        (float("inf"), "finite"),
        (1e-50, "positive"),
        (torch.ones(6), r"_scale is \(6,\): give one number, or one for each of 3 kv heads"),
        (torch.ones(1, 3), r"\(1, 3\)"),
        ("large", "give a float, or a tensor with one for each kv head"),
    ],
    ids=str,
)
def test_scales_that_are_none_are_refused(name: str, scale: object, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words) as raised:
        Attention(6, 16, num_kv_heads=3, **{name: scale})
    assert name in str(raised.value)


def test_scales_and_caches_of_other_dtypes_are_refused() -> None:
    layer, cache = Attention(6, 16, num_kv_heads=3, k_scale=0.5), CacheSpec(num_pages=4, page_size=4)
    with pytest.raises(InvalidArgumentError, match=f"scales for {FP8} alone"):
        layer.bind(*KVCache(1, SPEC, cache, "cpu").layers[0])
    with pytest.raises(InvalidArgumentError, match=r"only a cache of torch.float8_e4m3fn has queries of another"):
        CacheSpec(num_pages=4, query_dtype=torch.float32)
    with pytest.raises(InvalidArgumentError, match=r"query_dtype=torch.float8_e4m3fn"):
        CacheSpec(num_pages=4, dtype=FP8, query_dtype=FP8)


def test_a_plan_for_another_dtype_is_refused() -> None:
    rows = StoredRows(SPEC, [6], [2], dtype=torch.float32, scales_2K=SCALES, **SIZES)
    num_pages = rows.pool.num_pages
    plain = CacheSpec(num_pages=num_pages, page_size=4, dtype=torch.float32)
    half = CacheSpec(num_pages=num_pages, page_size=4, dtype=FP8)
    bare = Attention(6, 16, num_kv_heads=3)
    bare.bind(*KVCache(1, SPEC, plain, "cpu").layers[0])
    for layer, cache in ((layer_over(rows), plain), (layer_over(rows), half), (bare, rows.cache.cache)):
        plan = Planner([SPEC], cache, "cpu", "reference").prefill()
        plan.plan(rows.batch("cpu"))
        words = f"the plan was made for queries of {cache.query_dtype} and a cache of {cache.dtype}"
        with active_plans(plan.groups), pytest.raises(InvalidArgumentError, match=words):
            layer(*rows.packed)


def test_what_backends_cannot_do_is_named() -> None:
    cache, turning = CacheSpec(num_pages=4, dtype=FP8), AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=64)
    for backend in (FlashInferBackend, FusedBackend):
        assert not any("dtype" in reason for reason in backend.rejections(turning, cache, torch.device("cpu")))
        double = CacheSpec(num_pages=4, dtype=FP8, query_dtype=torch.float64)
        assert "query_dtype torch.float64" in "".join(backend.rejections(turning, double, torch.device("cpu")))
    turning = AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=64, pos_encoding="rope_llama")
    found = FlashInferBackend.rejections(turning, cache, torch.device("cpu"))
    assert any("it turns no fp8 keys" in reason for reason in found)
    with pytest.raises(BackendError, match="it turns no fp8 keys"):
        Planner([turning], cache, "cpu", "flashinfer")


def test_pages_keep_their_bytes_where_they_are_copied() -> None:
    """By layout and within a cache; half as many bytes as bfloat16 takes."""
    cache = CacheSpec(num_pages=5, page_size=4, dtype=FP8)
    assert 2 * cache.page_bytes(SPEC) == CacheSpec(num_pages=5, page_size=4).page_bytes(SPEC)
    held = KVCache(2, SPEC, cache, "cpu")
    for pair in held.layers:
        for pages in pair:
            pages.view(torch.uint8).random_()
    turned = held.converted("HND")
    assert turned.cache.is_fp8 and turned.num_bytes == held.num_bytes
    for ours, theirs in zip(held.layers, turned.layers, strict=True):
        for pages, other in zip(ours, theirs, strict=True):
            assert torch.equal(pages.view(torch.uint8), other.transpose(1, 2).view(torch.uint8))
    held.copy_pages([1, 2], [3, 4])
    for pair in held.layers:
        for pages in pair:
            assert torch.equal(pages[1:3].view(torch.uint8), pages[3:].view(torch.uint8))


def test_a_layer_moves_with_its_scales_and_is_not_cast() -> None:
    rows = StoredRows(SPEC, [6], [2], dtype=torch.float32, scales_2K=SCALES, **SIZES)
    layer = layer_over(rows)
    wanted, twin = attended(layer, rows), copy.deepcopy(layer)
    assert torch.equal(attended(twin.to("cpu"), rows), wanted)
    with pytest.raises(InvalidArgumentError, match="was cast: unbind it first"):
        layer.to(torch.bfloat16)
    assert torch.equal(attended(layer, rows), wanted)
    layer.unbind()
    assert layer.to(torch.bfloat16).kv_scales.dtype == torch.float32


def test_scales_are_written_and_read(tmp_path) -> None:
    scales = KVScales(SCALES[:1], SCALES[1:])
    scales.save(tmp_path / "scales.json")
    found = KVScales.load(tmp_path / "scales.json")
    assert torch.equal(found.k, scales.k) and torch.equal(found.v, scales.v)
    (tmp_path / "scales.json").write_text('{"schema_version": 1, "k": [[1, 0]], "v": [[1, 1]]}')
    with pytest.raises(InvalidArgumentError, match=r"scales.json has no KV scales .*KVScales.k\[0\]=\[1.0, 0.0\]"):
        KVScales.load(tmp_path / "scales.json")
    for k, v, words in (
        (torch.ones(2, 3), torch.ones(3, 2), "make them equal"),
        (torch.ones(3), torch.ones(3), r"\(3,\): give a tensor \[layers, kv heads\]"),
        ([1.0], torch.ones(1, 1), "is list"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            KVScales(k, v)


def test_the_largest_fit_and_use_the_upper_half() -> None:
    largest = torch.tensor([[448.0, 448.1, 1.0], [3e4, 0.0, 1e-30]])
    scales = KVScales.of_largest(largest, largest).k
    assert torch.equal(scales[0, :2], torch.tensor([1.0, 2.0])) and scales[1, 1] == 1
    used = (largest / scales)[largest > 0]
    assert ((used > 224) & (used <= 448)).all()
    assert torch.equal(scales.log2(), scales.log2().round()), "no powers of two"
    x = (2 * torch.rand(4, 3, 8, generator=torch.Generator().manual_seed(0)) - 1) * largest[0][:, None]
    back = dequantised(quantised(x, scales[0]), scales[0], torch.float32)
    assert ((back - x).abs() <= x.abs() / 16 + scales[0][:, None] * 2**-10).all()
    with pytest.raises(InvalidArgumentError, match="must be finite"):
        KVScales.of_largest(torch.tensor([[torch.nan]]), torch.ones(1, 1))
