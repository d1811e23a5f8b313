"""The engine as its users see it."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError
from ..hf.binding import Binding
from ..ledger import Ledger
from ..profile import CaptureProfile, origin
from ..sampling import SamplingParams
from ..scales import KVScales
from ..spans import StepTime
from ..traffic import Traffic
from .accounts import engine_ledger
from .arguments import backend_for, check_arguments, end_ids_of, ladder_for, opened, scales_for, vocabulary_of
from .engine import Engine
from .executor import Executor
from .explain import explain
from .profiling import profile_of, time_steps
from .prompts import Prompt, PromptReader
from .proof import prove
from .request import Delta, RequestOutput, drained
from .scheduler import Scheduler
from .sizing import CacheAsk, Sizing, length_limit
from .start import Progress, Start
from .text import decoder_of


class LLM:
    """A decoder of transformers behind continuous batching, its decode step captured once per batch-size bucket.

    Use it on one CUDA stream: steps share buffers, and one may still run when a call returns. Threads wait for one
    another. It attaches to the model it is given and restores it in `close()`.

    Args:
        model: a model folder, a `.gguf` file, a name on the hub, or a loaded transformers model in eval mode.
        tokenizer: for a loaded model; without one, prompts are token ids and results have no text.
        dtype, device: of the weights when loading; None for what the file holds, and for CUDA where there is one.
        backend: "auto" (the profile's, or the fused one or else FlashInfer on CUDA, the reference elsewhere), "fused",
            "flashinfer", "reference", or "cascade", which reads pages that requests share once for all of them.
        cascade: "auto" captures a cascade for every bucket besides, for steps where `prefixes.pays` says so; "off".
        enforce_eager: no CUDA graphs. Steps still run at the buckets, with the same bits.
        compile: compile the step with Inductor; "auto" does on CUDA.
        capture: "all" buckets at start, or "lazy": the largest at start, others when first used.
        max_batch: requests that run at once.
        max_seq_len: tokens of a request, prompt and generated; None for the model's limit, or what the pages hold.
        buckets: batch sizes to capture; None for a ladder that suits `max_batch`. `max_batch` is always added.
        page_size: tokens in a page.
        num_pages, kv_bytes: pages of each layer group, with the null page (with a window those it can use), or bytes.
        memory_fraction: with neither, what the engine may take of what is free beside the model, if it can be of use.
        on_kv_oom: where memory does not hold that cache: "raise", or "shrink" it to what is free then, with a warning.
        on_capture_oom: where it does not hold a graph: "raise", or "shrink" ladder and `max_batch`, with a warning.
        kv_cache_dtype: "fp8" keeps keys and values in e4m3, a byte each; "auto" in the model's own dtype.
        kv_scales: of an fp8 cache, as `calibrate` gives them, or a file of them; None for 1.0 everywhere.
        layout: of a page: "NHD" (slots first), "HND" or "auto", which is NHD.
        capture_profile: a file of `tools/capture.py`: ladder and backends; refused if made for another model or device.
        record_batches: a file for `tools/capture.py`: `close()` writes how many steps ran with how many rows into it.
        max_prefill_tokens: prompt tokens computed in one step; longer prompts are prefilled in chunks.
        prefill: FlashInfer's "fa2" or "fa3" (compiled once, in a minute); "auto" is fa3 for large batches, if there.
        prefill_buckets: prompt tokens to capture a step at; None for what suits the model (if not lazy), () for none.
        prefix_cache: share full pages between requests that begin alike.
        check: run a few tokens on transformers' eager attention and on ours first, and compare every layer.
        progress: called as `progress(stage, done, total)`; stages "load", "measure" (to size the cache) and "capture".

    Raises:
        ModelFileError: no model at that path; InvalidArgumentError: an argument is out of range.
        UnsupportedModelError: its attention does something that is not served; ModelCheckError if `check` shows it.
        BackendError: no backend for it, e.g. CUDA without FlashInfer, or not the `prefill` asked for; says why.

    Example:
        >>> with LLM("Qwen/Qwen3-0.6B") as llm:
        ...     print(llm.generate("The sky is", SamplingParams(temperature=0, max_tokens=16))[0].text)
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        tokenizer=None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
        cascade: str = "off",
        enforce_eager: bool = False,
        compile: bool | str = "auto",
        capture: str = "all",
        max_batch: int = 256,
        max_seq_len: int | None = None,
        buckets: Sequence[int] | None = None,
        page_size: int = 16,
        num_pages: int | None = None,
        kv_bytes: int | None = None,
        memory_fraction: float = 0.9,
        on_kv_oom: str = "raise",
        on_capture_oom: str = "raise",
        kv_cache_dtype: str | torch.dtype = "auto",
        kv_scales: KVScales | str | Path | None = None,
        layout: str = "auto",
        capture_profile: str | Path | None = None,
        record_batches: str | Path | None = None,
        max_prefill_tokens: int = 8192,
        prefill: str = "auto",
        prefill_buckets: Sequence[int] | None = None,
        prefix_cache: bool = True,
        check: bool = True,
        progress: Progress | None = None,
    ):
        profile = None if capture_profile is None else CaptureProfile.load(capture_profile)
        ladder = ladder_for(max_batch, buckets, profile)
        modes = {"backend": backend, "compile": compile, "capture": capture, "prefill": prefill, "cascade": cascade}
        shortages = {"on_kv_oom": on_kv_oom, "on_capture_oom": on_capture_oom, "memory_fraction": memory_fraction}
        sizes = {"page_size": page_size, "num_pages": num_pages, "kv_bytes": kv_bytes}
        sizes |= {"max_seq_len": max_seq_len, "max_prefill_tokens": max_prefill_tokens}
        given = {"model": model, "tokenizer": tokenizer, "record_batches": record_batches, "progress": progress}
        given |= {"prefill_buckets": prefill_buckets}
        switches = {"enforce_eager": enforce_eager, "prefix_cache": prefix_cache, "check": check}
        check_arguments(**given, **modes, **shortages, layout=layout, switches=switches, counts=sizes)
        progress = progress or (lambda stage, done, total: None)
        model, tokenizer = opened(model, tokenizer, dtype=dtype, device=device, progress=partial(progress, "load"))
        binding = Binding(model, packs=True, checks=check)
        ask = CacheAsk(num_pages=num_pages, kv_bytes=kv_bytes, memory_fraction=memory_fraction, on_kv_oom=on_kv_oom)
        with ExitStack() as undo:
            undo.callback(binding.detach)
            self._executor = Executor(
                binding,
                backend=backend_for(backend, profile, cascade),
                cascade=cascade,
                enforce_eager=enforce_eager,
                compile=model.device.type == "cuda" if compile == "auto" else compile,
                capture=capture,
                on_capture_oom=on_capture_oom,
                max_batch=max_batch,
                prefill=prefill,
                max_prefill_tokens=max_prefill_tokens,
                prefill_buckets=prefill_buckets,
            )
            undo.callback(self._executor.close)
            vocabulary, limit = vocabulary_of(model), length_limit(binding, max_seq_len)
            kind = {"page_size": page_size, "layout": layout, "kv_cache_dtype": kv_cache_dtype}
            sizing = Sizing.of(binding, ask, **kind, max_batch=max_batch, num_new=max_prefill_tokens, limit=limit)
            if check:
                prove(binding, sizing.smallest, self._executor.backend, prefill=prefill)
            if profile is not None:
                profile.check(**origin(model, sizing.smallest))
            if (scales := scales_for(kv_scales, sizing.smallest)) is not None:
                binding.set_scales(scales)
            self._start = Start(self._executor, sizing, ladder, limit=limit, profile=profile, progress=progress)
            self._start.run(max_seq_len)
            undo.pop_all()
        self.pools = self._executor.pools(prefix_cache=prefix_cache)
        self.pool = self.pools.pools[0]
        self.max_seq_len, max_batch = self._executor.state.max_seq_len, self._executor.runner.ladder.max
        self.model, self.tokenizer = model, tokenizer
        # An LLM that is dropped without close() must not leave the model attached, with nobody left to detach it.
        self._finalizer = weakref.finalize(self, self._executor.close)
        self._finalizer.atexit = False
        sizes = {"vocabulary": vocabulary, "limit": limit, "num_new": max_prefill_tokens}
        self._prompts = PromptReader(tokenizer, self.pools, **sizes)
        limits = {"max_batch": max_batch, "max_prefill_tokens": max_prefill_tokens, "length_rule": binding.length_rule}
        self._scheduler = Scheduler(self.pools, **limits)
        self._engine = Engine(
            self._executor,
            self._scheduler,
            max_seq_len=self.max_seq_len,
            end_ids=end_ids_of(model, tokenizer, vocabulary),
            overlap=self._executor.device.type == "cuda",
            decode=decoder_of(tokenizer),
        )
        self._outbox: deque[Delta] = deque()
        self._record_batches = None if record_batches is None else Path(record_batches)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[RequestOutput] | Iterator[Delta]:
        """Generates for all prompts.

        Args:
            prompts: one prompt or several, each text or token ids.
            params: one for all, or one per prompt.
            stream: return an iterator of deltas as they come; `delta.request_id` counts up in prompt order. Closing
                it early aborts what is left.
            progress: called as `progress(finished, total)` when a sample ends.

        Returns:
            One output per prompt in prompt order, or `n` in a row per prompt where `params.n` is more than 1.

        Raises:
            InvalidRequestError: a prompt cannot be served; none was started.
        """
        deltas = self._engine.drive(self._prompts.read_all(prompts, params), streams=stream, progress=progress)
        if stream:
            return deltas
        with closing(deltas):
            outputs = (delta.output for delta in deltas if delta.output is not None)
            return sorted(outputs, key=lambda output: (output.request_id, output.index))

    def chat(
        self, messages: Sequence[dict] | Sequence[Sequence[dict]], params=None, **options
    ) -> list[RequestOutput] | Iterator[Delta]:
        """Generates an answer to one conversation or several through the model's chat template.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`, or a list of such lists.
            params, options: as in `generate`.

        Raises:
            InvalidRequestError: there is no tokenizer, or it has no chat template.
        """
        return self.generate(self._prompts.read_chat(messages), params, **options)

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queues one prompt for `step()`; its `n` samples share the id.

        Raises:
            InvalidRequestError: it cannot be served; nothing was queued.
        """
        return self._engine.add(*self._prompts.read(prompt, params), self._outbox, streams=True)

    def step(self) -> list[Delta]:
        """Runs one step: a chunk of prefill for rows that need it, one token for every row that decodes.

        On CUDA what a step drew is returned by the next call, once that has launched its own. If a forward pass raises,
        its requests go back to wait with nothing lost, and the error is raised.

        Returns:
            What was added to each request of `add_request` since the last call, finished ones with their output.

        Raises:
            CaptureError: a weight was moved or reassigned since capture.
        """
        self._engine.step()
        return drained(self._outbox)

    @property
    def has_work(self) -> bool:
        """Whether `step()` has anything to do or to deliver."""
        return bool(self._engine.unfinished or self._outbox)

    def abort(self, request_id: int) -> None:
        """Ends a request now; its output, with what it had so far, comes with the next `step()`, or from its stream.

        Raises:
            InvalidRequestError: no unfinished request has that id.
        """
        self._engine.abort(request_id)

    def load_weights(
        self,
        weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        kv_scales: KVScales | str | Path | None = None,
    ) -> None:
        """Copies named tensors into the model in place, so that captured steps read them, and forgets cached prefixes.

        Requests that run keep their tokens; their keys and values are computed anew, over `kv_scales` if given.

        Raises:
            InvalidArgumentError: not the model's name or shape; weights before it are loaded. Or scales of another one.
        """
        self._check_open()
        scales = scales_for(kv_scales, self._executor.planner.cache)
        with self._engine.alone("load_weights"):
            self._engine.land()
            try:
                if scales is not None:
                    self._executor.binding.set_scales(scales)
                self._executor.load_weights(weights)
            finally:
                self._scheduler.preempt(self._scheduler.running)
                self.pools.clear_prefixes()

    def explain(self) -> str:
        """What is in force: mode, backend, rope, ladder, pages, and how steps have run."""
        self._check_open()
        return explain(self._executor, self._scheduler, self.max_seq_len, self._start.how)

    def ledger(self) -> Ledger:
        """Where the bytes are, from tensors, torch, the driver and NVML."""
        self._check_open()
        return engine_ledger(self._executor)

    def time_steps(self, num_rows: int, context: int, *, num_steps: int = 20, eager: bool = False) -> list[float]:
        """Seconds of decode steps of that many greedy rows alone, each beginning at `context` tokens.

        The first token of a row is random, what lies in its pages is whatever was there. A step counts from the end of
        the one before, on the device: scheduling and text are left out. Three steps before are not counted.

        Args:
            num_rows, context: how many rows, at the bucket that holds them, and of how many tokens at first.
            num_steps, eager: how many, and whether without CUDA graphs, as the plain call at the same bucket.

        Raises:
            InvalidArgumentError: the engine has requests, an argument is out of range, or rows grow past `max_seq_len`.
            BucketError, OutOfPagesError: no bucket holds the rows, or not the cache.
        """
        self._check_open()
        with self._engine.alone("time_steps"):
            if self.has_work:
                raise InvalidArgumentError("time_steps runs alone, and there are requests: finish or abort them first")
            return time_steps(self._executor, self.pools, num_rows, context, num_steps=num_steps, eager=eager)

    def profile(
        self, step_times: Mapping[int, Sequence[StepTime]] | None = None, ladder: Sequence[int] | None = None
    ) -> CaptureProfile:
        """What capture took, to be saved for `capture_profile=`.

        Args:
            step_times: what `time_steps` gave at each bucket, if measured; of the backend that serves that context.
            ladder: the buckets that a start from it captures, among those captured here; None for all.

        Raises:
            InvalidArgumentError: a bucket that was not captured, or cascades that were.
        """
        self._check_open()
        return profile_of(self._executor, self._start.costs(), step_times or {}, ladder)

    def close(self) -> None:
        """Aborts what runs, frees graphs and pages, and restores the model; does nothing the second time."""
        if not self._finalizer.alive:
            return
        with self._engine.alone("close"):
            try:
                self._engine.close()
            finally:
                self._finalizer()
        if self._record_batches is not None:
            Traffic(max_batch=self._scheduler.max_batch, steps=self._executor.runner.rows).save(self._record_batches)

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise InvalidArgumentError("the LLM is closed, its pages and graphs are freed: make a new one")

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()
