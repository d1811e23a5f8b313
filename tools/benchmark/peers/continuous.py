"""Peer `transformers-cb`: transformers' continuous batching."""

from __future__ import annotations

import time
from contextlib import contextmanager

from ..rows import PREFILL_TOKENS, WARM_TOKENS, tokens_each
from ..timing import Timed
from .loop import flash_attention
from .peer import Peer, Setting

BLOCK_SIZE = 256  # tokens, transformers' default
MASKED_TOKENS = 4096  # tokens a step where attention takes a dense mask of tokens x cache
POLL_SECONDS = 0.2


class TransformersContinuous(Peer):
    """On flash attention 3 or 2 where that is installed, else on sdpa; with CUDA graphs on CUDA."""

    name = "transformers-cb"
    serves = True
    packages = ("transformers", "flash-attn", "flash-attn-3")

    def __init__(self, setting: Setting):
        super().__init__(setting)
        found = flash_attention() if setting.device == "cuda" else None
        # Asked for as paged, sdpa is left alone; without that it may be exchanged for whatever hub kernel is found.
        self.model = setting.model(f"paged|{found or 'sdpa'}")
        self.is_masked = found is None

    def steps(self, prompts: list[list[int]], tokens: int) -> Timed:
        lens = [len(prompt) for prompt in prompts]
        budget = self.token_budget(lens)
        # Rows that decode have their part of each step's tokens.
        count = tokens_each(lens, tokens, prefill_tokens=max(1, budget - len(lens)))
        with self.running(lens, [count] * len(lens), temperature=0.0) as manager:
            self.collect(manager, manager.add_requests(prompts[:2], max_new_tokens=4))
            ids = manager.add_requests(prompts, max_new_tokens=count, record_timestamps=True)
            outputs = self.collect(manager, ids)
        latest = max(outputs, key=lambda output: output.timestamps[0])
        arrivals = latest.timestamps[WARM_TOKENS - 1 : WARM_TOKENS + tokens]
        if (ended := min(output.timestamps[-1] for output in outputs)) < arrivals[-1]:
            raise RuntimeError(
                f"a request ended {arrivals[-1] - ended:.3f} s before the last to begin had its token "
                f"{WARM_TOKENS + tokens}: not all rows decoded while steps were timed"
            )
        return Timed(
            seconds=[after - before for before, after in zip(arrivals, arrivals[1:], strict=False)],
            token_ids=outputs[0].generated_tokens,
            note="between arrivals of the tokens of the request that began last",
        )

    def serve(self, prompts: list[list[int]], counts: list[int], temperature: float) -> tuple[int, float]:
        lens = [len(prompt) for prompt in prompts]
        with self.running(lens, counts, temperature) as manager:
            # It captures a graph when a size first comes, so only a whole run is a warm-up.
            self.run_all(manager, prompts, counts)
            started = time.perf_counter()
            outputs = self.run_all(manager, prompts, counts)
            seconds = time.perf_counter() - started
        return sum(len(output.generated_tokens) for output in outputs), seconds

    def run_all(self, manager, prompts: list[list[int]], counts: list[int]) -> list:
        """Outputs of all prompts, sent at once."""
        ids = [
            manager.add_request(prompt, max_new_tokens=count, eos_token_id=-1)
            for prompt, count in zip(prompts, counts, strict=True)
        ]
        return self.collect(manager, ids)

    def token_budget(self, lens: list[int]) -> int:
        """Tokens that a step may hold."""
        return min(MASKED_TOKENS if self.is_masked else PREFILL_TOKENS, max(sum(lens), 2 * len(lens), 256))

    @contextmanager
    def running(self, lens: list[int], counts: list[int], temperature: float):
        """A warmed-up manager of transformers, sized for rows of `lens` prompt tokens that generate `counts`."""
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        blocks = sum(-(-(length + count) // BLOCK_SIZE) for length, count in zip(lens, counts, strict=True))
        draws = {"do_sample": False}
        if temperature:
            draws = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        config = ContinuousBatchingConfig(
            block_size=BLOCK_SIZE,
            num_blocks=blocks + 4,
            safety_margin=0.0,  # or no request begins while under 15% of the blocks are free
            max_batch_tokens=self.token_budget(lens),
            allow_block_sharing=False,
            use_cuda_graph=True if self.setting.device == "cuda" else None,
        )
        with self.model.continuous_batching_context_manager(
            generation_config=GenerationConfig(eos_token_id=-1, pad_token_id=0, max_new_tokens=max(counts), **draws),
            continuous_batching_config=config,
            workload_hints=WorkloadHints(max(lens), max(counts), len(lens)),
            timeout=60,
        ) as manager:
            self.attention_path = self.path(manager)
            yield manager

    def path(self, manager) -> str:
        """What it resolved to run."""
        config = manager.continuous_batching_config
        said = f"{self.model.config._attn_implementation}, CUDA graphs (varlen, decode) {config.use_cuda_graph}"
        said += f", block table {'on' if config.max_blocks_per_request else 'off'}"
        said += f", asynchronous {config.use_async_batching}, {config.max_batch_tokens} tokens a step"
        if self.setting.device == "cuda" and "flash_attention_3" not in said:
            said += "; flash attention 3 is not installed: compare with the published figures, which have it"
        return said

    def collect(self, manager, request_ids: list[str]) -> list:
        """The finished outputs in the order of the ids.

        Raises:
            RuntimeError: a request failed, or the thread that generates has ended.
        """
        found = {}
        while len(found) < len(request_ids):
            output = manager.get_result(timeout=POLL_SECONDS)
            if output is None:
                if not manager.is_running():
                    fatal = manager.background_thread_status.fatal_error
                    raise RuntimeError(f"transformers' generation thread ended: {fatal}")
            elif output.error is not None:
                raise RuntimeError(f"{output.request_id}: {output.error}")
            elif output.is_finished():
                found[output.request_id] = output
        return [found[request_id] for request_id in request_ids]
