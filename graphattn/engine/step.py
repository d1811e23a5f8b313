"""The model as a decode step: tokens and positions in, logits and what is drawn from them out."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import FunctionType

import torch
from torch import Tensor, nn

from .fold import fold

_numbers = itertools.count()
Draw = Callable[[Tensor, Tensor, Tensor], Tensor]


def most_likely(logits_BV: Tensor, token_ids_B: Tensor, positions_B: Tensor) -> Tensor:
    """The first largest of each row."""
    return logits_BV.argmax(-1)


class ModelStep:
    """Calls a bound transformers model on one packed row of tokens, compiled as one graph or plain.

    Args:
        model: the model, its attention on graphattn's layer.
        compile: compile with Inductor, `fullgraph=True`: once, for any number of tokens, so that it serves prefill too.
        max_batch: rows of the largest decode step.

    Attributes:
        draw: called with the logits `[B, vocabulary]`, the tokens and the positions `[B]`, returns ids `[B]`; never
            compiled.
    """

    def __init__(self, model: nn.Module, *, compile: bool, max_batch: int):
        self.compile = compile
        self.draw: Draw = most_likely
        self._graphs: list[int] = []
        self._single = SingleToken(model.device)
        self._forward = _compiled(model, self._graphs, self._single) if compile else _step_of(model)
        self._all_B = torch.arange(max_batch, device=model.device)

    @property
    def num_compiles(self) -> int:
        """Graphs compiled so far."""
        return len(self._graphs)

    @property
    def num_folded(self) -> int:
        """Linears of the compiled step that are ours where rows are few."""
        return max(self._graphs, default=0)

    def __call__(self, token_ids_B: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits `[B, vocabulary]` and the ids drawn `[B]`."""
        all_B = self._all_B[: len(token_ids_B)] if self.compile else None
        logits_BV = self.logits(token_ids_B, positions_B, all_B)
        return logits_BV, self.draw(logits_BV, token_ids_B, positions_B)

    def logits(self, token_ids_N: Tensor, positions_N: Tensor, last_R: Tensor | None) -> Tensor:
        """Logits after tokens `last_R` (int64) of the row, `[R, vocabulary]`; after all for None, if not compiled.

        Tokens and positions are int32.
        """
        if not self.compile:
            return self._forward(token_ids_N, positions_N, last_R)
        if len(token_ids_N) == 1:
            with self._single.instead(token_ids_N, positions_N, last_R) as inputs:
                return self._traced(*inputs)[:1]
        num_rows = len(last_R)
        if num_rows == 1:
            last_R = torch.cat((last_R, last_R))
        return self._traced(token_ids_N, positions_N, last_R)[:num_rows]

    def _traced(self, *inputs: Tensor) -> Tensor:
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 0)
        # Decode steps are as long as they have rows; prefill is not, and the graph must not hold them to be the same.
        with torch.fx.experimental._config.patch(use_duck_shape=False):
            return self._forward(*inputs)


class SingleToken:
    """Lets a graph that was compiled for any number of tokens from 2 compute a single one.

    Dynamo takes a size of 1 for a constant and would trace the model once more for it, seconds at each start. The
    compiled code has no such constant: Dynamo is given inputs of size 2, and the code behind it those of size 1.
    """

    def __init__(self, device: torch.device):
        integers = {"dtype": torch.int32, "device": device}
        self._pair = (torch.zeros(2, **integers), torch.zeros(2, **integers), torch.arange(2, device=device))
        self._inputs: tuple[Tensor, ...] | None = None

    @contextmanager
    def instead(self, *inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Gives the inputs for Dynamo, int32, int32 and int64, in whose place the compiled code gets these."""
        self._inputs = inputs
        try:
            yield self._pair
        finally:
            self._inputs = None

    def taken(self, inputs: Sequence, sizes: Container[int]) -> Sequence:
        """What the compiled code is to be called with; `sizes` are the places of numbers of tokens or rows."""
        if self._inputs is None:
            return inputs
        own = {id(pair): single for pair, single in zip(self._pair, self._inputs, strict=True)}
        return [1 if place in sizes else own.get(id(x), x) for place, x in enumerate(inputs)]


def _step_of(model: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def step(token_ids_N: Tensor, positions_N: Tensor, last_R: Tensor | None) -> Tensor:
        inputs = {"input_ids": token_ids_N[None], "position_ids": positions_N[None], "use_cache": False}
        if last_R is None:
            return model(**inputs).logits[0]
        if keeps:
            return model(**inputs, logits_to_keep=last_R).logits[0]
        return model(**inputs).logits[0, last_R]

    return step


def fold_few_rows(graph: torch.fx.GraphModule) -> int:
    """Makes linears of the graph ours where our kernel can compute them; returns how many."""
    if find_spec("triton") is None:
        return 0
    from ..kernels.linear import suits

    return fold(graph, suits)


def _compiled(
    model: nn.Module, graphs: list[int], single: SingleToken
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        from torch._inductor.compile_fx import compile_fx

        placeholders = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        sizes = {place for place, value in enumerate(placeholders) if isinstance(value, torch.SymInt)}
        folded = fold_few_rows(graph)
        # Padding holds the number of rows to a range wherever the width of a linear is no multiple of 8.
        with torch._inductor.config.patch(shape_padding=False):
            compiled = compile_fx(graph, inputs)
        graphs.append(folded)
        return lambda *inputs: compiled(*one.taken(inputs, sizes))

    step, one = _step_of(model), weakref.proxy(single)
    # Dynamo keeps what it compiled with the code object, for as long as that lives and up to a limit, and keeps by name
    # which numbers differed, to take them for dynamic. Models share neither this way: each has the limit to itself,
    # takes its graphs along when it goes, and has its own epsilon as a constant. The backend is kept there too, and
    # must not hold the step, nor tensors.
    code = step.__code__.replace(co_name=f"step_{next(_numbers)}")
    function = FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)
    return torch.compile(function, fullgraph=True, backend=backend)
