"""Peer `transformers-static`: a StaticCache and a decode step under torch.compile, as transformers documents it."""

from __future__ import annotations

import torch
from torch import Tensor

from .loop import Loop


class TransformersStatic(Loop):
    """The decode step compiled with mode="reduce-overhead", which captures it in a CUDA graph; the prefill is eager."""

    name = "transformers-static"
    attention = "sdpa"

    def cache(self, batch: int, max_len: int):
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=max_len)

    @property
    def compiles(self) -> bool:
        asked = self.setting.compile
        return self.setting.device == "cuda" if asked is None else asked

    def stepper(self):
        if not self.compiles:
            return self.call
        torch.compiler.reset()  # or the second batch size would be compiled for any size
        compiled = torch.compile(self.logits, mode="reduce-overhead", fullgraph=True)

        def step(drawn: Tensor, cache, position: int) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            drawn, positions = drawn.clone(), torch.full_like(drawn, position)
            # The graph writes its output to the same place every step.
            return compiled(drawn, positions, cache).clone()

        return step

    def logits(self, drawn: Tensor, positions: Tensor, cache) -> Tensor:
        """The step that is compiled; ends in the argmax, so that logits need not leave the graph."""
        output = self.model(input_ids=drawn, position_ids=positions, past_key_values=cache, use_cache=True)
        return output.logits[:, -1].argmax(-1, keepdim=True)
