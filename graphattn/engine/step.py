"""The model as a decode step: tokens and positions in, logits and what is drawn from them out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from types import FunctionType

import torch
from torch import Tensor, nn

from .fold import fold

_CHAINED = {"triton.enable_pdl": True}  # kernels start while the one before still runs, as ours do
Draw = Callable[[Tensor, Tensor], Tensor]


def most_likely(logits_BV: Tensor, positions_B: Tensor) -> Tensor:
    """The first largest of each row."""
    return logits_BV.argmax(-1)


class ModelStep:
    """Calls a bound transformers model on one packed row of tokens, compiled as one graph or plain.

    Args:
        model: the model, its attention on graphattn's layer.
        compile: compile with Inductor, `fullgraph=True`: once for batch 1 and once for every size from 2.
        draw: called with the logits `[B, vocabulary]` and the positions `[B]`, returns ids `[B]`; never compiled.
    """

    def __init__(self, model: nn.Module, *, compile: bool, draw: Draw = most_likely):
        self.compile, self._draw = compile, draw
        self._graphs: list[str] = []
        self._forward = _compiled(model, self._graphs) if compile else _step_of(model)

    @property
    def num_compiles(self) -> int:
        """Graphs compiled so far."""
        return len(self._graphs)

    def __call__(self, token_ids_B: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits `[B, vocabulary]` and the ids drawn `[B]`."""
        if self.compile and len(token_ids_B) > 1:
            torch._dynamo.mark_dynamic(token_ids_B, 0)
            torch._dynamo.mark_dynamic(positions_B, 0)
        logits_BV = self._forward(token_ids_B, positions_B)
        return logits_BV, self._draw(logits_BV, positions_B)


def last_logits(model: nn.Module, token_ids_N: Tensor, positions_N: Tensor, last_R: Tensor) -> Tensor:
    """Logits after tokens `last_R` of a packed row, `[R, vocabulary]`."""
    inputs = {"input_ids": token_ids_N[None], "position_ids": positions_N[None], "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, logits_to_keep=last_R).logits[0]
    return model(**inputs).logits[0, last_R]


def _step_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def step(token_ids_B: Tensor, positions_B: Tensor) -> Tensor:
        return model(input_ids=token_ids_B[None], position_ids=positions_B[None], use_cache=False).logits[0]

    return step


def _compiled(model: nn.Module, graphs: list[str]) -> Callable[[Tensor, Tensor], Tensor]:
    def backend(graph: torch.fx.GraphModule, inputs: list):
        from torch._inductor.compile_fx import compile_fx

        graphs.append(f"{len(graph.graph.nodes)} nodes")
        if find_spec("triton") is not None:
            from ..kernels.linear import suits

            fold(graph, suits)
        return compile_fx(graph, inputs, config_patches=_CHAINED)

    step = _step_of(model)
    # Dynamo keeps what it compiled with the code object, for as long as that lives and up to a limit. Models share no
    # code object this way, so each has the limit to itself and takes its graphs along when it goes.
    own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)
    return torch.compile(own, fullgraph=True, backend=backend)
