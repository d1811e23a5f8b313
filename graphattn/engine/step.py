"""The model as a decode step: tokens and positions in, logits and the most likely ids out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ModelStep:
    """Calls a bound transformers model on one packed row of tokens, compiled as one graph or plain.

    Args:
        model: the model, its attention on graphattn's layer.
        compile: compile with Inductor, `fullgraph=True`: once for batch 1 and once for every size from 2.

    Attributes:
        num_compiles: graphs compiled so far.
    """

    def __init__(self, model: nn.Module, *, compile: bool):
        self.model, self.compile, self.num_compiles = model, compile, 0
        self._forward = torch.compile(self._plain, fullgraph=True, backend=self._counted) if compile else self._plain

    def __call__(self, token_ids_B: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits `[B, vocabulary]` and their argmax `[B]`."""
        if self.compile and len(token_ids_B) > 1:
            torch._dynamo.mark_dynamic(token_ids_B, 0)
            torch._dynamo.mark_dynamic(positions_B, 0)
        return self._forward(token_ids_B, positions_B)

    def _plain(self, token_ids_B: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(input_ids=token_ids_B[None], position_ids=positions_B[None], use_cache=False)
        logits_BV = output.logits[0]
        return logits_BV, logits_BV.argmax(-1)

    def _counted(self, graph: torch.fx.GraphModule, inputs: list):
        from torch._inductor.compile_fx import compile_fx

        self.num_compiles += 1
        return compile_fx(graph, inputs)
