"""A few tokens through an engine's own parts, compared with transformers' eager attention before the engine starts."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..batch import ragged_batch
from ..buckets import BucketLadder
from ..errors import DeviceMemoryError
from ..hf.binding import Binding
from ..hf.oracle import Tokens
from ..shortage import first_line, is_out_of_memory
from ..spans import BackendTable
from ..spec import CacheSpec
from .executor import Executor


def prove(binding: Binding, cache: CacheSpec, backend: str | BackendTable, *, prefill: str) -> None:
    """Runs the oracle's rows packed, ragged, through prefill, and a token more of each through a decode step.

    Nothing is compiled or captured: what is compared is each layer of the model with the backend's kernels, over a
    cache of the queries' dtype, since what fp8 rounds away is no fault of the model.

    Args:
        binding: of the model, with an oracle.
        cache: what kind of cache; a small one of that kind is made and freed again.
        backend: as `Executor` takes it; of a table, each backend is tried.
        prefill: likewise.

    Raises:
        ModelCheckError: a layer differs; names the first.
        DeviceMemoryError: memory does not hold so few tokens.
    """
    names = [backend] if isinstance(backend, str) else {span.backend: 0 for each in backend.values() for span in each}
    for name in names:
        executor = Executor(
            binding,
            backend=name,
            cascade="off",
            enforce_eager=True,
            compile=False,
            capture="all",
            on_capture_oom="raise",
            max_batch=len(binding.oracle.prompts),
            prefill=prefill,
            max_prefill_tokens=binding.oracle.ids.numel(),
            prefill_buckets=(),
        )
        try:
            _run(executor, cache)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"not even {binding.oracle.ids.numel()} tokens fit beside the model ({first_line(error)}): end what "
                "else uses the device; check=False leaves out their comparison with transformers' eager attention"
            ) from error
        finally:
            executor.release()
    binding.oracle = None  # its tensors are for nothing else


def _run(executor: Executor, cache: CacheSpec) -> None:
    binding, oracle, page_size = executor.binding, executor.binding.oracle, cache.page_size
    prompts, (num_rows, num_columns) = oracle.prompts, oracle.ids.shape
    per_row = -(-num_columns // page_size)
    tables = [[1 + row * per_row + page for page in range(per_row)] for row in range(num_rows)]
    cache, groups = replace(cache, num_pages=1 + num_rows * per_row, dtype=cache.query_dtype), binding.groups
    executor.lay_out([cache] * len(groups), BucketLadder((num_rows,)), num_columns)
    executor.runner.capture()
    executor.draw_greedily(num_rows)
    ids = oracle.ids.tolist()
    batch = ragged_batch(
        [row[:length] for row, length in zip(ids, prompts, strict=True)],
        [0] * num_rows,
        [[table[: -(-length // page_size)] for table, length in zip(tables, prompts, strict=True)]] * len(groups),
        page_size=page_size,
        device=executor.device,
    )
    where = [(row, column) for row, length in enumerate(prompts) for column in range(length)]
    asked = Tokens(*torch.tensor(where, device=executor.device).T, torch.arange(len(where), device=executor.device))
    with oracle.compared(binding.layers, asked):
        logits = executor.logits(batch, torch.arange(len(where), device="cpu"))
    oracle.check_logits(logits, asked)
    rows, ends = torch.tensor([*enumerate(prompts)], device=executor.device).T
    asked = Tokens(rows, ends, rows)
    fed = [row[length] for row, length in zip(ids, prompts, strict=True)]
    with torch.no_grad(), oracle.compared(binding.layers, asked):
        logits, _ = executor.runner.run(fed, [length + 1 for length in prompts], [tables] * len(groups))
    oracle.check_logits(logits, asked)
