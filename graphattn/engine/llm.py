"""The engine as its users see it."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..buckets import BucketLadder
from ..errors import InvalidArgumentError, InvalidRequestError, OutOfPagesError
from ..hf.binding import Binding
from ..hf.load import end_token_ids, load_model, max_positions
from ..memory import Ledger, ledger, pages_that_fit, read_meters
from ..pages import BlockTable, PagePool
from ..sampling import SamplingParams, derive_seed, stop_ids
from ..spec import CacheSpec
from .executor import Drawn, Executor
from .request import Delta, FinishReason, Request, RequestOutput
from .scheduler import Scheduler
from .text import TextStream

Prompt = str | Sequence[int]
Progress = Callable[[str, int, int], None]


class LLM:
    """A decoder of transformers behind continuous batching, its decode step captured once per batch-size bucket.

    Use it from one thread. It attaches to the model it is given and restores it in `close()`.

    Args:
        model: a model folder, a `.gguf` file, a name on the hub, or a loaded transformers model (eval mode).
        tokenizer: for a loaded model; without one, prompts are token ids and results have no text.
        dtype: of the weights when loading; None for what the file holds.
        device: where to load; None for CUDA where there is one.
        backend: "auto" (FlashInfer on CUDA, the reference elsewhere), "flashinfer" or "reference".
        enforce_eager: no CUDA graphs. Steps still run at the buckets, with the same bits.
        compile: compile the step with Inductor; "auto" does on CUDA.
        capture: "all" buckets at start, or "lazy": the largest at start, others when first used.
        max_batch: requests that run at once.
        max_seq_len: tokens of a request, prompt and generated; None for the model's limit, or what the pages hold.
        buckets: batch sizes to capture; None for a ladder that suits `max_batch`. `max_batch` is always added.
        page_size: tokens in a page.
        num_pages: pages of the cache, the null page among them.
        kv_bytes: bytes of the cache, instead of `num_pages`.
        memory_fraction: with neither, this share of the memory that is free once the model is loaded (no more than
            `max_batch` requests of `max_seq_len` can use).
        max_prefill_tokens: prompt tokens computed in one step; longer prompts are prefilled in chunks.
        prefix_cache: share full pages between requests that begin alike.
        progress: called as `progress(stage, done, total)` while loading ("load") and capturing ("capture").

    Raises:
        ModelFileError: no model at that path.
        UnsupportedModelError: its attention does something that is not served.
        BackendError: no backend for it, e.g. CUDA without FlashInfer; lists why.
        InvalidArgumentError: an argument is out of range.

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
        max_prefill_tokens: int = 8192,
        prefix_cache: bool = True,
        progress: Progress | None = None,
    ):
        ladder = BucketLadder.default(max_batch) if buckets is None else BucketLadder(buckets, max_batch)
        for name, value in (("max_seq_len", max_seq_len), ("max_prefill_tokens", max_prefill_tokens)):
            if value is not None and value < 1:
                raise InvalidArgumentError(f"{name}={value}: it must be at least 1")
        if compile not in (True, False, "auto"):
            raise InvalidArgumentError(f"compile={compile!r}: choose True, False or 'auto'")
        if num_pages is not None and kv_bytes is not None:
            raise InvalidArgumentError(f"num_pages={num_pages} and kv_bytes={kv_bytes}: give one of them")
        progress = progress or (lambda stage, done, total: None)
        progress("load", 0, 1)
        if isinstance(model, nn.Module):
            if dtype is not None or device is not None:
                raise InvalidArgumentError("dtype and device are for loading; this model is loaded: use model.to(...)")
        else:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            model, loaded = load_model(model, dtype=dtype, device=device)
            tokenizer = tokenizer or loaded
        progress("load", 1, 1)
        binding = Binding(model)
        try:
            limit = max_positions(model)
            if max_seq_len is not None and limit is not None and max_seq_len > limit:
                raise InvalidArgumentError(f"max_seq_len={max_seq_len}: the model's positions end at {limit}")
            wanted = max_seq_len or limit
            cache = _cache_spec(binding, page_size, num_pages, kv_bytes, memory_fraction, max_batch, wanted)
            self.pool = PagePool(cache.num_pages, page_size, prefix_cache=prefix_cache)
            if max_seq_len is not None and self.pool.capacity_tokens < max_seq_len:
                raise OutOfPagesError(
                    f"max_seq_len={max_seq_len} needs {self.pool.pages_for(max_seq_len)} pages, the cache has "
                    f"{self.pool.num_usable} (page_size={page_size}): lower max_seq_len or give the cache more"
                )
            self.max_seq_len = min(length for length in (wanted, self.pool.capacity_tokens) if length is not None)
            self._executor = Executor(
                binding,
                cache,
                backend=backend,
                enforce_eager=enforce_eager,
                compile=model.device.type == "cuda" if compile == "auto" else compile,
                capture=capture,
                ladder=ladder,
                max_seq_len=self.max_seq_len,
            )
            self._executor.capture(lambda done, total: progress("capture", done, total))
        except BaseException:
            binding.detach()
            raise
        self.model, self.tokenizer = model, tokenizer
        self._vocab_size = model.get_input_embeddings().num_embeddings
        self._end_ids = end_token_ids(model, tokenizer)
        self._scheduler = Scheduler(self.pool, max_batch=max_batch, max_prefill_tokens=max_prefill_tokens)
        self._ids = itertools.count()
        self._requests: dict[int, list[Request]] = {}
        self._undelivered: list[Delta] = []

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
        prompts = [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise InvalidRequestError(f"{len(each)} SamplingParams for {len(prompts)} prompts: give one, or one each")
        checked = [self._check(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
        deltas = self._drive(checked, each, stream, progress)
        if stream:
            return deltas
        outputs = [delta.output for delta in deltas if delta.output is not None]
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
        conversations = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise InvalidRequestError("chat needs a tokenizer with a chat template: pass tokenizer=, or use generate")
        texts = [
            self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
            for conversation in conversations
        ]
        return self.generate([self._encode(text, add_special_tokens=False) for text in texts], params, **options)

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queues one prompt for `step()`; its `n` samples share the id.

        Raises:
            InvalidRequestError: it cannot be served; nothing was queued.
        """
        params = params or SamplingParams()
        return self._add(self._check(prompt, params), params, incremental=True)

    def step(self) -> list[Delta]:
        """Runs one step: a chunk of prefill for rows that need it, one token for every row that decodes.

        If a forward pass raises, its requests go back to wait with nothing lost, and the error is raised.

        Returns:
            What the step added to each request, finished ones with their output.

        Raises:
            CaptureError: a weight was moved or reassigned since capture.
        """
        deltas, self._undelivered = self._undelivered, []
        self._executor.check_weights()
        schedule = self._scheduler.schedule()
        work = (
            ([chunk.request for chunk in schedule.prefill], lambda: self._executor.prefill(schedule.prefill)),
            (schedule.decode, lambda: self._executor.decode(schedule.decode)),
        )
        completing = [chunk.request for chunk in schedule.prefill if chunk.completes]
        for requests, run in work:
            if not requests:
                continue
            try:
                drawn = run()
            except BaseException:
                for request in reversed([one for one in self._scheduler.running if one in requests]):
                    self._scheduler.preempt(request)
                self._undelivered = deltas
                raise
            deltas += self._accept(completing if requests is not schedule.decode else requests, drawn)
        return deltas

    @property
    def has_work(self) -> bool:
        """Whether `step()` has anything to do or to deliver."""
        return self._scheduler.has_work or bool(self._undelivered)

    def abort(self, request_id: int) -> None:
        """Ends a request now; its output, with what it had so far, comes with the next `step()`.

        Raises:
            InvalidRequestError: no unfinished request has that id.
        """
        if request_id not in self._requests:
            raise InvalidRequestError(f"request {request_id} is not in the engine: it has ended, or never was")
        for request in list(self._requests[request_id]):
            self._undelivered.append(self._end(request, "abort"))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copies named tensors into the model in place, so that captured steps read them, and forgets cached prefixes.

        Raises:
            InvalidArgumentError: a name or shape is not the model's; weights before it are loaded.
        """
        try:
            with torch.no_grad():
                self._executor.load_weights(weights)
        finally:
            self.pool.clear_prefixes()

    def explain(self) -> str:
        """What is in force: mode, backend, rope, ladder, pages, and how steps have run."""
        run, step, planner = self._executor.runner, self._executor.step, self._executor.planner
        spec, counts = self._executor.binding.spec, run.counts
        mode = "captured in CUDA graphs" if run.uses_graphs else "eager (no CUDA graphs)"
        compiled = f"compiled, {step.num_compiles} graphs" if step.compile else "not compiled"
        return "\n".join(
            (
                f"decode      {mode}, {compiled}",
                "prefill     eager, not compiled",
                f"backend     {', '.join(backend.name for backend in planner.backends)} on {self._executor.device}",
                f"layers      {len(self._executor.binding.layers)} x {spec}",
                "rope        applied by the model, outside the op",
                f"buckets     {', '.join(map(str, run.ladder))}",
                f"pages       {self.pool.num_usable} of {self.pool.page_size} tokens, {self.pool.num_used} in use, "
                f"{self.pool.num_cached} cached; max_seq_len {self.max_seq_len}",
                f"steps       {counts['replay']} replayed, {counts['eager']} eager, {counts['guard']} stopped by the "
                f"plan guard; {self._scheduler.num_preemptions} preemptions, {self.pool.num_hits} tokens from the "
                "prefix cache",
            )
        )

    def ledger(self) -> Ledger:
        """Where the bytes are, from tensors, torch, the driver and NVML."""
        parts = self._executor.parts()
        graphs = sum(capture.num_bytes for capture in self._executor.runner.captures)
        if graphs:
            parts["graphs"] = graphs
        return ledger(self._executor.device, parts)

    def close(self) -> None:
        """Aborts what runs, frees graphs and pages, and restores the model; does nothing the second time."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self._executor.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _encode(self, text: str, **options) -> list[int]:
        if self.tokenizer is None:
            raise InvalidRequestError("the prompt is text and there is no tokenizer: pass tokenizer= or token ids")
        return self.tokenizer(text, **options)["input_ids"]

    def _check(self, prompt: Prompt, params: SamplingParams) -> tuple[int, ...]:
        """The prompt's ids, if the engine can serve it whatever else runs."""
        ids = tuple(self._encode(prompt) if isinstance(prompt, str) else prompt)
        if not ids:
            raise InvalidRequestError("the prompt is empty: give at least one token")
        for position, token_id in enumerate(ids):
            if not isinstance(token_id, int) or not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(
                    f"token {token_id!r} at position {position} of the prompt: ids are integers from 0 to "
                    f"{self._vocab_size - 1}"
                )
        if len(ids) + 1 > self.max_seq_len:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens, max_seq_len is {self.max_seq_len}: there is no room to generate"
            )
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError(f"stop={params.stop}: stop strings need a tokenizer; use stop_token_ids")
        for token_id in params.stop_token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(f"stop_token_ids has {token_id}: ids go from 0 to {self._vocab_size - 1}")
        return ids

    def _add(self, ids: tuple[int, ...], params: SamplingParams, *, incremental: bool) -> int:
        request_id, seed = next(self._ids), secrets.randbits(63) if params.seed is None else params.seed
        room = self.max_seq_len - len(ids)
        samples = [
            Request(
                id=request_id,
                index=index,
                prompt=ids,
                params=params,
                seed=derive_seed(seed, index),
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                stop_ids=stop_ids(params, self._end_ids),
                table=BlockTable(self.pool),
                text=TextStream(self._decode, params.stop) if self.tokenizer and (incremental or params.stop) else None,
            )
            for index in range(params.n)
        ]
        self._requests[request_id] = list(samples)
        for request in samples:
            self._scheduler.add(request)
        return request_id

    def _drive(
        self,
        prompts: list[tuple[int, ...]],
        params: list[SamplingParams],
        stream: bool,
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[Delta]:
        """Queues checked prompts and steps until they have ended; others' deltas wait for the next `step()`."""
        total, finished = sum(one.n for one in params), 0
        mine = {self._add(ids, one, incremental=stream) for ids, one in zip(prompts, params, strict=True)}
        others: list[Delta] = []
        try:
            while finished < total:
                for delta in self.step():
                    if delta.request_id not in mine:
                        others.append(delta)
                        continue
                    if delta.output is not None:
                        finished += 1
                        if progress is not None:
                            progress(finished, total)
                    yield delta
        finally:
            for request_id in mine & self._requests.keys():
                for request in list(self._requests[request_id]):
                    self._end(request, "abort")
            self._undelivered = others + [delta for delta in self._undelivered if delta.request_id not in mine]

    def _accept(self, requests: Sequence[Request], drawn: Drawn) -> list[Delta]:
        deltas = []
        for request, (token_id, logprobs) in zip(requests, drawn, strict=True):
            try:
                reason = request.accept(token_id, logprobs)
                text = request.text.take() if request.text is not None and reason is None else ""
            except Exception as error:  # a tokenizer that fails on one request must not take the others along
                deltas.append(self._end(request, "error", new=(token_id,), error=f"{type(error).__name__}: {error}"))
                continue
            if reason is not None:
                deltas.append(self._end(request, reason, new=(token_id,)))
            else:
                deltas.append(Delta(request_id=request.id, index=request.index, token_ids=(token_id,), text=text))
        return deltas

    def _end(
        self, request: Request, reason: FinishReason, *, new: tuple[int, ...] = (), error: str | None = None
    ) -> Delta:
        """Takes a request out of the engine and makes its last delta."""
        self._scheduler.remove(request)
        samples = self._requests[request.id]
        samples.remove(request)
        if not samples:
            del self._requests[request.id]
        piece = text = ""
        if error is None and request.text is not None:
            piece, text = request.text.take(final=True), request.text.text
        elif error is None and self.tokenizer is not None:
            text = self._decode(request.tokens[len(request.prompt) :])
        output = request.output(reason, text, error)
        return Delta(request_id=request.id, index=request.index, token_ids=new, text=piece, output=output)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _cache_spec(
    binding: Binding,
    page_size: int,
    num_pages: int | None,
    kv_bytes: int | None,
    memory_fraction: float,
    max_batch: int,
    max_seq_len: int | None,
) -> CacheSpec:
    model = binding.model
    smallest = CacheSpec(num_pages=2, page_size=page_size, dtype=model.dtype)
    if num_pages is None:
        page_bytes = len(binding.layers) * smallest.page_bytes(binding.spec)
        if kv_bytes is not None:
            num_pages = pages_that_fit(page_bytes=page_bytes, kv_bytes=kv_bytes)
        else:
            free = read_meters(model.device).free
            num_pages = pages_that_fit(page_bytes=page_bytes, free=free, memory_fraction=memory_fraction)
            if max_seq_len is not None:
                num_pages = min(num_pages, 1 + max_batch * -(-max_seq_len // page_size))
    return CacheSpec(num_pages=num_pages, page_size=page_size, dtype=model.dtype)
