"""Captures prefill once for each of a few numbers of tokens and replays it, so that the host launches no layer of it.

A step is any callable `step_fn(token_ids[N], positions[N], last[R]) -> Tensor` that returns the logits after tokens
`last`, `[R, vocabulary]`, and whose attention layers are `Attention`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .capture import capture_graph, give_back, holds, on_stream, piece_for
from .errors import BucketError, CaptureError
from .ops import active_plans
from .outputs import Outputs
from .padded import PaddedBatch
from .plan import Planner, StepPlan
from .shortage import first_line, is_out_of_memory
from .spec import check_counts

TOKENS_A_ROW = 32  # of a bucket; more rows take more of FlashInfer's workspace, and rows as short leave its tiles empty
SIZES = (128, 256, 512, 1024, 2048, 4096)  # tokens; fewer take as long as 128
MOST_WORK = 2**42  # weights times tokens, from which on the device needs longer than the host to launch the layers


def default_buckets(max_tokens: int, num_weights: int) -> tuple[int, ...]:
    """Those of `SIZES` for which the host is what a prefill waits for, and `max_tokens`, which chunks of a long prompt
    have, if it is no larger.

    Args:
        max_tokens: of a step.
        num_weights: that each token meets.

    Example:
        >>> default_buckets(1000, 2**29), default_buckets(8192, 2**33)
        ((128, 256, 512, 1000), (128, 256, 512))
    """
    most = min(max_tokens, SIZES[-1], MOST_WORK // max(1, num_weights))
    return tuple(sorted({size for size in (*SIZES, max_tokens) if size <= most}))


@dataclass
class _Bucket:
    padded: PaddedBatch
    plan: StepPlan
    graph: torch.cuda.CUDAGraph | None = None
    signature: tuple = ()


class PrefillRunner:
    """Runs prefills at the bucket that holds their tokens: captured in CUDA graphs, or eagerly with the same plan.

    Args:
        step_fn: the step.
        planner: makes each bucket's attention plans.
        buckets: numbers of tokens.
        max_batch: rows of a step.
        max_seq_len: tokens of a row.
        kernel: as `Planner.padded` takes it.
        enforce_eager: never capture; nothing is captured on a CPU either.

    Attributes:
        asked: the buckets, the largest first.
        pool: of the graphs, apart from the decode steps' so that what each takes is known; None without graphs.
        counts: steps by how they ran: "replay", "eager", and "guard" (a plan that no longer matched its capture; such a
            step runs eagerly, and its bucket is not captured anew).

    Raises:
        BackendError: a CUDA graph was asked of a backend that cannot be captured.
        InvalidArgumentError: a bucket is no number of tokens, or `max_batch` or `max_seq_len` none of what they count.
    """

    def __init__(
        self,
        step_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
        planner: Planner,
        buckets: Sequence[int],
        *,
        max_batch: int,
        max_seq_len: int,
        kernel: str = "auto",
        enforce_eager: bool = False,
    ):
        check_counts(max_batch=max_batch, max_seq_len=max_seq_len)
        for bucket in buckets:
            check_counts(**{"a prefill bucket": bucket})
        self.asked = tuple(sorted(set(buckets), reverse=True))
        self.counts: Counter[str] = Counter()
        self._step_fn, self._planner, self._kernel = step_fn, planner, kernel
        self._max_batch, self._max_pages = max_batch, -(-max_seq_len // planner.cache.page_size)
        uses_graphs = planner.device.type == "cuda" and not enforce_eager and len(buckets) > 0
        if uses_graphs:
            planner.check_capturable()
        self.pool = torch.cuda.graph_pool_handle() if uses_graphs else None
        self._stream = torch.cuda.Stream(planner.device) if uses_graphs else None
        self._buckets: dict[int, _Bucket] = {}
        self._outputs = Outputs()

    @property
    def buckets(self) -> tuple[int, ...]:
        """Those that steps run at."""
        return tuple(sorted(self._buckets))

    @property
    def about(self) -> str:
        """The buckets, and which kernels compute each."""
        kernels = {size: {group.about for group in self._buckets[size].plan.groups} for size in self.buckets}
        return ", ".join(f"{size} ({', '.join(sorted(names))})" for size, names in kernels.items())

    @property
    def num_bytes(self) -> int:
        """Bytes of the numbers that each bucket reads, and of the logits that all share."""
        return self._outputs.num_bytes + sum(bucket.padded.num_bytes for bucket in self._buckets.values())

    def capture(self, progress: Callable[[int, int], None] | None = None) -> dict[int, str]:
        """Prepares the buckets, largest first so that smaller graphs fit in the pool it leaves.

        Args:
            progress: called as `progress(done, total)` after each.

        Returns:
            Those that memory does not hold, and what it said.

        Raises:
            CaptureError: the step cannot be captured, or the runner is closed.
        """
        self._check_open()
        failed: dict[int, str] = {}
        for done, num_tokens in enumerate(self.asked, start=1):
            if (reason := self._prepare_or_drop(num_tokens)) is not None:
                failed[num_tokens] = reason
            if progress is not None:
                progress(done, len(self.asked))
        return failed

    def pick(self, num_tokens: int, num_rows: int) -> int | None:
        """The smallest bucket that holds so many tokens in so many rows; None if none does."""
        fitting = (size for size in self._buckets if size >= num_tokens and self._rows(size) >= num_rows)
        return min(fitting, default=None)

    def run(
        self,
        bucket: int,
        token_ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        tables: Sequence[Sequence[Sequence[int]]],
        last: Sequence[int],
        lengths: Sequence[int] | None = None,
        *,
        eager: bool = False,
    ) -> Tensor:
        """Runs one prefill, on the current stream, and returns without waiting for it.

        Args:
            bucket: as `pick` gave it.
            token_ids, starts, tables, lengths: as `ragged_batch` takes them.
            last: tokens, counted through the batch, whose logits are asked for; one a row at most.
            eager: do not replay; the plain call at the same bucket, to compare with.

        Returns:
            The logits, `[len(last), vocabulary]`. They are overwritten by the next prefill.

        Raises:
            BucketError: there is no such bucket.
            CaptureError: the runner is closed.
            InvalidArgumentError: the rows are more than it holds, not of one length, without tokens or pages, or a page
                is not the cache's.
        """
        if bucket not in self._buckets:
            self._check_open()
            raise BucketError(
                f"no prefill of {bucket} tokens is prepared, only {list(self.buckets)}: call capture() before, and ask "
                "pick() for one"
            )
        prepared = self._buckets[bucket]
        prepared.plan.plan(prepared.padded.fill(token_ids, starts, tables, last, lengths))
        how = "replay" if prepared.signature == prepared.plan.signature else "guard"
        how = "eager" if prepared.graph is None or eager else how
        self.counts[how] += 1
        if how == "replay":
            prepared.graph.replay()
        else:
            self._call(prepared)
        return self._outputs.rows(len(last))

    def close(self) -> None:
        """Frees the graphs and lets go of every buffer; nothing can be run any more, and no bucket is picked."""
        if self._stream is not None and self._buckets:
            torch.cuda.synchronize(self._planner.device)  # a replay may still run on what is freed here
        self._buckets.clear()
        self._outputs.clear()
        for name in ("_planner", "_step_fn"):
            vars(self).pop(name, None)

    def _check_open(self) -> None:
        if "_planner" not in vars(self):
            raise CaptureError("the runner is closed, its graphs are freed: make a new one")

    def _rows(self, num_tokens: int) -> int:
        return min(self._max_batch, num_tokens, max(2, num_tokens // TOKENS_A_ROW))

    def _prepare_or_drop(self, num_tokens: int) -> str | None:
        """Prepares a bucket, or says how memory did not hold it; what it took is then given back."""
        try:
            self._buckets[num_tokens] = self._prepared(num_tokens)
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        if not self._buckets:
            self._outputs.clear()  # they have the rows of the largest bucket
        give_back(self._planner.device)
        return reason

    def _prepared(self, num_tokens: int) -> _Bucket:
        planner = self._planner
        padded = PaddedBatch(
            num_tokens,
            self._rows(num_tokens),
            max_pages=self._max_pages,
            page_size=planner.cache.page_size,
            num_groups=len(planner.groups),
            device=planner.device,
        )
        prepared = _Bucket(padded, planner.padded(padded, self._kernel))
        prepared.plan.plan(padded.fill([], [], [[] for _ in planner.groups], []))  # padding alone, on the null page
        if not len(self._outputs):
            self._outputs.allocate(self._eager(prepared), padded.num_rows, padded.num_rows)
        if self._stream is not None:
            self._capture_graph(prepared)
        return prepared

    def _eager(self, prepared: _Bucket) -> Tensor:
        padded = prepared.padded
        with torch.no_grad(), active_plans(prepared.plan.groups):
            return self._step_fn(padded.token_ids_N, padded.positions_N, padded.last_R)

    def _call(self, prepared: _Bucket) -> None:
        """The step and the copy into the shared logits: exactly what is captured."""
        self._outputs.copy_(self._eager(prepared), prepared.padded.num_rows)

    def _capture_graph(self, prepared: _Bucket) -> None:
        device = self._planner.device
        # On the capture stream: compilation and lazily loaded kernels must not be captured.
        with on_stream(self._stream, device):
            size = piece_for(lambda: self._call(prepared), device)
        in_one_piece = not self._buckets and holds(size, device)

        def step() -> None:
            if in_one_piece:
                torch.empty(size, dtype=torch.uint8, device=device)  # freed at once, and what follows is cut from it
            self._call(prepared)

        prepared.graph, _ = capture_graph(
            step,
            f"a prefill of {prepared.padded.num_tokens} tokens",
            instead="name no prefill bucket (LLM: prefill_buckets=())",
            pool=self.pool,
            stream=self._stream,
            device=device,
        )
        prepared.signature = prepared.plan.signature
