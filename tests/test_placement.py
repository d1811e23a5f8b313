"""What a step notices of a model whose weights or modules were changed behind its back."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny
from torch import nn

from graphattn.engine.placement import Placement


def _cast(model: nn.Module) -> None:
    model.model.layers[1].to(torch.bfloat16)


def _reassign_data(model: nn.Module) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.clone()


def _reassign_parameter(model: nn.Module) -> None:
    linear = model.model.layers[1].self_attn.o_proj
    linear.weight = nn.Parameter(linear.weight.detach().clone())


def _replace_module(model: nn.Module) -> None:
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)


def _remove_weight(model: nn.Module) -> None:
    model.model.norm.weight = None


def _remove_module(model: nn.Module) -> None:
    del model.model.layers[0].mlp.down_proj


def _replace_buffer(model: nn.Module) -> None:
    embedding = model.model.rotary_emb
    embedding.inv_freq = embedding.inv_freq.clone()


@pytest.mark.parametrize(
    "change",
    [_cast, _reassign_data, _reassign_parameter, _replace_module, _remove_weight, _remove_module, _replace_buffer],
)
def test_is_noticed(change) -> None:
    model = tiny("llama", dtype=torch.float32)
    placement = Placement(model)
    assert placement.is_intact
    change(model)
    assert not placement.is_intact


def test_weights_updated_in_place_are_where_they_were() -> None:
    model = tiny("llama", dtype=torch.float32)
    placement = Placement(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.data)  # another object over the same memory, which captured steps read
    assert placement.is_intact
    assert sum(tensor.nbytes for tensor in placement.tensors) >= sum(weight.nbytes for weight in model.parameters())
