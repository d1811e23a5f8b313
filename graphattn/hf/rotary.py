"""Hands the rotation of queries and keys, and their norms, from a model's attention modules to our layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InvalidArgumentError, UnsupportedModelError
from ..rope import LengthRule, Rotary
from .frequencies import frequencies, length_rule, tables
from .load import max_positions
from .probe import IMPLEMENTATIONS, Call, length_dependent, probe
from .widths import served_width

ROTATE = "apply_rotary_pos_emb"  # what nearly every modeling file of transformers calls its rotation
NORMS = ("q_norm", "k_norm")
POSITIONS = (3, 11)
CONFIG = "graphattn_config"  # attribute of a norm that passes through: its attention module's config
_without_rotation: dict[type, FunctionType] = {}  # the forward of each attention class, rotation left out


class RotaryTakeover:
    """Attention modules that leave norm and rotation out, so that `Attention` can do both in its kernel.

    Each module gets a forward that is its class's, in whose globals the rotation passes queries and keys through.
    Whether our layer then does the same is not read from the code but tried: two tokens run through the model before
    and after, its norms at uneven weights meanwhile, and every layer's queries and keys, normed and rotated here, must
    be what they were; that also tells which frequencies are a layer's where types of layers have their own (Gemma 3).
    Under another attention implementation than ours the modules are what they always were.

    Args:
        model: under the attention implementation `PROBE_UNMASKED`.
        modules: its attention modules by layer index.

    Attributes:
        rotaries: by layer; None for one that does not rotate, or that is left to do it itself.
        reason: why the model was left as it was; None if it was not.
        length_rule: how frequencies depend on a request's length; None if they do not.

    Raises:
        UnsupportedModelError: they do, and the model was left as it was: it takes them from the longest request.
    """

    def __init__(self, model: PreTrainedModel, modules: Sequence[nn.Module]):
        self._patched: list[nn.Module] = []
        self._norms: list[tuple[nn.Module, Tensor]] = []
        self.rotaries: list[Rotary | None] = [None] * len(modules)
        self.length_rule: LengthRule | None = None
        try:
            with _uneven_norms(modules):
                self.reason = self._take_over(model)
        except BaseException:
            self.detach()
            raise
        if self.reason is not None:
            self.detach()
        if self.reason is not None and length_dependent(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} takes rotary frequencies from the longest row of a batch, so requests would "
                f"change each other, and its layers cannot rotate instead: {self.reason}"
            )

    def check(self) -> None:
        """Raises InvalidArgumentError if a norm's weight is no longer the one that the layers read."""
        for norm, weight in self._norms:
            if norm.weight is not weight:
                raise InvalidArgumentError(
                    f"the weight of a {type(norm).__name__} was reassigned while an LLM runs the model: update weights "
                    "in place with llm.load_weights(...), or make a new LLM"
                )

    def detach(self) -> None:
        """Gives every module its own forward back; does nothing the second time."""
        for module in self._patched:
            for name in ("forward", CONFIG):
                vars(module).pop(name, None)
        self._patched, self._norms = [], []
        self.rotaries = [None] * len(self.rotaries)

    def _take_over(self, model: PreTrainedModel) -> str | None:
        embeddings = [module for module in model.modules() if tables(module)]
        if len(embeddings) != 1:
            return f"the model has {len(embeddings)} rotary embeddings"
        embedding, at = embeddings[0], [(POSITIONS, None)]
        self.length_rule, of_types = length_rule(embedding), tables(embedding)
        if self.length_rule is None and length_dependent(model):
            return "its layers have rotary embeddings of several kinds"
        threshold = 0 if self.length_rule is None else self.length_rule.threshold
        if self.length_rule is not None:
            at.insert(0, ((POSITIONS[0], threshold + 1), threshold + 2))  # first, since the other resets the embedding
            longest = max(max_positions(model) or 0, threshold + 2)
            of_types = [(frequencies(embedding, self.length_rule, longest), of_types[0][1])]
        probed = [probe(model, positions) for positions, _ in at]
        before = probed[-1]
        turned = 2 * max(inv_freq.shape[-1] for inv_freq, _ in of_types)
        head_dim = min(call.query.shape[3] for call in before)
        if turned > head_dim:
            return f"{turned} dims would be rotated, a head has {head_dim}"
        if not all(tensor.any() for call in before for tensor in (call.query, call.key)):
            return "queries or keys are zero, so nothing can be told of them"
        for call in before:
            if reason := self._patch(call.module, takes_norms=not _is_widened(call)):
                return reason
        if self.length_rule is not None:
            self._put(embedding, _no_angles)
        try:
            after = probe(model, POSITIONS)
        except UnsupportedModelError as error:
            return str(error)
        for layer, (raw, *done) in enumerate(zip(after, *probed, strict=True)):
            norms = [norm for name in NORMS if (norm := getattr(raw.module, name, None)) in self._patched]
            weights = [norm.weight for norm in norms] or [None, None]
            eps = norms[0].variance_epsilon if norms else 0.0
            tried = [Rotary(inv_freq, scaling, *weights, eps, threshold) for inv_freq, scaling in of_types]
            same = [each for each in tried if all(_rotates(each, raw, *one) for one in zip(done, at, strict=True))]
            if len(same) > 1 and not all(torch.equal(each.inv_freq, same[0].inv_freq) for each in same):
                return f"it cannot be told by which of {len(same)} kinds of frequencies layer {layer} rotates"
            if same:
                self.rotaries[layer] = same[0]
            elif norms or not all(_agree(raw.query, x.query) and _agree(raw.key, x.key) for x in done):
                return f"layer {layer} norms or rotates in a way of its own"
        return None

    def _patch(self, module: nn.Module, *, takes_norms: bool) -> str | None:
        kind, forward = type(module), inspect.unwrap(type(module).forward)
        if "forward" in vars(module) or ROTATE not in forward.__code__.co_names or ROTATE not in forward.__globals__:
            return f"{kind.__name__} does not call {ROTATE}"
        if forward.__closure__:
            return f"the forward of {kind.__name__} is a closure"
        if kind not in _without_rotation:
            own_globals = {**forward.__globals__, ROTATE: _pass_through}
            own = FunctionType(forward.__code__, own_globals, forward.__name__, forward.__defaults__)
            own.__kwdefaults__ = forward.__kwdefaults__
            _without_rotation[kind] = own
        self._put(module, _forward)
        norms = [getattr(module, name, None) for name in NORMS]
        if takes_norms and all(_is_head_norm(norm, getattr(module, "head_dim", None)) for norm in norms):
            if any(norm in self._patched for norm in norms) or norms[0] is norms[1]:
                return f"{kind.__name__} shares its norms"
            for norm in norms:
                vars(norm)[CONFIG] = module.config
                self._put(norm, _norm_forward)
                self._norms.append((norm, norm.weight))
        return None

    def _put(self, module: nn.Module, forward) -> None:
        module.forward = MethodType(forward, module)
        self._patched.append(module)


def _forward(module: nn.Module, *args, **kwargs):
    kind = type(module)
    is_ours = module.config._attn_implementation in IMPLEMENTATIONS
    return (_without_rotation[kind] if is_ours else kind.forward)(module, *args, **kwargs)


def _norm_forward(norm: nn.Module, x: Tensor) -> Tensor:
    is_ours = getattr(norm, CONFIG)._attn_implementation in IMPLEMENTATIONS
    return x if is_ours else type(norm).forward(norm, x)


def _no_angles(embedding: nn.Module, x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Nothing, which our layers do not read; transformers' own would look at the positions on the host."""
    if embedding.config._attn_implementation not in IMPLEMENTATIONS:
        return type(embedding).forward(embedding, x, *args, **kwargs)
    return x.new_zeros(1), x.new_zeros(1)


# Pickle looks methods up by their names, and finds the class's.
_forward.__name__ = _norm_forward.__name__ = _no_angles.__name__ = "forward"


def _pass_through(q: Tensor, k: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    return q, k


@contextmanager
def _uneven_norms(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Uneven weights for whatever norms heads: at even ones a norm and a rotation may change places unnoticed."""
    norms = {norm for module in modules for norm in module.children() if _is_vector(getattr(norm, "weight", None))}
    saved = [(norm.weight, norm.weight.detach().clone()) for norm in norms]
    try:
        for weight, _ in saved:
            weight.data.copy_(1 + torch.arange(len(weight), device=weight.device) % 7 / 7)
        yield
    finally:
        for weight, value in saved:
            weight.data.copy_(value)


def _is_vector(weight: object) -> bool:
    return isinstance(weight, Tensor) and weight.dim() == 1 and weight.is_floating_point()


def _is_head_norm(norm: nn.Module | None, head_dim: int | None) -> bool:
    weight = getattr(norm, "weight", None)
    is_plain = norm is not None and "forward" not in vars(norm) and not (norm._forward_hooks or norm._forward_pre_hooks)
    return is_plain and isinstance(weight, Tensor) and weight.shape == (head_dim,) and hasattr(norm, "variance_epsilon")


def _is_widened(call: Call) -> bool:
    """Whether our layer has wider heads, over which no mean can be taken."""
    head_dim = call.query.shape[3]
    return served_width(head_dim, call.value.shape[3], call.query.device) != head_dim


def _packed(x_1HND: Tensor) -> Tensor:
    return x_1HND[0].transpose(0, 1)


def _rotates(rotary: Rotary, raw: Call, done: Call, at: tuple[tuple[int, int], int | None]) -> bool:
    """Whether it makes of raw queries and keys, at two positions in a row of a length, what the model made of them."""
    positions, length = at
    positions_N = torch.tensor(positions, device=rotary.inv_freq.device)
    lengths_N = None if length is None else torch.full_like(positions_N, length)
    q_NHD, k_NHD = rotary.rotate(_packed(raw.query), _packed(raw.key), positions_N, lengths_N)
    return _agree(q_NHD, _packed(done.query)) and _agree(k_NHD, _packed(done.key))


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = 1e-5 if theirs.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance * theirs.abs().max().item())
