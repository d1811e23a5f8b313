"""Attention variants against their formulas computed densely, and the CUDA that is made of a declaration."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from dense import DenseRows, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_docs import engine_code
from torch import Tensor, nn
from varied import (
    CASES,
    LONG,
    RAGGED,
    TEMPERATURE,
    Case,
    VariedRows,
    everything,
    rows_of,
    sink_of_head,
    temperature_of_head,
)

import graphattn
from graphattn import Attention
from graphattn.backends.flashinfer import fa3
from graphattn.backends.flashinfer import variant as cuda
from graphattn.errors import BackendError, InvalidArgumentError
from graphattn.ops import active_plans
from graphattn.plan import Planner, choose_backend
from graphattn.rope import Rotary
from graphattn.spec import AttentionSpec, CacheSpec
from graphattn.state import StepState
from graphattn.variants import Variant, alibi, alibi_slopes, attention_sinks


def layer_of(rows: VariedRows) -> Attention:
    """A layer over the rows' pages whose tensors are those of the rows' formula."""
    spec, variant = rows.spec, rows.spec.variant
    own = replace(variant, tensors=rows.tensors)
    options = {"window": spec.window, "softcap": spec.softcap, "scale": spec.scale, "variant": own}
    layer = Attention(spec.num_heads, spec.head_dim, num_kv_heads=spec.num_kv_heads, **options)
    layer.bind(*rows.cache.layers[0])
    return layer


def attend_ragged(rows: VariedRows, backend: str = "auto") -> Tensor:
    device = rows.q[0].device
    plan = Planner([rows.spec], rows.cache.cache, device, backend).prefill()
    plan.plan(rows.batch(device))
    with active_plans(plan.groups):
        return layer_of(rows)(*rows.packed)


def decode_step(rows: VariedRows, padding: int, backend: str = "auto", max_seq_len: int = 512):
    """The plans of a decode step of the rows at a bucket that is larger, and its q, k and v."""
    device, num_rows = rows.q[0].device, len(rows.new)
    bucket, page_size = num_rows + padding, rows.pool.page_size
    size = {"max_batch": bucket, "max_seq_len": max_seq_len, "page_size": page_size}
    state = StepState(groups=[rows.spec], device=device, **size)
    plan = Planner([rows.spec], rows.cache.cache, device, backend).decode(state, bucket)
    tables = [[table.pages for table in rows.tables]]
    plan.plan(state.stage(bucket, [0] * num_rows, [old + 1 for old in rows.cached], tables))
    state.feed(bucket)
    return plan, [torch.cat([tensor, tensor.new_ones(padding, *tensor.shape[1:])]) for tensor in rows.packed]


def attend_decode(rows: VariedRows, padding: int) -> Tensor:
    plan, padded = decode_step(rows, padding)
    with active_plans(plan.groups):
        out = layer_of(rows)(*padded)
    assert out.isfinite().all(), "padded rows are rows like any other: finite"
    return out[: len(rows.new)]


def check(rows: VariedRows, ours: Tensor, *, floor: float) -> None:
    assert_close(ours, rows.attend(ours.dtype), rows.attend(torch.float64), floor=floor)


# What it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("ragged", RAGGED)
@pytest.mark.parametrize("name", CASES)
def test_reference(name: str, ragged: str, layout: str, dtype: torch.dtype) -> None:
    floor = 1e-6 if dtype == torch.float32 else 4e-3
    check(rows := rows_of(name, RAGGED[ragged], dtype=dtype, layout=layout), attend_ragged(rows), floor=floor)
    if ragged == "decode":
        check(rows := rows_of(name, RAGGED[ragged], dtype=dtype, layout=layout), attend_decode(rows, 3), floor=floor)


@pytest.mark.parametrize(
    "options", [{"window": 5}, {"softcap": 2.0}, {"window": 9, "softcap": 1.5, "scale": 0.5}], ids=str
)
@pytest.mark.parametrize("ragged", RAGGED)
@pytest.mark.parametrize("name", CASES)
def test_reference_with_window_and_softcap(name: str, ragged: str, options: dict) -> None:
    rows = rows_of(name, RAGGED[ragged], dtype=torch.float64, **options)
    check(rows, attend_ragged(rows), floor=1e-12)
    bare = DenseRows(
        replace(rows.spec, window=None, softcap=None, variant=None),
        *RAGGED[ragged],
        page_size=16,
        dtype=torch.float64,
        device="cpu",
    )
    assert not torch.allclose(rows.attend(torch.float64), bare.attend(torch.float64)), "the oracle sees no difference"


@settings(max_examples=40)
@given(
    st.sampled_from([*CASES]),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=6),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([None, 1, 4, 17]),
    st.integers(0, 99),
)
def test_reference_random_rows(name, lens, page_size, window, seed) -> None:
    ragged = tuple(map(list, zip(*lens, strict=True)))
    rows = rows_of(name, ragged, dtype=torch.float64, page_size=page_size, window=window, seed=seed)
    check(rows, attend_ragged(rows), floor=1e-12)


def test_reference_blocks_of_queries() -> None:
    rows = rows_of("everything", ([9, 600], [1100, 2]), dtype=torch.float64)
    check(rows, attend_ragged(rows), floor=1e-12)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    variant = Variant(
        "Blind",
        "__device__ bool mask(uint32_t head, int query, int key) const { return query != 3; }",
        mask=lambda head, query, key, values: query != 3,
    )
    spec = AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=4, variant=variant)
    rows = VariedRows(Case(lambda heads: variant), {}, spec, [0], [5], page_size=16, dtype=torch.float32, device="cpu")
    out = attend_ragged(rows)
    assert (out[3] == 0).all() and (out[[0, 1, 2, 4]] != 0).all()


def test_rotation_comes_before() -> None:
    generator = torch.Generator().manual_seed(3)
    rotary = Rotary(torch.rand(4, generator=generator), 1.2, torch.rand(8, generator=generator), torch.ones(8), 1e-6)
    found = []
    for is_outside in (True, False):
        rows = rows_of("everything", ([0, 0], [9, 5]), dtype=torch.float32)
        layer, (q, k, v) = layer_of(rows), rows.packed
        plan = Planner([rows.spec], rows.cache.cache, "cpu").prefill()
        batch = rows.batch("cpu")
        plan.plan(batch)
        if is_outside:
            q, k = rotary.rotate(q, k, batch.positions_N)
        else:
            layer.rotary = rotary
        with active_plans(plan.groups):
            found.append(layer(q, k, v))
    assert torch.equal(*found)


class ValuesInPlace(RuleBasedStateMachine):
    """Layers of one group, each with sinks of its own that are written in place under one plan."""

    @initialize()
    def build(self) -> None:
        self.rows = rows_of("sinks", RAGGED["decode"], dtype=torch.float64)
        self.tensors = [{"sinks": self.rows.tensors["sinks"].clone()} for _ in range(3)]
        self.layers = []
        for tensors in self.tensors:
            self.rows.tensors = tensors
            self.layers.append(layer_of(self.rows))
        assert len({layer.spec for layer in self.layers}) == 1
        self.plan, self.packed = decode_step(self.rows, padding=0)

    @rule(which=st.integers(0, 2), head=st.integers(0, 5), value=st.floats(-20, 20))
    def write(self, which: int, head: int, value: float) -> None:
        self.layers[which].variant_sinks[head] = value

    @invariant()
    def every_layer_reads_its_own(self) -> None:
        for tensors, layer in zip(self.tensors, self.layers, strict=True):
            self.rows.tensors = tensors
            with active_plans(self.plan.groups):
                check(self.rows, layer(*self.packed), floor=1e-12)


ValuesInPlace.TestCase.settings = settings(max_examples=10, stateful_step_count=6, deadline=None)
TestValuesInPlace = ValuesInPlace.TestCase


def test_alibi_slopes_are_the_papers() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    every_other = [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert alibi_slopes(12).tolist() == pytest.approx(alibi_slopes(8).tolist() + every_other)


def test_fullgraph_and_opcheck() -> None:
    rows = rows_of("sinks", RAGGED["decode"], dtype=torch.float32)
    for pages in rows.cache.layers[0]:
        pages.nan_to_num_()  # opcheck compares the mutated caches, and NaN equals nothing
    layer, (plan, packed) = layer_of(rows), decode_step(rows, padding=0)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    asked = (*packed, *rows.cache.layers[0], 0, layer.spec.variant.digest, [layer.variant_sinks])
    with active_plans(plan.groups):
        assert torch.equal(compiled(*packed), layer(*packed))
        torch.library.opcheck(torch.ops.graphattn.variant_attend, asked)


def engine_with_sinks(device: str, dtype: torch.dtype) -> dict:
    """The engine of docs/engine.md, the layers of its model with sinks of their own; its names after it ran."""
    page = engine_code(device, dtype)
    plain = "ga.Attention(heads, head_dim, num_kv_heads=kv_heads"
    with_sinks = f"{plain}, variant=ga.variants.attention_sinks(4 * torch.randn(heads))"
    assert page.count(plain) == 1
    names: dict = {}
    exec(page.replace(plain, with_sinks), names)
    return names


@torch.no_grad()
def test_an_engine_with_sinks_in_every_layer() -> None:
    """What decodes step by step is what a prefill of the whole row gives."""
    names = engine_with_sinks("cpu", torch.float64)
    engine, answers = names["engine"], names["answers"]
    first, second = (layer.attention for layer in engine.model.layers)
    assert first.spec == second.spec and not torch.equal(first.variant_sinks, second.variant_sinks)
    for prompt, answer in zip([[1, 2, 3], [7], list(range(40))], answers, strict=True):
        for count, token in enumerate(answer):
            table = graphattn.BlockTable(engine.pool)
            table.grow(len(prompt) + count)
            assert engine.prefill([prompt + answer[:count]], [table]).argmax().item() == token
            table.release()


# The layer and its tensors


def test_tensors_move_with_the_layer_and_keep_their_dtype() -> None:
    layer = Attention(2, 4, variant=attention_sinks(torch.tensor([1.25, 0.1])))
    moved = copy.deepcopy(layer).to(torch.bfloat16)
    assert moved.variant_sinks.dtype == torch.float32 and torch.equal(moved.variant_sinks, layer.variant_sinks)
    assert moved.spec == layer.spec and not layer.state_dict()
    assert layer.to("meta").variant_sinks.device.type == "meta"


def test_a_parameter_stays_one() -> None:
    sinks = nn.Parameter(torch.zeros(2))
    layer = Attention(2, 4, variant=attention_sinks(sinks))
    assert layer.variant_sinks is sinks and [*layer.state_dict()] == ["variant_sinks"]
    rows = DenseRows(layer.spec, [0], [3], page_size=16, dtype=torch.float32, device="cpu")
    layer.bind(*rows.cache.layers[0])
    plan = Planner([layer.spec], rows.cache.cache, "cpu").prefill()
    plan.plan(rows.batch("cpu"))
    with torch.no_grad(), active_plans(plan.groups):
        assert layer(*rows.packed).isfinite().all()
        layer.to(torch.bfloat16)
        with pytest.raises(InvalidArgumentError, match=r"sinks of variant AttentionSinks is \[2\] torch.bfloat16"):
            layer.spec.variant.check([layer.variant_sinks], torch.device("cpu"))


def test_equal_is_what_one_plan_can_serve() -> None:
    one, other = attention_sinks(torch.zeros(4)), attention_sinks(torch.ones(4))
    assert one == other and hash(one) == hash(other) and one != "sinks"
    assert one != attention_sinks(torch.zeros(5)) and one != attention_sinks(torch.zeros(4).half())
    assert temperature_of_head(4) == temperature_of_head(4)
    assert temperature_of_head(4) != replace(temperature_of_head(4), declaration=TEMPERATURE + "\n")
    assert everything(4) != replace(everything(4), scalars={"slope": 0.5})
    assert one != replace(one, sink=lambda head, values: values.sinks[head])


def mismatch(spec_variant: Variant | None, layer_variant: Variant | None) -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, variant=spec_variant)
    rows = DenseRows(spec, [4], [1], page_size=16, dtype=torch.float32, device="cpu")
    layer = Attention(4, 8, num_kv_heads=2, variant=layer_variant)
    layer.bind(*rows.cache.layers[0])
    plan = Planner([spec], rows.cache.cache, "cpu").prefill()
    plan.plan(rows.batch("cpu"))
    with active_plans(plan.groups):
        layer(*rows.packed)


@pytest.mark.parametrize(
    ("planned", "layer"),
    [
        (None, attention_sinks(torch.zeros(4))),
        (attention_sinks(torch.zeros(4)), None),
        (attention_sinks(torch.zeros(4)), alibi(4)),
    ],
)
def test_no_plan_computes_another_variant(planned, layer) -> None:
    words = [f"{each.name}-[0-9a-f]+" if each else "None" for each in (layer, planned)]
    with pytest.raises(
        InvalidArgumentError, match="the layer has variant {}, the plan of group 0 .* {}".format(*words)
    ):
        mismatch(planned, layer)


def test_tensors_that_do_not_fit() -> None:
    variant, cpu = attention_sinks(torch.zeros(4)), torch.device("cpu")
    for values, device, words in [
        ([], cpu, "takes .'sinks'., given are 0 tensors"),
        ([torch.zeros(5)], cpu, r"is \[5\] torch.float32, declared is \[4\] torch.float32"),
        ([torch.zeros(4).double()], cpu, r"is \[4\] torch.float64, declared is \[4\] torch.float32"),
        ([torch.zeros(4)], torch.device("cuda", 0), "is on cpu, the step on cuda:0: move the layer there"),
        ([torch.zeros(8)[::2]], cpu, r"has strides \(2,\)"),
    ]:
        with pytest.raises(InvalidArgumentError, match=words):
            variant.check(values, device)


# What is refused

SINK = "__device__ float sink(uint32_t head) const { return a[head]; }"


@pytest.mark.parametrize(
    ("name", "declaration", "options", "words"),
    [
        ("two words", SINK, {}, "the variant is called 'two words': that is no C\\+\\+ identifier"),
        ("9lives", SINK, {}, "is no C\\+\\+ identifier"),
        ("class", SINK, {}, "is no C\\+\\+ identifier"),
        ("_Hidden", SINK, {}, "Python or C\\+\\+ keeps such names"),
        ("A__b", SINK, {}, "Python or C\\+\\+ keeps such names"),
        (None, SINK, {}, "is called None"),
        ("A", SINK, {"tensors": {"float": torch.zeros(2)}}, "tensor of variant A is called 'float'"),
        ("A", SINK, {"tensors": {"lambda": torch.zeros(2)}}, "called 'lambda': Python"),
        ("A", SINK, {"tensors": {"sink": torch.zeros(2)}}, "called 'sink', and so is another part"),
        ("A", SINK, {"tensors": {"a": torch.zeros(2)}, "scalars": {"a": 1.0}}, "called 'a', and so is another part"),
        (
            "A",
            SINK,
            {"tensors": {"a": torch.zeros(2).cfloat()}},
            "tensor a of variant A is torch.complex64: kernels read",
        ),
        ("A", SINK, {"tensors": {"a": torch.zeros(4)[::2]}}, "tensor a of variant A has strides"),
        ("A", SINK, {"tensors": {"a": 1.0}}, "tensor a of variant A is a float: .* make it a scalar"),
        ("A", SINK, {"scalars": {"a": float("nan")}}, "scalar a of variant A is nan"),
        ("A", SINK, {"scalars": {"a": torch.zeros(())}}, "scalar a of variant A is tensor"),
        ("A", SINK, {"scalars": {"a": True}}, "scalar a of variant A is True"),
        ("A", SINK, {"sink": None}, r"declares float sink\(...\) and has no twin for it: pass sink="),
        ("A", SINK, {"sink": 3}, "sink of variant A is 3: give a function"),
        ("A", SINK, {"mask": lambda *_: True}, r"a twin mask= and its declaration no bool mask\(...\)"),
        ("A", "", {"sink": None}, "variant A declares nothing"),
        ("A", None, {}, "the declaration of variant A is a NoneType"),
    ],
)
def test_what_no_variant_can_be(name, declaration, options, words) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        Variant(name, declaration, **{"sink": sink_of_head, **options})


def test_unknown_arguments_of_the_ready_made() -> None:
    for make, argument, words in [
        (attention_sinks, torch.zeros(2, 2), r"sinks_H is \[2, 2\] torch.float32: give a vector"),
        (attention_sinks, torch.zeros(2, dtype=torch.int64), "torch.int64: give a vector"),
        (alibi, [0.5], "slopes_H is .0.5.: give a vector"),
        (alibi, 0, "num_heads=0: it must be at least 1"),
    ]:
        with pytest.raises(InvalidArgumentError, match=words):
            make(argument)


def test_specs_take_variants_for_their_heads() -> None:
    with pytest.raises(InvalidArgumentError, match="variant AttentionSinks is for 3 heads, num_heads is 4"):
        Attention(4, 8, variant=attention_sinks(torch.zeros(3)))
    with pytest.raises(InvalidArgumentError, match="variant='sinks': give a graphattn.variants.Variant"):
        Attention(4, 8, variant="sinks")


def test_which_backends_serve_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, variant=alibi(4))
    with pytest.raises(BackendError, match="fused: .*variant Alibi: its decode kernel computes none"):
        choose_backend("fused", spec, CacheSpec(num_pages=4), torch.device("cuda"))
    with pytest.raises(BackendError, match="prefill='fa3' cannot serve .*: variant Alibi is compiled for fa2"):
        fa3.kernels_for("fa3", spec, CacheSpec(num_pages=4), torch.device("cuda"), 132, 8192)
    asked = fa3.kernels_for("auto", spec, CacheSpec(num_pages=4), torch.device("cuda"), 132, 8192)
    assert asked == (("fa2",), "variant Alibi is compiled for fa2")


def test_auto_on_cuda_is_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphattn.backends import flashinfer, fused

    monkeypatch.setattr(flashinfer.FlashInferBackend, "rejections", staticmethod(lambda *asked: []))
    monkeypatch.setattr(fused, "has_gluon", lambda: True)
    plain = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64)
    cache, device = CacheSpec(num_pages=4), torch.device("cuda")
    assert choose_backend("auto", plain, cache, device).name == "fused"
    assert choose_backend("auto", replace(plain, variant=alibi(4)), cache, device).name == "flashinfer"


# The CUDA that is made of it


def spec_of(variant: Variant, **options) -> AttentionSpec:
    return AttentionSpec(num_heads=4, num_kv_heads=2, **{"head_dim": 64, **options}, variant=variant)


def section(struct: str, macro: str) -> str:
    return struct.partition(f"REGISTER_{macro}(")[2].partition("REGISTER_")[0]


def test_every_function_is_called_where_it_holds_for_all_keys() -> None:
    struct = cuda.struct(spec_of(everything(4)))
    transform = section(struct, "LOGITS_TRANSFORM")
    assert (
        transform.index("logits * scale_qk") < transform.index("functions.logits(") < transform.index("functions.mask(")
    )
    assert "functions.mask(" not in section(struct, "LOGITS_MASK"), "kernels call that for tiles at a border only"
    assert "kv_tile_idx == 0 ? functions.sink(" in section(struct, "M_D_UPDATE")
    assert "functions.output_scale(" in section(struct, "OUTPUT_TRANSFORM")
    assert "softcap * float" not in struct


def test_softcap_is_compiled_in_and_the_window_always_holds() -> None:
    struct = cuda.struct(spec_of(alibi(4), softcap=3.0))
    transform = section(struct, "LOGITS_TRANSFORM")
    assert (
        transform.index("logits * scale_qk") < transform.index("tanh(logit / softcap)") < transform.index("functions.")
    )
    assert "window_left" in section(struct, "LOGITS_MASK")
    assert "REGISTER_M_D_UPDATE" not in struct and "factor *= scale" not in struct
    assert cuda.scalars(spec_of(alibi(4), softcap=3.0, scale=0.5)) == (0.5, 3.0)


def test_scalars_come_in_the_order_of_their_names() -> None:
    spec = spec_of(everything(4), softcap=2.0)
    names = cuda.arguments(spec, torch.bfloat16).scalar_names
    values = dict(zip(names, cuda.scalars(spec), strict=True))
    assert values == {"graphattn_scale": 0.125, "graphattn_softcap": 2.0, "variant_slope": 0.125}
    asked = cuda.arguments(spec, torch.bfloat16)
    assert asked.tensor_names == ("variant_signs", "variant_strides", "variant_sinks", "variant_gates")
    assert asked.tensor_types == ("half", "int32_t", "nv_bfloat16", "float")


def test_modules_are_kept_apart_by_what_is_in_them() -> None:
    def uri(variant: Variant, dtype=torch.bfloat16, **options) -> str:
        return cuda.arguments(spec_of(variant, **options), dtype).uri

    base = temperature_of_head(4)
    assert uri(base) == uri(temperature_of_head(4), window=5) == uri(base, scale=3.0), "these are no part of the code"
    others = [
        uri(replace(base, declaration=TEMPERATURE.replace("/", "*"))),
        uri(replace(base, tensors={"temperature": torch.ones(4).half()})),
        uri(base, head_dim=128),
        uri(base, dtype=torch.float16),
        uri(base, softcap=2.0),
        uri(replace(base, name="Warmth")),
    ]
    assert len({uri(base), *others}) == 7


NINJA = """Ninja build failed. Ninja output:
ninja: Entering directory `/root/.cache/flashinfer/0.7.2.post1/90a/cached_ops/graphattn_Broken_0'
[1/12] /usr/local/cuda/bin/nvcc --generate-dependencies-with-compile -c mask_0.cu -o mask_0.cuda.o
FAILED: [code=2] mask_0.cuda.o
/usr/local/cuda/bin/nvcc --generate-dependencies-with-compile -DPy_LIMITED_API -c mask_0.cu -o mask_0.cuda.o
Broken(2): error: identifier "undefined_thing" is undefined
    return undefined_thing[head];
           ^

1 error detected in the compilation of "mask_0.cu".
ninja: build stopped: subcommand failed.
"""


def test_what_the_compiler_said_last() -> None:
    variant = Variant("Broken", SINK, sink=sink_of_head)
    text = str(cuda.not_compiled(spec_of(variant), torch.bfloat16, RuntimeError(NINJA)))
    assert text.startswith(
        "variant Broken could not be compiled or loaded for torch.bfloat16, head_dim 64; the last lines"
    )
    assert 'Broken(2): error: identifier "undefined_thing" is undefined\n    return undefined_thing[head];' in text
    assert text.endswith('1 error detected in the compilation of "mask_0.cu".')
    assert "--generate-dependencies" not in text and "ninja: build" not in text
    long = cuda.not_compiled(spec_of(variant), torch.bfloat16, RuntimeError("\n".join(map(str, range(1000)))))
    assert len(str(long).splitlines()) == 1 + cuda.MAX_LINES and str(long).endswith("\n999")


def test_it_is_reached_from_the_package() -> None:
    assert graphattn.variants.Variant is Variant


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["sinks", "alibi", "temperature", "everything"])
def test_flashinfer_prefill(name: str, head_dim: int) -> None:
    for layout, ragged in (
        ("NHD", RAGGED["prefill"]),
        ("HND", RAGGED["chunks over prefixes"]),
        ("NHD", LONG["prefill"]),
    ):
        for window in (None, 20):
            placed = {"head_dim": head_dim, "device": "cuda", "layout": layout, "window": window}
            rows = rows_of(name, ragged, dtype=torch.bfloat16, **placed)
            check(rows, attend_ragged(rows, "flashinfer"), floor=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["sinks", "alibi", "temperature", "everything"])
def test_flashinfer_decode_captured_eager_and_dense(name: str, head_dim: int) -> None:
    """A graph captured once, replayed over tensors that are written in place between replays."""
    for ragged, window in ((RAGGED["decode"], None), (LONG["decode"], None), (LONG["decode"], 20)):
        rows = rows_of(name, ragged, head_dim=head_dim, device="cuda", dtype=torch.bfloat16, window=window)
        layer, (plan, packed) = layer_of(rows), decode_step(rows, 3, "flashinfer", max_seq_len=8192)
        with torch.inference_mode(), active_plans(plan.groups):
            layer(*packed)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = layer(*packed)
            for change in (1.0, 0.5):
                for tensor in rows.tensors.values():  # the layer's own: they were on this device already
                    if tensor.is_floating_point():
                        tensor.mul_(change)
                graph.replay()
                assert captured.isfinite().all()
                assert torch.equal(captured, layer(*packed))
                check(rows, captured[: len(rows.new)].clone(), floor=2e-3)


@pytest.mark.gpu
def test_an_engine_with_sinks_in_graphs() -> None:
    names = engine_with_sinks("cuda", torch.bfloat16)
    assert names["engine"].runner.counts == {"replay": 7}
    eager = names["Engine"](names["engine"].model, enforce_eager=True)
    assert eager.generate([[1, 2, 3], [7], list(range(40))], num_tokens=8) == names["answers"]


@pytest.mark.gpu
def test_flashinfer_with_softcap() -> None:
    for name in ("sinks", "alibi"):
        for ragged in (RAGGED["prefill"], LONG["prefill"]):
            rows = rows_of(name, ragged, head_dim=64, device="cuda", dtype=torch.bfloat16, softcap=2.0, window=20)
            check(rows, attend_ragged(rows, "auto"), floor=2e-3)


@pytest.mark.gpu
def test_a_declaration_that_does_not_compile() -> None:
    text = "__device__ float sink(uint32_t head) const {\n  return undefined_thing[head];\n}"
    spec = spec_of(Variant("Broken", text, sink=sink_of_head))
    planner = Planner([spec], CacheSpec(num_pages=4), "cuda", "flashinfer")
    state = StepState(max_batch=1, max_seq_len=32, page_size=16, groups=[spec], device="cuda")
    for make in (planner.prefill, lambda: planner.decode(state, 1)):
        with pytest.raises(BackendError, match=r'(?s)variant Broken could.*Broken\(2\): error.*"undefined_thing"'):
            make()


@pytest.mark.gpu
def test_two_declarations_of_one_name_are_two_modules() -> None:
    found = []
    for operator in ("/", "*"):
        rows = rows_of("temperature", RAGGED["prefill"], head_dim=64, device="cuda", dtype=torch.bfloat16)
        declared = replace(rows.spec.variant, declaration=TEMPERATURE.replace("/", operator))
        rows.spec = replace(rows.spec, variant=declared)
        found.append(attend_ragged(rows, "flashinfer"))
    assert not torch.allclose(*found)
