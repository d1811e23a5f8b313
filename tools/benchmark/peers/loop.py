"""Peers that are a plain loop of model calls over one batch: transformers with sdpa or flash attention."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..rows import WARM_TOKENS
from ..timing import Timed
from .path import attention_ops
from .peer import Peer, Setting, missing, timed_part

PASS_TOKENS = 65536  # prompt tokens of all rows in one pass of the prefill, to bound its activations


class Loop(Peer):
    """transformers' eager model and its DynamicCache: what `generate` does without the rest of `generate`."""

    even_rows_only = True
    attention: str

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.model = setting.model(self.attention)

    def steps(self, prompts: list[list[int]], tokens: int) -> Timed:
        ids = torch.tensor(prompts, device=self.setting.device)
        cache = self.cache(len(prompts), ids.shape[1] + WARM_TOKENS + tokens)
        with torch.no_grad():
            drawn = self.prefill(ids, cache)
            if self.attention_path is None:
                # Looked at where it changes no timing: on a cache of its own, one row, one step.
                other = self.cache(1, ids.shape[1] + 1)
                first = self.prefill(ids[:1], other)
                ops = attention_ops(lambda: self.call(first, other, ids.shape[1]))
                self.attention_path = f"{self.attention}: {ops}"
            step = self.stepper()
            seconds, token_ids = [], [drawn[0].item()]
            for index in range(WARM_TOKENS - 1 + tokens):
                started = time.perf_counter()
                drawn = step(drawn, cache, ids.shape[1] + index)
                drawn_host = drawn.flatten().tolist()
                seconds.append(time.perf_counter() - started)
                token_ids.append(drawn_host[0])
        return timed_part(seconds, token_ids, tokens)

    def cache(self, batch: int, max_len: int):
        """An empty cache for `batch` rows of up to `max_len` tokens."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def prefill(self, ids: Tensor, cache) -> Tensor:
        """The first token of each row, `[B, 1]`."""
        stride = max(1, PASS_TOKENS // len(ids))
        for start in range(0, ids.shape[1], stride):
            part = ids[:, start : start + stride]
            positions = torch.arange(start, start + part.shape[1], device=ids.device).expand(len(ids), -1)
            output = self.model(
                input_ids=part, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def call(self, drawn: Tensor, cache, position: int) -> Tensor:
        """The next token of each row, `[B, 1]`."""
        positions = torch.full_like(drawn, position)
        output = self.model(input_ids=drawn, position_ids=positions, past_key_values=cache, use_cache=True)
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def stepper(self):
        """What runs a step, called like `call`."""
        return self.call


class Sdpa(Loop):
    """transformers with torch's own attention."""

    name = "sdpa"
    attention = "sdpa"


class FlashAttention(Loop):
    """transformers with flash attention 3 where it is installed, else 2."""

    name = "flash-attn"
    packages = ("transformers", "flash-attn", "flash-attn-3")

    def __init__(self, setting: Setting):
        self.attention = flash_attention()
        super().__init__(setting)

    @classmethod
    def reason(cls, setting: Setting) -> str | None:
        if absent := missing("flash_attn_interface", "flash_attn"):
            return absent
        if flash_attention() is None:
            return "transformers takes neither flash_attn_interface (3) nor flash_attn (2) as they are installed here"
        return None


def flash_attention() -> str | None:
    """The newest flash attention that transformers finds installed; None if it finds none."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else None
