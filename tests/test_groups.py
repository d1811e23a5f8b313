"""Models whose layers attend in several ways: each by its own group's plan, as transformers' eager attention has it."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from graphattn import LLM, Attention, CacheSpec, KVCache, Planner, SamplingParams
from graphattn.backends.reference import ReferenceBackend
from graphattn.batch import ragged_batch
from graphattn.errors import InvalidArgumentError, UnsupportedModelError
from graphattn.hf import attach
from graphattn.hf.binding import Binding
from graphattn.ops import active_plans
from graphattn.spec import AttentionSpec
from tests.grouped import MODELS, WINDOW, grouped, logprobs_after
from tests.tiny import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 128
GROUPS = {  # windows of the groups, in the order of their first layers; which group each layer is of
    "gemma2": ([WINDOW, None], [0, 1, 0, 1]),
    "gemma3_text": ([WINDOW, None], [0, 0, 0, 0, 0, 1]),
    "qwen2": ([None, WINDOW], [0, 0, 1, 1]),
    "qwen3": ([WINDOW, None], [0, 1, 0]),
    "mistral": ([WINDOW], [0, 0]),
    "cohere2": ([WINDOW, None], [0, 0, 0, 1]),
    "gpt_oss": ([WINDOW, None], [0, 1, 0, 1]),
}
AROUND = (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 29)  # lengths of prompts


@functools.cache
def plain(name: str, window: int = WINDOW) -> PreTrainedModel:
    return grouped(name, window)


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(100 * seed + length).choices(range(1, VOCAB), k=length))


def greedy(max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=20)


def assert_as_eager(model: PreTrainedModel, outputs) -> None:
    """The log-probabilities at every step, and the choice of the most likely, by eager attention."""
    for output in outputs:
        tokens = output.prompt_token_ids + output.token_ids
        want_TV = logprobs_after(model, tokens[:-1], len(output.prompt_token_ids))
        for want_V, found in zip(want_TV, output.logprobs, strict=True):
            told = torch.tensor([*found.values()], dtype=torch.float64)
            torch.testing.assert_close(told, want_V[[*found]], rtol=0, atol=2e-5)  # eager's softmax is in float32
        best_T = want_TV.max(-1).values
        drawn_T = want_TV.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert (best_T - drawn_T).max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_grouped_by_what_they_compute(name: str) -> None:
    model = grouped(name)
    binding = Binding(model, packs=True)
    windows, groups = GROUPS[name]
    assert [spec.window for spec in binding.groups] == windows
    assert [layer.group for layer in binding.layers] == groups
    for layer in binding.layers:
        assert layer.spec == binding.groups[layer.group]
    names = set(dict(model.named_parameters())) | set(model.state_dict())
    assert not any("graphattn" in each for each in names), "what the layers hold is nothing to save"
    binding.detach()


@pytest.mark.parametrize("name", MODELS)
def test_an_attached_model_answers_as_before(name: str) -> None:
    model, rows = grouped(name), [prompt_of(29), prompt_of(9)]
    mask = torch.tensor([[1] * 29, [0] * 20 + [1] * 9])
    padded = {"input_ids": torch.tensor([rows[0], (5,) * 20 + rows[1]]), "attention_mask": mask}
    greedily = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        # Row by row: eager attention gives NaN for padded rows whose window holds padding alone.
        want = [model(torch.tensor([row])).logits[0] for row in rows]
        texts = [
            [model.generate(torch.tensor([row]), num_beams=beams, **greedily)[0, len(row) :] for row in rows]
            for beams in (1, 2)
        ]
        for window in (WINDOW - 1, WINDOW + 1):  # what is compared shows a window that is one off
            assert (plain(name, window)(torch.tensor([rows[0]])).logits[0] - want[0]).abs().max() > 1e-3
        with attach(model, page_size=4) as handle:
            torch.testing.assert_close(model(**padded).logits[mask.bool()], torch.cat(want), rtol=0, atol=1e-5)
            for beams, text in zip((1, 2), texts, strict=True):
                found = model.generate(**padded, num_beams=beams, **greedily)[:, 29:]
                assert torch.equal(found, torch.stack(text))
            assert handle.pages.num_used == 0
        assert torch.equal(model(torch.tensor([rows[0]])).logits[0], want[0])


@pytest.mark.parametrize("max_prefill_tokens", [5, 8192], ids=["chunked", "whole"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_draws_what_eager_finds_most_likely(name: str, page_size: int, max_prefill_tokens: int) -> None:
    prompts = [prompt_of(length) for length in AROUND]
    options = {"page_size": page_size, "num_pages": 1 + 256 // page_size, "max_prefill_tokens": max_prefill_tokens}
    with LLM(grouped(name), max_batch=4, **options) as llm:
        for _ in range(2):  # the second time over pages that are cached
            outputs = llm.generate(prompts, greedy())
            assert_as_eager(plain(name), outputs)


@pytest.mark.parametrize("window", [1, 2, WINDOW - 1, WINDOW + 1])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_windows_of_other_sizes(name: str, window: int) -> None:
    prompts = [prompt_of(length) for length in (1, 2, 3, *AROUND[1:])]
    with LLM(grouped(name, window), max_batch=4, page_size=4, num_pages=100, max_prefill_tokens=7) as llm:
        assert_as_eager(plain(name, window), llm.generate(prompts, greedy(5)))


@pytest.mark.inductor
def test_a_step_with_groups_compiles_once() -> None:
    torch._dynamo.reset()
    model = grouped("gemma2", dtype=torch.float32, num_layers=2)
    options = {"max_batch": 4, "page_size": 4, "num_pages": 100}
    prompts = [prompt_of(length) for length in AROUND]
    with LLM(model, compile=True, **options) as llm:
        outputs = llm.generate(prompts, greedy())
        assert llm._executor.step.num_compiles == 1
    with LLM(model, **options) as llm:
        for ours, theirs in zip(outputs, llm.generate(prompts, greedy()), strict=True):
            assert ours.token_ids[0] == theirs.token_ids[0]
            first, (drawn, *_) = ours.logprobs[0], ours.token_ids
            assert abs(first[drawn] - theirs.logprobs[0][drawn]) < 1e-3


def test_sinks_are_read_where_the_model_keeps_them() -> None:
    model, changed = grouped("gpt_oss"), {}
    for name, weight in model.state_dict().items():
        if name.endswith("sinks"):
            changed[name] = weight + 3.0
    with LLM(model, max_batch=2, page_size=4, num_pages=50) as llm:
        before = llm.generate(prompt_of(20), greedy(3))
        llm.load_weights(changed)
        after = llm.generate(prompt_of(20), greedy(3))
    assert before[0].logprobs != after[0].logprobs
    assert_as_eager(model, after)


# What is refused


def _odd_sinks() -> PreTrainedModel:
    model = grouped("gpt_oss", num_layers=2)
    for layer in model.model.layers:
        layer.self_attn.sinks = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.float64))
    return model


def test_sinks_of_another_shape_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 0 has attention sinks \(s_aux\) of shape \[4, 1\]"):
        attach(_odd_sinks())


SPECS = (AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8), AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=8))


def planned(caches, specs=SPECS):
    planner = Planner(specs, caches, "cpu")
    plan = planner.prefill()
    plan.plan(ragged_batch([[0, 0]], [0], [[[1]]] * len(specs), page_size=4, device="cpu"))
    return plan


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.inductor)], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("heads", "group", "words"),
    [
        ((2, 2), 0, r"q is \[2, 2, 8\].* plan of group 0 was made for 4 query heads and 2 kv heads of 8"),
        ((4, 2), 1, r"q is \[2, 4, 8\].* plan of group 1 was made for 2 query heads"),
        ((4, 2), 2, "group 2: the step has plans of groups 0 to 1"),
        ((4, 2), -1, "group -1: the step has plans"),
    ],
)
def test_a_layer_of_other_heads_than_its_group_is_refused(heads, group: int, words: str, compiles: bool) -> None:
    cache = CacheSpec(num_pages=4, page_size=4, dtype=torch.float32)
    layer = Attention(heads[0], 8, num_kv_heads=heads[1], group=group)
    pages = KVCache(1, layer.spec, cache, "cpu")
    layer.bind(*pages.layers[0])
    for tensor in pages.layers[0]:
        tensor.fill_(7.0)
    q, k = torch.randn(2, heads[0], 8), torch.randn(2, heads[1], 8)
    if compiles:
        torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True) if compiles else layer
    with torch.no_grad(), active_plans(planned(cache).groups), pytest.raises(InvalidArgumentError, match=words):
        call(q, k, k)
    assert all((tensor == 7.0).all() for tensor in pages.layers[0]), "it wrote before it was refused"


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.inductor)], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "other", [{"window": 3}, {"softcap": 5}, {"scale": 1}, {"pos_encoding": "rope_llama"}], ids=str
)
def test_a_layer_that_computes_another_thing_than_its_group_is_refused(other: dict, compiles: bool) -> None:
    """It would compute what the plan says and nobody would notice."""
    layer, cache = Attention(4, 8, num_kv_heads=2, **other), CacheSpec(num_pages=4, page_size=4, dtype=torch.float32)
    layer.bind(*KVCache(1, layer.spec, cache, "cpu").layers[0])
    q, k = torch.randn(2, 4, 8), torch.randn(2, 2, 8)
    if compiles:
        torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True) if compiles else layer
    words = rf"the layer computes AttentionSpec\(.*{next(iter(other))}=.* the plan of group 0 was made for Attention"
    with torch.no_grad(), active_plans(planned(cache).groups), pytest.raises(InvalidArgumentError, match=words):
        call(q, k, k)
    alike = {name: float(value) if name in ("softcap", "scale") else value for name, value in other.items()}
    with torch.no_grad(), active_plans(planned([cache], [replace(SPECS[0], **alike)]).groups):
        assert call(q, k, k).isfinite().all()


@pytest.mark.parametrize(
    "pages",
    [
        [torch.zeros(2, 4, 2, 8, dtype=torch.int32)] * 2,
        [torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8, device="meta")],
    ],
    ids=["int32", "devices"],
)
def test_pages_of_no_dtype_or_two_devices_are_refused(pages: list) -> None:
    layer = Attention(4, 8, num_kv_heads=2)
    with pytest.raises(
        InvalidArgumentError, match=f"k_cache is {pages[0].dtype} on .*: one device holds both, as one of"
    ):
        layer.bind(*pages)


@pytest.mark.parametrize("count", [1, 3])
def test_other_tokens_than_were_planned_are_refused(count: int) -> None:
    """One would be written into the places of all; on a device others would be written anywhere."""
    layer, cache = Attention(4, 8, num_kv_heads=2), CacheSpec(num_pages=4, page_size=4, dtype=torch.float32)
    pages = KVCache(1, layer.spec, cache, "cpu")
    pages.clear(range(4))
    layer.bind(*pages.layers[0])
    q, k = torch.randn(count, 4, 8), torch.randn(count, 2, 8)
    words = f"q has {count} tokens, the step was planned for 2"
    with torch.no_grad(), active_plans(planned(cache).groups), pytest.raises(InvalidArgumentError, match=words):
        layer(q, k, k)
    assert not any(tensor.any() for tensor in pages.layers[0])


@pytest.mark.parametrize(
    "caches",
    [
        [CacheSpec(num_pages=4)],
        [CacheSpec(num_pages=4), CacheSpec(num_pages=4), CacheSpec(num_pages=4)],
        [CacheSpec(num_pages=4), CacheSpec(num_pages=4, page_size=8)],
        [CacheSpec(num_pages=4), CacheSpec(num_pages=4, dtype=torch.float16)],
        [CacheSpec(num_pages=4), CacheSpec(num_pages=4, layout="HND")],
    ],
    ids=["too few", "too many", "page size", "dtype", "layout"],
)
def test_caches_that_are_not_those_of_the_groups_are_refused(caches) -> None:
    with pytest.raises(InvalidArgumentError, match="for 2 layer groups: give one for all, or one for each"):
        Planner(SPECS, caches, "cpu")


def test_a_group_may_have_heads_and_pages_of_its_own() -> None:
    """Two layers of one step: other heads, other widths, other pages, each as if it were alone."""
    specs = (
        AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8),
        AttentionSpec(num_heads=3, num_kv_heads=1, head_dim=4),
    )
    caches = [CacheSpec(num_pages=count, page_size=4, dtype=torch.float64) for count in (4, 9)]
    tables, generator = [[[2, 1]], [[8, 5]]], torch.Generator().manual_seed(0)
    plan = Planner(specs, caches, "cpu").prefill()
    plan.plan(ragged_batch([[0] * 6], [0], tables, page_size=4, device="cpu"))
    for group, (spec, cache) in enumerate(zip(specs, caches, strict=True)):
        layer = Attention(spec.num_heads, spec.head_dim, num_kv_heads=spec.num_kv_heads, group=group)
        held = KVCache(1, spec, cache, "cpu")
        for tensor in held.layers[0]:
            tensor.fill_(float("nan"))
        layer.bind(*held.layers[0])
        q, k, v = (
            torch.randn(6, heads, spec.head_dim, generator=generator, dtype=torch.float64)
            for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        )
        with torch.no_grad(), active_plans(plan.groups):
            found = layer(q, k, v)
        keys, values = (x.repeat_interleave(spec.group_size, 1).transpose(0, 1) for x in (k, v))
        want = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), keys, values, is_causal=True)
        torch.testing.assert_close(found, want.transpose(0, 1))
        written = held.layers[0][0].isfinite().any(-1).any(-1).any(-1).nonzero().flatten().tolist()
        assert written == sorted(tables[group][0])


def test_every_backend_says_which_group_it_cannot_serve() -> None:
    from graphattn.errors import BackendError

    mixed = (SPECS[0], AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, window=4))
    with pytest.raises(BackendError, match="cascade cannot serve .*window=4"):
        Planner(mixed, CacheSpec(num_pages=4, dtype=torch.float32), "cpu", "cascade")
    planner = Planner(mixed, CacheSpec(num_pages=4, dtype=torch.float32), "cpu")
    assert [type(backend) for backend in planner.backends] == [ReferenceBackend] * 2


def test_explain_has_a_line_for_each_group() -> None:
    with LLM(grouped("gemma2"), max_batch=2, page_size=4, num_pages=50) as llm:
        lines = [line for line in llm.explain().splitlines() if line.startswith("layers")]
    assert [line.split(" x ")[0].split()[-1] for line in lines] == ["2", "2"]
    assert "window=8" in lines[0] and "window" not in lines[1] and all("softcap=2.0" in line for line in lines)


def test_a_model_of_one_group_is_as_it_was() -> None:
    binding = Binding(tiny("llama"), packs=True)
    assert len(binding.groups) == 1 and {layer.group for layer in binding.layers} == {0}
