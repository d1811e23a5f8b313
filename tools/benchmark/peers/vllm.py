"""Peer `vllm`."""

from __future__ import annotations

import itertools
import os
import time

from ..rows import PREFILL_TOKENS, WARM_TOKENS, tokens_each
from ..timing import Timed
from .peer import Peer, Setting, missing
from .saved import save_model


class Vllm(Peer):
    """vLLM's engine, stepped by hand, with its defaults but for the prefix cache and the sizes."""

    name = "vllm"
    serves = True
    packages = ("vllm",)

    def __init__(self, setting: Setting):
        from vllm import LLM

        super().__init__(setting)
        self._folder = save_model(setting, with_tokenizer=False)
        self._llm = LLM(
            model=self._folder.name,
            skip_tokenizer_init=True,
            dtype=str(setting.dtype).removeprefix("torch."),
            max_model_len=setting.max_len,
            max_num_seqs=setting.max_batch,
            max_num_batched_tokens=max(PREFILL_TOKENS, setting.max_len),
            enable_prefix_caching=False,
            seed=0,
        )
        self._ids = itertools.count()
        asked = os.environ.get("VLLM_ATTENTION_BACKEND")
        self.attention_path = f"VLLM_ATTENTION_BACKEND={asked}" if asked else "as vLLM chooses; its log says which"

    @classmethod
    def reason(cls, setting: Setting) -> str | None:
        return missing("vllm")

    def steps(self, prompts: list[list[int]], tokens: int) -> Timed:
        count = tokens_each([len(prompt) for prompt in prompts], tokens)
        ids = self._add(prompts, [count] * len(prompts), 0.0)
        engine, counts, seconds, first = self._llm.llm_engine, dict.fromkeys(ids, 0), [], []
        while len(seconds) < tokens:
            is_warm = min(counts.values()) >= WARM_TOKENS
            started = time.perf_counter()
            outputs = engine.step()
            elapsed = time.perf_counter() - started
            for output in outputs:
                counts[output.request_id] = len(output.outputs[0].token_ids)
                if output.request_id == ids[0]:
                    first = list(output.outputs[0].token_ids)
            if is_warm and len(outputs) == len(ids):
                seconds.append(elapsed)
            elif not engine.has_unfinished_requests():
                raise RuntimeError(f"its requests ended after {len(seconds)} of {tokens} steps with all rows")
        engine.abort_request(ids)
        while engine.has_unfinished_requests():
            engine.step()
        return Timed(seconds=seconds, token_ids=first, note="calls of step() that returned a token for every row")

    def serve(self, prompts: list[list[int]], counts: list[int], temperature: float) -> tuple[int, float]:
        self._finish(self._add(prompts[:8], [4] * 8, temperature))
        started = time.perf_counter()
        generated = self._finish(self._add(prompts, counts, temperature))
        return generated, time.perf_counter() - started

    def _add(self, prompts: list[list[int]], counts: list[int], temperature: float) -> list[str]:
        from vllm import SamplingParams

        ids = [str(next(self._ids)) for _ in prompts]
        for request_id, prompt, count in zip(ids, prompts, counts, strict=False):
            params = SamplingParams(temperature=temperature, max_tokens=count, ignore_eos=True, detokenize=False)
            self._llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        return ids

    def _finish(self, ids: list[str]) -> int:
        """Steps until all have ended; returns their tokens."""
        engine, counts = self._llm.llm_engine, dict.fromkeys(ids, 0)
        while engine.has_unfinished_requests():
            for output in engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
        return sum(counts.values())

    def close(self) -> None:
        self._folder.cleanup()
