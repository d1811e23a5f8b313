"""How many pages a model's cache gets, and how long its requests may become."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ..errors import DeviceMemoryError, InvalidArgumentError, OutOfPagesError
from ..groups import row_limit, row_pages
from ..hf.binding import Binding
from ..hf.load import max_positions
from ..ledger import Ledger, mib
from ..memory import SEGMENT, SMALL
from ..spec import FP8, AttentionSpec, CacheSpec
from .forecast import Costs

KV_OOM_MODES = ("raise", "shrink")
FP8_NAMES = ("fp8", "fp8_e4m3", FP8)


@dataclass(frozen=True, kw_only=True)
class CacheAsk:
    """How large a cache is asked for: `num_pages`, or else `kv_bytes`, or else a share of what is free; and what to do
    where memory does not hold it, "raise" or "shrink"."""

    num_pages: int | None
    kv_bytes: int | None
    memory_fraction: float
    on_kv_oom: str

    @property
    def is_share(self) -> bool:
        return self.num_pages is None and self.kv_bytes is None

    def budget(self, free: int) -> int:
        """Bytes of `free` that may be taken, all in all."""
        part, whole = float(self.memory_fraction).as_integer_ratio()
        return free * part // whole


def length_limit(binding: Binding, max_seq_len: int | None) -> int | None:
    """Tokens a request may reach, pages aside: what was asked, or else the model's limit; None if it has none.

    Raises:
        InvalidArgumentError: more was asked than the model has positions.
    """
    limit = max_positions(binding.model)
    if max_seq_len is not None and limit is not None and max_seq_len > limit:
        raise InvalidArgumentError(f"max_seq_len={max_seq_len}: the model's positions end at {limit}")
    return limit if max_seq_len is None else max_seq_len


@dataclass(frozen=True, kw_only=True)
class GroupSize:
    """One layer group: what it computes, how many layers it has, and more pages than requests can ever use in it; None
    where they have no limit."""

    spec: AttentionSpec
    num_layers: int
    max_pages: int | None


def usable_pages(window: int | None, page_size: int, *, max_batch: int, num_new: int, limit: int | None) -> int | None:
    """Pages of a group, the null page among them, of which requests can use no more; None where they have no limit.

    Args:
        window: tokens that a token of the group sees, itself included; None for all.
        page_size: tokens in a page.
        max_batch: requests that run at once.
        num_new: tokens that all of them compute at once at most, beside those that decode.
        limit: tokens that a request may reach; None for no limit.
    """
    whole = None if limit is None else 1 + max_batch * -(-limit // page_size)
    if window is None:
        return whole
    # Beside its window a row has the page it fills, and one that scheduling keeps free for it.
    windows = 1 + max_batch * (row_pages(window, page_size, 1) + 1) + -(-num_new // page_size)
    return windows if whole is None else min(whole, windows)


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """Arithmetic of one model's cache.

    Attributes:
        ask: what was asked for.
        smallest: a cache of 2 pages.
        groups: the layer groups.
        num_new: tokens of a request that are computed at once at most.
    """

    ask: CacheAsk
    smallest: CacheSpec
    groups: tuple[GroupSize, ...]
    num_new: int

    @classmethod
    def of(
        cls,
        binding: Binding,
        ask: CacheAsk,
        *,
        kv_cache_dtype: str | torch.dtype,
        page_size: int,
        layout: str,
        max_batch: int,
        num_new: int,
        limit: int | None,
    ) -> Sizing:
        """For a bound model, so many requests and so many tokens of each.

        Raises:
            InvalidArgumentError: a `kv_cache_dtype` that is neither the model's nor fp8.
        """
        computed = binding.model.dtype
        dtype = FP8 if kv_cache_dtype in FP8_NAMES else computed
        if kv_cache_dtype not in ("auto", computed, *FP8_NAMES):
            raise InvalidArgumentError(
                f"kv_cache_dtype={kv_cache_dtype!r}: choose 'auto' for the model's own, {computed}, or 'fp8' for {FP8}"
            )
        layout = "NHD" if layout == "auto" else layout
        return cls(
            ask=ask,
            smallest=CacheSpec(num_pages=2, page_size=page_size, dtype=dtype, layout=layout, query_dtype=computed),
            groups=tuple(
                GroupSize(
                    spec=spec,
                    num_layers=len(binding.layers_of(group)),
                    max_pages=usable_pages(spec.window, page_size, max_batch=max_batch, num_new=num_new, limit=limit),
                )
                for group, spec in enumerate(binding.groups)
            ),
            num_new=num_new,
        )

    @property
    def max_pages(self) -> int | None:
        """More than requests can ever use in any group; None where they have no limit."""
        each = [group.max_pages for group in self.groups]
        return None if None in each else max(each)

    def caches(self, num_pages: int) -> list[CacheSpec]:
        """That of each layer group where one may have so many pages: others have as many, or what their windows can use
        if that is less."""
        widest = self.max_pages
        return [
            replace(
                self.smallest,
                num_pages=num_pages if group.max_pages == widest else min(num_pages, group.max_pages or num_pages),
            )
            for group in self.groups
        ]

    def bytes_of(self, num_pages: int, *, in_segments: bool = False) -> int:
        """Of all groups' pages where one may have so many; `in_segments` as torch takes them from the device."""
        total = 0
        for group, cache in zip(self.groups, self.caches(num_pages), strict=True):
            tensor_bytes = cache.num_pages * cache.page_bytes(group.spec) // 2
            if in_segments and tensor_bytes >= SMALL:
                tensor_bytes = -(-tensor_bytes // SEGMENT) * SEGMENT
            total += 2 * group.num_layers * tensor_bytes
        return total

    def most_pages(self, budget: int, *, in_segments: bool = False) -> int:
        """The most pages whose bytes are within a budget; 0 where not even 2 pages are."""
        low, high = 0, budget // min(self.smallest.page_bytes(group.spec) for group in self.groups) + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.bytes_of(max(2, middle), in_segments=in_segments) <= budget
            low, high = (middle, high) if fits else (low, middle)
        return low if low >= 2 else 0

    def is_plenty(self, free: int) -> bool:
        """Whether all that requests can use is half of what may be taken, or less: what else a start takes will do with
        the other half, and need not be measured first."""
        return self.max_pages is not None and 2 * self.bytes_of(self.max_pages) <= self.ask.budget(free)

    def num_pages(self, base: Ledger, costs: Costs | None) -> int:
        """Pages of the cache.

        Args:
            base: the ledger before the start.
            costs: what a start takes beside the cache, if it is known.

        Raises:
            DeviceMemoryError: the share of what is free holds no 2 pages beside that; says what was asked and there.
            InvalidArgumentError: `kv_bytes` hold no 2 pages.
        """
        ask = self.ask
        if ask.num_pages is not None:
            return ask.num_pages
        if ask.kv_bytes is not None:
            pages = self.most_pages(ask.kv_bytes)
            if pages < 2:
                raise InvalidArgumentError(
                    f"kv_bytes={ask.kv_bytes}: that holds fewer than 2 pages (the null page and one more) of "
                    f"{self.bytes_of(2) // 2} bytes in all layers; raise it, or make the pages smaller"
                )
            return pages
        pages = self.that_fit(base, costs)
        if pages < 2:
            raise DeviceMemoryError(self.shortage(base, costs))
        return pages

    def that_fit(self, now: Ledger, costs: Costs | None) -> int:
        """Pages that the share of what is free holds now, 0 where that is fewer than 2."""
        if now.meters.free is None:
            return 0
        budget = self.ask.budget(now.meters.free) - (0 if costs is None else costs.num_bytes)
        pages = self.most_pages(budget, in_segments=now.meters.source == "driver")
        return pages if self.max_pages is None else min(pages, self.max_pages)

    def shortage(self, now: Ledger, costs: Costs | None) -> str:
        """What was asked, what there is and what to do."""
        meters, others = now.meters, {line.name: line.bytes for line in now.lines}
        text = (
            f"memory_fraction={self.ask.memory_fraction} of {mib(meters.free)} MiB free of {mib(meters.total)} on "
            f"{now.device} is {mib(self.ask.budget(meters.free))} MiB; "
        )
        if costs is not None:
            text += f"{mib(costs.num_bytes)} MiB of that go to all but the cache ({costs.source}), and "
        text += f"the rest does not hold 2 pages of {mib(self.bytes_of(2) // 2)} MiB. "
        for name in ("other processes", "CUDA context and other processes"):
            if name in others:
                text += f"By its ledger {mib(others[name])} MiB are of {name}. "
        return (
            f"{text}Free memory, raise memory_fraction, or ask for less: a lower max_prefill_tokens, max_batch or "
            "max_seq_len, fewer buckets"
        )


def room(sizing: Sizing, num_pages: int, limit: int | None) -> int:
    """Tokens that a request may reach in caches where one has so many pages, and at most `limit`."""
    caches = sizing.caches(num_pages)
    limits = [
        row_limit(cache.num_pages, cache.page_size, group.spec.window, sizing.num_new)
        for group, cache in zip(sizing.groups, caches, strict=True)
    ]
    known = [each for each in (limit, *limits) if each is not None]
    # Windows alone, and positions without an end: page tables have to end somewhere.
    return min(known) if known else (max(cache.num_pages for cache in caches) - 1) * sizing.smallest.page_size


def check_room(sizing: Sizing, num_pages: int, max_seq_len: int) -> None:
    """Raises OutOfPagesError if one request of that length does not fit."""
    there = room(sizing, num_pages, max_seq_len)
    if there < max_seq_len:
        size = sizing.smallest.page_size
        needed, usable = -(-max_seq_len // size), there // size
        raise OutOfPagesError(
            f"max_seq_len={max_seq_len} needs {needed} pages, the cache has {usable} (page_size={size}): "
            "lower max_seq_len or give the cache more"
        )


def weights_of_token(model: nn.Module) -> int:
    """Weights that a token is multiplied with: all but the embedding, and of experts, which lie in one tensor of three
    dimensions, those of as many as a token has."""
    config = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    sizes = [
        weight.numel() * min(chosen, len(weight)) // len(weight) if chosen and weight.dim() == 3 else weight.numel()
        for weight in model.parameters()
    ]
    return sum(sizes) - model.get_input_embeddings().weight.numel()
