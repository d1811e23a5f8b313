"""Captures a decode step once per bucket and replays it.

A step is any callable `step_fn(token_ids[B], positions[B]) -> Tensor | tuple[Tensor, ...]` whose attention layers are
`Attention`; every output has B as its first dimension. Its first launch computes something from the tokens, as an
embedding does: attention reads page tables early, and must not come right behind what derives them.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Batch
from .buckets import BucketLadder
from .capture import Capture, capture_graph, give_back, on_stream
from .errors import CaptureError, CaptureMemoryError, InvalidArgumentError
from .meters import read_meters
from .ops import active_plans
from .outputs import Outputs
from .plan import Planner, StepPlan
from .shortage import capture_shortage, first_line, is_out_of_memory
from .state import StepState

StepFn = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]
CAPTURE_MODES = ("all", "lazy")
CAPTURE_OOM_MODES = ("raise", "shrink")


@dataclass
class _Bucket:
    backend: str
    plan: StepPlan
    token_ids_B: Tensor
    positions_B: Tensor
    graph: torch.cuda.CUDAGraph | None = None
    signature: tuple = ()


class DecodeRunner:
    """Runs decode steps at the ladder's buckets: captured in CUDA graphs, or eagerly with the same plan and callable.

    Without CUDA graphs (`enforce_eager=True`, or a CPU) a step is the plain call of `step_fn` over the same static
    buffers at the same bucket, so eager and captured give the same bits.

    Args:
        step_fn: the step; called as `step_fn(token_ids[B], positions[B])`, int32 at fixed addresses.
        state: the buffers it reads.
        planner: makes each bucket's attention plans.
        ladder: the buckets; its largest must be `state.max_batch`.
        enforce_eager: never capture.
        capture: "all" captures every bucket in `capture()`; "lazy" the largest there, others when first used.
        on_capture_oom: buckets that memory does not hold leave the ladder: "raise" then says so with an error, "shrink"
            with a warning. Either way those captured stay usable: rows run at the next larger one of them.

    Attributes:
        ladder: the buckets that steps run at.
        captures: a `Capture` per captured bucket and backend, in order.
        shortage: which buckets were left out for want of memory, in words; None if none were.
        counts: steps by how they ran: "replay", "eager", and "guard" (a plan that no longer matched its capture).
        rows: steps by the number of rows asked for, padding left out.
        served: steps by bucket and backend.

    Raises:
        BackendError: a CUDA graph was asked of a backend that cannot be captured.
        InvalidArgumentError: the ladder does not fit the state, or an unknown capture mode.
    """

    def __init__(
        self,
        step_fn: StepFn,
        state: StepState,
        planner: Planner,
        *,
        ladder: BucketLadder,
        enforce_eager: bool = False,
        capture: str = "all",
        on_capture_oom: str = "raise",
    ):
        if ladder.max != state.max_batch:
            raise InvalidArgumentError(
                f"the ladder ends at {ladder.max}, the state holds {state.max_batch} rows: make them equal"
            )
        planner.check_state(state)
        for name, mode, modes in (
            ("capture", capture, CAPTURE_MODES),
            ("on_capture_oom", on_capture_oom, CAPTURE_OOM_MODES),
        ):
            if mode not in modes:
                raise InvalidArgumentError(f"{name}={mode!r}: choose {' or '.join(modes)}")
        self.uses_graphs = state.device.type == "cuda" and not enforce_eager
        if self.uses_graphs:
            planner.check_capturable()
        self.state, self.planner, self.ladder = state, planner, ladder
        self.captures: list[Capture] = []
        self.counts: Counter[str] = Counter()
        self.rows: Counter[int] = Counter()
        self.served: Counter[tuple[int, str]] = Counter()
        self.shortage: str | None = None
        self._step_fn, self._lazy, self._shrinks = step_fn, capture == "lazy", on_capture_oom == "shrink"
        self._buckets: dict[tuple[int, str], _Bucket] = {}
        self._outputs, self._is_closed = Outputs(), False
        self.pool = torch.cuda.graph_pool_handle() if self.uses_graphs else None
        self._stream = torch.cuda.Stream(state.device) if self.uses_graphs else None

    @property
    def num_bytes(self) -> int:
        """Bytes of the outputs that all buckets share."""
        return self._outputs.num_bytes

    def capture(
        self, progress: Callable[[int, int], None] | None = None, *, max_buckets: int | None = None
    ) -> list[Capture]:
        """Prepares the buckets, largest first so that smaller graphs fit in the pool it leaves.

        Args:
            progress: called as `progress(done, total)` after each bucket.
            max_buckets: how many of the largest; None for all, or for one if they are captured lazily.

        Returns:
            What each bucket took.

        Raises:
            CaptureMemoryError: memory does not hold some of them (with "shrink": any of them).
        """
        self._check_open()
        asked, table, sizes = self.ladder, self.planner.table, sorted(self.ladder, reverse=True)
        wanted = min(len(sizes), max_buckets or (1 if self._lazy else len(sizes)))
        failed: dict[tuple[int, str | None], str] = {}
        for done, bucket in enumerate(sizes, start=1):
            for backend in self.planner.names(bucket):
                if (bucket, None) not in failed:
                    failed |= self._prepare_or_drop(bucket, backend)
            if progress is not None:
                progress(min(done, wanted), wanted)
            if done - sum(backend is None for _, backend in failed) == wanted:
                break
        if not self._buckets:
            self.ladder = asked  # nothing fits now, and all may be tried again
            self.planner.restore(table)
        if failed:
            self._report(failed)
        return self.captures

    def run(
        self,
        token_ids: Sequence[int],
        seq_lens: Sequence[int],
        tables: Sequence[Sequence[Sequence[int]]],
        drawn: Sequence[int | None] | None = None,
        *,
        eager: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Runs one step, on the current stream, and returns without waiting for it.

        What is sent waits for the copy before the last, which the device makes before it runs that step.
        Run all steps on one stream, or make the streams wait for each other: they share buffers.

        Args:
            token_ids: the token each row feeds; they are not checked against the vocabulary.
            seq_lens: each row's length with that token counted.
            tables: `tables[group][row]`, the row's pages in order.
            drawn: where in `state.drawn` each row's token is, if the host does not know it yet; None for
                `token_ids[row]`.
            eager: do not replay; the plain call at the same bucket, to compare with.

        Returns:
            The step's outputs, cut to the rows given. They are overwritten by the next step.

        Raises:
            BucketError: no bucket holds the rows.
            InvalidArgumentError: a row is too long, its table too short or holds a page that the cache has not, or the
                arguments are not of one length.
            CaptureError: a bucket that is captured now could not be; CaptureMemoryError for want of memory.
        """
        bucket, prepared = self._planned(token_ids, seq_lens, tables, drawn)
        self.rows[len(token_ids)] += 1
        self.served[bucket, prepared.backend] += 1
        if prepared.graph is None or eager:
            self.counts["eager"] += 1
            self._call(prepared)
        elif prepared.signature == prepared.plan.signature:
            self.counts["replay"] += 1
            with self.state.fed(bucket):
                prepared.graph.replay()
        else:
            self.counts["guard"] += 1
            with self._recorded(bucket, prepared.backend) as taken:
                taken |= self._capture_graph(bucket, prepared)
            self.state.stage(bucket, token_ids, seq_lens, tables, drawn=drawn)
            self._call(prepared)
        return self._outputs.rows(len(token_ids))

    def verify(
        self, token_ids: Sequence[int], seq_lens: Sequence[int], tables: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        """Runs one step by replay and eagerly at the same bucket and plan, and compares every bit of the outputs.

        Raises:
            CaptureError: an output differs; says which and where.
        """
        replayed = self.run(token_ids, seq_lens, tables)
        replayed = [output.clone() for output in (replayed if isinstance(replayed, tuple) else (replayed,))]
        self._call(self._planned(token_ids, seq_lens, tables)[1])
        self._outputs.compare(replayed)

    def close(self) -> None:
        """Frees the graphs and lets go of every buffer; nothing can be run any more."""
        if self.uses_graphs and not self._is_closed:
            torch.cuda.synchronize(self.state.device)  # a replay may still run on what is freed here
        self._is_closed = True
        self._buckets.clear()
        self._outputs.clear()
        for name in ("state", "planner", "_step_fn"):
            vars(self).pop(name, None)

    def _check_open(self) -> None:
        if self._is_closed:
            raise CaptureError("the runner is closed, its graphs are freed: make a new one")

    def _planned(self, token_ids, seq_lens, tables, drawn=None) -> tuple[int, _Bucket]:
        """Stages the rows, and plans them by who serves them: a cascade besides, where what they share pays for it."""
        bucket, prepared = self._ready(len(token_ids), seq_lens)
        num_pages = [cache.num_pages for cache in self.planner.caches]
        batch = self.state.stage(bucket, token_ids, seq_lens, tables, drawn=drawn, num_pages=num_pages)
        for name in self.planner.cascade_names(bucket):
            if self._buckets[bucket, name].plan.pays(batch):
                prepared = self._buckets[bucket, name]
        prepared.plan.plan(batch)
        return bucket, prepared

    def _ready(self, num_rows: int, seq_lens: Sequence[int]) -> tuple[int, _Bucket]:
        """The bucket that rows run at, with the backend that serves them, captured now if it was not yet."""
        self._check_open()
        bucket = self.ladder.pick(num_rows)
        backend = self.planner.backend_for(bucket, seq_lens)
        failed = self._prepare_or_drop(bucket, backend)
        for name in () if failed else self.planner.cascade_names(bucket):
            failed |= self._prepare_or_drop(bucket, name)
        if not failed:
            return bucket, self._buckets[bucket, backend]
        self._report(failed)
        return self._ready(num_rows, seq_lens)

    def _prepare_or_drop(self, bucket: int, backend: str) -> dict[tuple[int, str | None], str]:
        """Prepares a bucket with a backend, or says how memory did not hold it; what it took is then given back.

        The bucket's other backends then serve what this one did. Without any, it has left the ladder, unless it is the
        last, and is named with None for a backend.
        """
        if (bucket, backend) in self._buckets:
            return {}
        try:
            self._prepare(bucket, backend)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        else:
            return {}
        if not self._buckets:
            self._outputs.clear()  # they have the rows of the largest bucket
        has_others = self.planner.has_others(bucket, backend)
        if has_others:
            self.planner.leave_out(bucket, backend)
        elif len(self.ladder) > 1:
            self.ladder = BucketLadder([size for size in self.ladder if size != bucket])
        give_back(self.state.device)
        return {(bucket, backend if has_others else None): reason}

    def _report(self, failed: dict[tuple[int, str | None], str]) -> None:
        """Says what was left out: as an error, or as a warning if that was asked for and anything is left."""
        free, captured = read_meters(self.state.device).free, tuple(sorted({bucket for bucket, _ in self._buckets}))
        text = capture_shortage(failed, self.captures, max_batch=self.state.max_batch, free=free)
        self.shortage = text
        if not (captured and self._shrinks):
            raise CaptureMemoryError(text, failed=tuple(sorted({bucket for bucket, _ in failed})), captured=captured)
        warnings.warn(text, RuntimeWarning, stacklevel=4)

    def _prepare(self, bucket: int, backend: str) -> None:
        with self._recorded(bucket, backend) as taken:
            plan = self.planner.decode(self.state, bucket, backend)
            prepared = _Bucket(backend, plan, self.state.token_ids(bucket), self.state.positions(bucket))
            with self._rehearsal(bucket) as batch:
                prepared.plan.plan(batch)
                if not len(self._outputs):
                    self._outputs.allocate(self._eager(prepared), bucket, self.ladder.max)
            if self.uses_graphs:
                taken |= self._capture_graph(bucket, prepared)
        self._buckets[bucket, backend] = prepared

    @contextmanager
    def _recorded(self, bucket: int, backend: str) -> Iterator[dict[str, int | None]]:
        """Adds what its body takes to `captures`; what meters count, the body puts in the dict that it is given."""
        started, held, taken = time.perf_counter(), self.planner.num_bytes, {}
        yield taken
        taken |= {"seconds": time.perf_counter() - started, "workspace_bytes": self.planner.num_bytes - held}
        capture = Capture(bucket=bucket, backend=backend, **taken)
        for earlier in [each for each in self.captures if (each.bucket, each.backend) == (bucket, backend)]:
            self.captures.remove(earlier)
            capture = capture.after(earlier)
        self.captures.append(capture)

    @contextmanager
    def _rehearsal(self, bucket: int) -> Iterator[Batch]:
        """Stages padding alone, so that steps run in here move no row on and write to no row's pages, and keeps what
        they draw from taking the place of ids that later steps feed."""
        drawn = self.state.drawn.clone()
        try:
            yield self.state.stage(bucket, [], [], [[] for _ in self.state.groups])
        finally:
            self.state.drawn.copy_(drawn)

    def _eager(self, prepared: _Bucket) -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad(), active_plans(prepared.plan.groups):
            self.state.feed(len(prepared.token_ids_B))
            return self._step_fn(prepared.token_ids_B, prepared.positions_B)

    def _call(self, prepared: _Bucket) -> None:
        """The step and the copy into the shared outputs: exactly what is captured."""
        self._outputs.copy_(self._eager(prepared), len(prepared.token_ids_B))

    def _capture_graph(self, bucket: int, prepared: _Bucket) -> dict[str, int | None]:
        """Warms up and captures; returns the bytes that the graph took."""
        device = self.state.device
        # On the capture stream: compilation and lazily loaded kernels must not be captured.
        with self._rehearsal(bucket), on_stream(self._stream, device):
            self._call(prepared)
        name, where = f"the step at bucket {bucket}", {"stream": self._stream, "device": device}
        graph, bytes_taken = capture_graph(lambda: self._call(prepared), name, pool=self.pool, **where)
        prepared.graph, prepared.signature = graph, prepared.plan.signature
        return bytes_taken
