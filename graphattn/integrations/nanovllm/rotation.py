"""Norm and rotation of queries and keys, taken over from a model whose own are found to be the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...rope import Rotary
from ...shortage import first_line, is_out_of_memory

BASES = (1e6, 1e4)  # of frequencies, tried after the config's: nano-vLLM has 1e6 where it does not find that


class Passed(nn.Module):
    """Stands where a norm or a rotation stood."""

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What it was given, positions left out."""
        return inputs[0] if len(inputs) == 1 else inputs[1:]


class _Seen(nn.Module):
    """Stands where attention stands, and keeps what it is given."""

    def forward(self, *inputs: Tensor) -> Tensor:
        self.inputs = inputs
        return torch.zeros_like(inputs[0])


def take_over(model: nn.Module, attention: type[nn.Module], config) -> None:
    """Gives each attention layer the norm and rotation before it as its `rotary`, and puts `Passed` in their places.

    A module that has `attn`, `rotary_emb` and perhaps `q_norm` and `k_norm` has them tried on random queries and keys
    at positions up to the last, and is tried whole with them and without. They are taken over if `Rotary` makes the
    same of those but for rounding; else the layer's `rotary` is None, the model goes on doing it by itself, and a
    `RuntimeWarning` says why.

    Args:
        model: nano-vLLM's, with its weights.
        attention: nano-vLLM's attention.
        config: the model's, of transformers.
    """
    for module in model.modules():
        if isinstance(module, attention):
            module.rotary = None
    for owner in list(model.modules()):
        if isinstance(getattr(owner, "attn", None), attention) and hasattr(owner, "rotary_emb"):
            owner.attn.rotary = _taken(owner, config)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def _taken(owner: nn.Module, config) -> Rotary | None:
    """What was taken over of a module; None, with a warning, if a trial differs or raises."""
    own = {name: getattr(owner, name) for name in ("rotary_emb", "q_norm", "k_norm") if hasattr(owner, name)}
    taken, why = None, "they compute something else"
    try:
        positions = _positions(owner, config)
        rotary = next((each for each in _candidates(owner, config) if _is_same(owner, each, positions)), None)
        if rotary is not None:
            right = _given(owner, config, positions)
            for name in own:
                setattr(owner, name, Passed())
            q, k, v = _given(owner, config, positions)
            if all(map(_is_near, (*rotary.rotate(q, k, positions), v), right)):
                taken = rotary
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = first_line(error)
    finally:
        if taken is None:
            for name, module in own.items():
                setattr(owner, name, module)
    if taken is None:
        text = f"norm and rotation of {type(owner).__name__} stay its own, outside the attention kernel: {why}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
    return taken


def _given(owner: nn.Module, config, positions: Tensor) -> tuple[Tensor, ...]:
    """What a module hands to its attention for random hidden states."""
    weight, attn, owner.attn = next(owner.parameters()), owner.attn, _Seen()
    generator = torch.Generator("cpu").manual_seed(1)
    drawn = {"generator": generator, "dtype": torch.float32, "device": "cpu"}  # the default dtype is the model's
    try:
        owner(positions, torch.randn(len(positions), config.hidden_size, **drawn).to(weight.device, weight.dtype))
        return owner.attn.inputs
    finally:
        owner.attn = attn


def _positions(owner: nn.Module, config) -> Tensor:
    """Powers of two, 0, and the last that the module knows."""
    table = getattr(owner.rotary_emb, "cos_sin_cache", None)
    last = config.max_position_embeddings - 1 if table is None else min(len(table), config.max_position_embeddings) - 1
    device = next(owner.parameters()).device
    return torch.tensor([*(2**bit for bit in range(last.bit_length())), 0, last], device=device)


def _is_near(ours: Tensor, theirs: Tensor) -> bool:
    allowed = 4 * torch.finfo(theirs.dtype).eps + 1e-2  # angles of far tokens, in float32
    return ours.shape == theirs.shape and bool((_size(ours - theirs) <= allowed * _size(theirs)).all())


def _norms(owner: nn.Module) -> list[nn.Module | None]:
    return [getattr(owner, name, None) for name in ("q_norm", "k_norm")]


def _candidates(owner: nn.Module, config) -> Iterator[Rotary]:
    norms, head_dim, device = _norms(owner), owner.attn.head_dim, next(owner.parameters()).device
    weights, eps = ([getattr(norm, name, None) for norm in norms] for name in ("weight", "eps"))
    if (
        eps[0] != eps[1]
        or (eps[0] is None) != (norms[0] is None)
        or len({norm is None for norm in norms} | {weight is None for weight in weights}) != 1
    ):
        return
    weights = [None if weight is None else weight.detach() for weight in weights]
    stated = (config, getattr(config, "rope_parameters", None) or {})
    bases = [getattr(stated[0], "rope_theta", None), stated[1].get("rope_theta"), *BASES]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    for base in dict.fromkeys(filter(None, bases)):
        yield Rotary(1.0 / base**exponents, 1.0, *weights, eps[0] or 0.0)


def _is_same(owner: nn.Module, rotary: Rotary, positions: Tensor) -> bool:
    """In float32, where scales show; angles are of float32 anyhow, and the less sure the farther a token is."""
    layer, generator = owner.attn, torch.Generator("cpu").manual_seed(0)
    drawn = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    heads = (layer.num_heads, layer.num_kv_heads)
    allowed_N = 1e-5 + 4 * torch.finfo(torch.float32).eps * positions.double()
    for scale in (1.0, 1e-3):  # an epsilon shows in small ones
        q, k = (scale * torch.randn(len(positions), count, layer.head_dim, **drawn) for count in heads)
        q, k = q.to(positions.device), k.to(positions.device)
        normed = [x.clone() if norm is None else norm(x.clone()) for x, norm in zip((q, k), _norms(owner), strict=True)]
        own, ours = owner.rotary_emb(positions, *normed), rotary.rotate(q, k, positions)
        sizes = [(_size(mine - theirs), _size(theirs)) for mine, theirs in zip(ours, own, strict=True)]
        if not all(bool((error_N <= allowed_N * size_N).all()) for error_N, size_N in sizes):
            return False
    return True


def _size(x_NHD: Tensor) -> Tensor:
    return x_NHD.double().flatten(1).norm(dim=1)
