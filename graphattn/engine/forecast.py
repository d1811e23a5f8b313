"""What a start is to take, line by line of the ledger, so that it can be held against what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache import KVCache
from ..ledger import CACHE, Ledger
from ..memory import SEGMENT, SMALL
from ..profile import CaptureProfile, StartCosts
from .accounts import KERNELS, WORKSPACES, page_lines

SPLIT = 1 << 20  # bytes: of what is left of a segment, torch gives more than that to others


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a start takes beside weights and cache.

    Attributes:
        growth: bytes by line of the ledger, beyond what each line had before.
        later: bytes of buckets that are captured when first used.
        source: how that is known, in words.
    """

    growth: Mapping[str, int]
    later: int = 0
    source: str

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return max(0, sum(self.growth.values()) + self.later)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes that lines of the ledger were to have after the start, and that were to be free; what is not named was not
    foreseen."""

    lines: Mapping[str, int]
    free: int | None = None

    @classmethod
    def of(cls, base: Ledger, caches: Sequence[KVCache], costs: Costs | None) -> Forecast:
        """For a ledger as it was before the start, the caches, and what else a start takes if that is known."""
        cache_bytes = sum(cache.num_bytes for cache in caches)
        before = {line.name: line.bytes for line in base.lines}
        lines = {"weights": before["weights"], **page_lines(caches)}
        if costs is None:
            return cls(lines=lines)
        lines |= {name: before.get(name, 0) + grown for name, grown in costs.growth.items()}
        for line, unused in map(unused_bytes, caches if base.meters.source == "driver" else ()):
            lines[line] = lines.get(line, 0) + unused
            cache_bytes += unused
        grown = sum(costs.growth.values()) + cache_bytes
        return cls(lines=lines, free=None if base.meters.free is None else base.meters.free - grown)


def stored_costs(profile: CaptureProfile, settings: Mapping[str, Any]) -> StartCosts | None:
    """What a start of the profile's ladder takes by what is stored of starts with such settings; None if that is not
    of all its backends.

    Where each backend was measured in an engine of its own, every one brings its workspaces, while the other lines are
    those of the one that took most. Kernels are those of all engines together: in one process the later ones found
    loaded what the earlier ones had.
    """
    names = {span.backend for spans in profile.backends.values() for span in spans}
    alike = [each for each in profile.costs if each.settings == settings]
    parts = [each for each in alike if {*each.backends} == names][:1]
    parts = parts or [each for each in alike if len(each.backends) == 1 and names.issuperset(each.backends)]
    if {name for each in parts for name in each.backends} != names:
        return None
    growth = {}
    for line in dict.fromkeys(line for each in parts for line in each.growth):
        sizes = [each.growth.get(line, 0) for each in (alike if line == KERNELS else parts)]
        growth[line] = sum(sizes) if line in (KERNELS, WORKSPACES) else max(sizes)
    return StartCosts(
        backends=tuple(sorted(names)),
        settings=dict(settings),
        max_seq_len=min(each.max_seq_len for each in parts),
        growth=growth,
    )


def unused_bytes(cache: KVCache) -> tuple[str, int]:
    """What torch takes from the device for a cache beyond its bytes, and the line of the ledger that has it."""
    num_tensors = 2 * len(cache.layers)
    tensor_bytes = cache.num_bytes // num_tensors
    unused = -tensor_bytes % SEGMENT if tensor_bytes >= SMALL else 0
    return CACHE if unused > SPLIT else "other torch", num_tensors * unused
