"""Norm and rotation that an LLM's layers take over: only where they do the same, and given back exactly."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny import tiny
from torch import nn
from transformers import PreTrainedModel

from graphattn import LLM, InvalidArgumentError, SamplingParams

PROMPTS = [[5, 9, 33, 71, 12], [7], list(range(40, 75))]
TAKEN = {"llama": 4, "qwen3": 4, "qwen2": 4, "smollm3": 3, "cohere": 0, "hunyuan_v1_dense": 0, "glm4": 0}
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def made(family: str, seed: int = 0) -> PreTrainedModel:
    """Token 0 is padding, so its embedding is zero; norms that do not start at ones."""
    model = tiny(family, num_layers=4, seed=seed, pad_token_id=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1 and seed:
                weight.copy_(1 + torch.rand(weight.shape, generator=generator))
    return model


def expected(model: PreTrainedModel, count: int = 10) -> list[tuple[int, ...]]:
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        rows.append(tuple(out[0, len(prompt) :].tolist()))
    return rows


def drawn(llm: LLM) -> list[tuple[int, ...]]:
    return [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("family", TAKEN)
def test_tokens_are_those_of_generate_and_of_new_weights(family: str) -> None:
    """smollm3 does not rotate every layer, cohere rotates other pairs, hunyuan norms after it rotates."""
    model, other = made(family), made(family, seed=3)
    want = [expected(each) for each in (model, other)]
    state, forwards = dict(model.state_dict()), [module.forward.__func__ for module in model.modules()]
    with LLM(model, max_batch=3, num_pages=80) as llm:
        taken = sum(rotary is not None for rotary in llm._executor.binding.rotary.rotaries)
        assert taken == TAKEN[family]
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
        assert drawn(llm) == want[0]
        llm.load_weights(other.state_dict())
        assert drawn(llm) == want[1]
    assert [module.forward.__func__ for module in model.modules()] == forwards
    assert not any("forward" in vars(module) or "graphattn_config" in vars(module) for module in model.modules())


def _share(model: PreTrainedModel) -> None:
    layers = model.model.layers
    layers[1].self_attn.q_norm = layers[0].self_attn.q_norm


def _hook(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.q_norm.register_forward_hook(lambda module, args, out: out * 2)


def _own_forward(model: PreTrainedModel) -> None:
    norm = model.model.layers[1].self_attn.k_norm
    norm.forward = lambda x: type(norm).forward(norm, x) * 2


@pytest.mark.parametrize("change", [_share, _hook, _own_forward])
def test_norms_that_are_not_plain_stay_the_models(change) -> None:
    model = made("qwen3")
    change(model)
    want, before = expected(model), [dict(vars(module)) for module in model.modules()]
    with LLM(model, max_batch=3, num_pages=80) as llm:
        assert drawn(llm) == want
    assert expected(model) == want
    after = [dict(vars(module)) for module in model.modules()]
    assert [row.get("forward") for row in after] == [row.get("forward") for row in before]


def test_a_copy_under_another_implementation_is_the_model_itself() -> None:
    model = made("qwen3")
    want = expected(model)
    with LLM(model, max_batch=3, num_pages=80) as llm:
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other.set_attn_implementation("sdpa")
            assert expected(other) == want
        assert drawn(llm) == want


def test_a_norm_whose_weight_is_reassigned_is_noticed() -> None:
    model = made("qwen3")
    with LLM(model, max_batch=3, num_pages=80) as llm:
        norm = model.model.layers[2].self_attn.k_norm
        norm.weight = nn.Parameter(norm.weight.detach() * 2)
        with pytest.raises(InvalidArgumentError, match="the weight of a Qwen3RMSNorm was reassigned"):
            drawn(llm)
