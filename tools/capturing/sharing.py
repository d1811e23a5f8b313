"""What buckets would take if each had all to itself."""

from __future__ import annotations

from graphattn import LLM, BucketLadder, DecodeRunner, Planner, StepState


def alone(llm: LLM, bucket: int) -> dict[str, int]:
    """Captures a bucket once more, with a pool, outputs and workspaces of its own, and frees them again.

    Returns:
        Bytes of its graph in torch's pool and by the driver, of its outputs and of its workspaces.
    """
    executor = llm._executor
    planner, options = executor.planner, {"enforce_eager": executor.enforce_eager}
    own = Planner(planner.groups, planner.cache, planner.device, executor.backend)
    sizes = {"max_seq_len": executor.state.max_seq_len, "page_size": executor.state.page_size}
    rows = StepState(max_batch=bucket, groups=planner.groups, device=planner.device, **sizes)
    runner = DecodeRunner(executor.step, rows, own, ladder=BucketLadder([bucket]), **options)
    (capture,) = runner.capture()
    taken = {
        "pool_bytes": capture.pool_bytes,
        "driver_bytes": capture.driver_bytes,
        "output_bytes": runner.num_bytes,
        "workspace_bytes": own.num_bytes,
    }
    runner.close()
    return taken
