"""Models whose layers attend in several ways on a GPU: captured, over pages that are given back."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from graphattn import LLM, Attention, CacheSpec, DecodeRunner, KVCache, Planner, StepState
from graphattn.buckets import BucketLadder
from graphattn.errors import BackendError, InvalidArgumentError
from graphattn.pages import NULL_PAGE
from graphattn.spec import AttentionSpec
from tests.grouped import grouped, logprobs_after
from tests.test_groups import greedy, prompt_of

pytestmark = pytest.mark.gpu
LENGTHS = (1, 19, 20, 21, 40, 300, 333, 700)


def big(name: str, window: int = 20, **options) -> PreTrainedModel:
    heads = {"head_dim": 64, "num_attention_heads": 8, "max_position_embeddings": 2048}
    if name == "gpt_oss":
        heads["experts_implementation"] = "grouped_mm"  # eager experts look at the device and cannot be captured
    return grouped(name, window, dtype=torch.bfloat16, **(heads | options)).cuda()


def oracles(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model in float32, and as it is; both in plain torch."""
    exact, plain = copy.deepcopy(model).float(), copy.deepcopy(model)
    for each in (exact, plain):
        each.config._experts_implementation = "eager"
    return exact, plain


def poison(llm: LLM) -> None:
    """NaN in every page that nobody holds and no prefix is kept in; on the stream, behind what still runs."""
    for pool, cache in zip(llm.pools.pools, llm._executor.caches, strict=True):
        empty = torch.tensor(pool._free, dtype=torch.long, device="cuda")
        for pair in cache.layers:
            for pages in pair:
                pages[empty] = float("nan")
                assert not pages[NULL_PAGE].isnan().any()


def outputs_of(llm: LLM, max_tokens: int) -> list:
    asked = [llm.add_request(prompt_of(length), greedy(max_tokens)) for length in LENGTHS]
    outputs = {}
    while llm.has_work:
        poison(llm)
        outputs |= {delta.request_id: delta.output for delta in llm.step() if delta.output is not None}
    assert not any(pool.num_used for pool in llm.pools.pools)
    return [outputs[request_id] for request_id in asked]


def errors(outputs, exact: PreTrainedModel, plain: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much our log-probabilities, and those of plain torch in bfloat16, miss those of float32."""
    ours, theirs = [], []
    for output in outputs:
        tokens, first = output.prompt_token_ids + output.token_ids, len(output.prompt_token_ids)
        want_TV, plain_TV = (_on_cuda(model, tokens[:-1], first) for model in (exact, plain))
        for want_V, plain_V, found in zip(want_TV, plain_TV, output.logprobs, strict=True):
            told = torch.tensor([*found.values()], device="cuda")
            ours.append(told - want_V[[*found]])
            theirs.append(plain_V[[*found]] - want_V[[*found]])
    return torch.cat(ours), torch.cat(theirs)


def _on_cuda(model: PreTrainedModel, tokens, first: int) -> torch.Tensor:
    with torch.device("cuda"):
        return logprobs_after(model, tokens, first).float()


@pytest.mark.parametrize("eager", [False, True], ids=["captured", "eager"])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("gemma2", "auto"),
        ("gemma2", "flashinfer"),
        ("gemma3_text", "auto"),
        ("qwen2", "auto"),
        ("mistral", "auto"),
        ("gpt_oss", "auto"),
    ],
)
def test_groups_are_right_over_poisoned_pages(name: str, backend: str, eager: bool) -> None:
    model = big(name)
    exact, plain = oracles(model)
    options = {"max_batch": 4, "max_seq_len": 1024, "kv_bytes": 32 << 20, "max_prefill_tokens": 128, "compile": False}
    with LLM(model, backend=backend, enforce_eager=eager, **options) as llm:
        print(f"\n{llm.explain()}\n{llm.ledger()}")
        outputs = outputs_of(llm, 30)
        assert eager or llm._executor.runner.counts["replay"] > 0
    ours, theirs = errors(outputs, exact, plain)
    for norm in (lambda x: x.square().mean().sqrt(), lambda x: x.abs().max()):
        print(f"{name} {backend}: {norm(ours):.2e}, plain bfloat16 {norm(theirs):.2e}")
        assert norm(ours) <= 2 * norm(theirs) + 2e-3


@pytest.mark.parametrize("prefill", ["fa2", "fa3"])
@pytest.mark.parametrize("window", [64, 100, 129])
def test_prefill_in_chunks_begins_at_the_window(prefill: str, window: int) -> None:
    """fa3 reads whole tiles, so pages that were given back, where the null page stands."""
    model = big("qwen3", window, head_dim=128)
    exact, plain = oracles(model)
    options = {"max_batch": 4, "max_seq_len": 1024, "kv_bytes": 64 << 20, "max_prefill_tokens": 256, "compile": False}
    try:
        llm = LLM(model, prefill=prefill, **options)
    except BackendError as error:
        pytest.skip(str(error))
    with llm:
        ours, theirs = errors(outputs_of(llm, 6), exact, plain)
    for norm in (lambda x: x.square().mean().sqrt(), lambda x: x.abs().max()):
        assert norm(ours) <= 2 * norm(theirs) + 2e-3


def test_a_captured_layer_of_other_heads_than_its_group_is_refused() -> None:
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64)
    cache = CacheSpec(num_pages=8, page_size=16)
    layer = Attention(4, 64, num_kv_heads=2)
    layer.bind(*KVCache(1, spec, cache, "cuda").layers[0])
    state = StepState(max_batch=2, max_seq_len=64, page_size=16, groups=[spec], device="cuda")

    def step(token_ids, positions):
        x = token_ids[:, None, None].to(torch.bfloat16)
        return layer(x.expand(-1, 4, 64).contiguous(), *(x.expand(-1, 2, 64).contiguous() for _ in "kv"))

    runner = DecodeRunner(step, state, Planner([spec], cache, "cuda"), ladder=BucketLadder([2]))
    with pytest.raises(InvalidArgumentError, match="plan of group 0 was made for 8 query heads"):
        runner.capture()
    runner.close()
