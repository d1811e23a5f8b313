"""Batches padded to one number of tokens: what is sent, and attention over them, captured once for any rows."""

from __future__ import annotations

import pytest
import torch
from dense import DenseRows, assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from graphattn.backends.flashinfer import fa3
from graphattn.batch import ragged_batch
from graphattn.errors import InvalidArgumentError
from graphattn.ops import active_plans
from graphattn.padded import PaddedBatch
from graphattn.pages import NULL_PAGE
from graphattn.plan import Planner, StepPlan
from graphattn.spec import AttentionSpec, CacheSpec

NUM_TOKENS, NUM_ROWS, MAX_PAGES = 40, 5, 9


@st.composite
def ragged_rows(draw, num_groups: int, page_size: int) -> dict:
    """Rows that fit, with pages in any order."""
    counts = draw(st.lists(st.integers(1, 12), max_size=NUM_ROWS).filter(lambda counts: sum(counts) <= NUM_TOKENS))
    most = MAX_PAGES * page_size
    counts = [min(count, most) for count in counts]
    starts = [draw(st.integers(0, most - count)) for count in counts]
    tables = [
        [
            draw(st.lists(st.integers(1, 99), min_size=needed, max_size=MAX_PAGES))
            for needed in (-(-(start + count) // page_size) for start, count in zip(starts, counts, strict=True))
        ]
        for _ in range(num_groups)
    ]
    return {
        "token_ids": [draw(st.lists(st.integers(0, 99), min_size=count, max_size=count)) for count in counts],
        "starts": starts,
        "tables": tables,
        "lengths": draw(st.sampled_from([None, [7] * len(counts)])),
    }


@given(st.data(), st.sampled_from([1, 2, 3]), st.sampled_from([1, 4, 16]))
def test_the_rows_come_first_then_one_of_padding_then_empty_ones(data, num_groups: int, page_size: int) -> None:
    """Over buffers that another batch has been in before."""
    sizes = {"max_pages": MAX_PAGES, "page_size": page_size, "num_groups": num_groups}
    padded = PaddedBatch(NUM_TOKENS, NUM_ROWS, device="cpu", **sizes)
    before = data.draw(ragged_rows(num_groups, page_size))
    padded.fill(**before, last=[len(ids) - 1 for ids in before["token_ids"][:1]])
    rows = data.draw(ragged_rows(num_groups, page_size))
    count, num_rows, last = sum(map(len, rows["token_ids"])), len(rows["token_ids"]), list(range(len(rows["starts"])))
    batch = padded.fill(**rows, last=last)
    assert padded.last_R.tolist() == last + [0] * (NUM_ROWS - num_rows)
    assert batch.token_ids_N.shape == batch.positions_N.shape == (NUM_TOKENS,)
    assert batch.token_ids_N.tolist() == sum(rows["token_ids"], []) + [0] * (NUM_TOKENS - count)
    assert set(batch.positions_N[count:].tolist()) <= {0} and set(batch.lengths_N[count:].tolist()) <= {1}
    assert batch.rows_N[count:].tolist() == [num_rows] * (NUM_TOKENS - count)
    has_padding = count < NUM_TOKENS
    ends = batch.qo_indptr_B1.tolist()
    assert len(ends) == NUM_ROWS + 2 and ends[num_rows + has_padding :] == [NUM_TOKENS] * (
        NUM_ROWS + 2 - num_rows - has_padding
    )
    assert padded.qo_indptr_B1.tolist() == ends
    assert batch.kv_lens_B[num_rows:].tolist() == ([NUM_TOKENS - count] if has_padding else []) + [0] * (
        NUM_ROWS + 1 - num_rows - has_padding
    )
    if num_rows:
        plain = ragged_batch(**rows, page_size=page_size, device="cpu")
        for name in ("token_ids_N", "positions_N", "rows_N", "lengths_N"):
            assert torch.equal(getattr(batch, name)[:count], getattr(plain, name)), name
        assert torch.equal(batch.qo_indptr_B1[: num_rows + 1], plain.qo_indptr_B1)
        assert torch.equal(batch.kv_lens_B[:num_rows], plain.kv_lens_B)
        for csr, of_plain in zip(batch.groups, plain.groups, strict=True):
            num_pages = int(of_plain.indptr_B1[-1])
            assert torch.equal(csr.indptr_B1[: num_rows + 1], of_plain.indptr_B1)
            assert torch.equal(csr.indices_P[:num_pages], of_plain.indices_P)
            assert torch.equal(csr.last_page_len_B[:num_rows], of_plain.last_page_len_B)
    for csr, on_host in zip(batch.groups, batch.groups_host, strict=True):
        used = int(csr.indptr_B1[-1])
        assert torch.equal(csr.kv_lens(page_size), batch.kv_lens_B)
        assert set(csr.indices_P[int(csr.indptr_B1[num_rows]) : used].tolist()) <= {NULL_PAGE}
        assert torch.equal(on_host.indptr_B1, csr.indptr_B1) and torch.equal(on_host.indices_P, csr.indices_P[:used])


def test_the_buffers_stay_where_they_are_and_each_begins_on_16_bytes() -> None:
    padded = PaddedBatch(7, 3, max_pages=5, page_size=4, num_groups=2, device="cpu")
    parts = [padded.last_R, padded.token_ids_N, padded.positions_N, padded.rows_N, padded.lengths_N]
    parts += [padded.qo_indptr_B1]
    parts += [part for csr in padded.groups for part in (csr.indptr_B1, csr.indices_P, csr.last_page_len_B)]
    spans = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in parts)
    assert all(start % 16 == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in zip(spans[:-1], spans[1:], strict=True))
    batch = padded.fill([[1, 2]], [3], [[[1, 2]], [[3, 4]]], [1])
    assert batch.token_ids_N.data_ptr() == padded.token_ids_N.data_ptr()
    assert sum(part.nbytes for part in parts) <= padded.num_bytes


@pytest.mark.parametrize(
    ("rows", "last", "words"),
    [
        (([[1, 2]], [3], [[[1]]]), [1], "row 0: 5 tokens need 2 pages"),
        (([[1] * 9], [0], [[[1, 2, 3]]]), [], "9 tokens in 1 rows: the batch has 8 tokens in 2 rows at most"),
        (([[1]] * 3, [0] * 3, [[[1]] * 3]), [], "3 tokens in 3 rows"),
        (([[1, 2]], [19], [[[1] * 6]]), [], r"rows of \[21\] tokens: a row has 20 at most"),
        (([[1, 2]], [3], [[[1, 2]]]), [2], r"last=\[2\]: they are among 2 tokens, 2 of them at most"),
        (([[1, 2]], [3], [[[1, 2]]]), [-1], r"last=\[-1\]: they are among 2 tokens"),
        (([[1, 2, 3]], [3], [[[1, 2]]]), [0, 1, 2], r"last=\[0, 1, 2\]: they are among 3 tokens, 2 of them at most"),
    ],
)
def test_what_does_not_fit_or_is_no_batch_is_refused(rows: tuple, last: list[int], words: str) -> None:
    padded = PaddedBatch(8, 2, max_pages=5, page_size=4, num_groups=1, device="cpu")
    with pytest.raises(InvalidArgumentError, match=words):
        padded.fill(*rows, last)


SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64)
ROWS = {
    "prefill": ([0, 0, 0], [1, 128, 193]),
    "full": ([0], [400]),
    "chunks over prefixes": ([1000, 5, 0, 31], [130, 200, 9, 1]),
    "short rows": ([0, 300, 16, 40, 7], [1, 2, 3, 1, 5]),
}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (([[1.5]], [0], [[[1]]], None), "token_ids: 1.5 is among them, give ints of 32 bits"),
        (([[2**40]], [0], [[[1]]], None), "token_ids: they go from .* to 1099511627776, give ints of 32"),
        (([[1]], [0], [[[1.9]]], None), "pages in a table: 1.9 is among them"),
        (([[1]], [0], [[[2**40]]], None), "pages in a table: they go from"),
        (([[1]], [0], [[[1]]], [2.5]), "lengths: 2.5 is among them"),
    ],
    ids=str,
)
def test_numbers_that_are_no_ints_are_refused(rows: tuple, words: str) -> None:
    """numpy would cut a page to that of another row."""
    ids, starts, tables, lengths = rows
    with pytest.raises(InvalidArgumentError, match=words):
        ragged_batch(ids, starts, tables, page_size=4, device="cpu", lengths=lengths)
    padded = PaddedBatch(8, 2, max_pages=4, page_size=4, num_groups=1, device="cpu")
    with pytest.raises(InvalidArgumentError, match=words):
        padded.fill(ids, starts, tables, [0], lengths)


@pytest.mark.parametrize("num_groups", [0, 2])
def test_pages_of_other_groups_and_rows_without_starts_are_refused(num_groups: int) -> None:
    padded = PaddedBatch(8, 2, max_pages=4, page_size=4, num_groups=1, device="cpu")
    with pytest.raises(InvalidArgumentError, match=f"1 starts and pages of {num_groups} layer groups: give each"):
        padded.fill([[1, 2, 3]], [0], [[[1]]] * num_groups, [2])
    with pytest.raises(InvalidArgumentError, match="1 rows with 2 starts and pages of 1 layer groups"):
        padded.fill([[1, 2, 3]], [0, 0], [[[1]]], [2])


def attended(plan: StepPlan, padded: PaddedBatch, rows: DenseRows, inputs: tuple[Tensor, ...]) -> None:
    """Sends the rows' numbers and queries, keys and values, padded, to where a captured step reads them."""
    tables = [[table.pages for table in rows.tables]]
    plan.plan(padded.fill([[0] * count for count in rows.new], rows.cached, tables, []))
    for buffer, packed in zip(inputs, rows.packed, strict=True):
        buffer.copy_(F.pad(packed, (0, 0, 0, 0, 0, len(buffer) - len(packed)), value=1.0))


def buffers(spec: AttentionSpec, num_tokens: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    return tuple(torch.zeros(num_tokens, count, spec.head_dim, dtype=dtype, device=device) for count in heads)


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("ragged", ROWS)
def test_reference(ragged: str, options: dict) -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, **options)
    rows = DenseRows(spec, *ROWS[ragged], page_size=16, dtype=torch.float64, device="cpu")
    padded = PaddedBatch(400, 5, max_pages=99, page_size=16, num_groups=1, device="cpu")
    plan, inputs = Planner([spec], rows.cache.cache, "cpu").padded(padded), buffers(spec, 400, torch.float64, "cpu")
    attended(plan, padded, rows, inputs)
    with active_plans(plan.groups):
        ours = torch.ops.graphattn.attend(*inputs, *rows.cache.layers[0], 0)
    exact = rows.attend(torch.float64)
    assert_close(ours[: len(exact)], exact, exact, floor=1e-12)
    assert ours.isfinite().all()  # the padding attends to what it has itself written to the null page


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["fa2", "fa3"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "options"),
    [
        (128, torch.bfloat16, {}),
        (64, torch.float16, {}),
        (128, torch.bfloat16, {"window": 150}),
        (128, torch.bfloat16, {"softcap": 2.0}),
    ],
    ids=str,
)
def test_one_capture_serves_any_rows(head_dim: int, dtype, options: dict, layout: str, kernel: str) -> None:
    """Captured over padding alone, replayed for each of the rows in turn, over a cache whose unused slots are NaN."""
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=head_dim, **options)
    most = max(sum(-(-(old + new) // 16) for old, new in zip(*each, strict=True)) for each in ROWS.values())
    cases = {
        name: DenseRows(spec, *each, page_size=16, dtype=dtype, device="cuda", layout=layout)
        for name, each in ROWS.items()
    }
    cache = CacheSpec(num_pages=most + 9, page_size=16, dtype=dtype, layout=layout)
    if kernel == "fa3":
        from graphattn.backends.flashinfer import private

        if reason := fa3.why_not(spec, cache, torch.device("cuda")):
            pytest.skip(f"fa3: {reason}")
        if not private.has_fa3(spec, cache):
            pytest.skip(f"fa3's module is neither prebuilt nor compiled for {spec}")
    padded = PaddedBatch(400, 5, max_pages=99, page_size=16, num_groups=1, device="cuda")
    shared = tuple(
        torch.full((cache.num_pages, *cache.page_shape(spec)), float("nan"), dtype=dtype, device="cuda") for _ in "kv"
    )
    plan, inputs = (
        Planner([spec], cache, "cuda", "flashinfer").padded(padded, kernel),
        buffers(spec, 400, dtype, "cuda"),
    )
    plan.plan(padded.fill([], [], [[]], []))
    stream = torch.cuda.Stream()
    with active_plans(plan.groups):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.ops.graphattn.attend(*inputs, *shared, 0)
        torch.cuda.current_stream().wait_stream(stream)
        graph, signature = torch.cuda.CUDAGraph(), plan.signature
        with torch.cuda.graph(graph, stream=stream):
            ours = torch.ops.graphattn.attend(*inputs, *shared, 0)
    for name, rows in cases.items():
        for held, own in zip(shared, rows.cache.layers[0], strict=True):
            held.fill_(float("nan"))
            held[: len(own)].copy_(own)
        attended(plan, padded, rows, inputs)
        assert plan.signature == signature, name
        graph.replay()
        exact = rows.attend(torch.float32)
        assert_close(ours[: len(exact)], rows.attend(dtype), exact, floor=1e-3)
