"""One model runner of nano-vLLM on graphattn: its layers' pages, its plans, its captured decode steps."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ...batch import Batch
from ...buckets import BucketLadder
from ...cache import KVCache, first_page
from ...ops import active_plans
from ...plan import Planner
from ...runner import DecodeRunner
from ...spec import AttentionSpec, CacheSpec
from ...state import StepState
from .ahead import Ahead, blank_pages, expected
from .drawn import DECODED, PREFILLED, Drawn
from .layout import LayoutError
from .rows import Decode

OPEN: WeakSet[Serving] = WeakSet()  # those that nobody closed


class Serving:
    """The steps of a model whose attention layers are nano-vLLM's.

    Args:
        model: nano-vLLM's, of this rank; called as `model(token_ids_N, positions_N)`, returns `[N, hidden]`.
        layers: its attention modules in order.
        page_size: tokens in one of its blocks.
        max_batch: rows of a decode step at most, always a bucket.
        max_seq_len: tokens that a row may reach.
        max_prefill_tokens: of all rows of a prefill together.
        enforce_eager: no CUDA graphs, and no step ahead.
        is_alone: whether no other rank has to launch what this one does.

    Attributes:
        runner: captures and replays decode steps, once laid out.
        drawn: where tokens lie that were drawn last.
        temperatures: that were sent last, as numbers and on the device; None before.
        scheduler: the engine's scheduler as it is now, which may be another than at first; None if there is none.

    Raises:
        LayoutError: layers differ in heads, width or scale.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        *,
        page_size: int,
        max_batch: int,
        max_seq_len: int,
        max_prefill_tokens: int,
        enforce_eager: bool,
        is_alone: bool,
    ):
        specs = [
            AttentionSpec(
                num_heads=layer.num_heads,
                num_kv_heads=layer.num_kv_heads,
                head_dim=layer.head_dim,
                scale=layer.scale,
            )
            for layer in layers
        ]
        if len(set(specs)) != 1:
            told = ", ".join(map(repr, dict.fromkeys(specs))) or "none"
            raise LayoutError(f"the model's attention layers are {told}: known are models whose layers are alike")
        weight = next(model.parameters())
        self._model, self._layers, self._spec = model, list(layers), specs[0]
        self._dtype, self._device = weight.dtype, weight.device
        self._page_size, self._max_batch, self._max_seq_len = page_size, max_batch, max_seq_len
        self._max_prefill_tokens, self._enforce_eager = max_prefill_tokens, enforce_eager
        self.runner: DecodeRunner | None = None
        self.temperatures: tuple[list[float], Tensor] | None = None
        self.scheduler: Callable[[], object | None] = lambda: None
        self._runs_ahead = is_alone and not enforce_eager
        OPEN.add(self)

    def lay_out_smallest(self) -> None:
        """Lays out over two pages, to measure what steps take beside the cache."""
        cache = CacheSpec(num_pages=2, page_size=self._page_size, dtype=self._dtype)
        self.lay_out(KVCache(len(self._layers), self._spec, cache, self._device).layers)

    def lay_out(self, pages: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Makes buffers, plans and a runner over a cache; what was laid out before is freed first.

        Args:
            pages: each layer's keys and values, `[pages, page_size, kv_heads, head_dim]`; page 0 is padding's.
        """
        self._release()
        keys = pages[0][0]
        cache = CacheSpec(num_pages=len(keys), page_size=keys.shape[1], dtype=keys.dtype)
        planner = Planner([self._spec], cache, self._device)
        state = StepState(
            max_batch=self._max_batch,
            max_seq_len=self._max_seq_len,
            page_size=cache.page_size,
            groups=[self._spec],
            device=self._device,
        )
        ladder = BucketLadder.default(self._max_batch)
        self.runner = DecodeRunner(self._model, state, planner, ladder=ladder, enforce_eager=self._enforce_eager)
        self._prefill_plan = planner.prefill("auto", self._max_prefill_tokens)
        self.drawn = Drawn()
        self._seqs: Sequence = ()  # of the decode step that was launched last, if no prefill was since
        self._ahead: Ahead | None = None
        for layer, (k_cache, v_cache) in zip(self._layers, pages, strict=True):
            layer.k_page, layer.v_page = first_page(k_cache), first_page(v_cache)

    def prefill(self, batch: Batch) -> Tensor:
        """Hidden states of all tokens of ragged rows, `[N, hidden]`."""
        self._seqs, self._ahead = (), None
        self.drawn.begin(self.runner.state.drawn, PREFILLED)
        self._prefill_plan.plan(batch)
        with active_plans(self._prefill_plan.groups):
            return self._model(batch.token_ids_N, batch.positions_N)

    def decode(self, rows: Decode) -> Tensor:
        """Hidden states of one token of each row, `[B, hidden]`; the next step overwrites them."""
        ahead, self._ahead, self._seqs = self._ahead, None, rows.seqs
        self.drawn.begin(self.runner.state.drawn, DECODED)
        hidden = None if ahead is None else ahead.of(rows)
        return self._run(rows) if hidden is None else hidden

    def sampled(self, token_ids_B: Tensor) -> Tensor | None:
        """The sampler drew for the step that was launched last. Launches the one that is expected next.

        While that runs, the host schedules and launches what follows it. Not where a prefill may come first.

        Returns:
            The tokens in host memory, if a step was launched: read from the device they would wait for that. Else None.
        """
        if not self.drawn.keep(token_ids_B) or len(token_ids_B) != len(self._seqs):
            return None
        scheduler = self.scheduler()
        waiting = getattr(scheduler, "waiting", None)
        if not self._runs_ahead or waiting is None or waiting:
            return None
        blank = blank_pages(getattr(scheduler, "block_manager", None))
        rows = expected(self._seqs, blank, page_size=self._page_size, max_seq_len=self._max_seq_len)
        if rows is None:
            return None
        on_cuda = token_ids_B.is_cuda
        read_B = torch.empty(token_ids_B.shape, dtype=token_ids_B.dtype, device="cpu", pin_memory=on_cuda)
        read_B.copy_(token_ids_B, non_blocking=True)
        read = torch.cuda.current_stream(token_ids_B.device).record_event() if on_cuda else None
        with torch.inference_mode():
            self._ahead = Ahead(rows, self._run(rows))
        if read is not None:
            read.synchronize()
        return read_B

    def _run(self, rows: Decode) -> Tensor:
        return self.runner.run(rows.token_ids, rows.seq_lens, [rows.tables], rows.drawn)

    def close(self) -> None:
        """Frees graphs and buffers, and lets go of the pages."""
        self._release()
        OPEN.discard(self)

    def _release(self) -> None:
        if self.runner is None:
            return
        self.runner.close()
        self.runner = self._prefill_plan = None
        for layer in self._layers:
            layer.k_page = layer.v_page = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
