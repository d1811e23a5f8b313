"""Runs scheduled work on the device: the model, its cache, and the captured decode step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from types import SimpleNamespace

import torch
from torch import Tensor

from ..batch import Batch, ragged_batch
from ..buckets import BucketLadder
from ..cache import KVCache
from ..capture import give_back, reserve_for
from ..draw import Sampled, sample, with_logprobs
from ..errors import CaptureError, DeviceMemoryError, InvalidArgumentError
from ..groups import GroupPools
from ..hf.binding import IMPLEMENTATION, Binding
from ..hf.capturable import refuse_uncapturable
from ..ledger import mib, tensor_bytes
from ..ops import active_plans
from ..pages import NULL_PAGE, PagePool
from ..plan import Planner
from ..prefill_runner import PrefillRunner, default_buckets
from ..runner import DecodeRunner
from ..sampling import Ask, RowSampling, SamplingParams
from ..shortage import first_line, is_out_of_memory
from ..spans import BackendTable
from ..spec import CacheSpec
from ..state import StepState
from .accounts import WORKSPACES, page_lines
from .arguments import vocabulary_of
from .draws import RowDraws
from .flight import Flight
from .forecast import Forecast
from .placement import Placement
from .request import Request
from .scheduler import Chunk
from .seats import seated
from .sizing import weights_of_token
from .step import ModelStep, most_likely

DECODED, PREFILLED = 0, 1  # the rows of `StepState.drawn`


class Executor:
    """A bound model with its pages: decodes and prefills through runners, larger ragged batches without CUDA graphs."""

    def __init__(
        self,
        binding: Binding,
        *,
        backend: str | BackendTable,
        cascade: str,
        enforce_eager: bool,
        compile: bool,
        capture: str,
        on_capture_oom: str,
        max_batch: int,
        prefill: str,
        max_prefill_tokens: int,
        prefill_buckets: Sequence[int] | None,
    ):
        self.binding, self.model, self.device = binding, binding.model, binding.model.device
        if compile or (self.device.type == "cuda" and not enforce_eager):
            refuse_uncapturable(self.model)
        self.num_layers, self.backend, self.cascade = len(binding.layers), backend, cascade
        self.is_lazy = capture == "lazy"
        self.prefill_kernel, self.max_prefill_tokens = prefill, max_prefill_tokens
        # None is what suits the model; nothing is captured later on its own, when memory may be gone.
        self._names_buckets = prefill_buckets is not None
        self.prefill_buckets = () if prefill_buckets is None and self.is_lazy else prefill_buckets
        self._options = {"enforce_eager": enforce_eager, "capture": capture, "on_capture_oom": on_capture_oom}
        self.runner: DecodeRunner | None = None
        self.prefill_runner: PrefillRunner | None = None
        self.caches: list[KVCache] = []  # by layer group
        self.enforce_eager = enforce_eager
        self.shortages: list[str] = []  # of memory, that left out what was asked for
        self.forecast: Forecast | None = None  # what the start was to take,
        self.growth: dict[str, int] = {}  # and what it took, of that `kernel_bytes` outside torch and graphs
        self.kernel_bytes = 0
        self._rows: list[Request] = []  # who decoded where in the last step
        self.step = ModelStep(self.model, compile=compile, max_batch=max_batch)
        self._placement = Placement(self.model)

    def lay_out(self, caches: Sequence[CacheSpec], ladder: BucketLadder, max_seq_len: int) -> None:
        """Makes pages of each layer group, buffers, plans of prefill and a runner; the compiled step is the same for
        any."""
        groups = self.binding.groups
        self.planner = Planner(groups, caches, self.device, self.backend, self.cascade)
        self.caches = self.binding.allocate(caches)
        self.state = StepState(
            max_batch=ladder.max,
            max_seq_len=max_seq_len,
            page_size=self.planner.cache.page_size,
            groups=groups,
            device=self.device,
        )
        self._draws = RowDraws(
            self.state.drawn[DECODED],
            max_batch=ladder.max,
            vocab=vocabulary_of(self.model).fed,
            dtype=self.model.dtype,
        )
        self.step.draw = self._draws
        self.runner = DecodeRunner(self.step, self.state, self.planner, ladder=ladder, **self._options)
        longest = min(self.max_prefill_tokens, ladder.max * max_seq_len)
        self._prefill_plan = self.planner.prefill(self.prefill_kernel, longest)
        self.prefill_runner = PrefillRunner(
            self.step.logits,
            self.planner,
            self._suitable_prefill_buckets(longest) if self.prefill_buckets is None else self.prefill_buckets,
            max_batch=ladder.max,
            max_seq_len=max_seq_len,
            kernel=self.prefill_kernel,
            enforce_eager=self.enforce_eager,
        )

    def pools(self, *, prefix_cache: bool) -> GroupPools:
        """New books of who holds which page of each layer group."""
        pools = [PagePool(cache.num_pages, cache.page_size, prefix_cache=prefix_cache) for cache in self.planner.caches]
        return GroupPools(pools, [spec.window for spec in self.planner.groups])

    def release(self) -> None:
        """Frees graphs, pages and buffers, to the last byte for others; `lay_out` makes new ones."""
        for runner in (self.prefill_runner, self.runner):
            if runner is not None:
                runner.close()
        self.binding.unbind()
        for cache in self.caches:
            cache.layers.clear()  # who still holds the cache must not keep the bytes
        for name in ("planner", "state", "_prefill_plan", "_draws"):
            vars(self).pop(name, None)
        self.step.draw, self._rows = most_likely, []
        if self.device.type == "cuda":
            give_back(self.device)

    def capture(self, progress: Callable[[int, int], None] | None = None, *, max_buckets: int | None = None) -> None:
        """Prepares every bucket (or the largest, if lazily; or so many), and what runs outside them.

        Raises:
            CaptureMemoryError: memory does not hold a bucket.
            DeviceMemoryError: it does not hold the longest prefill beside them.
        """
        num_prefills, num_decodes = len(self.prefill_runner.asked), 0

        def decodes(done: int, total: int) -> None:
            nonlocal num_decodes
            num_decodes = total
            if progress is not None:
                progress(done, total + num_prefills)

        def prefills(done: int, total: int) -> None:
            if progress is not None:
                progress(num_decodes + done, num_decodes + total)

        self.runner.capture(decodes, max_buckets=max_buckets)
        beside = f"beside {mib(self.cache_bytes)} MiB of cache"
        less = "give the cache less (kv_bytes, num_pages or memory_fraction)"
        if failed := self.prefill_runner.capture(prefills):
            text = (
                f"prefills of {', '.join(map(str, failed))} tokens could not be captured {beside} "
                f"({next(iter(failed.values()))}): name fewer in prefill_buckets, or {less}"
            )
            if self._names_buckets and self._options["on_capture_oom"] == "raise":
                raise DeviceMemoryError(text)
            self.shortages.append(text)
            self.prefill_buckets = self.prefill_runner.buckets
            warnings.warn(text, RuntimeWarning, stacklevel=4)
        if self.device.type == "cuda":  # last, so that torch keeps the memory that was found
            try:
                reserve_for(lambda: self._warm_up(self.max_prefill_tokens), self.device)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise DeviceMemoryError(
                    f"a prefill of {self.max_prefill_tokens} tokens does not fit {beside} ({first_line(error)}): lower "
                    f"max_prefill_tokens, or {less}"
                ) from error

    @property
    def about_prefill(self) -> str:
        """Which kernels compute it, and why no others do."""
        return "; ".join(dict.fromkeys(plan.about for plan in self._prefill_plan.groups))

    def prefill(self, chunks: Sequence[Chunk]) -> Flight:
        """Computes the next tokens of each request; draws one for each chunk that completes its request's tokens.

        Decode first in a step that does both: this overwrites where the last prefill's draws lie.
        """
        requests = [chunk.request for chunk in chunks]
        starts = [request.num_computed for request in requests]
        ends = [start + chunk.num_tokens for start, chunk in zip(starts, chunks, strict=True)]
        rule = self.binding.length_rule
        token_ids = [request.tokens[start:end] for request, start, end in zip(requests, starts, ends, strict=True)]
        rows = (token_ids, starts, self._tables(requests))
        lengths = None if rule is None else [rule.counted(len(r.prompt), r.computed_as) for r in requests]
        counts = [chunk.num_tokens for chunk in chunks]
        last = [end - 1 for end, chunk in zip(accumulate(counts), chunks, strict=True) if chunk.completes]
        last = last or [sum(counts) - 1]  # its logits are computed for nobody
        if (bucket := self.prefill_runner.pick(sum(counts), len(chunks))) is not None:
            logits_RV = self.prefill_runner.run(bucket, *rows, last, lengths)
        else:
            batch = ragged_batch(*rows, page_size=self.state.page_size, device=self.device, lengths=lengths)
            logits_RV = self.logits(batch, torch.tensor(last, device="cpu"))
        for chunk in chunks:
            chunk.request.computed(chunk.num_tokens)
        drawn = [chunk.request for chunk in chunks if chunk.request.num_pending == 0]
        if not drawn:  # is waited for as well, or rows beside it would wait for the last two chunks of a prompt at once
            return Flight([], Sampled(self.state.drawn[PREFILLED, :0]))
        sampled = sample(logits_RV, [request.row() for request in drawn])
        self.state.drawn[PREFILLED, : len(drawn)].copy_(sampled.token_ids.clamp(min=0))
        return self._take_off(sampled, drawn, PREFILLED)

    def decode(self, requests: Sequence[Request]) -> Flight:
        """One token for each request, at the bucket that holds them."""
        self._rows = rows = seated(self._rows, requests)
        with self._draws.staged(rows):
            logits_BV, token_ids_B = self.runner.run(
                [request.tokens[-1] for request in rows],
                [len(request.tokens) for request in rows],
                self._tables(rows),
                [request.drawn_at if request.num_unread else None for request in rows],
            )
        for request in rows:
            request.computed(1)
        sampled = with_logprobs(token_ids_B, logits_BV, [request.params.logprobs for request in rows])
        return self._take_off(sampled, rows, DECODED)

    def draw_greedily(self, num_rows: int) -> None:
        """Has the first rows take the most likely token, until they ask for another draw."""
        row = SimpleNamespace(ask=Ask(seed=0), tokens=(), stop_ids=frozenset())
        with self._draws.staged([row] * num_rows):
            pass

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Copies named tensors into the model's own, whose addresses captured graphs hold."""
        own = self.model.state_dict()
        for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
            if name not in own:
                raise InvalidArgumentError(f"weight {name!r}: the model has none of that name")
            if not isinstance(tensor, Tensor):
                raise InvalidArgumentError(f"weight {name!r} is a {type(tensor).__name__}: give a torch.Tensor")
            if own[name].shape != tensor.shape:
                raise InvalidArgumentError(
                    f"weight {name!r} is {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
                )
            if tensor.is_floating_point() != own[name].is_floating_point():
                raise InvalidArgumentError(f"weight {name!r} is {tensor.dtype}, the model's is {own[name].dtype}")
            own[name].copy_(tensor)

    def check_model(self) -> None:
        """Raises what says that the model is no longer the one that was attached and captured.

        Raises:
            InvalidArgumentError: its attention implementation, a norm that our layers compute or a merged weight was
                changed.
            CaptureError: a weight no longer lies where captured steps read it.
        """
        if self.binding.implementation != IMPLEMENTATION:
            raise InvalidArgumentError(
                f"the model was set to attn_implementation={self.binding.implementation!r} while an LLM runs it: set "
                f"it back to {IMPLEMENTATION!r}, or close the LLM first"
            )
        self.binding.rotary.check()
        if not self.runner.uses_graphs:
            self.binding.merged.check()
            return
        if not self._placement.is_intact:
            raise CaptureError(
                "a weight was moved or a module reassigned after capture, so captured steps would read the old one; "
                "update weights in place with llm.load_weights(...), or make a new LLM"
            )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's weights and buffers."""
        return tensor_bytes(self._placement.tensors)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(cache.num_bytes for cache in self.caches)

    def parts(self) -> dict[str, int]:
        """Bytes in tensors by what they are for."""
        return {
            "weights": self.weight_bytes,
            **page_lines(self.caches),
            WORKSPACES: self.planner.num_bytes,
            "step buffers": self.state.num_bytes + self._draws.num_bytes + self.prefill_runner.num_bytes,
            "logits": self.runner.num_bytes,
        }

    def close(self) -> None:
        """Frees graphs, pages and buffers, and restores the model."""
        self.release()
        self.binding.detach()
        del self.step, self._placement

    def _suitable_prefill_buckets(self, longest: int) -> tuple[int, ...]:
        """What suits the model and steps of so many tokens, where prefill can be captured."""
        if self.device.type != "cuda" or self.backend == "reference":
            return ()
        return default_buckets(longest, weights_of_token(self.model))

    def _warm_up(self, num_tokens: int) -> None:
        """Draws, and a prefill of that many tokens on the null page: kernels are compiled at their first call, which
        no request should wait for, and their memory is found."""
        vocab, max_batch = self.model.get_input_embeddings().num_embeddings, self.runner.ladder.max
        for count in (1, max_batch):
            logits = torch.zeros(count, vocab, dtype=self.model.dtype, device=self.device)
            for penalty in (1.0, 2.0):
                params = SamplingParams(repetition_penalty=penalty)
                sample(logits, [RowSampling(params, seed=0, position=0, seen=(0,))] * count)
        most, page_size = self.state.max_seq_len, self.state.page_size
        lens = [min(most, num_tokens - start) for start in range(0, num_tokens, most)][:max_batch]
        tables = [[NULL_PAGE] * -(-length // page_size) for length in lens]
        rows = ([[0] * length for length in lens], [0] * len(lens), [tables] * len(self.caches))
        batch = ragged_batch(*rows, page_size=page_size, device=self.device)
        self.logits(batch, batch.qo_indptr_B1[1:].long() - 1)

    def logits(self, batch: Batch, last: Tensor) -> Tensor:
        """Logits after tokens `last` (int64, in host memory) of a ragged batch, `[len(last), vocabulary]`."""
        self._prefill_plan.plan(batch)
        with torch.no_grad(), active_plans(self._prefill_plan.groups):
            return self.step.logits(batch.token_ids_N, batch.positions_N, self._upload(last))

    def _tables(self, requests: Sequence[Request]) -> list[list[list[int]]]:
        """Each group's pages of each request."""
        groups = range(len(self.caches))
        return [[request.pages.tables[group].pages for request in requests] for group in groups]

    def _upload(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _take_off(self, sampled: Sampled, requests: Sequence[Request], region: int) -> Flight:
        """Sends what was drawn, and lies in a region of the state for the next step to feed, to the host."""
        flight = Flight(requests, sampled)
        first = region * self.state.drawn.shape[1]
        for row, request in enumerate(requests):
            request.draw(first + row)
        return flight
