"""What transformers' own eager attention makes of a few tokens, and whether our layers make the same of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from ..errors import ModelCheckError, UnsupportedModelError

EAGER = "graphattn_eager"  # the attention implementation under which a model must be to be recorded
HIDDEN = "hidden_states"  # what every attention module of transformers calls its input
PROMPTS = (7, 1, 18)  # tokens of each row before the one that is decoded; a page of 16 ends within
ULPS = 2.0  # units in the last place that queries, keys and values may be off, however they are computed
FLOOR = 1e-6  # of the largest output: transformers' eager softmax is in float32, whatever the model's dtype
DRIFT = {torch.float64: 1e-4, torch.float32: 1e-3}  # of what stands between two layers, relative; 0.1 for half types
_recorded: ContextVar[dict[nn.Module, list[Outputs]]] = ContextVar("graphattn_recorded")


@dataclass(frozen=True)
class Outputs:
    """Of one layer's attention, `[B, T, H, Dv]`, and what an error must stay below that is due to the dtype."""

    out: Tensor
    exact: Tensor
    rms: float
    max: float

    @classmethod
    def of(cls, eager: Callable, module: nn.Module, qkv: Sequence[Tensor], mask: Tensor | None, **arguments) -> Outputs:
        """Once in the dtype, once in one above, and once in that with each of q, k and v a little off."""
        out, _ = eager(module, *qkv, mask, **arguments)
        dtype = out.dtype
        wider = torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64
        generator = torch.Generator("cpu").manual_seed(0)

        def nudged(x: Tensor) -> Tensor:
            noise = 2 * torch.rand(x.shape, generator=generator, dtype=wider, device="cpu") - 1
            return x.to(wider) * (1 + ULPS * torch.finfo(dtype).eps * noise.to(x.device))

        mask = mask.to(wider) if mask is not None and mask.is_floating_point() else mask
        exact, _ = eager(module, *(x.to(wider) for x in qkv), mask, **arguments)
        moved, _ = eager(module, *map(nudged, qkv), mask, **arguments)
        floor = FLOOR * exact.abs().max().item()
        errors = [_error(each.to(wider), exact) for each in (out, moved)]
        rms, largest = (2 * max(each) + floor for each in zip(*errors, strict=True))
        return cls(out, exact, rms, largest)


def _error(found: Tensor, exact: Tensor) -> tuple[float, float]:
    difference = (found - exact).abs()
    return difference.square().mean().sqrt().item(), difference.max().item()


def _eager_attention(module, query, key, value, attention_mask, **arguments):
    forward = inspect.unwrap(type(module).forward)
    eager = forward.__globals__.get("eager_attention_forward")
    if eager is None:
        raise UnsupportedModelError(f"the file of {type(module).__name__} has no eager_attention_forward")
    outputs = Outputs.of(eager, module, (query, key, value), attention_mask, **arguments)
    _recorded.get().setdefault(module, []).append(outputs)
    return outputs.out, None


AttentionInterface.register(EAGER, _eager_attention)
AttentionMaskInterface.register(EAGER, eager_mask)


@dataclass(frozen=True)
class Tokens:
    """Which of the oracle's tokens a call computes.

    Attributes:
        rows, columns: of the oracle, by token.
        places: where each stands among the tokens of the call, padding counted.
    """

    rows: Tensor
    columns: Tensor
    places: Tensor


class Oracle:
    """A model's hidden states and attention on rows of a few tokens, as transformers computes them eagerly.

    The rows are recorded side by side, all equally long: what is causal does not see the tokens after it, so ours may
    be fed any part of a row, and shorter rows than these. Our layers are then fed what each of the model's layers was
    fed and hand on what its attention made of it. So errors do not add up, and the first layer that differs is the one
    that is wrong.

    Args:
        model: under the attention implementation `EAGER`.
        modules: its attention modules by layer index.
        longest: tokens that a row may have; None for no limit.
        is_ragged: whether rows are to be of different lengths; padding would move the positions of some models.

    Attributes:
        ids: `[B, T]` int64, on the model's device.
        prompts: tokens of each row before the last one that is looked at, at most T - 1.

    Raises:
        UnsupportedModelError: it does not run so, or an attention module is not called once; says which.
    """

    def __init__(
        self, model: PreTrainedModel, modules: Sequence[nn.Module], longest: int | None, *, is_ragged: bool = True
    ):
        self._name, self._modules = type(model).__name__, list(modules)
        most = max(PROMPTS) if longest is None else max(1, min(max(PROMPTS), longest - 1))
        self.prompts = [min(length, most) if is_ragged else most for length in PROMPTS]
        self.ids = _some_ids(model, len(self.prompts), most + 1)
        positions = torch.arange(most + 1, device=self.ids.device).expand_as(self.ids)
        self._hidden: list[Tensor | None] = [None] * len(self._modules)

        def keep(index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._hidden[index] = _flat(_hidden_of(module, args, kwargs), self.ids.numel(), module)

        token = _recorded.set({})
        try:
            with _hooked([each.register_forward_pre_hook for each in self._modules], keep, with_kwargs=True):
                with torch.no_grad():
                    self._logits = logits_of(model(input_ids=self.ids, position_ids=positions, use_cache=False))
            if self._logits.shape[:2] != self.ids.shape:
                raise TypeError(f"its head gives {list(self._logits.shape)} for {list(self.ids.shape)} tokens")
            found = _recorded.get()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{self._name} could not be checked against transformers' eager attention: {type(error).__name__}: "
                f"{error}; check=False leaves that out"
            ) from error
        finally:
            _recorded.reset(token)
        counts = [len(found.get(module, ())) for module in self._modules]
        if set(counts) != {1} or len(found) != len(self._modules):
            raise UnsupportedModelError(f"{self._name}: its layers attend {counts} times in a call, expected is once")
        self._outputs = [found[module][0] for module in self._modules]
        for index, outputs in enumerate(self._outputs):
            if not outputs.exact.isfinite().all():
                raise UnsupportedModelError(
                    f"{self._name}: layer {index} attends to values that are not finite under transformers' eager "
                    "attention already, so there is nothing to compare with: look for NaN in its weights; check=False "
                    "leaves the comparison out"
                )

    @contextmanager
    def compared(self, layers: Sequence[nn.Module], tokens: Tokens) -> Iterator[None]:
        """Compares every layer in the one call of the model inside the block.

        Args:
            layers: ours by layer index, `Attention`.
            tokens: those of the call.

        Raises:
            ModelCheckError: a layer is not called once, or is the first to differ; says by how much.
        """
        counts = [0] * len(self._modules)

        def feed(index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = _hidden_of(module, args, kwargs)
            flat = _flat(hidden, None, module).clone()
            right = self._hidden[index].view(*self.ids.shape, -1)[tokens.rows, tokens.columns]
            self._check_drift(f"what layer {index} is fed", index, flat[tokens.places], right)
            flat[tokens.places] = right
            return _with_hidden(args, kwargs, flat.view(hidden.shape))

        def compare(index: int, layer: nn.Module, args: tuple, out: Tensor) -> Tensor:
            outputs, counts[index] = self._outputs[index], counts[index] + 1
            exact, right = (x[tokens.rows, tokens.columns] for x in (outputs.exact, outputs.out))
            width = right.shape[-1]
            rms, largest = _error(out[tokens.places][..., :width].to(exact.dtype), exact)
            if not (rms <= outputs.rms and largest <= outputs.max):
                raise ModelCheckError(
                    f"{self._name}: layer {index} attends otherwise than transformers' eager: error {rms:.3g} (root "
                    f"mean square), {largest:.3g} (largest), where {outputs.rms:.3g} and {outputs.max:.3g} may be due "
                    f"to {right.dtype}. This model cannot be served; check=False skips this check",
                    layer=index,
                )
            out = out.clone()
            out[tokens.places, :, :width] = right
            return out

        with (
            _hooked([each.register_forward_pre_hook for each in self._modules], feed, with_kwargs=True),
            _hooked([each.register_forward_hook for each in layers], compare),
        ):
            yield
        missed = next((index for index, count in enumerate(counts) if count != 1), None)
        if missed is not None:
            raise ModelCheckError(
                f"{self._name}: layer {missed} attended {counts[missed]} times in a call, expected is once",
                layer=missed,
            )

    def check_logits(self, logits: Tensor, tokens: Tokens) -> None:
        """Raises ModelCheckError if logits `[N, vocabulary]` of these tokens differ, other than by rounding."""
        self._check_drift("its logits", None, logits, self._logits[tokens.rows, tokens.columns])

    def _check_drift(self, what: str, layer: int | None, found: Tensor, right: Tensor) -> None:
        rms, largest = _error(found.double(), right.double())
        scale, allowed = right.double().square().mean().sqrt().item(), DRIFT.get(right.dtype, 0.1)
        if not rms <= allowed * scale:
            raise ModelCheckError(
                f"{self._name}: {what} differs from what it is under transformers' eager attention: error {rms:.3g} "
                f"(root mean square), {largest:.3g} (largest) of values of {scale:.3g}. All attention before it was "
                "right, so the model mixes tokens in another way too, or takes positions from their place. It cannot "
                "be served; check=False skips this check",
                layer=layer,
            )


def logits_of(output) -> Tensor:
    """A model's logits, or of one without a head its last hidden states."""
    return output.last_hidden_state if getattr(output, "logits", None) is None else output.logits


def _some_ids(model: PreTrainedModel, num_rows: int, num_columns: int) -> Tensor:
    """Different ids over the whole vocabulary, without the one of padding."""
    embeddings = model.get_input_embeddings()
    vocab = embeddings.weight.shape[0]
    ids = (torch.arange(num_rows * num_columns, device="cpu") * 7919 + 11) % vocab
    padding = getattr(embeddings, "padding_idx", None)
    ids[ids == (padding if padding is not None else -1)] = (11 if padding != 11 else 12) % vocab
    return ids.view(num_rows, num_columns).to(model.device)


@contextmanager
def _hooked(registrations: Sequence[Callable], hook: Callable, **options) -> Iterator[None]:
    """Registers `hook(index, ...)` everywhere, and removes it again."""
    handles = []
    try:
        for index, register in enumerate(registrations):
            handles.append(register(partial(hook, index), **options))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden_of(module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    if not args and HIDDEN not in kwargs:
        raise UnsupportedModelError(f"a {type(module).__name__} is called with {sorted(kwargs)}, without {HIDDEN}")
    return args[0] if args else kwargs[HIDDEN]


def _with_hidden(args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, HIDDEN: hidden})


def _flat(hidden: Tensor, num_tokens: int | None, module: nn.Module) -> Tensor:
    """`[tokens, width]`."""
    flat = hidden.flatten(0, -2)
    if num_tokens is not None and len(flat) != num_tokens:
        raise UnsupportedModelError(
            f"a {type(module).__name__} is fed hidden states {tuple(hidden.shape)} of {num_tokens} tokens"
        )
    return flat
