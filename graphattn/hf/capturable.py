"""Models whose own kernels wait for the host, so that no CUDA graph can hold them."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..errors import UnsupportedModelError


def refuse_uncapturable(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for a model that can be run but neither compiled nor captured; says what to do."""
    name, quantizer = type(model).__name__, getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        method = getattr(quantizer.quantization_config, "quant_method", type(quantizer).__name__)
        raise UnsupportedModelError(
            f"{name} has weights quantised by {getattr(method, 'value', method)}, whose kernels transformers does not "
            "take to be compileable: pass enforce_eager=True and compile=False, or load it with another quantization"
        )
    experts = getattr(model.config.get_text_config(), "_experts_implementation", None)
    if experts == "eager" and model._can_set_experts_implementation():
        raise UnsupportedModelError(
            f"{name} runs its experts one after another (experts_implementation='eager'), which waits for the host in "
            "every layer: call model.set_experts_implementation('grouped_mm'), or pass enforce_eager=True and "
            "compile=False"
        )
