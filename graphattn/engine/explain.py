"""What an engine runs on, in words."""

from __future__ import annotations

from ..backends.cascade import CascadeBackend
from ..groups import GroupPools
from ..plan import Planner
from ..spec import CacheSpec
from .executor import Executor
from .scheduler import Scheduler
from .step import ModelStep


def explain(executor: Executor, scheduler: Scheduler, max_seq_len: int, how: str) -> str:
    """Mode, backend, rope, ladder, pages, `how` they were sized, and how steps have run; a line each."""
    run, step, planner, pools = executor.runner, executor.step, executor.planner, scheduler.pools
    counts = run.counts
    buckets = ", ".join(
        _bucket(executor, bucket, backend) for bucket in run.ladder for backend in planner.names(bucket)
    )
    mode = "captured in CUDA graphs" if run.uses_graphs else "eager (no CUDA graphs)"
    compiled = f"compiled, {step.num_compiles} graphs" if step.compile else "not compiled"
    shortages = executor.shortages + ([] if run.shortage is None else [run.shortage])
    return "\n".join(
        (
            f"decode      {mode}, {compiled}",
            f"prefill     {_prefill(executor)}, {compiled}; {executor.about_prefill}",
            f"backend     {', '.join(planner.all_names)} on {executor.device}",
            *_cascade(planner),
            *_layers(executor),
            f"rope        {_rope(executor)}",
            f"merged      {_merged(executor)}",
            f"linears     {_linears(step)}",
            f"buckets     {buckets}; {run.ladder.waste(run.rows):.0%} of the rows computed were padding",
            *_pages(pools, planner.cache, max_seq_len),
            f"memory      {how}",
            *(f"left out    {text}" for text in shortages),
            f"steps       {counts['replay']} replayed, {counts['eager']} eager, {counts['guard']} stopped by the plan "
            f"guard; {scheduler.num_preemptions} preemptions, {pools.pools[0].num_hits} tokens from the prefix cache",
        )
    )


def _prefill(executor: Executor) -> str:
    """The numbers of tokens that prefills are padded to, how many were, and what is done with others."""
    run = executor.prefill_runner
    if not run.buckets:
        return "no CUDA graphs"
    mode = "captured at" if executor.runner.uses_graphs else "eager at"
    counts = run.counts
    steps = f"{counts['replay']} replayed, {counts['eager']} eager, {counts['guard']} stopped by the plan guard"
    return f"{mode} {run.about} tokens, {steps}; others unpadded, without CUDA graphs"


def _bucket(executor: Executor, bucket: int, backend: str) -> str:
    """A bucket, who serves it, if not alone from how many tokens a row on, and its steps."""
    planner, run = executor.planner, executor.runner
    spans = planner.spans(bucket)
    starts = [str(span.context) for span in spans if span.backend == backend]
    where = "" if len(spans) == 1 else f" from {' and '.join(starts)} tokens a row"
    if not starts:
        where = " where rows share enough"
    return f"{bucket} {backend}{where} ({run.served[bucket, backend]} steps)"


def _cascade(planner: Planner) -> tuple[str, ...]:
    if CascadeBackend.name not in planner.all_names:
        return ()
    return (f"cascade     {planner.num_shared} steps attended once to pages that rows share",)


def _layers(executor: Executor) -> list[str]:
    """A line for each layer group."""
    binding = executor.binding
    return [
        f"layers      {len(binding.layers_of(group))} x {spec}{_widened(binding.widths[group])}"
        for group, spec in enumerate(binding.groups)
    ]


def _pages(pools: GroupPools, cache: CacheSpec, max_seq_len: int) -> list[str]:
    """A line for each layer group."""
    kind = f"{cache.layout}, fp8" if cache.is_fp8 else cache.layout
    return [
        f"pages       {pool.num_usable} of {pool.page_size} tokens ({kind}), {pool.num_used} in use, "
        f"{pool.num_cached} cached; "
        + (f"max_seq_len {max_seq_len}" if window is None else f"given back behind a window of {window}")
        for pool, window in zip(pools.pools, pools.windows, strict=True)
    ]


def _linears(step: ModelStep) -> str:
    if not step.num_folded:
        return "all by torch"
    return f"{step.num_folded} by a kernel of ours where rows are few, with the norms, gates and residuals beside them"


def _widened(widths: tuple[int, int] | None) -> str:
    if widths is None:
        return ""
    return f"; the model's own heads are {widths[0]} wide, values {widths[1]}, the rest are zeros"


def _merged(executor: Executor) -> str:
    merged = executor.binding.merged
    kinds = ", ".join(f"{count} x {kind}" for kind, count in merged.num_merged.items())
    name, reason = next(iter(merged.kept.items()), (None, None))
    return kinds if name is None else f"{kinds}; {len(merged.kept)} left apart, {name}: {reason}"


def _rope(executor: Executor) -> str:
    takeover = executor.binding.rotary
    if takeover.reason is not None:
        return f"applied by the model, outside the op: {takeover.reason}"
    ours = [rotary for rotary in takeover.rotaries if rotary is not None]
    norms = sum(rotary.q_weight is not None for rotary in ours)
    said = f"in the op for {len(ours)} of {len(takeover.rotaries)} layers, with q and k norms for {norms}"
    if takeover.length_rule is not None:
        how = "which then is computed anew" if takeover.length_rule.is_whole else "token by token"
        said += f"; other frequencies for a request of more than {takeover.length_rule.threshold} tokens, {how}"
    return said
