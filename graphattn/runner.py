"""Captures a decode step once per bucket and replays it.

A step is any callable `step_fn(token_ids[B], positions[B]) -> Tensor | tuple[Tensor, ...]` whose attention layers are
`Attention`; every output has B as its first dimension. Its first launch computes something from the tokens, as an
embedding does: attention reads page tables early, and must not come right behind what derives them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Batch
from .buckets import BucketLadder
from .errors import BackendError, CaptureError, InvalidArgumentError
from .ops import active_plans
from .plan import Planner, StepPlan
from .state import StepState

StepFn = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]
CAPTURE_MODES = ("all", "lazy")
_CAPTURING = threading.Lock()  # torch.cuda.graph empties the allocator's cache, which another thread's capture forbids


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What one bucket's capture took.

    Attributes:
        bucket: rows.
        backend: who attends in it.
        seconds: planning, warm-up (with compilation, if the step compiles) and capture.
        pool_bytes: what the graph added to torch's private pool; 0 without CUDA graphs.
        driver_bytes: by how much the driver's free memory shrank beyond that.

    A bucket that was captured anew with the same backend counts all of its captures.
    """

    bucket: int
    backend: str
    seconds: float
    pool_bytes: int = 0
    driver_bytes: int = 0


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

    Attributes:
        captures: a `Capture` per captured bucket and backend, in order.
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
    ):
        if ladder.max != state.max_batch:
            raise InvalidArgumentError(
                f"the ladder ends at {ladder.max}, the state holds {state.max_batch} rows: make them equal"
            )
        for what, ours, theirs in (
            ("page_size", state.page_size, planner.cache.page_size),
            ("layer groups", state.groups, planner.groups),
            ("device", state.device.type, planner.device.type),
        ):
            if ours != theirs:
                raise InvalidArgumentError(f"the state has {what} {ours}, the planner {theirs}: make them equal")
        if capture not in CAPTURE_MODES:
            raise InvalidArgumentError(f"capture={capture!r}: choose {' or '.join(CAPTURE_MODES)}")
        self.uses_graphs = state.device.type == "cuda" and not enforce_eager
        if self.uses_graphs and planner.not_capturable:
            raise BackendError(
                f"backend {planner.not_capturable[0]} cannot run inside a CUDA graph: pass enforce_eager=True"
            )
        self.state, self.planner, self.ladder = state, planner, ladder
        self.captures: list[Capture] = []
        self.counts: Counter[str] = Counter()
        self.rows: Counter[int] = Counter()
        self.served: Counter[tuple[int, str]] = Counter()
        self._step_fn, self._lazy = step_fn, capture == "lazy"
        self._buckets: dict[tuple[int, str], _Bucket] = {}
        self._outputs: tuple[Tensor, ...] = ()
        self._single = self._is_closed = False
        self._pool = torch.cuda.graph_pool_handle() if self.uses_graphs else None
        self._stream = torch.cuda.Stream(state.device) if self.uses_graphs else None

    @property
    def num_bytes(self) -> int:
        """Bytes of the outputs that all buckets share."""
        return sum(output.nbytes for output in self._outputs)

    def capture(self, progress: Callable[[int, int], None] | None = None) -> list[Capture]:
        """Prepares the buckets, largest first so that smaller graphs fit in the pool it leaves.

        Args:
            progress: called as `progress(done, total)` after each bucket.

        Returns:
            What each bucket took.
        """
        self._check_open()
        sizes = sorted(self.ladder, reverse=True)[: 1 if self._lazy else None]
        for done, bucket in enumerate(sizes, start=1):
            for backend in self.planner.names(bucket):
                self._prepare(bucket, backend)
            if progress is not None:
                progress(done, len(sizes))
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
            CaptureError: a bucket that is captured now could not be.
        """
        bucket = self.ladder.pick(len(token_ids))
        prepared = self._for(bucket, seq_lens)
        num_pages = self.planner.cache.num_pages
        batch = self.state.stage(bucket, token_ids, seq_lens, tables, drawn=drawn, num_pages=num_pages)
        prepared.plan.plan(batch)
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
            self._capture_graph(bucket, prepared)
            self.state.stage(bucket, token_ids, seq_lens, tables, drawn=drawn, num_pages=num_pages)
            self._call(prepared)
        return self._result(len(token_ids))

    def verify(
        self, token_ids: Sequence[int], seq_lens: Sequence[int], tables: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        """Runs one step by replay and eagerly at the same bucket and plan, and compares every bit of the outputs.

        Raises:
            CaptureError: an output differs; says which and where.
        """
        replayed = self.run(token_ids, seq_lens, tables)
        replayed = [output.clone() for output in (replayed if isinstance(replayed, tuple) else (replayed,))]
        bucket = self.ladder.pick(len(token_ids))
        self.state.stage(bucket, token_ids, seq_lens, tables, num_pages=self.planner.cache.num_pages)
        self._call(self._for(bucket, seq_lens))
        for index, (output, eager) in enumerate(zip(replayed, self._outputs, strict=True)):
            bits, eager_bits = (each.unsqueeze(-1).view(torch.uint8) for each in (output, eager[: len(token_ids)]))
            differs = bits != eager_bits
            if differs.any():
                rows = differs.flatten(1).any(1).nonzero().flatten().tolist()
                raise CaptureError(
                    f"output {index} of the captured step differs from the eager one in rows {rows}: "
                    "something that the step reads was baked into the capture or moved since"
                )

    def close(self) -> None:
        """Frees the graphs and lets go of every buffer; nothing can be run any more."""
        if self.uses_graphs and not self._is_closed:
            torch.cuda.synchronize(self.state.device)  # a replay may still run on what is freed here
        self._is_closed = True
        self._buckets.clear()
        self._outputs = ()
        for name in ("state", "planner", "_step_fn"):
            vars(self).pop(name, None)

    def _check_open(self) -> None:
        if self._is_closed:
            raise CaptureError("the runner is closed, its graphs are freed: make a new one")

    def _for(self, bucket: int, seq_lens: Sequence[int]) -> _Bucket:
        """The bucket with the backend that serves these rows."""
        self._check_open()
        return self._prepare(bucket, self.planner.backend_for(bucket, seq_lens))

    def _prepare(self, bucket: int, backend: str) -> _Bucket:
        if (bucket, backend) in self._buckets:
            return self._buckets[bucket, backend]
        started = time.perf_counter()
        plan = self.planner.decode(self.state, bucket, backend)
        prepared = _Bucket(backend, plan, self.state.token_ids(bucket), self.state.positions(bucket))
        with self._rehearsal(bucket) as batch:
            prepared.plan.plan(batch)
            self._allocate_outputs(prepared, bucket)
        if self.uses_graphs:
            self._capture_graph(bucket, prepared, started)
        else:
            seconds = time.perf_counter() - started
            self.captures.append(Capture(bucket=bucket, backend=backend, seconds=seconds))
        self._buckets[bucket, backend] = prepared
        return prepared

    @contextmanager
    def _rehearsal(self, bucket: int) -> Iterator[Batch]:
        """Stages padding alone, so that steps run in here move no row on and write to no row's pages, and keeps what
        they draw from taking the place of ids that later steps feed."""
        drawn = self.state.drawn.clone()
        try:
            yield self.state.stage(bucket, [], [], [[] for _ in self.state.groups])
        finally:
            self.state.drawn.copy_(drawn)

    def _allocate_outputs(self, prepared: _Bucket, bucket: int) -> None:
        if self._outputs:
            return
        outputs = self._eager(prepared)
        self._single = isinstance(outputs, Tensor)
        outputs = (outputs,) if self._single else outputs
        for index, output in enumerate(outputs):
            if output.shape[:1] != (bucket,):
                raise InvalidArgumentError(
                    f"output {index} of step_fn is {tuple(output.shape)}: its first dimension must be the {bucket} rows"
                )
        rows = self.state.max_batch
        with torch.inference_mode(False):
            self._outputs = tuple(
                torch.zeros((rows, *output.shape[1:]), dtype=output.dtype, device=output.device) for output in outputs
            )

    def _eager(self, prepared: _Bucket) -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad(), active_plans(prepared.plan.groups):
            self.state.feed(len(prepared.token_ids_B))
            return self._step_fn(prepared.token_ids_B, prepared.positions_B)

    def _call(self, prepared: _Bucket) -> None:
        """The step and the copy into the shared outputs: exactly what is captured."""
        outputs = self._eager(prepared)
        for shared, output in zip(self._outputs, (outputs,) if self._single else outputs, strict=True):
            shared[: len(prepared.token_ids_B)].copy_(output)

    def _capture_graph(self, bucket: int, prepared: _Bucket, started: float | None = None) -> None:
        """Warms up, captures and records what that took."""
        started = time.perf_counter() if started is None else started
        device = self.state.device
        # On the capture stream: compilation and lazily loaded kernels must not be captured.
        current = torch.cuda.current_stream(device)
        with self._rehearsal(bucket):
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(2):
                    self._call(prepared)
            current.wait_stream(self._stream)
        torch.cuda.synchronize(device)
        with _CAPTURING:
            # cuBLAS's workspace must come from the graph's pool: one from outside may be freed, and not by us
            # (torch/_inductor/cudagraph_trees.py clears them too, for every stream).
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            reserved, free = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[0]
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    self._call(prepared)
            except Exception as error:
                raise CaptureError(
                    f"the step at bucket {bucket} runs but cannot be captured ({type(error).__name__}: {error}): it "
                    "must not wait for the device (.item(), .cpu(), printing a tensor), or pass enforce_eager=True"
                ) from error
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        prepared.graph, prepared.signature = graph, prepared.plan.signature
        pool_bytes = torch.cuda.memory_reserved(device) - reserved
        driver_bytes = free - torch.cuda.mem_get_info(device)[0] - pool_bytes
        key = (bucket, prepared.backend)
        earlier = [capture for capture in self.captures if (capture.bucket, capture.backend) == key]
        self.captures = [capture for capture in self.captures if (capture.bucket, capture.backend) != key]
        self.captures.append(
            Capture(
                bucket=bucket,
                backend=prepared.backend,
                seconds=time.perf_counter() - started + sum(capture.seconds for capture in earlier),
                pool_bytes=max(pool_bytes, 0) + sum(capture.pool_bytes for capture in earlier),
                driver_bytes=max(driver_bytes, 0) + sum(capture.driver_bytes for capture in earlier),
            )
        )

    def _result(self, num_rows: int) -> Tensor | tuple[Tensor, ...]:
        outputs = tuple(output[:num_rows] for output in self._outputs)
        return outputs[0] if self._single else outputs
