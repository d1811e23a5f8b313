"""Hands the rotation of queries and keys, and their norms, from a model's attention modules to our layers."""

from __future__ import annotations

import inspect
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..rope import Rotary
from .probe import Call, probe

ROTATE = "apply_rotary_pos_emb"  # what nearly every modeling file of transformers calls its rotation
NORMS = ("q_norm", "k_norm")
POSITIONS = (3, 11)


class RotaryTakeover:
    """Attention modules that leave norm and rotation out, so that `Attention` can do both in its kernel.

    Each module gets a forward of its own: its class's, in whose globals the rotation passes queries and keys through.
    Whether our layer then does the same is not read from the code but tried: two tokens run through the model before
    and after, and every layer's queries and keys, normed and rotated here, must be what they were.

    Args:
        model: under the attention implementation `PROBE_UNMASKED`.
        calls: of its attention modules, by layer index.

    Attributes:
        rotaries: by layer; None for one that does not rotate, or that is left to do it itself.
        reason: why the model was left as it was; None if it was not.
    """

    def __init__(self, model: PreTrainedModel, calls: list[Call]):
        self._patched: list[nn.Module] = []
        self.rotaries: list[Rotary | None] = [None] * len(calls)
        before = probe(model, POSITIONS)
        try:
            self.reason = self._take_over(model, before)
        except BaseException:
            self.detach()
            raise
        if self.reason is not None:
            self.detach()

    def detach(self) -> None:
        """Gives every module its own forward back; does nothing the second time."""
        for module in self._patched:
            del module.forward
        self._patched = []
        self.rotaries = [None] * len(self.rotaries)

    def _take_over(self, model: PreTrainedModel, before: list[Call]) -> str | None:
        embeddings = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
        if len(embeddings) != 1:
            return f"the model has {len(embeddings)} rotary embeddings"
        inv_freq, scaling = embeddings[0].inv_freq, float(getattr(embeddings[0], "attention_scaling", 1.0))
        if 2 * inv_freq.numel() != before[0].query.shape[3]:
            return f"{2 * inv_freq.numel()} of {before[0].query.shape[3]} dims of a head are rotated"
        for call in before:
            if reason := self._patch(call.module):
                return reason
        after = probe(model, POSITIONS)
        positions = torch.tensor(POSITIONS, device=inv_freq.device)
        for layer, (raw, done) in enumerate(zip(after, before, strict=True)):
            norms = [getattr(raw.module, name) for name in NORMS if getattr(raw.module, name, None) in self._patched]
            weights = [norm.weight for norm in norms] or [None, None]
            eps = float(getattr(norms[0], "variance_epsilon", 0.0)) if norms else 0.0
            rotary = Rotary(inv_freq, scaling, *weights, eps)
            q_NHD, k_NHD = rotary.rotate(_packed(raw.query), _packed(raw.key), positions)
            if _agree(q_NHD, _packed(done.query)) and _agree(k_NHD, _packed(done.key)):
                self.rotaries[layer] = rotary
            elif norms or not (_agree(raw.query, done.query) and _agree(raw.key, done.key)):
                return f"layer {layer} norms or rotates in a way of its own"
        return None

    def _patch(self, module: nn.Module) -> str | None:
        name, forward = type(module).__name__, inspect.unwrap(type(module).forward)
        if "forward" in vars(module) or ROTATE not in forward.__code__.co_names or ROTATE not in forward.__globals__:
            return f"{name} does not call {ROTATE}"
        if forward.__closure__:
            return f"the forward of {name} is a closure"
        own = FunctionType(
            forward.__code__,
            {**forward.__globals__, ROTATE: _pass_through},
            forward.__name__,
            forward.__defaults__,
        )
        own.__kwdefaults__ = forward.__kwdefaults__
        self._put(module, own)
        norms = [getattr(module, norm, None) for norm in NORMS]
        if all(_is_head_norm(norm, getattr(module, "head_dim", None)) for norm in norms):
            for norm in norms:
                self._put(norm, _same)
        return None

    def _put(self, module: nn.Module, forward) -> None:
        module.forward = MethodType(forward, module)
        self._patched.append(module)


def _pass_through(q: Tensor, k: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    return q, k


def _same(module: nn.Module, x: Tensor) -> Tensor:
    return x


def _is_head_norm(norm: nn.Module | None, head_dim: int | None) -> bool:
    weight = getattr(norm, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (head_dim,) and hasattr(norm, "variance_epsilon")


def _packed(x_1HND: Tensor) -> Tensor:
    return x_1HND[0].transpose(0, 1)


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = 1e-5 if theirs.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance * theirs.abs().max().item())
