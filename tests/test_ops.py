"""The op's four claims, each on its own: opcheck, fullgraph, no recompilation, no copy of the cache."""

from __future__ import annotations

import re

import pytest
import torch
from dense import DenseRows
from tiny import tiny
from torch import nn

from graphattn import Attention, KVCache, PagePool
from graphattn.batch import ragged_batch
from graphattn.cache import all_pages
from graphattn.engine.step import ModelStep
from graphattn.errors import InvalidArgumentError, NoActivePlanError
from graphattn.hf.binding import Binding
from graphattn.ops import active_plans
from graphattn.plan import Planner
from graphattn.rope import Rotary
from graphattn.spec import AttentionSpec, CacheSpec
from graphattn.state import StepState

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8)


def planned(device: str = "cpu", dtype=torch.float32, spec=SPEC, backend: str = "auto"):
    rows = DenseRows(spec, [3, 0, 20], [1, 1, 1], page_size=16, dtype=dtype, device=device)
    plan = Planner([spec], rows.cache.cache, device, backend).prefill()
    plan.plan(rows.batch(device))
    return rows, plan


def test_opcheck() -> None:
    rows, plan = planned()
    with active_plans(plan.groups):
        torch.library.opcheck(torch.ops.graphattn.attend, (*rows.packed, *rows.cache.layers[0], 0))


@pytest.mark.gpu
def test_opcheck_on_cuda() -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64)
    rows, plan = planned("cuda", torch.bfloat16, spec)
    for pages in rows.cache.layers[0]:
        pages.nan_to_num_()  # opcheck compares the mutated caches, and NaN equals nothing
    with active_plans(plan.groups):
        torch.library.opcheck(torch.ops.graphattn.attend, (*rows.packed, *rows.cache.layers[0], 0))


def test_plans_nest_and_are_restored() -> None:
    rows, plan = planned()
    layer = Attention(4, 8, num_kv_heads=2)
    layer.bind(*rows.cache.layers[0])
    with active_plans(plan.groups):
        first = layer(*rows.packed)
        with pytest.raises(ZeroDivisionError), active_plans(()):
            raise ZeroDivisionError
        assert torch.equal(layer(*rows.packed), first)
    with pytest.raises(NoActivePlanError, match="outside a planned step"):
        layer(*rows.packed)


def test_layer_says_what_does_not_fit() -> None:
    rows, plan = planned()
    q, k, v = rows.packed
    with pytest.raises(InvalidArgumentError, match="num_heads=5 is no multiple of num_kv_heads=2"):
        Attention(5, 8, num_kv_heads=2)
    layer = Attention(4, 8, num_kv_heads=2)
    with active_plans(plan.groups), pytest.raises(NoActivePlanError, match=r"layer\.bind"):
        layer(q, k, v)
    with pytest.raises(InvalidArgumentError, match=r"k_cache is \(2, 16, 3, 8\)"):
        layer.bind(torch.zeros(2, 16, 3, 8), torch.zeros(2, 16, 3, 8))
    layer.bind(*rows.cache.layers[0])
    with active_plans(plan.groups):
        with pytest.raises(InvalidArgumentError, match=r"k is \(3, 4, 8\): the layer takes \[tokens, 2, 8\]"):
            layer(q, q, v)
        with pytest.raises(InvalidArgumentError, match="q is torch.float64"):
            layer(q.double(), k, v)
    assert not layer.state_dict(), "the cache is no weight"


class Decoder(nn.Module):
    """A whole decoder step: embedding, layers of attention, a head."""

    def __init__(self, num_layers: int = 2):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(32, 16)
        self.qkv = nn.ModuleList(nn.Linear(16, (4 + 2 + 2) * 8) for _ in range(num_layers))
        self.attention = nn.ModuleList(Attention(4, 8, num_kv_heads=2) for _ in range(num_layers))
        self.out = nn.ModuleList(nn.Linear(32, 16) for _ in range(num_layers))
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator)

    def forward(self, token_ids, positions):
        hidden = self.embed(token_ids) + positions[:, None] * 0.01
        for qkv, attention, out in zip(self.qkv, self.attention, self.out, strict=True):
            q, k, v = qkv(hidden).unflatten(-1, (8, 8)).split([4, 2, 2], dim=1)
            hidden = torch.tanh(hidden + out(attention(q, k, v).flatten(1)))
        return hidden @ self.embed.weight.T


def prepared(num_pages: int = 600):
    model = Decoder()
    cache = CacheSpec(num_pages=num_pages, dtype=torch.float32)
    for layer, pages in zip(model.attention, KVCache(2, SPEC, cache, "cpu").layers, strict=True):
        layer.bind(*pages)
    state = StepState(max_batch=16, max_seq_len=64, page_size=16, groups=[SPEC], device="cpu")
    return model, state, Planner([SPEC], cache, "cpu"), PagePool(num_pages)


def steps(model, state, planner, pool, buckets):
    for bucket in buckets:
        plan = planner.decode(state, bucket)
        pages = pool.allocate(bucket)
        plan.plan(state.stage(bucket, [1] * bucket, [1] * bucket, [[[page] for page in pages]]))
        with torch.no_grad(), active_plans(plan.groups):
            state.feed(bucket)
            yield model(state.token_ids(bucket), state.positions(bucket))


@pytest.mark.inductor
def test_fullgraph_and_two_compilations_for_all_buckets() -> None:
    torch._dynamo.reset()
    model, state, planner, pool = prepared()
    eager = list(steps(model, state, planner, pool, (16, 8, 4, 2, 1)))
    counted = []

    def backend(graph, inputs):
        from torch._inductor.compile_fx import compile_fx

        counted.append(graph)
        return compile_fx(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def call(token_ids, positions):
        if len(token_ids) > 1:
            torch._dynamo.mark_dynamic(token_ids, 0)
            torch._dynamo.mark_dynamic(positions, 0)
        return compiled(token_ids, positions)

    ours = list(steps(call, state, planner, pool, (16, 8, 4, 2, 1)))
    for got, expected in zip(ours, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(counted) == 2, "one compilation serves every bucket from 2 up, one serves batch 1"


@pytest.mark.inductor
@pytest.mark.parametrize("bucket", [8, 1])
def test_compiled_step_copies_no_cache(bucket: int) -> None:
    """Inductor's own code allocates nothing as large as a layer's cache and calls the op on the cache itself."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model, state, planner, pool = prepared(num_pages=977)
    plan = planner.decode(state, bucket)
    plan.plan(state.stage(bucket, [1] * bucket, [1] * bucket, [[[page] for page in pool.allocate(bucket)]]))
    state.feed(bucket)
    with torch.no_grad(), active_plans(plan.groups):
        args = (state.token_ids(bucket), state.positions(bucket))
        _, sources = run_and_get_code(torch.compile(model, fullgraph=True), *args)
    source = "\n".join(sources)
    assert source.count("graphattn.attend.default(") == 2
    # 977 pages is a prime that no other tensor has: it may appear in an input's size check, never in an allocation.
    for line in source.splitlines():
        if "977" in line:
            assert not re.search(r"empty_strided|clone|copy_", line), line
    assert str(977 * 16 * 2 * 8) not in source, "a loop over the whole cache"


@pytest.mark.inductor
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_step_compiles_once(family: str) -> None:
    torch._dynamo.reset()
    binding = Binding(tiny(family, dtype=torch.float32), packs=True)
    cache = CacheSpec(num_pages=64, dtype=torch.float32)
    binding.allocate([cache])
    state = StepState(max_batch=8, max_seq_len=64, page_size=16, groups=binding.groups, device="cpu")
    planner, pool = Planner(binding.groups, cache, "cpu"), PagePool(64)
    plain, compiled = (ModelStep(binding.model, compile=compile, max_batch=8) for compile in (False, True))
    sizes = (8, 4, 2, 1, 6)
    expected = list(steps(plain, state, planner, pool, sizes))
    for (logits, ids), (plain_logits, _) in zip(steps(compiled, state, planner, pool, sizes), expected, strict=True):
        torch.testing.assert_close(logits, plain_logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(ids, logits.argmax(-1))
    assert compiled.num_compiles == 1


@pytest.mark.inductor
def test_a_compiled_step_serves_caches_of_any_size() -> None:
    """So that a cache can be sized by what a first, small one showed, without compiling again."""
    torch._dynamo.reset()
    binding = Binding(tiny("llama", dtype=torch.float32), packs=True)
    state = StepState(max_batch=8, max_seq_len=64, page_size=16, groups=binding.groups, device="cpu")
    plain, compiled = (ModelStep(binding.model, compile=compile, max_batch=8) for compile in (False, True))
    for num_pages in (40, 64, 1000):
        cache = CacheSpec(num_pages=num_pages, dtype=torch.float32)
        binding.allocate([cache])
        planner = Planner(binding.groups, cache, "cpu")
        runs = [list(steps(step, state, planner, PagePool(num_pages), (4, 2, 1))) for step in (plain, compiled)]
        for (expected, _), (logits, _) in zip(*runs, strict=True):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert compiled.num_compiles == 1


def test_compiled_models_do_not_share_dynamos_limit_and_go_when_dropped(monkeypatch) -> None:
    """More models than Dynamo keeps graphs for one piece of code; compilation itself is left out."""
    import gc
    import weakref

    import torch._inductor.compile_fx

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", lambda graph, inputs: graph.forward)
    torch._dynamo.reset()
    alive = []
    for _ in range(6):
        binding = Binding(tiny("llama", dtype=torch.float32, num_layers=1), packs=True)
        cache = CacheSpec(num_pages=8, dtype=torch.float32)
        binding.allocate([cache])
        state = StepState(max_batch=2, max_seq_len=16, page_size=16, groups=binding.groups, device="cpu")
        step = ModelStep(binding.model, compile=True, max_batch=8)
        list(steps(step, state, Planner(binding.groups, cache, "cpu"), PagePool(8), (2, 1)))
        assert step.num_compiles == 1
        alive.append(weakref.ref(binding.model))
        binding.detach()
        del binding, step
        gc.collect()
    assert sum(model() is not None for model in alive) <= 1


def test_a_layer_that_is_cast_keeps_all_its_pages() -> None:
    layer = Attention(2, 64)
    layer.bind(torch.zeros(64, 16, 2, 64), torch.zeros(64, 16, 2, 64))
    layer.bfloat16()
    assert (
        layer.k_cache.dtype == torch.bfloat16 and len(all_pages(layer.k_cache)) == len(all_pages(layer.v_cache)) == 64
    )
    with pytest.raises(InvalidArgumentError, match="strides"):
        layer.bind(torch.zeros(8, 16, 2, 64), torch.zeros(8, 2, 16, 64).transpose(1, 2))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tables": [[[1, 4]]]}, "page 4 of layer group 0: the cache has pages 0 to 3"),
        ({"tables": [[[-1, 2]]]}, "page -1 is in a table"),
        ({"tables": [[[1, 2]], [[1, 2]]]}, "the batch has tables of 2 layer groups, the planner has 1"),
        ({"tables": [[[1, 2], [3]]]}, r"tables\[0\] has 2 rows, token_ids 1"),
        ({"starts": []}, "starts has 0 rows, token_ids 1"),
        ({"starts": [-1]}, r"starts=\[-1\]"),
        ({"starts": [0.5]}, r"starts=\[0.5\]"),
        ({"lengths": [5, 5]}, "lengths has 2 rows"),
        ({"page_size": 2, "tables": [[[1, 2, 3]]]}, "the batch has page_size=2, the cache 4"),
        ({"page_size": 0}, "page_size=0"),
    ],
)
def test_a_ragged_batch_that_does_not_fit_its_plan(options: dict, complaint: str) -> None:
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8)
    plan = Planner([spec], CacheSpec(num_pages=4, page_size=4, dtype=torch.float32), "cpu").prefill()
    rows = {"starts": [0], "tables": [[[1, 2]]], "page_size": 4, "device": "cpu"} | options
    with pytest.raises(InvalidArgumentError, match=complaint):
        plan.plan(ragged_batch([[7] * 5], **rows))


def test_what_a_layer_may_not_be_called_with() -> None:
    """A cache of fewer pages than planned for, and queries with a gradient."""
    spec, cache = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8), CacheSpec(num_pages=6, dtype=torch.float32)
    layer, plan = Attention(2, 8, num_kv_heads=1), Planner([spec], cache, "cpu").prefill()
    plan.plan(ragged_batch([[7] * 5], [0], [[[1]]], page_size=16, device="cpu"))
    q, k = torch.randn(5, 2, 8), torch.randn(5, 1, 8)
    layer.bind(*KVCache(1, spec, CacheSpec(num_pages=4, dtype=torch.float32), "cpu").layers[0])
    with active_plans(plan.groups), pytest.raises(InvalidArgumentError, match="has 4 pages, the plan was made for 6"):
        layer(q, k, k)
    layer.bind(*KVCache(1, spec, cache, "cpu").layers[0])
    with active_plans(plan.groups), pytest.raises(InvalidArgumentError, match="wrap the step in torch.no_grad"):
        layer(q.requires_grad_(), k, k)
    with active_plans(plan.groups), torch.no_grad():
        layer(q, k, k)


@pytest.mark.parametrize(
    "options",
    [
        {"num_heads": 2.0},
        {"head_dim": True},
        {"window": 2.5},
        {"rotary": Rotary(torch.ones(4), q_weight=torch.ones(7), k_weight=torch.ones(7))},
        {"rotary": Rotary(torch.ones(4), q_weight=torch.ones(8))},
    ],
)
def test_layers_that_cannot_be(options: dict) -> None:
    with pytest.raises(InvalidArgumentError):
        Attention(**({"num_heads": 2, "head_dim": 8} | options))
