"""How many pages a model's cache gets, and how long its requests may become."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..errors import DeviceMemoryError, InvalidArgumentError, OutOfPagesError
from ..hf.binding import Binding
from ..hf.load import max_positions
from ..ledger import Ledger, mib
from ..memory import pages_that_fit
from ..spec import AttentionSpec, CacheSpec
from .forecast import Costs

KV_OOM_MODES = ("raise", "shrink")


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
class Sizing:
    """Arithmetic of one model's cache.

    Attributes:
        ask: what was asked for.
        smallest: a cache of 2 pages.
        groups: the layer groups, and how many layers each has.
        max_pages: more than requests can ever use; None where they have no limit.
    """

    ask: CacheAsk
    smallest: CacheSpec
    groups: tuple[tuple[AttentionSpec, int], ...]
    max_pages: int | None

    @classmethod
    def of(
        cls,
        binding: Binding,
        ask: CacheAsk,
        *,
        kv_dtype: torch.dtype | None,
        page_size: int,
        layout: str,
        max_batch: int,
        limit: int | None,
    ) -> Sizing:
        """For a bound model, so many requests and so many tokens of each.

        Raises:
            InvalidArgumentError: a `kv_dtype` that is not the model's.
        """
        dtype = binding.model.dtype
        if kv_dtype not in (None, dtype):
            raise InvalidArgumentError(
                f"kv_dtype={kv_dtype}: the model computes in {dtype}, and no backend keeps a cache of any "
                "other dtype; leave kv_dtype out, or load the model in that dtype"
            )
        layout = "NHD" if layout == "auto" else layout
        return cls(
            ask=ask,
            smallest=CacheSpec(num_pages=2, page_size=page_size, dtype=dtype, layout=layout),
            groups=tuple((spec, len(binding.layers_of(at))) for at, spec in enumerate(binding.groups)),
            max_pages=None if limit is None else 1 + max_batch * -(-limit // page_size),
        )

    @property
    def page_bytes(self) -> int:
        """Of a page in all layers."""
        return sum(num_layers * self.smallest.page_bytes(spec) for spec, num_layers in self.groups)

    def bytes_of(self, num_pages: int) -> int:
        """Of so many pages."""
        return num_pages * self.page_bytes

    def caches(self, num_pages: int) -> list[CacheSpec]:
        """That of each layer group."""
        return [replace(self.smallest, num_pages=num_pages)] * len(self.groups)

    def is_plenty(self, free: int) -> bool:
        """Whether all that requests can use is half of what may be taken, or less: what else a start takes will do with
        the other half, and need not be measured first."""
        return self.max_pages is not None and 2 * self.max_pages * self.page_bytes <= self.ask.budget(free)

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
            return pages_that_fit(page_bytes=self.page_bytes, kv_bytes=ask.kv_bytes)
        pages = self.that_fit(base, costs)
        if pages < 2:
            raise DeviceMemoryError(self.shortage(base, costs))
        return pages

    def that_fit(self, now: Ledger, costs: Costs | None) -> int:
        """Pages that the share of what is free holds now, 0 where that is fewer than 2."""
        reserve = 0 if costs is None else costs.num_bytes
        if now.meters.free is None or self.ask.budget(now.meters.free) - reserve < 2 * self.page_bytes:
            return 0
        pages = pages_that_fit(
            page_bytes=self.page_bytes,
            free=now.meters.free,
            memory_fraction=self.ask.memory_fraction,
            reserve=reserve,
            num_tensors=2 * sum(num_layers for _, num_layers in self.groups) if now.meters.source == "driver" else None,
        )
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
        text += f"the rest does not hold 2 pages of {mib(self.page_bytes)} MiB. "
        for name in ("other processes", "CUDA context and other processes"):
            if name in others:
                text += f"By its ledger {mib(others[name])} MiB are of {name}. "
        return (
            f"{text}Free memory, raise memory_fraction, or ask for less: a lower max_prefill_tokens, max_batch or "
            "max_seq_len, fewer buckets"
        )


def check_room(cache: CacheSpec, max_seq_len: int) -> None:
    """Raises OutOfPagesError if one request of that length does not fit."""
    needed, usable = -(-max_seq_len // cache.page_size), cache.num_pages - 1
    if needed > usable:
        raise OutOfPagesError(
            f"max_seq_len={max_seq_len} needs {needed} pages, the cache has {usable} (page_size={cache.page_size}): "
            "lower max_seq_len or give the cache more"
        )
