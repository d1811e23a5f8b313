"""Decode in levels against dense attention, over rows whose groups come, go and change depth under one plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense import SharedRows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backends import check, spec_of
from tiny import tiny

from graphattn import (
    LLM,
    Attention,
    BackendError,
    BucketLadder,
    DecodeRunner,
    InvalidArgumentError,
    SamplingParams,
    prefixes,
)
from graphattn.backends import cascade as cascade_backend
from graphattn.backends.cascade import MAX_RUNS
from graphattn.ops import active_plans
from graphattn.plan import Planner, StepPlan
from graphattn.rope import Rotary
from graphattn.spec import AttentionSpec, CacheSpec
from graphattn.state import StepState

BUCKET, PAGE_SIZE, NUM_PAGES = 12, 4, 400
# Letters are shared pages, numbers tokens of a row's own.
STEPS = {
    "nothing is shared": [("", 5), ("", 1), ("", 9)],
    "one group": [("aaaa", 1), ("aaaa", 4), ("aaaa", 5), ("aaaa", 30)],
    "one group beside others": [("", 7), ("aab", 3), ("", 1), ("aab", 8), ("c", 2)],
    "two levels": [("aaab", 1), ("aaac", 2), ("aaab", 3), ("aaac", 4), ("aaa", 9), ("", 3)],
    "deeper than the levels": [("abcd", 1), ("abcd", 2), ("abc", 3), ("ab", 5), ("a", 4), ("", 3)],
    "every row": [("aabb", 3)] * BUCKET,
    "a group is one row now": [("aabb", 3), ("", 2)],
    "one row": [("aab", 6)],
    "groups side by side": [("a", 1), ("b", 2), ("c", 3), ("c", 1), ("b", 2), ("a", 3)],
}


def shared_rows(
    spec: AttentionSpec, step, seed: int = 0, dtype=torch.float64, device="cpu", layout="NHD"
) -> SharedRows:
    prefixes, own = zip(*step, strict=True)
    options = {"page_size": PAGE_SIZE, "dtype": dtype, "device": device, "layout": layout, "seed": seed}
    return SharedRows(spec, list(prefixes), list(own), num_pages=NUM_PAGES, **options)


def state_of(spec: AttentionSpec, device: str) -> StepState:
    return StepState(max_batch=BUCKET, max_seq_len=256, page_size=PAGE_SIZE, groups=[spec], device=device)


def staged(state: StepState, rows: SharedRows):
    lens = [cached + 1 for cached in rows.cached]
    return state.stage(BUCKET, [0] * len(lens), lens, [[table.pages for table in rows.tables]])


def attend(state: StepState, plan: StepPlan, rows: SharedRows, rotary: Rotary | None = None) -> torch.Tensor:
    plan.plan(staged(state, rows))
    state.feed(BUCKET)
    padding = BUCKET - len(rows.new)
    padded = [torch.cat([tensor, tensor.new_ones(padding, *tensor.shape[1:])]) for tensor in rows.packed]
    spec = rows.spec
    layer = Attention(spec.num_heads, spec.head_dim, spec.scale, spec.num_kv_heads, softcap=spec.softcap, rotary=rotary)
    layer.bind(*rows.cache.layers[0])
    with active_plans(plan.groups):
        out = layer(*padded)
    assert out.isfinite().all(), "padded rows are rows like any other: finite"
    return out[: len(rows.new)]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"scale": 0.3}], ids=str)
def test_levels_are_dense_attention(options: dict, layout: str) -> None:
    """One plan object through all kinds of steps, twice."""
    spec = spec_of("group 2", 8, **options)
    state, plan = state_of(spec, "cpu"), None
    for seed, step in enumerate([*STEPS.values()] * 2):
        rows = shared_rows(spec, step, seed, layout=layout)
        plan = plan or Planner([spec], rows.cache.cache, "cpu", "cascade").decode(state, BUCKET)
        check(rows, attend(state, plan, rows), floor=1e-12)


def test_what_each_step_shares() -> None:
    """That the steps above are what they are called: pages shared by level, and rows of each run."""
    spec = spec_of("group 2", 8)
    state, plan, found = state_of(spec, "cpu"), None, {}
    for name, step in STEPS.items():
        rows = shared_rows(spec, step)
        plan = plan or Planner([spec], rows.cache.cache, "cpu", "cascade").decode(state, BUCKET)
        plan.plan(staged(state, rows))
        found[name] = [[(run.count, run.start, run.end) for run in level] for level in plan.groups[0].cascade.levels]
    assert found == {
        "nothing is shared": [[], []],
        "one group": [[(4, 0, 4)], []],
        "one group beside others": [[(2, 0, 3)], []],
        "two levels": [[(5, 0, 3)], [(2, 3, 4), (2, 3, 4)]],
        "deeper than the levels": [[(5, 0, 1)], [(4, 1, 2)]],
        "every row": [[(BUCKET, 0, 4)], []],
        "a group is one row now": [[], []],
        "one row": [[], []],
        "groups side by side": [[(2, 0, 1)] * 3, []],
    }


def test_a_page_that_the_step_writes_to_is_not_shared() -> None:
    """Every row keeps a tail of a token or more, also where two have one table and their last pages become full."""
    spec = spec_of("group 2", 8)
    state = state_of(spec, "cpu")
    plan = Planner([spec], CacheSpec(num_pages=8, page_size=PAGE_SIZE), "cpu", "cascade").decode(state, BUCKET)
    for length, shared in ((2 * PAGE_SIZE, 1), (2 * PAGE_SIZE + 1, 2)):
        plan.plan(state.stage(BUCKET, [0, 0], [length] * 2, [[[1, 2, 3]] * 2]))
        assert plan.groups[0].cascade.depths_B.tolist()[:2] == [shared] * 2


rows_drawn = st.lists(st.tuples(st.text("ab", max_size=5), st.integers(1, 9)), min_size=1, max_size=BUCKET)


@settings(max_examples=25)
@given(st.lists(rows_drawn, min_size=1, max_size=4), st.integers(0, 99))
def test_random_groups_that_change(steps, seed) -> None:
    spec = spec_of("group 3", 4)
    state, plan = state_of(spec, "cpu"), None
    for at, step in enumerate(steps):
        rows = shared_rows(spec, step, seed + at)
        plan = plan or Planner([spec], rows.cache.cache, "cpu", "cascade").decode(state, BUCKET)
        check(rows, attend(state, plan, rows), floor=1e-12)


@pytest.mark.parametrize("has_norm", [False, True], ids=["rotated", "normed and rotated"])
def test_rotation_comes_first(has_norm: bool) -> None:
    spec, generator = spec_of("group 2", 8), torch.Generator().manual_seed(0)
    weights = [torch.rand(8, generator=generator, dtype=torch.float64) for _ in range(2)] if has_norm else [None, None]
    rotary = Rotary(10000.0 ** (-torch.arange(0, 8, 2) / 8), 1.2, *weights, 1e-6)
    found = []
    for backend in ("reference", "cascade"):
        rows = shared_rows(spec, STEPS["two levels"])
        state = state_of(spec, "cpu")
        plan = Planner([spec], rows.cache.cache, "cpu", backend).decode(state, BUCKET)
        found.append((attend(state, plan, rows, rotary), rows.pages[0].nan_to_num(0.0)))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def test_a_window_is_refused() -> None:
    with pytest.raises(BackendError, match="cascade: window 5: where a row's window begins inside shared pages"):
        Planner([spec_of("group 2", 8, window=5)], CacheSpec(num_pages=4), "cpu", "cascade")


@pytest.mark.parametrize("page", [0, NUM_PAGES])
def test_pages_that_were_freed_are_refused(page: int) -> None:
    """And the step after it is planned as if nothing had been."""
    spec = spec_of("group 2", 8)
    state, rows = state_of(spec, "cpu"), shared_rows(spec, STEPS["two levels"])
    plan = Planner([spec], rows.cache.cache, "cpu", "cascade").decode(state, BUCKET)
    kept = [list(table.pages) for table in rows.tables]
    for table in rows.tables[:5]:
        table.pages = [table.pages[0], page, *table.pages[2:]]
    with pytest.raises(InvalidArgumentError, match=rf"rows \[0, 1, 2, 3, 4\] share page {page} at place 1"):
        plan.plan(staged(state, rows))
    for table, pages in zip(rows.tables, kept, strict=True):
        table.pages = pages
    check(rows, attend(state, plan, rows), floor=1e-12)


def test_more_runs_than_a_level_holds() -> None:
    """Those that save the least are left to the tails; the numbers of slots and fields hold at every bucket."""
    spec, bucket = spec_of("group 2", 4), 2 * MAX_RUNS + 9
    state = StepState(max_batch=bucket, max_seq_len=64, page_size=PAGE_SIZE, groups=[spec], device="cpu")
    letters = [chr(ord("a") + index) for index in range(bucket // 2)]
    step = [(letter * (1 + index % 3), 1 + index % 7) for index, letter in enumerate(letters) for _ in "12"]
    rows = shared_rows(spec, step)
    plan = Planner([spec], rows.cache.cache, "cpu", "cascade").decode(state, len(step))
    lens = [cached + 1 for cached in rows.cached]
    plan.plan(state.stage(len(step), [0] * len(step), lens, [[table.pages for table in rows.tables]]))
    state.feed(len(step))
    with active_plans(plan.groups):
        check(rows, torch.ops.graphattn.attend(*rows.packed, *rows.cache.layers[0], 0), floor=1e-12)
    assert len(plan.groups[0].cascade.levels[0]) == MAX_RUNS < len(letters)


def test_engine_answers_as_by_the_reference() -> None:
    """Rows share pages through the prefix cache, and their conversations grow apart."""
    system = list(range(1, 41))
    prompts = [system + [50 + row % 2] * 20 + [row] for row in range(6)] + [[9, 8, 7]]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    answers = []
    for backend in ("reference", "cascade"):
        with LLM(tiny("llama"), backend=backend, max_batch=8, max_seq_len=128, num_pages=60) as llm:
            llm.generate([prompts[0], prompts[1]], params)
            answers.append([output.token_ids for output in llm.generate(prompts, params)])
            if backend == "cascade":
                plan = llm._executor.runner._buckets[8, "cascade"].plan.groups[0]
                assert [sum(run.count for run in level) for level in plan.cascade.levels] == [6, 6]
    assert answers[0] == answers[1]


def shared_tables(num_shared: int, num_rows: int = 6) -> tuple[list[int], list[list[int]]]:
    """Lengths and tables of rows that share so many pages and have one of their own."""
    tables = [[*range(1, 1 + num_shared), 100 + row] for row in range(num_rows)]
    return [PAGE_SIZE * len(table) - row % 3 for row, table in enumerate(tables)], tables


def runner_of(cascade: str, cache: CacheSpec, pages, **options) -> DecodeRunner:
    spec = spec_of("group 2", 8)
    layer = Attention(4, 8, num_kv_heads=2)
    layer.bind(*(tensor.clone() for tensor in pages))
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(9, 8, 8, dtype=torch.float64, generator=generator)
    planner = Planner([spec], cache, "cpu", "reference", cascade)
    ladder = BucketLadder([4, BUCKET])
    step_fn = lambda ids, positions: layer(*table[ids].split([4, 2, 2], dim=1)).flatten(1)  # noqa: E731
    return DecodeRunner(step_fn, state_of(spec, "cpu"), planner, ladder=ladder, **options)


@pytest.mark.parametrize("capture", ["all", "lazy"])
def test_the_runner_chooses_by_what_rows_share(monkeypatch, capture: str) -> None:
    """Beside a backend of any kind, a cascade runs the steps that it pays for; both give the same outputs."""
    monkeypatch.setattr(cascade_backend, "pays", lambda runs, *tails, **sizes: any(runs))
    cache = CacheSpec(num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=torch.float64)
    pages = [torch.randn(NUM_PAGES, *cache.page_shape(spec_of("group 2", 8)), dtype=torch.float64) for _ in "kv"]
    plain, ours = (runner_of(cascade, cache, pages, capture=capture) for cascade in ("off", "auto"))
    for runner in (plain, ours):
        runner.capture()
    for num_shared, num_rows in ((0, 6), (5, 6), (1, 3), (0, 3), (5, 3), (3, 6)):
        lens, tables = shared_tables(num_shared, num_rows)
        found = [runner.run(list(range(num_rows)), lens, [tables]).clone() for runner in (plain, ours)]
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)
        ours.verify(list(range(num_rows)), lens, [tables])
    assert ours.served == {
        (BUCKET, "reference"): 2,
        (BUCKET, "cascade"): 4,
        (4, "reference"): 2,
        (4, "cascade"): 4,
    }
    # Each is planned for twice where it is verified.
    assert ours.planner.num_shared == 12
    assert plain.planner.num_shared == 0 and plain.planner.all_names == ("reference",)


def test_a_cascade_that_memory_does_not_hold_is_left_out(monkeypatch) -> None:
    """Its bucket is then served as if there were none, and that is said."""
    monkeypatch.setattr(cascade_backend, "pays", lambda runs, *tails, **sizes: any(runs))
    cache = CacheSpec(num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=torch.float64)
    pages = [torch.zeros(NUM_PAGES, *cache.page_shape(spec_of("group 2", 8)), dtype=torch.float64) for _ in "kv"]
    runner = runner_of("auto", cache, pages, on_capture_oom="shrink")
    prepare = DecodeRunner._prepare

    def short(self, bucket: int, backend: str) -> None:
        if (bucket, backend) == (BUCKET, "cascade"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        prepare(self, bucket, backend)

    monkeypatch.setattr(DecodeRunner, "_prepare", short)
    with pytest.warns(RuntimeWarning, match=f"bucket {BUCKET} with cascade could not be captured"):
        runner.capture()
    assert runner.ladder.sizes == (4, BUCKET)
    for num_rows in (6, 3):
        lens, tables = shared_tables(5, num_rows)
        runner.run([0] * num_rows, lens, [tables])
    assert runner.served == {(BUCKET, "reference"): 1, (4, "cascade"): 1}


@pytest.mark.parametrize(
    ("rows", "shared", "tail", "expected"),
    [
        (256, 8192, 256, True),
        (64, 8192, 256, True),
        (16, 8192, 256, True),
        (256, 1024, 256, True),
        (8, 8192, 256, False),
        (64, 1024, 256, False),
        (32, 1024, 256, False),
        (64, 512, 512, False),
        (256, 64, 1024, False),
        (256, 0, 1024, False),
    ],
)
def test_the_rule(rows: int, shared: int, tail: int, expected: bool) -> None:
    """What docs/benchmarks/attention-h100.json says of each of its cases: yes where a cascade is clearly faster."""
    run = prefixes.SharedRun(first=0, count=rows, start=0, end=shared // 16)
    assert prefixes.pays([run], np.full(rows, tail), page_size=16, token_bytes=4096) is expected


def test_the_rule_where_one_tail_is_long() -> None:
    """The tails' kernel leaves a row unsplit in large buckets, and all wait for it."""
    run = prefixes.SharedRun(first=0, count=64, start=0, end=512)
    tails = np.full(64, 256)
    tails[3] = 32768
    assert not prefixes.pays([run], tails, page_size=16, token_bytes=4096)


def test_engine_chooses_by_what_requests_share(monkeypatch) -> None:
    monkeypatch.setattr(cascade_backend, "pays", lambda runs, *tails, **sizes: any(runs))
    prompts, params = (
        [list(range(1, 41)) + [50 + row] for row in range(6)],
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
    )
    answers = []
    for cascade in ("off", "auto"):
        with LLM(tiny("llama"), cascade=cascade, max_batch=8, max_seq_len=128, num_pages=60) as llm:
            llm.generate(prompts[0], params)
            answers.append([output.token_ids for output in llm.generate(prompts, params)])
            said = llm.explain()
            assert ("cascade     5 steps attended once" in said) == (cascade == "auto"), said
            if cascade == "auto":
                assert "6 cascade where rows share enough (5 steps)" in said
                with pytest.raises(InvalidArgumentError, match="cascade='auto': a profile says who serves a context"):
                    llm.profile()
    assert answers[0] == answers[1]


def test_cascade_modes_are_checked() -> None:
    with pytest.raises(InvalidArgumentError, match="cascade='on': choose off or auto"):
        LLM(tiny("llama"), cascade="on")
    with pytest.raises(BackendError, match="cascade: window 5"):
        Planner([spec_of("group 2", 8, window=5)], CacheSpec(num_pages=4), "cpu", cascade="auto")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    ("heads", "options"), [("group 2", {}), ("group 7", {}), ("group 2", {"softcap": 2.0})], ids=str
)
def test_captured_once_for_all_steps(heads: str, options: dict, layout: str) -> None:
    """One graph, captured over padding alone, through groups that come, go and change depth: each replay is the eager
    call bit for bit, and dense attention."""
    spec, bf16 = spec_of(heads, 64, **options), {"dtype": torch.bfloat16, "device": "cuda", "layout": layout}
    state = state_of(spec, "cuda")
    first = shared_rows(spec, STEPS["two levels"], **bf16)
    pages = first.cache.layers[0]
    plan = Planner([spec], first.cache.cache, "cuda", "cascade").decode(state, BUCKET)
    inputs = [tensor.new_ones(BUCKET, *tensor.shape[1:]) for tensor in first.packed]

    def call() -> torch.Tensor:
        state.feed(BUCKET)
        with active_plans(plan.groups):
            return torch.ops.graphattn.attend(*inputs, *pages, 0)

    plan.plan(state.stage(BUCKET, [], [], [[]]))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, signature = torch.cuda.CUDAGraph(), plan.signature
    with torch.cuda.graph(graph, stream=stream):
        out = call()
    for seed, step in enumerate([*STEPS.values()] * 2):
        rows = shared_rows(spec, step, seed, **bf16)
        for fixed, fresh in zip(pages, rows.cache.layers[0], strict=True):
            fixed.copy_(fresh)
        for tensor, packed in zip(inputs, rows.packed, strict=True):
            tensor[: len(packed)] = packed
        plan.plan(staged(state, rows))
        assert plan.signature == signature
        with state.fed(BUCKET):
            graph.replay()
        replayed = out.clone()
        staged(state, rows)
        # Padding rows all write one slot, with values that differ here: which of them is read back is a race.
        assert torch.equal(call()[: len(step)], replayed[: len(step)]) and replayed.isfinite().all()
        for fixed, fresh in zip(pages, rows.cache.layers[0], strict=True):
            fresh.copy_(fixed)
        check(rows, replayed[: len(step)], floor=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (128, 16), (256, 16), (128, 1)])
def test_long_prefixes(head_dim: int, page_size: int) -> None:
    """Levels that are split over the context, for more rows than a tile of queries holds, beside others."""
    spec = AttentionSpec(num_heads=8, num_kv_heads=4, head_dim=head_dim)
    pages = 1600 // page_size if page_size > 1 else 300
    prefixes = ["a" * pages] * 20 + ["a" * pages + "b" * pages] * 45 + [""] * 5 + ["c" * 3] * 2
    own = [1 + 37 * row % 300 for row in range(len(prefixes))]
    options = {"page_size": page_size, "dtype": torch.bfloat16, "device": "cuda", "num_pages": 2 * pages + 40000}
    rows = SharedRows(spec, prefixes, own, **options)
    bucket = len(own) + 7
    state = StepState(max_batch=bucket, max_seq_len=4096, page_size=page_size, groups=[spec], device="cuda")
    plan = Planner([spec], rows.cache.cache, "cuda", "cascade").decode(state, bucket)
    plan.plan(state.stage(bucket, [0] * len(own), [n + 1 for n in rows.cached], [[t.pages for t in rows.tables]]))
    state.feed(bucket)
    padded = [torch.cat([tensor, tensor.new_ones(7, *tensor.shape[1:])]) for tensor in rows.packed]
    with active_plans(plan.groups):
        check(rows, torch.ops.graphattn.attend(*padded, *rows.cache.layers[0], 0)[: len(own)], floor=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "cascade"), [("cascade", "off"), ("fused", "auto"), ("flashinfer", "auto")])
def test_runner_replays_groups_that_change(monkeypatch, backend: str, cascade: str) -> None:
    """Through `DecodeRunner`: no replan changes what a captured launch holds by value, alone or beside a backend."""
    monkeypatch.setattr(cascade_backend, "pays", lambda runs, *tails, **sizes: any(runs))
    spec, device = spec_of("group 2", 64), "cuda"
    bf16 = {"dtype": torch.bfloat16, "device": device}
    state, rows = state_of(spec, device), shared_rows(spec, STEPS["two levels"], **bf16)
    layer = Attention(spec.num_heads, spec.head_dim, num_kv_heads=spec.num_kv_heads)
    layer.bind(*rows.cache.layers[0])
    projection = torch.randn(3, 1024, spec.num_heads * spec.head_dim, device=device).bfloat16()

    def step_fn(token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q, k, v = (table[token_ids].unflatten(1, (-1, spec.head_dim)) for table in projection)
        return layer(q, k[:, : spec.num_kv_heads].contiguous(), v[:, : spec.num_kv_heads].contiguous()).flatten(1)

    planner = Planner([spec], rows.cache.cache, device, backend, cascade)
    runner = DecodeRunner(step_fn, state, planner, ladder=BucketLadder([4, BUCKET]))
    runner.capture()
    for seed, step in enumerate(STEPS.values()):
        fresh = shared_rows(spec, step, seed, **bf16)
        for fixed, pages in zip(rows.cache.layers[0], fresh.cache.layers[0], strict=True):
            fixed.copy_(pages)
        tables = [[table.pages for table in fresh.tables]]
        runner.verify(list(range(len(step))), [cached + 1 for cached in fresh.cached], tables)
    assert runner.counts == {"replay": len(STEPS)}
    assert (len(runner.served) > 2) == (cascade == "auto"), runner.served
    runner.close()
