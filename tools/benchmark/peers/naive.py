"""Peer `naive`: the simplest migration of a flash-attn engine to FlashInfer, which graphattn began as.

Each request's keys and values lie flat in one buffer per layer. A prompt runs alone through
`single_prefill_with_kv_cache`; a decode step calls `single_decode_with_kv_cache` once per request and layer. Rotation
stays in the model, there is one layout, and nothing is captured. GEMMs of a decode step are over all rows.
"""

from __future__ import annotations

import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rows import WARM_TOKENS
from ..timing import Timed
from .peer import Peer, Setting, missing, timed_part

IMPLEMENTATION = "one_query_at_a_time"  # transformers takes any name with "flash" in it for flash-attn


class Naive(Peer):
    """A loop over requests in every layer."""

    name = "naive"

    def __init__(self, setting: Setting):
        from transformers import AttentionInterface

        super().__init__(setting)
        AttentionInterface.register(IMPLEMENTATION, self.attend)
        self.model = setting.model(IMPLEMENTATION)
        if setting.device == "cuda":
            self.packages = ("transformers", "flashinfer-python")
            self.attention_path = "flashinfer.single_prefill_with_kv_cache, flashinfer.single_decode_with_kv_cache"
        else:
            self.attention_path = "F.scaled_dot_product_attention, one query at a time"
        self._rows: list[int] = []  # rows of the call under way
        self._lens: list[int] = []  # tokens of each row in its buffers
        self._flat: list[list[tuple[Tensor, Tensor]]] = []  # per layer and row

    @classmethod
    def reason(cls, setting: Setting) -> str | None:
        return missing("flashinfer") if setting.device == "cuda" else None

    def steps(self, prompts: list[list[int]], tokens: int) -> Timed:
        config = self.model.config.get_text_config()
        shape = (config.num_key_value_heads, self.model.model.layers[0].self_attn.head_dim)
        empty = partial(torch.empty, dtype=self.setting.dtype, device=self.setting.device)
        ends = [len(prompt) + WARM_TOKENS + tokens for prompt in prompts]
        self._flat = [[(empty(end, *shape), empty(end, *shape)) for end in ends] for _ in self.model.model.layers]
        self._lens = [0] * len(prompts)
        drawn = [self.forward([row], prompt)[0] for row, prompt in enumerate(prompts)]
        seconds, token_ids = [], [drawn[0]]
        for _ in range(WARM_TOKENS - 1 + tokens):
            started = time.perf_counter()
            drawn = self.forward(list(range(len(prompts))), drawn)
            seconds.append(time.perf_counter() - started)
            token_ids.append(drawn[0])
        self._flat.clear()
        return timed_part(seconds, token_ids, tokens)

    @torch.no_grad()
    def forward(self, rows: list[int], token_ids: list[int]) -> list[int]:
        """One prompt, or one token for each row; the next token of each."""
        self._rows = rows
        counts = [len(token_ids)] if len(rows) == 1 else [1] * len(rows)
        starts = [self._lens[row] for row in rows]
        positions = [start + at for start, count in zip(starts, counts, strict=True) for at in range(count)]
        logits = self.model(
            input_ids=torch.tensor([token_ids], device=self.setting.device),
            position_ids=torch.tensor([positions], device=self.setting.device),
            use_cache=False,
            logits_to_keep=len(rows),
        ).logits
        for row, count in zip(rows, counts, strict=True):
            self._lens[row] += count
        return logits[0].argmax(-1).tolist()

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **options):
        """Called by each layer with `[1, heads, tokens, head_dim]`, rotated; returns `[1, tokens, heads, head_dim]`."""
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        count = len(query) // len(self._rows)
        outputs = []
        for index, row in enumerate(self._rows):
            new = slice(index * count, (index + 1) * count)
            start, end = self._lens[row], self._lens[row] + count
            flat = self._flat[module.layer_idx][row]
            for buffer, tensor in zip(flat, (key, value), strict=True):
                buffer[start:end] = tensor[new]
            keys, values = (buffer[:end] for buffer in flat)
            outputs.append(self.single(query[new], keys, values, options["scaling"]))
        return torch.cat(outputs)[None], None

    def single(self, q_THD: Tensor, k_NKD: Tensor, v_NKD: Tensor, scale: float) -> Tensor:
        """One request: its prompt (T = N) or its newest query (T = 1) over all its keys and values."""
        if self.setting.device == "cuda":
            import flashinfer

            q_THD = q_THD.contiguous()
            if len(q_THD) > 1:
                # Its fa3 kernels take minutes to compile, and no prefill is timed.
                return flashinfer.single_prefill_with_kv_cache(
                    q_THD, k_NKD, v_NKD, causal=True, sm_scale=scale, backend="fa2"
                )
            return flashinfer.single_decode_with_kv_cache(q_THD[0], k_NKD, v_NKD, sm_scale=scale)[None]
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q_THD, k_NKD, v_NKD))
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=len(q_THD) > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return attended[0].transpose(0, 1)
