"""FlashInfer's prefill for Hopper: when it is chosen, what its plans take; on a Hopper GPU, what it computes."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from dense import DenseRows, assert_close
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny

import graphattn.backends.flashinfer as package
from graphattn import LLM
from graphattn.backends.flashinfer import fa3
from graphattn.errors import BackendError, InvalidArgumentError
from graphattn.ops import active_plans
from graphattn.plan import Planner
from graphattn.spec import AttentionSpec, CacheSpec

PROCESSORS = 132
SPEC = AttentionSpec(num_heads=16, num_kv_heads=8, head_dim=128)
CACHE, DEVICE = CacheSpec(num_pages=4), torch.device("cuda")


@pytest.mark.parametrize(
    ("counts", "suits"),
    [
        ([8192], True),
        ([1024] * 8, True),
        ([528], True),  # half of 132 tiles of 128 tokens of 16 heads
        ([527], False),
        ([16] * 512, False),  # an eighth of each tile
        ([64] * 128, False),
        ([65] * 128, True),
        ([1] * 256, False),
        ([2048, *[1] * 8], True),
        ([2048, *[1] * 15], True),
        ([2048, *[1] * 17], False),
    ],
    ids=str,
)
def test_which_batches_it_is_for(counts: list[int], suits: bool) -> None:
    assert fa3.suits(SPEC, PROCESSORS, torch.tensor(counts)) == suits


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=40),
    st.sampled_from([64, 128, 256]),
    st.sampled_from([1, 7, 16]),
    st.sampled_from([1, 300]),
)
def test_the_bytes_of_a_plan(counts: list[int], head_dim: int, num_heads: int, times: int) -> None:
    """Every array of the work list, each element counted, as FlashInfer's planner lays them out one after the other."""
    counts = counts * times
    spec = AttentionSpec(num_heads=num_heads, num_kv_heads=1, head_dim=head_dim)
    tile = 192 if head_dim == 64 else 128
    shared = -(-sum(counts) // tile) + len(counts) - 1 > 4096
    works = sum(len(range(0, count, tile)) for count in counts) * (1 if shared else num_heads)
    at = 0
    for length in (works, works, works, works, works, works, PROCESSORS + 1, works):
        at = -(-at // 16) * 16 + 4 * length
    assert at <= fa3.plan_bytes(spec, PROCESSORS, torch.tensor(counts)) < at + 16


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    """A Hopper GPU as torch sees one, FlashInfer's module prebuilt; the dict says otherwise."""
    machine = {"capability": (9, 0), "lacks": None, "compiled": True}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine["capability"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    private = ModuleType("private")
    private.why_no_fa3 = lambda spec, cache: machine["lacks"]
    private.has_fa3 = lambda spec, cache: machine["compiled"]
    monkeypatch.setitem(sys.modules, f"{package.__name__}.private", private)
    monkeypatch.setattr(package, "private", private, raising=False)
    return machine


def kernels(asked: str, max_tokens: int = 8192) -> tuple[tuple[str, ...], str | None]:
    return fa3.kernels_for(asked, SPEC, CACHE, DEVICE, PROCESSORS, max_tokens)


def test_the_choice_on_a_hopper_gpu(hopper: dict) -> None:
    assert kernels("auto") == (("fa2", "fa3"), None)
    assert kernels("fa3", max_tokens=0) == (("fa3",), None) and kernels("fa2") == (("fa2",), None)
    assert kernels("auto", max_tokens=528)[0] == ("fa2", "fa3")
    names, why = kernels("auto", max_tokens=527)
    assert names == ("fa2",) and why == "it is for batches of 528 tokens and more, and the largest has 527"


def test_auto_waits_for_no_compilation(hopper: dict) -> None:
    hopper["compiled"] = False
    names, why = kernels("auto")
    assert names == ("fa2",) and why.startswith("its module is not compiled yet; prefill='fa3' compiles it")
    assert kernels("fa3") == (("fa3",), None)


@pytest.mark.parametrize(
    ("change", "cuda", "words"),
    [
        ({"capability": (8, 9)}, "13.0", "it is for compute capability 9.0, this device has 8.9"),
        ({"capability": (10, 0)}, "13.0", "this device has 10.0"),
        ({}, "12.1", "it needs CUDA 12.3, torch was built for 12.1"),
        (
            {"lacks": "its module is not prebuilt and cannot be compiled: no ninja"},
            "13.0",
            "cannot be compiled: no ninja",
        ),
    ],
)
def test_where_it_is_not_there_auto_says_why_and_asking_for_it_raises(hopper, monkeypatch, change, cuda, words) -> None:
    hopper |= change
    monkeypatch.setattr(torch.version, "cuda", cuda)
    names, why = kernels("auto")
    assert names == ("fa2",) and words in why
    with pytest.raises(BackendError, match=words):
        kernels("fa3")
    assert kernels("fa2") == (("fa2",), None)


def test_the_reference_has_no_such_kernels() -> None:
    cache = CacheSpec(num_pages=4, dtype=torch.float32)
    assert Planner([SPEC], cache, "cpu").prefill("auto", 99).groups[0].about == "plain torch"
    model = tiny("llama")
    config = model.config
    with pytest.raises(BackendError, match="prefill='fa3': backend reference computes prefill in plain torch"):
        LLM(model, num_pages=40, prefill="fa3")
    assert model.config is config
    with pytest.raises(InvalidArgumentError, match="prefill='fa4': choose auto, fa2 or fa3"):
        LLM(model, num_pages=40, prefill="fa4")
    with LLM(model, num_pages=40) as llm:
        assert "prefill     no CUDA graphs, not compiled; plain torch" in llm.explain()


def skip_unless_ready(spec: AttentionSpec, cache: CacheSpec) -> None:
    """Skips where fa3 is not served, and where its module would have to be compiled first, which takes minutes."""
    from graphattn.backends.flashinfer import private

    if reason := fa3.why_not(spec, cache, torch.device("cuda")):
        pytest.skip(f"fa3: {reason}")
    if not private.has_fa3(spec, cache):
        pytest.skip(f"fa3's module is neither prebuilt nor compiled for {spec}, {cache.dtype}")


HEADS = {"one each": (2, 2), "group 2": (4, 2), "group 7": (7, 1)}
RAGGED = {
    "prefill": ([0, 0, 0, 0], [1, 128, 193, 700]),
    "chunks over prefixes": ([1000, 5, 0, 31], [130, 300, 129, 1]),
    "decode": ([0, 15, 16, 40, 300], [1, 1, 1, 1, 1]),
}
VARIANTS = [
    (128, torch.bfloat16, {}),
    (64, torch.bfloat16, {}),
    (256, torch.bfloat16, {}),
    (64, torch.float16, {}),
    (128, torch.bfloat16, {"window": 150}),
    (64, torch.bfloat16, {"window": 20}),
    (128, torch.bfloat16, {"softcap": 2.0}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("ragged", RAGGED)
@pytest.mark.parametrize(("page_size", "layout"), [(16, "NHD"), (1, "NHD"), (16, "HND")])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("head_dim", "dtype", "options"), VARIANTS, ids=str)
def test_fa3(head_dim: int, dtype, options: dict, heads: str, page_size: int, layout: str, ragged: str) -> None:
    """Against dense attention, over a cache whose unused slots are NaN."""
    num_heads, num_kv_heads = HEADS[heads]
    spec = AttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **options)
    rows = DenseRows(spec, *RAGGED[ragged], page_size=page_size, dtype=dtype, device="cuda", layout=layout)
    skip_unless_ready(spec, rows.cache.cache)
    plan = Planner([spec], rows.cache.cache, "cuda", "flashinfer").prefill("fa3")
    plan.plan(rows.batch("cuda"))
    with active_plans(plan.groups):
        ours = torch.ops.graphattn.attend(*rows.packed, *rows.cache.layers[0], 0)
    assert plan.groups[0].counts == {"fa3": 1}
    assert_close(ours, rows.attend(dtype), rows.attend(torch.float32), floor=1e-3)


@pytest.mark.gpu
def test_auto_takes_it_for_large_batches_and_grows_its_plans() -> None:
    """Batches of any size in turn through one plan."""
    skip_unless_ready(SPEC, CACHE)
    cache = CacheSpec(num_pages=2)  # each batch brings pages of its own
    plan = Planner([SPEC], cache, "cuda", "fused").prefill(max_tokens=8192).groups[0]
    counts = [[1300], [7], [2048, 2000, 100], [1] * 50, [600] * 8, [900]]
    for seed, new in enumerate(counts):
        cached = [11 * row for row in range(len(new))]
        rows = DenseRows(SPEC, cached, new, page_size=16, dtype=torch.bfloat16, device="cuda", seed=seed)
        plan.plan(rows.batch("cuda"))
        with active_plans([plan]):
            ours = torch.ops.graphattn.attend(*rows.packed, *rows.cache.layers[0], 0)
        assert_close(ours, rows.attend(torch.bfloat16), rows.attend(torch.float32), floor=1e-3)
    assert plan.counts == {"fa3": 4, "fa2": 2}
    assert "fa3 (4 batches) from" in plan.about and "else fa2 (2 batches); its module was ready in" in plan.about
