"""All that attaching a model may not leave behind."""

from __future__ import annotations

import torch


def snapshot(model: torch.nn.Module) -> dict:
    """All that attach could leave behind: attributes, hooks and configs by identity, weights, what the configs say."""

    def identity(value):
        if isinstance(value, dict):
            return {key: identity(each) for key, each in value.items()}
        return value if isinstance(value, bool | int | float | str | None) else id(value)

    modules = {
        name: {key: identity(value) for key, value in vars(module).items()} for name, module in model.named_modules()
    }
    weights = {
        name: (weight.data_ptr(), weight.requires_grad) for name, weight in model.state_dict(keep_vars=True).items()
    }
    configs = {
        name: (module.config.to_dict(), module.config._attn_implementation)
        for name, module in model.named_modules()
        if hasattr(module, "config")
    }
    return {"modules": modules, "weights": weights, "configs": configs}
