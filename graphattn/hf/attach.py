"""Runs one loaded transformers model on graphattn's layer: `model(...)` and `model.generate(...)` as they were."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..batch import Batch, ragged_batch
from ..errors import InvalidArgumentError, OutOfPagesError
from ..layer import Attention
from ..ops import active_plans
from ..plan import Planner, StepPlan
from .binding import Binding
from .paged_cache import PagedCache
from .pool import GrowingPool


def attach(
    model: PreTrainedModel, *, backend: str = "auto", page_size: int = 16, num_pages: int | None = None
) -> Attachment:
    """Puts graphattn's attention under a loaded model, this instance only.

    `model(...)` and `model.generate(...)` then keep their keys and values in pages of ours: ragged batches with left
    or right padding, sampling and beams included. The model must be in eval mode and called without grad.

    Args:
        model: a decoder of transformers, on its device.
        backend: "auto", "flashinfer" or "reference".
        page_size: tokens in a page.
        num_pages: pages at most; None grows with use.

    Returns:
        A handle; `.detach()` restores the model exactly, and so does leaving it as a context manager.

    Raises:
        UnsupportedModelError: the model's attention does something this layer does not serve.
        BackendError: the backend cannot serve the model's heads on its device.

    Example:
        >>> with graphattn.hf.attach(model):
        ...     model.generate(**tokenizer("The sky is", return_tensors="pt"))
    """
    return Attachment(model, backend=backend, page_size=page_size, num_pages=num_pages)


class Attachment:
    """The handle that `attach` returns.

    Attributes:
        model: the attached model.
        layers: its `Attention` layers.
    """

    def __init__(self, model: PreTrainedModel, *, backend: str, page_size: int, num_pages: int | None):
        self.model = model
        self._binding = Binding(model)
        try:
            self._pool = GrowingPool(self._binding, page_size=page_size, num_pages=num_pages)
            planner = Planner([self._binding.spec], self._pool.cache.cache, model.device, backend)
            self._plan = planner.prefill()
        except BaseException:
            self._binding.detach()
            raise
        self.backend = planner.backends[0].name
        self._step = ExitStack()
        self._held: PagedCache | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    @property
    def layers(self) -> list[Attention]:
        return self._binding.layers

    def detach(self) -> None:
        """Restores the model exactly; does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        self._binding.detach()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc_info) -> None:
        self.detach()

    def __repr__(self) -> str:
        return (
            f"Attachment({type(self.model).__name__}, {len(self.layers)} layers, {self.backend}, {self._binding.spec})"
        )

    def _before(self, model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Reads what the call asks for, gives its rows pages, and plans."""
        if model.training or (torch.is_grad_enabled() and any(weight.requires_grad for weight in model.parameters())):
            raise InvalidArgumentError(
                "the attached model was called in training mode or with grad: call model.eval() and wrap the call in "
                "torch.no_grad(), or detach"
            )
        ids = args[0] if args else kwargs.get("input_ids")
        tokens = ids if ids is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            raise InvalidArgumentError("the attached model was called with neither input_ids nor inputs_embeds")
        num_rows, num_columns = tokens.shape[:2]
        past = kwargs.get("past_key_values")
        cache = self._cache_of(past, num_rows)
        valid = _valid_columns(kwargs.get("attention_mask"), cache, num_columns, num_rows)
        _refuse_packing(kwargs.get("position_ids"), valid)
        starts = list(cache.lens)
        before = [list(columns) for columns in cache.columns]
        try:
            cache.grow(valid)
        except OutOfPagesError:
            cache.lens, cache.columns = starts, before
            raise
        batch = self._batch(cache, valid, starts, tokens.device)
        plan: StepPlan = self._plan
        plan.plan(batch)
        groups = plan.groups
        if not all(map(all, valid)):
            indices_N = torch.tensor(valid, device=tokens.device).flatten().nonzero().flatten()
            groups = tuple(_UnpaddedPlan(group, indices_N) for group in groups)
        self._step.enter_context(active_plans(groups))
        kwargs = {**kwargs, "attention_mask": None}
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = model.config.get_text_config().use_cache
        self._held = cache  # a call that keeps no cache still needs its pages until it ends
        if past is not None or kwargs["use_cache"]:
            kwargs["past_key_values"] = cache
        return args, kwargs

    def _after(self, model: PreTrainedModel, args: tuple, kwargs: dict, output):
        self._step.close()
        self._held = None

    def _cache_of(self, past: Cache | None, num_rows: int) -> PagedCache:
        if past is None or (isinstance(past, DynamicCache) and past.get_seq_length() == 0):
            return PagedCache(self._pool, len(self.layers), num_rows)
        if not isinstance(past, PagedCache) or past.pool is not self._pool:
            raise InvalidArgumentError(
                f"past_key_values is a {type(past).__name__} that this attachment did not make: pass none, or the one "
                "that the attached model returned (and no cache_implementation to generate)"
            )
        if past.batch_size != num_rows:
            raise InvalidArgumentError(f"{num_rows} rows over a cache of {past.batch_size}: make them equal")
        return past

    def _batch(self, cache: PagedCache, valid: list[list[int]], starts: list[int], device: torch.device) -> Batch:
        # Token ids do not matter here: the model embeds its own.
        rows = [row for row, columns in enumerate(valid) if any(columns)]
        return ragged_batch(
            [[0] * sum(valid[row]) for row in rows],
            [starts[row] for row in rows],
            [[cache.tables[row].pages for row in rows]],
            page_size=self._pool.pages.page_size,
            device=device,
        )


class _UnpaddedPlan:
    """A plan over the tokens of a padded batch: padding is neither appended nor attended, and comes out as zero."""

    def __init__(self, plan, indices_N: Tensor):
        self._plan, self._indices_N = plan, indices_N

    def attend(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        picked = (tensor.index_select(0, self._indices_N) for tensor in (q, k, v))
        out = self._plan.attend(*picked, k_cache, v_cache)
        return q.new_zeros(q.shape).index_copy_(0, self._indices_N, out)


def _valid_columns(mask: Tensor | None, cache: PagedCache, num_columns: int, num_rows: int) -> list[list[int]]:
    """Which of the new columns hold tokens, `[row][column]`.

    Raises:
        InvalidArgumentError: the mask is no [rows, columns] mask of 0 and 1, hides earlier tokens, or has no token.
    """
    if mask is None:
        return [[1] * num_columns for _ in range(num_rows)]
    total = cache.num_columns + num_columns
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (num_rows, total):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidArgumentError(
            f"attention_mask is {shape}: only a [{num_rows}, {total}] mask of 0 and 1 (padding) is served"
        )
    rows = mask.long().tolist()
    for row, (columns, seen) in enumerate(zip(rows, cache.columns, strict=True)):
        if columns[: len(seen)] != seen:
            raise InvalidArgumentError(
                f"attention_mask changes row {row}'s earlier columns: tokens already cached cannot be masked any more"
            )
        start = columns.index(1) if 1 in columns else 0
        if not set(columns) <= {0, 1} or not any(columns) or (0 in columns[start:] and _has_hole(columns[start:])):
            raise InvalidArgumentError(
                f"attention_mask of row {row} is not one run of tokens between padding: masked tokens in the middle "
                "of a row are not served"
            )
    return [columns[cache.num_columns :] for columns in rows]


def _has_hole(columns: list[int]) -> bool:
    return 1 in columns[columns.index(0) :]


def _refuse_packing(position_ids: Tensor | None, valid: list[list[int]]) -> None:
    if position_ids is None or position_ids.dim() != 2:
        return
    rows = position_ids.expand(len(valid), -1).tolist()
    for row, (positions, columns) in enumerate(zip(rows, valid, strict=True)):
        kept = [position for position, column in zip(positions, columns, strict=True) if column]
        if any(after != before + 1 for before, after in zip(kept, kept[1:], strict=False)):
            raise InvalidArgumentError(
                f"position_ids of row {row} do not count up by one: several sequences packed in a row are not served"
            )
