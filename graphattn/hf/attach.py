"""Runs one loaded transformers model on graphattn's layer: `model(...)` and `model.generate(...)` as they were."""

from __future__ import annotations

import functools
import inspect
import threading

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..backends.base import Plan
from ..batch import ragged_batch
from ..errors import InvalidArgumentError
from ..layer import Attention
from ..ops import active_plans
from ..plan import Planner, StepPlan
from .binding import IMPLEMENTATION, Binding
from .oracle import Tokens, logits_of
from .paged_cache import PagedCache
from .pool import GrowingPool


def attach(
    model: PreTrainedModel,
    *,
    backend: str = "auto",
    page_size: int = 16,
    num_pages: int | None = None,
    check: bool = True,
) -> Attachment:
    """Puts graphattn's attention under a loaded model, this instance only.

    `model(...)` and `model.generate(...)` then keep their keys and values in pages of ours: ragged batches, sampling,
    beams and assisted generation included. The model must be in eval mode and called without grad.

    Args:
        model: a decoder of transformers, on its device.
        backend: "auto" (FlashInfer on CUDA, the reference elsewhere), "flashinfer" or "reference".
        page_size: tokens in a page.
        num_pages: pages at most, one of them reserved; None grows with use.
        check: run a few tokens on transformers' eager attention and on ours, and compare every layer.

    Returns:
        A handle; `.detach()` restores the model exactly, and so does leaving it as a context manager.

    Raises:
        UnsupportedModelError: the model's attention does something this layer does not serve.
        ModelCheckError: it does not compute what transformers' eager attention does; names the first layer.
        BackendError: the backend cannot serve the model's heads on its device.

    Example:
        >>> with graphattn.hf.attach(model):
        ...     model.generate(**tokenizer("The sky is", return_tensors="pt"))
    """
    return Attachment(model, backend=backend, page_size=page_size, num_pages=num_pages, check=check)


def detach(model: PreTrainedModel) -> None:
    """Detaches a model whose handle is gone; `Attachment.detach()` for one that has lost it.

    Raises:
        InvalidArgumentError: the model is not attached by `attach`.
    """
    handle = getattr(getattr(vars(model).get("forward"), "func", None), "__self__", None)
    if not isinstance(handle, Attachment):
        raise InvalidArgumentError(f"{type(model).__name__} is not attached: there is nothing to detach")
    handle.detach()


class Attachment:
    """The handle that `attach` returns.

    While it is attached, calls of the model raise InvalidArgumentError for what is not served (training, grad, masks
    other than padding, caches of other kinds, attention weights) and OutOfPagesError beyond `num_pages`; a call that
    raises leaves the cache it was given as it was. Threads may share the model; their calls take turns.

    Attributes:
        model: the attached model.
        backend: name of the backend that computes attention.
        pages: who holds which page: `pages.num_used` is 0 when no cache is left.
    """

    def __init__(self, model: PreTrainedModel, *, backend: str, page_size: int, num_pages: int | None, check: bool):
        self.model = model
        self._binding = Binding(model, packs=False, checks=check)
        self._calls = _CallLock()
        try:
            self._pool: GrowingPool | None = GrowingPool(self._binding, page_size=page_size, num_pages=num_pages)
            if backend == "auto" and model.device.type == "cuda":
                backend = "flashinfer"  # every call is a ragged one; others differ in decode plans only
            planner = Planner(self._binding.groups, self._pool.caches[0].cache, model.device, backend)
            self._plan: StepPlan | None = planner.prefill()
        except BaseException:
            self._binding.detach()
            raise
        self.pages, self.backend = self._pool.pages, planner.backends[0].name
        self._had_forward, self._forward = "forward" in vars(model), model.forward
        self._signature = inspect.signature(model.forward)
        # generate reads the signature. A partial, unlike a function, lets a deep copy of the model have its own pages.
        model.forward = functools.update_wrapper(functools.partial(self._forward_on_pages), model.forward)
        if check:
            try:
                self._check()
            except BaseException:
                self.detach()
                raise

    @property
    def layers(self) -> list[Attention]:
        """The model's `Attention` layers by layer index; none any more after `detach`."""
        return self._binding.layers

    def detach(self) -> None:
        """Restores the model exactly and gives the pages' memory back; does nothing the second time."""
        if self._pool is None:
            return
        if self._had_forward:
            self.model.forward = self._forward
        else:
            del self.model.forward
        self._binding.detach()
        for cache in self._pool.caches:
            cache.layers.clear()  # a past_key_values that is still held must not keep the bytes
        self._pool = self._plan = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc_info) -> None:
        self.detach()

    def __repr__(self) -> str:
        groups = ", ".join(map(str, self._binding.groups))
        state = f"{len(self.layers)} layers, {self.backend}, {groups}" if self._pool else "detached"
        return f"Attachment({type(self.model).__name__}, {state})"

    def _check(self) -> None:
        """Runs the oracle's rows, padded on the left, and a token more of each; raises ModelCheckError."""
        oracle = self._binding.oracle
        ids, past, longest = oracle.ids, None, max(oracle.prompts)
        mask = torch.tensor([[0] * (longest - length) + [1] * length for length in oracle.prompts], device=ids.device)
        rows, columns = mask.nonzero(as_tuple=True)
        columns = columns - (longest - torch.tensor(oracle.prompts, device=ids.device))[rows]
        prompt = torch.zeros_like(ids[:, :longest])
        prompt[mask.bool()] = ids[rows, columns]
        rows_B, ends_B = torch.arange(len(ids), device=ids.device), torch.tensor(oracle.prompts, device=ids.device)
        for step, tokens in (
            (prompt, Tokens(rows, columns, mask.flatten().nonzero().flatten())),
            (ids[rows_B, ends_B][:, None], Tokens(rows_B, ends_B, rows_B)),
        ):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
            options = {"position_ids": positions, "attention_mask": mask, "past_key_values": past, "use_cache": True}
            with torch.no_grad(), oracle.compared(self.layers, tokens):
                out = self.model(input_ids=step, **options)
            oracle.check_logits(logits_of(out).flatten(0, 1)[tokens.places], tokens)
            if (past := getattr(out, "past_key_values", None)) is None:
                break  # a head that gives none back is never continued
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        self._binding.oracle = None  # its tensors are for nothing else

    @torch.compiler.disable(reason="plans are made from host numbers in each call; compile without attach, or use LLM")
    def _forward_on_pages(self, *args, **kwargs):
        """The model's forward, its rows in pages and under a plan; one call at a time, whatever the thread."""
        with self._calls.lock:
            return self._forward_alone(*args, **kwargs)

    def _forward_alone(self, *args, **kwargs):
        if args:
            self._signature.bind(*args, **kwargs)  # a TypeError where the model's own forward would raise it
            kwargs = {**self._signature.bind_partial(*args).arguments, **kwargs}
        tokens = self._tokens(kwargs)
        past, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        num_rows, num_columns = tokens.shape[:2]
        cache = self._cache(past, num_rows)
        valid_BT = _valid(mask, cache, num_columns)
        if mask is None and not cache.num_columns:
            _refuse_packing(kwargs.get("position_ids"))
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = getattr(self.model.config.get_text_config(), "use_cache", False)
        if past is not None or kwargs["use_cache"]:
            kwargs["past_key_values"] = cache
        # Without use_cache the model is given no cache, but its pages are needed until it returns. It keeps the mask:
        # some count positions by it (OPT), or leave padding out of their losses (experts).
        with cache.filling(valid_BT), active_plans(self._plans(cache, valid_BT)):
            return self._forward(**kwargs)

    def _tokens(self, kwargs: dict) -> Tensor:
        """The input ids or embeddings, `[rows, columns, ...]`, of a call that can be served."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            raise InvalidArgumentError("the attached model was called with neither input_ids nor inputs_embeds")
        model = self.model
        has_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (tokens, *model.parameters()))
        if kwargs.get("is_causal") is False:
            raise InvalidArgumentError("is_causal=False: attention on pages is causal; leave it out, or detach")
        if model.training or has_grad or self._binding.is_training:
            raise InvalidArgumentError(
                "the attached model was called in training mode or with grad: call model.eval() and wrap the call in "
                "torch.no_grad(), or detach"
            )
        if kwargs.get("output_attentions") or getattr(model.config, "output_attentions", False):
            raise InvalidArgumentError("output_attentions: attention weights are never formed; ask for none, or detach")
        implementation = self._binding.implementation
        is_moved = self.layers[0].k_cache.data_ptr() != self._pool.caches[0].layers[0][0].data_ptr()
        if implementation != IMPLEMENTATION or is_moved:
            raise InvalidArgumentError(
                f"the model was moved, cast or set to attn_implementation={implementation!r} after attach: detach, do "
                "that, then attach again"
            )
        return tokens

    def _cache(self, past: Cache | None, num_rows: int) -> PagedCache:
        """The cache that a call continues, or a new one."""
        if past is None:
            return PagedCache(self._pool, len(self.layers), num_rows)
        if type(past) is DynamicCache and not past.offloading and past.get_seq_length() == 0:
            # Whoever made it, generate among them, goes on with this object, so it must become what it stands for.
            past.__class__ = PagedCache
            past.__init__(self._pool, len(self.layers), num_rows)
        if not isinstance(past, PagedCache) or past.pool is not self._pool:
            raise InvalidArgumentError(
                f"past_key_values is a {type(past).__name__} that this attachment did not make: pass none, an empty "
                "DynamicCache or the one that the attached model returned (and no cache_implementation to generate)"
            )
        if past.batch_size != num_rows:
            raise InvalidArgumentError(f"{num_rows} rows over a cache of {past.batch_size}: make them equal")
        return past

    def _plans(self, cache: PagedCache, valid_BT: Tensor) -> list[Plan]:
        """Plans of this call for the op."""
        starts, counts, groups = cache.lens, valid_BT.sum(1).tolist(), list(self._plan.groups)
        rows = [row for row, count in enumerate(counts) if count]
        if rows:
            batch = ragged_batch(
                [[0] * counts[row] for row in rows],  # the model embeds its own tokens
                [starts[row] for row in rows],
                [[cache.tables[row].pages for row in rows]] * len(groups),
                page_size=self.pages.page_size,
                device=self.model.device,
            )
            self._plan.caches = [each.cache for each in self._pool.caches]  # they grow
            self._plan.plan(batch)
        if valid_BT.all():
            return groups
        indices_N = valid_BT.flatten().nonzero().flatten().to(self.model.device)
        return [_UnpaddedPlan(group, indices_N) for group in groups]


class _CallLock:
    """A lock that a copy of the model has anew."""

    def __init__(self):
        self.lock = threading.RLock()

    def __reduce__(self):
        return (_CallLock, ())


class _UnpaddedPlan:
    """A plan over the tokens of a padded batch: padding is neither appended nor attended, and comes out as zero."""

    def __init__(self, plan: Plan, indices_N: Tensor):
        self._plan, self._indices_N, self.page_shape, self.spec = plan, indices_N, plan.page_shape, plan.spec

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *others) -> Tensor:
        out = q.new_zeros(q.shape)
        if len(self._indices_N):
            picked = (tensor.index_select(0, self._indices_N) for tensor in (q, k, v))
            out.index_copy_(0, self._indices_N, self._plan.attend(*picked, *others))
        return out


def _valid(mask: Tensor | None, cache: PagedCache, num_columns: int) -> Tensor:
    """Which of the new columns hold tokens, `[B, T]` bool in host memory.

    Raises:
        InvalidArgumentError: the mask is no [rows, columns] mask of 0 and 1, changes what was masked earlier, or has
            padding between tokens.
    """
    shape = (cache.batch_size, cache.num_columns + num_columns)
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device="cpu")
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidArgumentError(f"attention_mask is {found}: only a {shape} mask of 0 and 1 (padding) is served")
    mask = mask.cpu()
    valid_BC = mask.bool()
    if not torch.equal(valid_BC, mask == 1):
        raise InvalidArgumentError("attention_mask holds other values than 0 and 1: only padding is served")
    changed_B = (valid_BC[:, : cache.num_columns] != cache.valid_BC).any(1)
    if changed_B.any():
        raise InvalidArgumentError(
            f"attention_mask changes earlier columns of rows {changed_B.nonzero().flatten().tolist()}: go on with "
            "the mask of the earlier calls; what is cached cannot be masked or unmasked"
        )
    num_runs_B = (valid_BC.int().diff(dim=1, prepend=valid_BC.new_zeros(shape[0], 1).int()) == 1).sum(1)
    if (num_runs_B > 1).any():
        raise InvalidArgumentError(
            f"attention_mask of rows {(num_runs_B > 1).nonzero().flatten().tolist()} has padding between tokens, which "
            "is not served: pad on the left what is to be continued"
        )
    return valid_BC[:, cache.num_columns :]


def _refuse_packing(position_ids: Tensor | None) -> None:
    """Raises InvalidArgumentError where transformers would take positions that jump for the start of another text."""
    if position_ids is not None and position_ids.dim() == 2 and (position_ids.diff(dim=1) != 1).any():
        raise InvalidArgumentError(
            "position_ids do not count up by one: several sequences packed in a row are not served; pass an "
            "attention_mask with them if they are one sequence"
        )
