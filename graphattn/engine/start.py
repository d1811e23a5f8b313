"""How an engine starts: what it takes is measured or known, then its cache is sized, allocated and captured over."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

from ..buckets import BucketLadder
from ..capture import give_back
from ..errors import DeviceMemoryError
from ..ledger import CACHE, Ledger, mib
from ..profile import CaptureProfile, StartCosts
from ..shortage import first_line, is_out_of_memory
from .accounts import KERNELS, PREFILL_POOL, base_ledger, growth
from .executor import Executor
from .forecast import Costs, Forecast, stored_costs, unused_bytes
from .sizing import Sizing, check_room, room

Progress = Callable[[str, int, int], None]


class Start:
    """One start of an executor.

    Args:
        executor: nothing is laid out in it yet.
        sizing: the arithmetic of its cache.
        ladder: the buckets to capture.
        limit: tokens that a request may reach, pages aside; None for no limit.
        profile: what a start took before, if that is stored.
        progress: called as `progress(stage, done, total)` with stages "measure" and "capture".

    Attributes:
        how: where the size of the cache comes from, in words.
    """

    def __init__(
        self,
        executor: Executor,
        sizing: Sizing,
        ladder: BucketLadder,
        *,
        limit: int | None,
        profile: CaptureProfile | None,
        progress: Progress,
    ):
        self._executor, self._sizing, self._ladder, self._limit = executor, sizing, ladder, limit
        self._profile, self._progress = profile, progress
        self.how = ""
        self._unused = 0  # bytes that torch had and nothing held before the start

    def run(self, max_seq_len: int | None) -> None:
        """Sizes the cache, allocates it and captures.

        Args:
            max_seq_len: tokens that a request must be able to reach, if that was asked.

        Raises:
            DeviceMemoryError: memory does not hold what was asked; CaptureMemoryError if buckets.
            OutOfPagesError: the cache does not hold one request of `max_seq_len`.
        """
        executor, sizing = self._executor, self._sizing
        if executor.device.type == "cuda":
            give_back(executor.device)  # what loading left is free for us
        base = base_ledger(executor)
        if sizing.ask.is_share and base.meters.free is None:
            raise DeviceMemoryError(
                f"what is free of {base.device} is not known {base.notes}: give kv_bytes or num_pages"
            )
        costs = self._known_costs(base)
        may_rehearse = costs is None and sizing.ask.is_share and base.meters.source == "driver"
        if may_rehearse and not sizing.is_plenty(base.meters.free):
            costs = self._rehearse(base)
        num_pages = sizing.num_pages(base, costs)
        self.how = self._explain(base, costs)
        base, costs = self._allocate(num_pages, base, costs, max_seq_len)
        executor.capture(partial(self._progress, "capture"))
        executor.growth, self._unused = growth(executor, base), base.size_of(CACHE)
        executor.forecast = Forecast.of(base, executor.caches, costs)

    def costs(self) -> StartCosts:
        """What it took, to be stored."""
        executor = self._executor
        grown = dict(executor.growth)
        for line, unused in (unused_bytes(cache) for cache in executor.caches):
            if line in grown:
                grown[line] -= unused
        if CACHE in grown:
            grown[CACHE] += self._unused
        return StartCosts(
            backends=executor.planner.all_names,
            settings=self._settings(),
            max_seq_len=executor.state.max_seq_len,
            growth=grown,
        )

    def _settings(self) -> dict[str, str | int | bool]:
        executor, asked = self._executor, self._executor.prefill_buckets
        return {
            "compile": executor.step.compile,
            "enforce_eager": executor.enforce_eager,
            "max_prefill_tokens": executor.max_prefill_tokens,
            "prefill": executor.prefill_kernel,
            "prefill_buckets": "auto" if asked is None else ", ".join(map(str, asked)),
        }

    def _room(self, num_pages: int) -> int:
        """Tokens that a request may reach in so many pages."""
        return room(self._sizing, num_pages, self._limit)

    def _that_fit(self, base: Ledger, costs: Costs | None) -> int:
        """The pages that fit beside such costs, none at all for None."""
        return max(2, self._sizing.that_fit(base, costs))

    def _known_costs(self, base: Ledger) -> Costs | None:
        """What the profile has on a start like this one; None if it has nothing, or of another."""
        if self._profile is None or not self._sizing.ask.is_share:
            return None
        settings = self._settings()
        stored = stored_costs(self._profile, settings)
        if stored is None and settings["prefill_buckets"] == "":
            # Of what a start with captured prefills took, this one takes less.
            stored = stored_costs(self._profile, settings | {"prefill_buckets": "auto"})
        if stored is None:
            return None
        grown = dict(stored.growth)
        if settings["prefill_buckets"] == "":
            grown.pop(PREFILL_POOL, None)
        now, later = [], []
        for each in self._profile.buckets:
            if each.bucket in self._ladder:
                is_later = self._executor.is_lazy and each.bucket < self._ladder.max
                (later if is_later else now).extend(each.captured)
        graphs = sum(b.driver_bytes for each in self._profile.buckets for b in each.backends)
        others = graphs - sum(b.driver_bytes for b in now)
        taken = {"graph pool": sum(b.pool_bytes for b in now), KERNELS: stored.growth.get(KERNELS, 0) - others}
        taken[CACHE] = max(0, stored.growth.get(CACHE, 0) - base.size_of(CACHE))  # what lies unused serves as well
        costs = Costs(
            growth=grown | {name: size for name, size in taken.items() if name in grown},
            later=sum(each.pool_bytes + each.driver_bytes for each in later),
            source="as the capture profile has it",
        )
        return costs if self._room(self._that_fit(base, costs)) <= stored.max_seq_len else None

    def _rehearse(self, base: Ledger) -> Costs:
        """Captures over a cache of 2 pages and gives all back; the compiled step stays, and serves the real start."""
        executor = self._executor
        try:
            self._lay_out_smallest(base)
            executor.capture(partial(self._progress, "measure"), max_buckets=2 if executor.is_lazy else None)
            grown, captures, runner = growth(executor, base), executor.runner.captures, executor.runner
            self._ladder = runner.ladder
            executor.shortages += [] if runner.shortage is None else [runner.shortage]
            if runner.planner.table is not None:
                executor.backend = runner.planner.table  # without what did not fit
            num_graphs = [len(runner.planner.names(bucket)) for bucket in runner.ladder]
        finally:
            executor.release()
        later, second = 0, [capture for capture in captures if capture.bucket != captures[0].bucket]
        if executor.is_lazy and second:
            # All but the largest are captured later, and are taken to be like the second.
            later = sum(num_graphs[:-1]) * max(capture.pool_bytes + capture.driver_bytes for capture in second)
            if "graph pool" in grown:
                grown["graph pool"] -= sum(capture.pool_bytes for capture in second)
                grown[KERNELS] -= sum(capture.driver_bytes for capture in second)
        return Costs(growth=grown, later=later, source="measured by a first capture")

    def _lay_out_smallest(self, base: Ledger) -> None:
        try:
            self._executor.lay_out(self._sizing.caches(2), self._ladder, self._room(self._that_fit(base, None)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"{mib(base.meters.free)} MiB are free of {base.device}, and not even the step's buffers and a cache "
                f"of 2 pages fit ({first_line(error)}): end what else uses the device, or ask for a lower max_batch or "
                "max_seq_len"
            ) from error

    def _allocate(
        self, num_pages: int, base: Ledger, costs: Costs | None, max_seq_len: int | None
    ) -> tuple[Ledger, Costs | None]:
        """Lays the cache out, or a smaller one if that was asked for and memory has gone meanwhile.

        Returns:
            The ledger right before, and what else the start takes if that is known.
        """
        executor, sizing = self._executor, self._sizing
        while True:
            if max_seq_len is not None:
                check_room(sizing, num_pages, max_seq_len)
            try:
                executor.lay_out(sizing.caches(num_pages), self._ladder, self._room(num_pages))
                return base, costs
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            executor.release()
            now = base_ledger(executor)
            text = (
                f"a cache of {num_pages} pages, {mib(sizing.bytes_of(num_pages))} MiB, does not fit "
                f"({reason}): {mib(now.meters.free)} MiB of {now.device} are free now, "
                f"{mib(base.meters.free)} were when it was sized ({self.how})"
            )
            if sizing.ask.on_kv_oom == "shrink" and now.meters.source == "driver":
                costs = self._rehearse(now)  # anew if need be: of what was measured, some is loaded by now
            fewer = min(num_pages * 7 // 8, sizing.that_fit(now, costs))
            if sizing.ask.on_kv_oom == "raise" or fewer < 2:
                raise DeviceMemoryError(
                    f"{text}. About {max(fewer, 0)} pages would fit: ask for fewer (num_pages, kv_bytes or "
                    "memory_fraction), end what else uses the device, or pass on_kv_oom='shrink' to take what fits"
                )
            num_pages, base = fewer, now
            self.how = f"{self.how}; {fewer} pages, since memory went meanwhile"
            warnings.warn(f"{text}; {fewer} pages are tried", RuntimeWarning, stacklevel=4)

    def _explain(self, base: Ledger, costs: Costs | None) -> str:
        ask, free = self._sizing.ask, base.meters.free
        if not ask.is_share:
            return "cache as asked"
        margin = free - ask.budget(free)
        text = f"{ask.memory_fraction:g} of {mib(free)} MiB free, {mib(margin)} MiB are the margin"
        if costs is None:
            return f"{text}; nothing but the cache is reserved"
        return f"{text}, {mib(costs.num_bytes)} MiB are for all but the cache, {costs.source}"
