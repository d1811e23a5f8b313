"""Norms, gates and residuals are folded into linears where that changes nothing, and left alone elsewhere."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny
from torch import Tensor, nn
from torch.nn import functional as F

from graphattn.engine.fold import fold


def folded(forward, *inputs: Tensor, suits=lambda weight: True) -> list[tuple]:
    """What linears of the compiled forward fold in, as (bias, norm, gated, residual), those of a pair together; checks
    that results are equal."""
    found: list[tuple] = []

    def backend(graph, _):
        fold(graph, suits)
        for node in graph.graph.nodes:
            if node.target is torch.ops.graphattn.linear.default:
                _, _, bias, norm, _, gated, residual = node.args
                found.append((bias is not None, norm is not None, gated, residual is not None))
            if node.target is torch.ops.graphattn.linear_pair.default:
                _, _, _, bias, _, _, _, next_bias, gated = node.args
                found.append(((bias is not None, False, False, True), (next_bias is not None, True, gated, False)))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        expected = forward(*inputs)
        ours = torch.compile(forward, backend=backend, fullgraph=True)(*inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    return found


def norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) / 8 for shape in ((64, 64), (128, 64), (64,), (64,))]


@pytest.mark.parametrize(("family", "has_bias"), [("llama", 0), ("qwen3", 0), ("mistral", 0), ("qwen2", 1)])
def test_models_have_all_folded(family: str, has_bias: int):
    from graphattn.hf.merge import MergedProjections

    model = tiny(family, dtype=torch.float32)
    merged = MergedProjections(model)

    def forward(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    qkv, plus_residual, gate_up = (
        (bool(has_bias), True, False, False),
        (False,) * 3 + (True,),
        (False, True, True, False),
    )
    assert folded(forward, torch.arange(7)[None]) == [
        qkv,
        (plus_residual, gate_up),
        (plus_residual, qkv),
        (plus_residual, gate_up),
        plus_residual,
        (False, False, False, False),  # logits are cut between norm and head
    ]
    merged.detach()


def test_a_sum_that_is_read_before_the_pair_stays(x: Tensor, weights: list[Tensor]):
    square, wide, weight, _ = weights

    def forward(x: Tensor, has_reader: bool) -> tuple[Tensor, ...]:
        total = F.linear(x, square) + x
        read = total * 2 if has_reader else x
        return read, F.linear(norm(total, weight), wide), total

    total, normed = (False, False, False, True), (False, True, False, False)
    assert folded(lambda x: forward(x, has_reader=True), x) == [total, normed]
    assert folded(lambda x: forward(x, has_reader=False), x) == [(total, normed)]


def test_what_others_read_stays(x: Tensor, weights: list[Tensor]):
    square, wide, weight, _ = weights

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        normed = norm(x, weight)
        plain = F.linear(normed, square)
        total = x + plain
        halves = F.linear(normed, wide)
        first, second = halves.split([64, 64], -1)
        return normed, plain, total, F.silu(first) * second, halves

    assert folded(forward, x) == [(False, True, False, False), (False, True, False, False)]


def test_a_gate_of_other_halves_and_a_sum_that_broadcasts_stay(x: Tensor, weights: list[Tensor]):
    square, wide, weight, row = weights

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        second, first = F.linear(x, wide).split([64, 64], -1)
        thin, thick = F.linear(x, wide).split([32, 96], -1)
        doubled = F.linear(x, square)
        return (
            F.silu(first) * second,
            F.silu(thick).sum(-1) * thin.sum(-1),
            F.linear(x, square) + row,
            doubled + doubled,
        )

    assert folded(forward, x) == [(False, False, False, False)] * 4


def test_norms_of_another_kind_stay(x: Tensor, weights: list[Tensor]):
    square, _, weight, _ = weights

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        shifted = norm(x, 1 + weight)
        sums = x.to(torch.float32) * torch.rsqrt(x.to(torch.float32).pow(2).sum(-1, keepdim=True) + 1e-6)
        return (
            F.linear(shifted, square),
            F.linear(weight * sums.to(x.dtype), square),
            F.linear(F.layer_norm(x, (64,)), square),
        )

    assert folded(forward, x) == [(False, True, False, False), *[(False, False, False, False)] * 2]


def test_only_linears_that_suit(x: Tensor, weights: list[Tensor]):
    first, second = nn.Linear(64, 64), nn.Linear(64, 96)
    found = folded(lambda x: second(x + first(x)), x, suits=lambda weight: weight.shape[0] == 64)
    assert found == [(True, False, False, True)]


def test_what_is_changed_in_place_is_read_when_it_was(x: Tensor, weights: list[Tensor]):
    """Dynamo keeps changes in place as statements that nobody reads; a folded linear reads late."""
    square, wide, weight, _ = weights

    def of_its_output(x: Tensor) -> Tensor:
        out = F.linear(x, square)
        out.add_(1)
        return out * 2

    def of_another(x: Tensor) -> Tensor:
        sums = torch.zeros_like(x)
        sums.index_add_(1, torch.arange(5), F.linear(x, square))
        return sums

    def of_its_residual(x: Tensor) -> tuple[Tensor, Tensor]:
        rest = x + 1
        total = F.linear(x, square) + rest
        rest.mul_(0)
        return total, rest

    def of_what_was_normed(x: Tensor) -> Tensor:
        x = x.clone()
        normed = norm(x, weight)
        x += F.linear(normed, square)
        return F.linear(normed, square)

    def of_its_input(x: Tensor) -> Tensor:
        x = x.clone()
        rest = x * 2
        out = F.linear(x, square)
        x.mul_(0)
        return rest + out

    def of_half_a_gate(x: Tensor) -> Tensor:
        first, second = F.linear(x, wide).split([64, 64], -1)
        first = F.silu(first)
        second.add_(1)
        return first * second

    plain = (False, False, False, False)
    assert folded(of_its_output, x) == [plain]
    assert folded(of_another, x) == [plain]
    assert folded(of_its_residual, x) == [(False, False, False, True)]
    assert folded(of_what_was_normed, x) == [(False, True, False, False), plain]
    assert folded(of_its_input, x) == [plain]
    assert folded(of_half_a_gate, x) == [plain]


def test_weights_that_are_computed_and_numbers_that_are_added_stay(x: Tensor, weights: list[Tensor]):
    """A kernel that has just written a weight may still run when ours reads it."""
    square, *_ = weights
    assert folded(lambda x: F.linear(x, square * 2), x) == []
    assert folded(lambda x: F.linear(x, square) + x.shape[1], x) == [(False, False, False, False)]


def test_models_of_other_epsilons_fold_their_own_norms():
    """Dynamo takes a number that differs between calls of one name for dynamic; models are not one name."""
    from graphattn import LLM, SamplingParams
    from graphattn.engine import step

    found = []

    def noting(graph, suits):
        count = fold(graph, lambda weight: True)
        targets = [node.target for node in graph.graph.nodes if node.target is not torch.ops.graphattn.linear.default]
        norms = [node.args[3] for node in graph.graph.nodes if node.target is torch.ops.graphattn.linear.default]
        found.append(targets.count(torch.ops.graphattn.linear_pair.default) + sum(norm is not None for norm in norms))
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "fold_few_rows", lambda graph: noting(graph, None))
        patch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs: graph.forward)
        torch._dynamo.reset()
        for eps in (1e-6, 1e-5, 1e-4):
            with LLM(
                tiny("qwen3", dtype=torch.float32, rms_norm_eps=eps), compile=True, max_batch=2, num_pages=20
            ) as llm:
                llm.generate([[1, 2], [3]], SamplingParams(temperature=0, max_tokens=3))
                assert llm._executor.step.num_compiles == len(found)
                assert llm._executor.step.num_folded == 9
            assert set(found) == {4}
            found.clear()
