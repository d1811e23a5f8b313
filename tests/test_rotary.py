"""Norm and rotation that an LLM's layers take over: only where they do the same, and given back exactly."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle

import pytest
import torch
from tiny import tiny
from torch import nn
from transformers import PreTrainedModel

from graphattn import LLM, Attention, InvalidArgumentError, Rotary, SamplingParams, UnsupportedModelError
from graphattn.hf import attach

PROMPTS = [[5, 9, 33, 71, 12], [7], list(range(40, 75))]
TAKEN = {"llama": 4, "qwen3": 4, "qwen2": 4, "smollm3": 3, "phi": 4, "gpt_neox": 4, "stablelm": 4}
TAKEN |= {"gemma2": 4, "gemma3_text": 4}
TAKEN |= {"cohere": 0, "hunyuan_v1_dense": 0, "glm4": 0}
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
    """gemma3 has frequencies for layers with windows and others, smollm3 does not rotate every layer, phi, gpt_neox
    and stablelm not every dim; cohere and glm4 rotate other pairs, hunyuan norms after it rotates."""
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


def test_each_type_of_layer_has_its_frequencies_or_the_model_rotates_itself() -> None:
    model = tiny("gemma3_text", num_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    embedding = model.model.rotary_emb
    with LLM(model, max_batch=2, num_pages=40) as llm:
        found = [rotary.inv_freq for rotary in llm._executor.binding.rotary.rotaries]
        local, whole = embedding.sliding_attention_inv_freq, embedding.full_attention_inv_freq
        assert not torch.equal(local, whole)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, [local, whole] * 2, strict=True))
    embedding.sliding_attention_inv_freq.copy_(embedding.full_attention_inv_freq * (1 + 1e-6))
    want = expected(model)
    with LLM(model, max_batch=3, num_pages=80) as llm:
        assert "it cannot be told by which of 2 kinds of frequencies layer 0 rotates" in llm.explain()
        assert drawn(llm) == want


THRESHOLD = 64
SCALED = {"rope_theta": 10000.0, "factor": 4.0}
ROPES = {
    "default": {"rope_theta": 10000.0},
    "linear": SCALED,
    "yarn": SCALED | {"original_max_position_embeddings": 128},
    "llama3": SCALED | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
    "proportional": SCALED | {"partial_rotary_factor": 0.5},
    "dynamic": SCALED,
    "longrope": SCALED
    | {
        "original_max_position_embeddings": THRESHOLD,
        "short_factor": [1 + 0.1 * pair for pair in range(8)],
        "long_factor": [2 + 0.5 * pair for pair in range(8)],
    },
}


def of_rope_type(kind: str) -> PreTrainedModel:
    positions = {"max_position_embeddings": THRESHOLD if kind == "dynamic" else 4 * THRESHOLD}
    return tiny("llama", rope_parameters=ROPES[kind] | {"rope_type": kind}, **positions)


@functools.cache
def asked(kind: str) -> tuple[list[list[int]], list[tuple[list[int], list[float]]]]:
    """Prompts on both sides of the threshold, with prefixes in common, and what each is to give."""
    model, generator = of_rope_type(kind), torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 128, (count,), generator=generator).tolist() for count in (5, 63, 64, 65, 90)]
    prompts += [prompts[4][:55], prompts[4][:64] + [7], prompts[4]]
    return prompts, [alone(model, prompt, 16, recomputes=kind == "longrope") for prompt in prompts]


def alone(model: PreTrainedModel, prompt: list[int], count: int, *, recomputes: bool) -> tuple[list[int], list[float]]:
    """Greedy tokens of transformers at batch 1 and their log-probabilities, from a copy of the model, since it keeps
    frequencies of earlier calls."""
    ids, cache, logprobs = torch.tensor([prompt]), None, []
    model = copy.deepcopy(model)
    with torch.no_grad():
        for _ in range(count):
            fed = ids if cache is None or recomputes else ids[:, -1:]
            out = model(fed, past_key_values=None if recomputes else cache, use_cache=not recomputes)
            best, token = out.logits[0, -1].log_softmax(-1).max(-1)
            ids, cache = torch.cat((ids, token[None, None]), 1), out.past_key_values
            logprobs.append(best.item())
    return ids[0, len(prompt) :].tolist(), logprobs


def ours(llm: LLM, prompts: list[list[int]], count: int) -> list[tuple[list[int], list[float]]]:
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=1))
    rows = [zip(output.token_ids, output.logprobs, strict=True) for output in outputs]
    return [
        ([*output.token_ids], [found[token] for token, found in row]) for output, row in zip(outputs, rows, strict=True)
    ]


def check(found: list[tuple[list[int], list[float]]], want: list[tuple[list[int], list[float]]]) -> None:
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in want]
    for (_, ours), (_, theirs) in zip(found, want, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"max_prefill_tokens": 16, "page_size": 4, "num_pages": 58}], ids=str)
@pytest.mark.parametrize("kind", ROPES)
def test_every_rope_type_and_a_length_of_its_own_for_each_request(kind: str, options: dict) -> None:
    """Requests on both sides of the length from which frequencies change, and that cross it, share steps and pages.

    With longrope a request that crosses it is computed anew, as transformers does without a cache.
    """
    (prompts, want), model = asked(kind), of_rope_type(kind)
    with LLM(model, max_batch=4, **{"num_pages": 80} | options) as llm:
        assert all(rotary is not None for rotary in llm._executor.binding.rotary.rotaries)
        for _ in range(2):  # the second time there are pages of prefixes
            check(ours(llm, prompts, 16), want)
        llm.pool.check()
        assert options or llm.pool.num_hits > 0
        assert llm._scheduler.num_preemptions > 0 or not (options or kind == "longrope")
    assert all("forward" not in vars(module) for module in model.modules())
    assert alone(model, prompts[0], 5, recomputes=True)[0] == want[0][0][:5]


@pytest.mark.inductor
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_of_a_length_in_a_compiled_step(kind: str) -> None:
    model, prompt = of_rope_type(kind), list(range(60))
    want = alone(model, prompt, 8, recomputes=kind == "longrope")
    with LLM(model, max_batch=2, num_pages=40, compile=True) as llm:
        check(ours(llm, [prompt, prompt], 8), [want, want])


def test_frequencies_of_a_length_that_the_layers_cannot_apply() -> None:
    """Cohere rotates other pairs, so the model would have to: with the frequencies of the longest request."""
    model = tiny("cohere", rope_parameters=ROPES["longrope"] | {"rope_type": "longrope"})
    with pytest.raises(UnsupportedModelError, match="from the longest row of a batch, so requests would change each"):
        LLM(model, max_batch=2, num_pages=40)
    model = of_rope_type("dynamic")
    model.model.other = copy.deepcopy(model.model.rotary_emb)
    with pytest.raises(UnsupportedModelError, match="rotate instead: the model has 2 rotary embeddings"):
        LLM(model, max_batch=2, num_pages=40)
    model = of_rope_type("longrope")
    model.model.rotary_emb.rope_type = {"full_attention": "longrope"}
    with pytest.raises(
        UnsupportedModelError, match="rotate instead: its layers have rotary embeddings of several kinds"
    ):
        LLM(model, max_batch=2, num_pages=40)
    with pytest.raises(UnsupportedModelError, match="graphattn.LLM gives each request its own"):
        attach(of_rope_type("dynamic"))


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


def test_frequencies_that_do_not_fit_a_head() -> None:
    for shape in ((33,), (4, 33), (1, 2, 8)):
        with pytest.raises(InvalidArgumentError, match="of the 32 pairs of a head at most"):
            Attention(4, 64, rotary=Rotary(torch.ones(shape)))


@pytest.mark.parametrize(("family", "section"), [("qwen2_vl", [2, 3, 3]), ("qwen3_vl", [4, 2, 2])])
def test_positions_in_three_of_a_text(family: str, section: list[int]) -> None:
    """M-RoPE turns a text, whose three positions are one, as a plain rotation does; the second interleaves sections."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = family.replace("_vl", "VL").replace("qwen", "Qwen")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ropes = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = getattr(modeling, f"{kind}TextConfig")(
        **sizes, **ends, intermediate_size=64, head_dim=16, vocab_size=96, rope_parameters=ropes
    )
    torch.manual_seed(0)
    model = getattr(modeling, f"{kind}TextModel")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
        ids = torch.randint(1, 96, (2, 20))
        model.set_attn_implementation("eager")
        want = model(ids).last_hidden_state
        with attach(model):
            torch.testing.assert_close(model(ids).last_hidden_state, want, rtol=1e-4, atol=1e-4)
        q, k = torch.randn(20, 4, 16), torch.randn(20, 2, 16)
        positions = torch.arange(20)
        cos, sin = model.rotary_emb(q, positions.expand(3, 1, 20))
        turned = modeling.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        ours = Rotary(model.rotary_emb.inv_freq).rotate(q, k, positions)
    for got, theirs in zip(ours, turned, strict=True):
        torch.testing.assert_close(got, theirs[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
