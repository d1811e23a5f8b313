"""Prefill at a few numbers of tokens, captured or eager: same results, and what is said of it."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from functools import partial

import pytest
import torch
from dense import assert_close
from grouped import grouped
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny

from graphattn import LLM, AttentionSpec, CacheSpec, Planner, SamplingParams
from graphattn.batch import ragged_batch
from graphattn.engine.executor import Executor
from graphattn.engine.sizing import weights_of_token
from graphattn.errors import BucketError, CaptureError, DeviceMemoryError, InvalidArgumentError
from graphattn.pages import NULL_PAGE
from graphattn.prefill_runner import MOST_WORK, SIZES, TOKENS_A_ROW, PrefillRunner, default_buckets

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=2)


def prompts(counts: list[int], vocab: int = 128, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(count)] for count in counts]


def generated(model, counts: list[int], **options) -> tuple[list[list[int]], torch.Tensor, str]:
    """Tokens, the log-probabilities of them, and what the engine says of itself."""
    sizes = {"max_batch": 8, "num_pages": 120, "max_prefill_tokens": 100}
    with LLM(model, **(sizes | options)) as llm:
        outputs = llm.generate(prompts(counts), GREEDY)
        about = llm.explain()
    chosen = [
        each[token_id] for output in outputs for each, token_id in zip(output.logprobs, output.token_ids, strict=True)
    ]
    return [output.token_ids for output in outputs], torch.tensor(chosen, dtype=torch.float64), about


@given(st.integers(1, 20000), st.integers(0, 2**40))
def test_default_buckets(max_tokens: int, num_weights: int) -> None:
    buckets = default_buckets(max_tokens, num_weights)
    assert list(buckets) == sorted(set(buckets)) and set(buckets) <= {*SIZES, max_tokens}
    assert all(size <= max_tokens and size * num_weights <= MOST_WORK for size in buckets)
    if max_tokens <= SIZES[-1] and max_tokens * num_weights <= MOST_WORK:
        assert buckets[-1] == max_tokens  # what steps of a long prompt have


MODELS = {
    "qwen3": lambda: tiny("qwen3"),
    "qwen2": lambda: tiny("qwen2"),
    "two kinds of layers": lambda: grouped("gemma3_text"),
    "windows": lambda: grouped("mistral"),
    "experts and sinks": lambda: grouped("gpt_oss"),
    "frequencies by length": lambda: tiny(
        "llama",
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_padded_prefills_compute_what_others_do(name: str) -> None:
    """Over more prompts than a bucket has rows, in chunks and beside rows that decode."""
    counts = [5, 60, 1, 33, 17, 100, 230, 2, 2, 2]
    tokens, logprobs, _ = generated(MODELS[name](), counts)
    padded_tokens, padded_logprobs, about = generated(MODELS[name](), counts, prefill_buckets=[16, 64, 100])
    assert padded_tokens == tokens
    assert (padded_logprobs - logprobs).abs().max() < 1e-6
    assert "prefill     eager at 16 (plain torch), 64 (plain torch), 100 (plain torch) tokens, 0 replayed" in about


@pytest.mark.inductor
def test_they_run_through_the_one_compiled_step() -> None:
    counts = [5, 60, 33, 230]
    tokens, logprobs, _ = generated(tiny("qwen3"), counts)
    options = {"prefill_buckets": [16, 64, 100], "compile": True}
    padded_tokens, padded_logprobs, about = generated(tiny("qwen3"), counts, **options)
    assert padded_tokens == tokens and "compiled, 1 graphs" in about
    assert (padded_logprobs - logprobs).abs().max() < 1e-6


def test_padding_is_at_positions_that_the_model_has() -> None:
    """And leaves finite numbers in the null page, which kernels may read and weigh with zero."""
    model = tiny("llama", max_position_embeddings=40)
    with LLM(model, num_pages=60, prefill_buckets=[64, 128]) as llm:
        seen = []
        llm._executor.step._forward = partial(_recorded, llm._executor.step._forward, seen)
        llm.generate(prompts([5, 30, 33, 17]), GREEDY)
        assert max(int(positions.max()) for positions in seen) < 40
        assert {len(positions) for positions in seen} >= {128}
        for pages in itertools.chain(*llm._executor.caches[0].layers):
            assert pages[NULL_PAGE].isfinite().all()


def _recorded(forward, seen: list, token_ids, positions, last):
    seen.append(positions.clone())
    return forward(token_ids, positions, last)


def test_the_smallest_bucket_that_has_tokens_and_rows_and_none_beyond() -> None:
    with LLM(tiny("llama"), max_batch=8, num_pages=60, prefill_buckets=[16, 64, 160]) as llm:
        run = llm._executor.prefill_runner
        assert run.buckets == (16, 64, 160)
        picked = {
            (1, 1): 16,
            (16, 2): 16,
            (17, 1): 64,
            (12, 3): 160,  # 64 tokens are for two rows
            (160, 160 // TOKENS_A_ROW): 160,
            (12, 6): None,
            (161, 1): None,
        }
        assert {rows: run.pick(*rows) for rows in picked} == picked
        with pytest.raises(BucketError, match=r"no prefill of 32 tokens is prepared, only \[16, 64, 160\]"):
            run.run(32, [[1]], [0], [[[1]]], [0])
        llm.generate(prompts([10, 161]), GREEDY)  # together more than any bucket has
        assert run.counts == {}
        llm.generate(prompts([10], seed=1), GREEDY)
        assert run.counts == {"eager": 1}
        buckets = "16 (plain torch), 64 (plain torch), 160 (plain torch) tokens"
        steps = "0 replayed, 1 eager, 0 stopped by the plan guard"
        assert f"prefill     eager at {buckets}, {steps}; others unpadded, without CUDA graphs" in llm.explain()


def test_of_experts_those_that_a_token_has_count() -> None:
    model = grouped("gpt_oss")
    experts = [weight for weight in model.parameters() if weight.dim() == 3]
    others = sum(weight.numel() for weight in model.parameters() if weight.dim() != 3)
    assert len(experts) == 2 * 4 and all(len(weight) == 4 for weight in experts)
    embedded = model.get_input_embeddings().weight.numel()
    assert weights_of_token(model) == others - embedded + sum(weight.numel() for weight in experts) // 2
    assert weights_of_token(tiny("llama")) == sum(
        weight.numel() for name, weight in tiny("llama").named_parameters() if "embed_tokens" not in name
    )


@pytest.mark.parametrize("buckets", [(1,), (2, 3), (5, 5)])
@pytest.mark.parametrize("max_batch", [1, 4])
def test_buckets_of_next_to_nothing(buckets: tuple[int, ...], max_batch: int) -> None:
    with LLM(tiny("llama"), max_batch=max_batch, num_pages=60, prefill_buckets=buckets) as llm:
        assert llm._executor.prefill_runner.buckets == tuple(sorted({*buckets}))
        llm.generate(prompts([2, 3, 5]), GREEDY)


def test_none_on_a_cpu_unless_asked_for() -> None:
    with LLM(tiny("llama"), num_pages=60) as llm:
        assert llm._executor.prefill_runner.buckets == ()
        assert "prefill     no CUDA graphs, not compiled; plain torch" in llm.explain()


@pytest.mark.parametrize(
    ("buckets", "words"),
    [
        ("64", r"prefill_buckets='64': give a sequence of numbers of tokens, \(\) for none"),
        (64, "prefill_buckets=64: give a sequence"),
        ([64, 0], "a bucket of prefill_buckets=0: it must be an int, at least 1"),
        ([True], "a bucket of prefill_buckets=True"),
        ([64, 500], "a step computes max_prefill_tokens=100 at most, raise that or drop the bucket"),
    ],
)
def test_what_is_no_bucket_is_refused(buckets, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        LLM(tiny("llama"), num_pages=60, max_prefill_tokens=100, prefill_buckets=buckets)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the largest bucket that memory holds, until its step has run; `buckets` suit the model."""
    make, held = PrefillRunner._eager, [50]

    def eager(runner, prepared):
        logits = make(runner, prepared)
        if runner._outputs and prepared.padded.num_tokens > held[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return logits

    monkeypatch.setattr(PrefillRunner, "_eager", eager)
    monkeypatch.setattr(PrefillRunner, "_prepared", _prepared(PrefillRunner._prepared))
    monkeypatch.setattr(Executor, "_suitable_prefill_buckets", lambda *args: (16, 64, 128))
    return held


def _prepared(make):
    """On a CPU too the step runs once more, as if it were captured."""

    def prepared(runner, num_tokens):
        bucket = make(runner, num_tokens)
        runner._call(bucket)
        return bucket

    return prepared


WORDS = r"prefills of 128, 64 tokens could not be captured beside .* MiB of cache \(OutOfMemoryError: CUDA out"


def test_buckets_asked_for_that_memory_does_not_hold(room: list[int]) -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    with pytest.raises(DeviceMemoryError, match=WORDS):
        LLM(model, num_pages=60, prefill_buckets=[16, 64, 128])
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("options", [{}, {"on_capture_oom": "shrink", "prefill_buckets": [16, 64, 128]}], ids=str)
def test_buckets_that_memory_does_not_hold_are_left_out(room: list[int], options: dict) -> None:
    with pytest.warns(RuntimeWarning, match=WORDS), LLM(tiny("llama"), num_pages=60, **options) as llm:
        run = llm._executor.prefill_runner
        assert run.buckets == (16,)
        padded, logits = run._buckets[16].padded, 2 * 128 * 8
        assert run.num_bytes == padded.num_bytes + logits  # and not those of the largest that was tried
        assert "left out    prefills of 128, 64 tokens" in llm.explain()
        assert len(llm.generate(prompts([10, 70]), GREEDY)) == 2
    room[0] = 1
    with pytest.warns(RuntimeWarning, match="prefills of 128, 64, 16 tokens"), LLM(tiny("llama"), num_pages=60) as llm:
        assert llm._executor.prefill_runner.num_bytes == 0
        assert "prefill     no CUDA graphs" in llm.explain()


def test_buckets_that_nobody_named_are_left_out_by_a_second_capture_too(room: list[int]) -> None:
    """As where a start measures first, and memory goes meanwhile."""
    with pytest.warns(RuntimeWarning, match=WORDS), LLM(tiny("llama"), num_pages=60) as llm:
        executor, (caches, ladder, longest) = llm._executor, laid_out(llm)
        executor.release()
        executor.lay_out(caches, ladder, longest)
        room[0] = 1
        with pytest.warns(RuntimeWarning, match="prefills of 16 tokens could not be captured"):
            executor.capture()
        assert executor.prefill_runner.buckets == () and len(executor.shortages) == 2


def laid_out(llm: LLM) -> tuple:
    executor = llm._executor
    return executor.planner.caches, executor.runner.ladder, executor.state.max_seq_len


@pytest.mark.parametrize("sizes", [{"max_batch": 0, "max_seq_len": 8}, {"max_batch": 2, "max_seq_len": 2.5}], ids=str)
def test_sizes_that_count_nothing(sizes: dict) -> None:
    planner = Planner([AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8)], CacheSpec(num_pages=4), "cpu")
    with pytest.raises(InvalidArgumentError, match="it must be an int, at least 1"):
        PrefillRunner(lambda *args: None, planner, [8], **sizes)


def test_progress_counts_prefills_too() -> None:
    seen = []
    options = {"max_batch": 4, "buckets": [1, 4], "num_pages": 60, "prefill_buckets": [16, 64, 128]}
    with LLM(tiny("llama"), **options, progress=lambda *told: seen.append(told)):
        assert [told for told in seen if told[0] == "capture"] == [("capture", done, 5) for done in range(1, 6)]


def test_its_buffers_are_in_the_ledger_and_go_when_the_engine_does() -> None:
    lines = []
    for buckets in ((), (64, 128)):
        with LLM(tiny("llama"), num_pages=60, prefill_buckets=buckets) as llm:
            lines.append({line.name: line.bytes for line in llm.ledger().lines})
            run = llm._executor.prefill_runner
            if buckets:
                assert run.num_bytes == lines[1]["step buffers"] - lines[0]["step buffers"] > 0
                assert lines[1]["logits"] == lines[0]["logits"]
    assert run.num_bytes == 0 and run.pick(1, 1) is None
    for call in (run.capture, lambda: run.run(64, [[1]], [0], [[[1]]], [0])):
        with pytest.raises(CaptureError, match="the runner is closed, its graphs are freed: make a new one"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "llama"])
@pytest.mark.parametrize("compile", [True, False])
def test_captured_is_eager_bit_for_bit_and_close_to_others(family: str, compile: bool) -> None:
    """Logits after the last token of each row, by replay, by the same plan without a graph, and unpadded."""
    model = tiny(family, dtype=torch.bfloat16, head_dim=64).cuda()
    exact_model = copy.deepcopy(model).float()
    with LLM(model, max_batch=8, num_pages=200, compile=compile, prefill_buckets=[64, 256, 500]) as llm:
        executor = llm._executor
        run, groups = executor.prefill_runner, len(executor.caches)
        assert run.buckets == (64, 256, 500)
        for counts in ([5], [64], [30, 200, 7], [256], [10, 11, 12, 13, 400]):
            ids, starts = prompts(counts, seed=len(counts)), [0] * len(counts)
            tables, first = [], 1
            for count in counts:
                tables.append(list(range(first, first + -(-count // 16))))
                first = tables[-1][-1] + 1
            rows = (ids, starts, [tables] * groups)
            last = [sum(counts[: row + 1]) - 1 for row in range(len(counts))]
            bucket = run.pick(sum(counts), len(counts))
            replayed = run.run(bucket, *rows, last).clone()
            eager = run.run(bucket, *rows, last, eager=True).clone()
            assert torch.equal(replayed, eager), (bucket, counts)
            batch = ragged_batch(*rows, page_size=16, device="cuda")
            others = executor.logits(batch, torch.tensor(last))
            with torch.no_grad():
                exact = torch.cat([exact_model(torch.tensor([row], device="cuda")).logits[0, -1:] for row in ids])
            assert_close(replayed, others, exact, floor=2e-2)
        assert run.counts == {"replay": 5, "eager": 5}


@pytest.mark.gpu
def test_a_prompt_of_any_length_is_served_by_graphs_alone() -> None:
    model = tiny("qwen3", dtype=torch.bfloat16, head_dim=64).cuda()
    with warnings.catch_warnings(), LLM(model, max_batch=4, num_pages=400, max_prefill_tokens=512) as llm:
        warnings.simplefilter("error")
        run = llm._executor.prefill_runner
        assert run.buckets == (128, 256, 512)
        for count in (1, 2, 127, 128, 129, 200, 400):  # a single token decodes
            llm.generate(prompts([count], seed=count), GREEDY)
        assert run.counts == {"replay": 6}
        llm.generate(prompts([400, 300, 450], seed=9), GREEDY)  # in steps of 512
        assert run.counts["replay"] == run.counts.total() > 8
        buckets = "captured at 128 (fa2), 256 (fa2), 512 (fa2) tokens"
        assert f"prefill     {buckets}, {run.counts['replay']} replayed, 0 eager" in llm.explain()
        assert {"graph pool", "prefill graph pool"} <= {line.name for line in llm.ledger().lines}
