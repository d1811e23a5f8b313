"""Workload `attention`: what attention adds to a step where it runs, between the GEMMs of many layers in one graph.

Timed back to back with itself a kernel overlaps its own next launch and finds small caches in L2; in this chain it does
neither. The figure is the time of the chain less that of the same chain whose attention passes the queries through.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

import graphattn as ga

from .accuracy import is_wrong
from .paths import FIRST, Path, Turn, compared
from .rows import Row, sharing_rows
from .shape import head_dim_of, token_bytes
from .timing import quantile, spread, wait

PAGE_SIZE = 16
FP8 = torch.float8_e4m3fn
WARM_STEPS = 5


class Chain:
    """The GEMMs of a decoder's layers, projections merged, with attention or a pass-through between the first two.

    Args:
        config: a transformers config.
        dtype, device: of weights and activations.
        max_batch: rows at most.
    """

    def __init__(self, config, dtype: torch.dtype, device: str, max_batch: int):
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim_of(config),
        )
        hidden, width = config.hidden_size, self.heads * self.head_dim
        sizes = (
            (hidden, width + 2 * self.kv_heads * self.head_dim),
            (width, hidden),
            (hidden, 2 * config.intermediate_size),
            (config.intermediate_size, hidden),
        )
        options = {"dtype": dtype, "device": device}
        torch.manual_seed(0)
        self.weights = [
            [torch.randn(size, **options) * size[0] ** -0.5 for size in sizes] for _ in range(config.num_hidden_layers)
        ]
        self.x = torch.randn(max_batch, hidden, **options)
        self.device, self.attends, self.turns = device, True, False
        self.turn = Turn(self.head_dim, device)
        self.attention: list[ga.Attention] = []

    def unbound(self, path: Path) -> list[ga.Attention]:
        """Attention layers without pages."""
        options = path.options(self.heads, self.head_dim, self.device)
        return [ga.Attention(self.heads, self.head_dim, num_kv_heads=self.kv_heads, **options) for _ in self.weights]

    def __call__(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.x[: len(token_ids)]
        turned = self.attends and self.turns
        angles = self.turn.angles(positions, x.dtype) if turned else None
        for attention, weights in zip(self.attention, self.weights, strict=True):
            qkv = x @ weights[0]
            if self.attends:
                q, k, v = self.heads_of(qkv)
                if turned:
                    q, k = self.turn(q, k, angles)
                attended = attention(q, k, v).flatten(1)
            else:
                attended = qkv[:, : weights[1].shape[0]]  # a view, which a GEMM reads without a copy
            gate_up = attended @ weights[1] @ weights[2]
            x = gate_up[:, : gate_up.shape[1] // 2] @ weights[3]
        return x

    def heads_of(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[N, heads, head_dim]`, k and v `[N, kv_heads, head_dim]`."""
        qkv = qkv.unflatten(-1, (self.heads + 2 * self.kv_heads, self.head_dim))
        return qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)

    def first_heads(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the first layer's attention is given."""
        return self.heads_of(self.x[:num_rows] @ self.weights[0][0])


class Pages:
    """Random keys and values for these rows, pages in random order, bound to the chain's layers.

    Of what rows share, full pages are shared; the rest is each row's own.
    """

    def __init__(self, chain: Chain, path: Path, rows: list[Row], dtype: torch.dtype, device: str):
        chain.attention, chain.turns = [], path.turns  # the pages of an earlier case go before these are made
        chain.attention = chain.unbound(path)
        self.spec, self.lens = chain.attention[0].spec, [row.tokens for row in rows]
        num_shared = {row.part: row.shared // PAGE_SIZE for row in rows}
        num_own = [-(-row.tokens // PAGE_SIZE) - num_shared[row.part] for row in rows]
        pool = ga.PagePool(1 + sum(num_own) + sum(num_shared.values()), PAGE_SIZE)
        shared = {part: pool.allocate(count) for part, count in num_shared.items()}
        self.tables: list[list[int]] = [[] for _ in rows]
        for row in random.Random(0).sample(range(len(rows)), len(rows)):
            self.tables[row] = shared[rows[row].part] + pool.allocate(num_own[row])
        sizes = {"num_pages": pool.num_pages, "page_size": PAGE_SIZE, "layout": path.layout}
        self.cache = ga.CacheSpec(**sizes, dtype=FP8 if path.is_fp8 else dtype, query_dtype=dtype)
        self.layers = ga.KVCache(len(chain.attention), self.spec, self.cache, device).layers
        for attention, pair in zip(chain.attention, self.layers, strict=True):
            for pages in pair:
                pages.copy_(torch.randn(pages.shape, dtype=dtype, device=device))  # torch draws no fp8
            attention.bind(*pair)

    @property
    def page_lists(self) -> list[list[list[int]]]:
        return [self.tables]

    def runner(self, step_fn, device: str, backend: str) -> ga.DecodeRunner:
        """Captures `step_fn` for all rows; on a CPU it is called as it is."""
        batch = len(self.lens)
        state = ga.StepState(
            max_batch=batch, max_seq_len=max(self.lens), page_size=PAGE_SIZE, groups=[self.spec], device=device
        )
        planner = ga.Planner([self.spec], self.cache, device, backend)
        runner = ga.DecodeRunner(step_fn, state, planner, ladder=ga.BucketLadder([batch]))
        runner.capture()
        return runner


def step_us(runner: ga.DecodeRunner, lens: list[int], tables: list, device: str, repeats: int) -> list[float]:
    """Microseconds of each of `repeats` steps, launched without waiting, so that the device has the next at hand."""
    token_ids = [0] * len(lens)
    if device == "cpu":
        times = []
        for _ in range(WARM_STEPS + repeats):
            started = time.perf_counter()
            runner.run(token_ids, lens, tables)
            times.append((time.perf_counter() - started) * 1e6)
        return times[WARM_STEPS:]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_STEPS + repeats + 1)]
    for event in events[:-1]:
        event.record()
        runner.run(token_ids, lens, tables)
    events[-1].record()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) * 1e3 for before, after in zip(events, events[1:], strict=False)]
    return times[WARM_STEPS:]


def launch_us(runner: ga.DecodeRunner, lens: list[int], tables: list, device: str) -> float:
    """Microseconds of the host to stage and launch one step; where steps are shorter, they wait for it."""
    times = []
    for _ in range(WARM_STEPS):
        wait(device)
        started = time.perf_counter()
        runner.run([0] * len(lens), lens, tables)
        times.append(time.perf_counter() - started)
    wait(device)
    return quantile(times, 0.5) * 1e6


def check(chain: Chain, pages: Pages, path: Path, device: str) -> dict:
    """The first layer's output against that of plain torch in float32, and beside it plain torch's in this dtype."""

    def first_layer(token_ids: Tensor, positions: Tensor) -> Tensor:
        return chain.attention[0](*chain.first_heads(len(token_ids)))

    runner = pages.runner(first_layer, device, path.backend)
    ours = runner.run([0] * len(pages.lens), pages.lens, pages.page_lists).clone()
    runner.close()
    exact, plain = (_plain(chain, pages, path, dtype) for dtype in (torch.float32, ours.dtype))
    errors = {"ours": ours - exact, "plain": plain - exact}
    return {f"{name}_rms": error.square().mean().sqrt().item() for name, error in errors.items()}


def _plain(chain: Chain, pages: Pages, path: Path, dtype: torch.dtype) -> Tensor:
    """What the first layer computes over the same pages, in plain torch."""
    cache = replace(pages.cache, dtype=dtype, query_dtype=dtype)
    layer, device, batch = chain.unbound(path)[0], pages.layers[0][0].device, len(pages.lens)
    layer.bind(*(held.to(dtype, copy=True) for held in pages.layers[0]))
    sizes = {"max_batch": batch, "max_seq_len": max(pages.lens), "page_size": PAGE_SIZE}
    state = ga.StepState(groups=[pages.spec], device=device, **sizes)
    plan = ga.Planner([pages.spec], cache, device, "reference").decode(state, batch)
    plan.plan(state.stage(batch, [0] * batch, pages.lens, pages.page_lists))
    state.feed(batch)
    q, *new = chain.first_heads(batch)
    if path.is_fp8:  # the token of the step is attended to as it is stored
        new = [heads.to(FP8) for heads in new]
    with ga.active_plans(plan.groups):
        return layer(q.to(dtype), *(heads.to(dtype) for heads in new))


def measure(
    config, dtype: torch.dtype, device: str, cases: list[str], repeats: int, rate: float, comparison: str = "backends"
) -> Iterator[dict]:
    """Microseconds per layer that append and attention add, by path, of one case after the other.

    Raises:
        RuntimeError: a path's output is wrong.
    """
    chain = Chain(config, dtype, device, max(len(sharing_rows(case)) for case in cases))
    for case in cases:
        asked = sharing_rows(case)
        read = sum(each.tokens - each.shared for each in asked)  # shared tokens once
        read += sum({each.part: each.shared for each in asked}.values())
        floor_us = read * token_bytes(config, dtype.itemsize) / rate * 1e6
        with torch.no_grad():
            gemms_us = _gemms_us(chain, len(asked), dtype, device, repeats)
        row: dict = {"case": case, "floor_us": floor_us, "gemms_us_per_layer": gemms_us, "paths": {}}
        for name, path in compared(comparison, device).items():
            try:
                with torch.no_grad():
                    row["paths"][name] = _one(chain, path, asked, dtype, device, repeats, gemms_us)
            except (ga.BackendError, torch.OutOfMemoryError) as error:
                row["paths"][name] = {"error": f"{type(error).__name__}: {error}"}
            if device == "cuda":
                torch.cuda.empty_cache()
        yield row


def _gemms_us(chain: Chain, num_rows: int, dtype: torch.dtype, device: str, repeats: int) -> float:
    """Microseconds a layer of the chain whose attention passes the queries through, for so many rows.

    By the path that is quickest to stage, since short steps would otherwise wait for the host.
    """
    path = Path(FIRST[device])
    pages = Pages(chain, path, [Row(1, 0, 0)] * num_rows, dtype, device)
    chain.attends = False
    runner = pages.runner(chain, device, path.backend)
    alone = quantile(step_us(runner, pages.lens, pages.page_lists, device, repeats), 0.5)
    runner.close()
    return alone / len(chain.weights)


def _one(
    chain: Chain, path: Path, rows: list[Row], dtype: torch.dtype, device: str, repeats: int, gemms_us: float
) -> dict:
    pages = Pages(chain, path, rows, dtype, device)
    lens = pages.lens
    checked = check(chain, pages, path, device)
    if is_wrong(checked):
        raise RuntimeError(f"{path} is wrong, so it is not measured: {checked}")
    chain.attends = True
    runner = pages.runner(chain, device, path.backend)
    times = step_us(runner, lens, pages.page_lists, device, repeats)
    launch = launch_us(runner, lens, pages.page_lists, device)
    runner.close()
    return {
        "us_per_layer": spread([us / len(chain.weights) - gemms_us for us in times]),
        "step_us": quantile(times, 0.5),
        "launch_us": launch,
        "is_host_bound": device == "cuda" and launch > quantile(times, 0.5),
        "check": checked,
    }
