"""Peers `nano-vllm` and `nano-vllm-graphattn`: its engine on flash-attn, and the same one on graphattn."""

from __future__ import annotations

import time

from ..rows import PREFILL_TOKENS, WARM_TOKENS
from ..timing import Timed
from .peer import Peer, Setting, missing
from .saved import save_model

COLD = 1e-5  # it refuses temperature 0; this draws the most likely token


class NanoVllm(Peer):
    """nano-vLLM's engine, stepped by hand. It serves Qwen 3 only, and prefills every request before it decodes any."""

    name = "nano-vllm"
    serves = True
    packages = ("nano-vllm", "flash-attn")

    def __init__(self, setting: Setting):
        from nanovllm import LLM

        super().__init__(setting)
        self._folder = save_model(setting, with_tokenizer=True)
        self._llm = LLM(
            self._folder.name,
            max_model_len=setting.max_len,
            max_num_seqs=setting.max_batch,
            max_num_batched_tokens=max(2 * PREFILL_TOKENS, setting.max_len),
        )
        self.attention_path = "flash_attn.flash_attn_varlen_func, flash_attn.flash_attn_with_kvcache"

    @classmethod
    def reason(cls, setting: Setting) -> str | None:
        return missing("nanovllm")

    def steps(self, prompts: list[list[int]], tokens: int) -> Timed:
        from nanovllm import SamplingParams

        params = SamplingParams(temperature=COLD, max_tokens=WARM_TOKENS + tokens + 1, ignore_eos=True)
        for prompt in prompts:
            self._llm.add_request(prompt, params)
        seconds, first = [], []
        while not self._llm.is_finished():
            started = time.perf_counter()
            finished, num_tokens = self._llm.step()
            elapsed = time.perf_counter() - started
            if num_tokens == -len(prompts):
                seconds.append(elapsed)
            if finished:
                first = list(min(finished)[1])
        if len(seconds) < WARM_TOKENS - 1 + tokens:
            raise RuntimeError(f"{len(seconds)} steps decoded all {len(prompts)} rows: the cache holds too few blocks")
        return Timed(
            seconds=seconds[WARM_TOKENS - 1 : WARM_TOKENS - 1 + tokens],
            token_ids=first,
            note=f"at temperature {COLD}, since it refuses 0",
        )

    def serve(self, prompts: list[list[int]], counts: list[int], temperature: float) -> tuple[int, float]:
        from nanovllm import SamplingParams

        def run(counts: list[int]) -> int:
            for prompt, count in zip(prompts, counts, strict=False):
                params = SamplingParams(temperature=temperature, max_tokens=count, ignore_eos=True)
                self._llm.add_request(prompt, params)
            generated = 0
            while not self._llm.is_finished():
                generated += sum(len(token_ids) for _, token_ids in self._llm.step()[0])
            return generated

        for rows in (8, 3, 1):  # its sampler is compiled by rows: for some, for any, for one
            run([4] * rows)
        started = time.perf_counter()
        return run(counts), time.perf_counter() - started

    def close(self) -> None:
        self._folder.cleanup()


class NanoVllmOnGraphattn(NanoVllm):
    """The same engine with attention, cache, planning and CUDA graphs of graphattn, as its integration puts them there.

    What it gains over `nano-vllm` is theirs; what it lacks of graphattn's own figures is scheduler, sampler and model.
    """

    name = "nano-vllm-graphattn"
    packages = ("nano-vllm",)

    def __init__(self, setting: Setting):
        from graphattn.integrations.nanovllm import install

        install()
        super().__init__(setting)
        self.attention_path = "graphattn, by graphattn.integrations.nanovllm"
