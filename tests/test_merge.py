"""Merged projections: one GEMM for q, k, v and one for gate, up; the same numbers, and the model back afterwards."""

from __future__ import annotations

import copy
import io
import weakref
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from graphattn.engine.step import ModelStep
from graphattn.errors import InvalidArgumentError
from graphattn.hf import attach, merge
from graphattn.hf.merge import MergedProjections
from graphattn.memory import tensor_bytes
from tests.tiny import FAMILIES, tiny

SIBLINGS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
GEMMS = 2 * 4 + 1  # of two layers: qkv, o, gate and up, down; and the head


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(1, 128, shape, generator=torch.Generator().manual_seed(sum(shape)))


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


def siblings(model: nn.Module) -> list[nn.Linear]:
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in SIBLINGS]


def block(*, bias: bool = False) -> nn.Module:
    """What holds q, k and v, of unlike widths."""
    module = nn.Module()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, width in (("q_proj", 8), ("k_proj", 4), ("v_proj", 6)):
            module.add_module(name, nn.Linear(5, width, bias=bias, dtype=torch.float64))
        with torch.random.fork_rng(devices=[]):
            module.x = torch.randn(3, 5, dtype=torch.float64)
    return module


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=1e-12)


class Gemms(TorchDispatchMode):
    """Counts them while it is entered."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear)
        return op(*args, **(kwargs or {}))


def calls(graph: torch.fx.GraphModule) -> Counter:
    return Counter(getattr(node.target, "__name__", node.target) for node in graph.graph.nodes)


# The numbers and how they come about


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5)], ids=str)
def test_a_merged_model_answers_as_before_with_fewer_gemms(family: str, shape: tuple[int, int]):
    model, tokens = tiny(family), ids(*shape)
    for linear in siblings(model):
        if linear.bias is not None:
            linear.bias.normal_()  # zero at first
    with Gemms() as gemms:
        expected = logits(model, tokens)
    assert gemms.count == GEMMS + 2 * 3
    merged = MergedProjections(model)
    assert merged.num_merged == {"qkv": 2, "gate_up": 2} and not merged.kept
    with Gemms() as gemms:
        found = logits(model, tokens)
    assert gemms.count == GEMMS
    assert near(found, expected)


def test_an_attached_model_generates_as_before():
    model, tokens = tiny("qwen2"), ids(2, 6)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(tokens, **options)
    with attach(model):
        MergedProjections(model)
        assert torch.equal(model.generate(tokens, **options), expected)


@pytest.mark.parametrize(
    ("family", "compiler"),
    [("llama", "none"), ("qwen3", "none"), pytest.param("qwen2", "inductor", marks=pytest.mark.inductor)],
)
def test_a_compiled_step_has_one_gemm_per_group_and_compiles_once(family: str, compiler: str, monkeypatch):
    import torch._inductor.compile_fx

    graphs, compile_fx = [], torch._inductor.compile_fx.compile_fx

    def counting(graph, given):
        graphs.append(graph)
        return compile_fx(graph, given) if compiler == "inductor" else graph.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", counting)
    torch._dynamo.reset()
    model = tiny(family)
    plain, compiled = ModelStep(model, compile=False, max_batch=8), ModelStep(model, compile=True, max_batch=8)
    steps = [(ids(size).int(), torch.arange(size, dtype=torch.int32)) for size in (8, 4, 2, 1, 6)]
    expected = [plain(*step)[0] for step in steps]
    merged = MergedProjections(model)
    for step, logits_BV in zip(steps, expected, strict=True):
        found, greedy = compiled(*step)
        torch.testing.assert_close(found, logits_BV, rtol=1e-5, atol=1e-5)  # norms pass through float32
        assert torch.equal(greedy, found.argmax(-1))
    assert compiled.num_compiles == len(graphs) == 1
    for graph in graphs:
        assert calls(graph)["linear"] == GEMMS
        assert len(graph.graph.output_node().args[0]) == 1, "the draw is not compiled"
    siblings(model)[4].weight.mul_(2)  # the second sibling of gate and up
    updated = compiled(*steps[0])[0]
    merged.detach()
    assert not near(updated, expected[0])
    torch.testing.assert_close(plain(*steps[0])[0], updated, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled(*steps[0])[0], updated, rtol=1e-5, atol=1e-5)


def test_layers_compiled_one_by_one_share_one_graph():
    torch._dynamo.reset()
    model, tokens, graphs = tiny("llama", num_layers=12), ids(1, 5), []
    expected = logits(model, tokens)
    MergedProjections(model)

    def backend(graph, given):
        graphs.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    assert near(logits(model, tokens), expected)
    assert [calls(graph)["linear"] for graph in graphs] == [4]


def test_an_input_of_a_compiled_graph_is_as_good_as_any():
    torch._dynamo.reset()
    mlp, graphs = tiny("llama").model.layers[0].mlp, []
    xs = [torch.randn(1, 4, 64, dtype=torch.float64) for _ in range(3)]
    expected = [mlp(x) for x in xs]
    MergedProjections(mlp)
    compiled = torch.compile(mlp, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    mlp.gate_proj(xs[2])
    for x, out in [*zip(xs, expected, strict=True)] * 2:
        assert near(compiled(x), out)
    assert all(calls(graph)["linear"] == 2 and len(graph.graph.output_node().args[0]) == 1 for graph in graphs)


# The parameters


@pytest.mark.parametrize("bias", [False, True], ids=["weights", "biases too"])
def test_parameters_stay_themselves_and_share_one_storage(bias: bool):
    module = block(bias=bias)
    parameters, values = dict(module.named_parameters()), copy.deepcopy(module.state_dict())
    num_bytes, gradless = tensor_bytes(parameters.values()), module.k_proj.weight.requires_grad_(False)
    MergedProjections(module)
    found = dict(module.named_parameters())
    assert list(found) == list(parameters) and all(found[name] is parameters[name] for name in found)
    assert module.q_proj.weight.requires_grad and not gradless.requires_grad
    state = module.state_dict()
    assert list(state) == list(values) and all(torch.equal(state[name], values[name]) for name in values)
    for kind in ("weight", "bias") if bias else ("weight",):
        assert len({parameter.untyped_storage().data_ptr() for name, parameter in found.items() if kind in name}) == 1
    assert tensor_bytes(found.values()) == num_bytes


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_an_update_in_place_reaches_the_merged_gemm(name: str, kind: str):
    module = block(bias=True)
    linear = module.get_submodule(name)
    MergedProjections(module)
    module.load_state_dict({**module.state_dict(), f"{name}.{kind}": getattr(linear, kind) + 1})
    getattr(linear, kind).copy_(getattr(linear, kind) * 2)
    with Gemms() as gemms:
        outs = {each: module.get_submodule(each)(module.x) for each in SIBLINGS[:3]}
    assert gemms.count == 1
    assert near(outs[name], module.x @ linear.weight.T + linear.bias)


def snapshot(model: nn.Module) -> dict:
    """All attributes by identity, and what the parameters say."""

    def identity(value):
        return {key: id(each) for key, each in value.items()} if isinstance(value, dict) else id(value)

    modules = {name: {key: identity(each) for key, each in vars(m).items()} for name, m in model.named_modules()}
    kept = model.state_dict(keep_vars=True)
    return {
        "modules": modules,
        "weights": {name: (w.is_meta or w.to_dense().tolist(), w.requires_grad) for name, w in kept.items()},
    }


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_detach_restores_the_model_exactly(family: str):
    model, tokens = tiny(family), ids(2, 4)
    seen, expected = snapshot(model), logits(model, tokens)
    merged = MergedProjections(model)
    assert snapshot(model) != seen
    logits(model, tokens)
    for _ in range(2):
        merged.detach()
        assert merged.num_merged == {"qkv": 0, "gate_up": 0}
        assert snapshot(model) == seen and torch.equal(logits(model, tokens), expected)
        assert not any("forward" in vars(module) for module in model.modules())
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert [s.nbytes() for s in storages] == [p.nbytes for p in model.parameters()]
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    again = MergedProjections(model)
    assert again.num_merged == {"qkv": 2, "gate_up": 2}


def test_what_was_merged_goes_with_detach():
    module = block(bias=True)
    merged = MergedProjections(module)
    held = [weakref.ref(tensor) for group in merged._groups for tensor in (group.weight, group.bias)]
    merged.detach()
    assert [tensor() for tensor in held] == [None, None]


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = tiny("qwen2")
    seen, joined, num_calls = snapshot(model), merge._joined, []

    def failing(parameters):
        num_calls.append(1)
        if len(num_calls) == 5:  # the bias of the second layer's q, k and v
            raise torch.OutOfMemoryError("no more")
        return joined(parameters)

    monkeypatch.setattr(merge, "_joined", failing)
    with pytest.raises(torch.OutOfMemoryError):
        MergedProjections(model)
    assert len(num_calls) == 5 and snapshot(model) == seen
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in model.parameters())


def test_merging_in_inference_mode_makes_no_inference_tensors():
    module = block(bias=True)
    with torch.inference_mode():
        merged = MergedProjections(module)
        assert near(module.v_proj(module.x), module.x @ module.v_proj.weight.T + module.v_proj.bias)
    assert not any(parameter.is_inference() for parameter in module.parameters())
    with torch.inference_mode():
        merged.detach()
    assert not any(parameter.is_inference() for parameter in module.parameters())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_merged_model_has_weights_of_its_own(way: str):
    model, tokens = tiny("qwen2"), ids(1, 4)
    MergedProjections(model)
    expected = logits(model, tokens)
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    for linear in siblings(model):
        linear.weight.zero_()
    assert near(logits(copied, tokens), expected)
    for linear in siblings(copied):
        linear.weight.zero_()
    assert near(logits(copied, tokens), logits(model, tokens))


def test_a_merged_model_is_saved_as_it_is(tmp_path):
    model, tokens = tiny("qwen2"), ids(1, 4)
    MergedProjections(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert near(logits(loaded, tokens), logits(model, tokens))


def _assign(module: nn.Module) -> None:
    module.load_state_dict({name: tensor.clone() for name, tensor in module.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda module: module.float(), "a q_proj's weight"),
        (_assign, "a q_proj's weight"),
        (lambda module: setattr(module.v_proj.weight, "data", torch.ones(6, 5)), "a v_proj's weight"),
        (lambda module: setattr(module.k_proj.bias, "data", torch.ones(4)), "a k_proj's bias"),
    ],
    ids=["cast", "assigned", "weight", "bias"],
)
def test_parameters_that_were_moved_are_noticed_and_survive_detach(change: Callable, names: str):
    module = block(bias=True)
    merged = MergedProjections(module)
    merged.check()
    change(module)
    values = copy.deepcopy(module.state_dict())
    with pytest.raises(
        InvalidArgumentError, match=rf"{names} \(.*\) was moved, cast or reassigned after it was merged"
    ):
        merged.check()
    merged.detach()
    assert all(torch.equal(tensor, values[name]) for name, tensor in module.state_dict().items())


# What is not merged


class OtherLinear(nn.Linear):
    pass


def _tie(module: nn.Module) -> None:
    module.head = nn.Linear(5, 4, bias=False)
    module.head.weight = module.k_proj.weight


def _share_a_view(module: nn.Module) -> None:
    module.register_buffer("part", module.v_proj.weight.data[1:3])


def _subclass(module: nn.Module) -> None:
    module.k_proj = OtherLinear(5, 4, bias=False, dtype=torch.float64)


def _unlike(**options) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        module.v_proj = nn.Linear(
            **{"in_features": 5, "out_features": 6, "bias": False, "dtype": torch.float64} | options
        )

    return change


def _sparsify(module: nn.Module) -> None:
    module.k_proj.weight = nn.Parameter(module.k_proj.weight.data.to_sparse(), requires_grad=False)


def _quantize(module: nn.Module) -> None:
    class Quantized(torch.Tensor):
        pass

    weight = module.k_proj.weight.data.as_subclass(Quantized)
    module.k_proj.weight = nn.Parameter(weight, requires_grad=False)


KEPT = {
    "tied": (_tie, "k_proj has a weight that is tied"),
    "shared in part": (_share_a_view, "v_proj has a weight that is tied"),
    "one module twice": (lambda m: setattr(m, "v_proj", m.k_proj), "k_proj has a weight that is tied"),
    "subclass": (_subclass, "k_proj is a OtherLinear"),
    "quantized": (_quantize, "k_proj has a weight that is tied, quantized"),
    "sparse": (_sparsify, "k_proj has a weight that is tied, quantized"),
    "hook": (lambda m: m.v_proj.register_forward_hook(lambda *_: None), "v_proj has forward hooks"),
    "hook before": (lambda m: m.q_proj.register_forward_pre_hook(lambda *_: None), "q_proj has forward hooks"),
    "patched": (lambda m: setattr(m.k_proj, "forward", m.k_proj.forward), "k_proj has a forward of its own"),
    "dtype": (_unlike(dtype=torch.float32), "differ in dtype"),
    "width": (_unlike(in_features=6), "differ in input width: 5, 5, 6"),
    "device": (_unlike(device="meta"), "differ in device"),
    "bias": (_unlike(bias=True), "differ in bias: False, False, True"),
    "in part": (lambda m: delattr(m, "v_proj"), None),
}


@pytest.mark.parametrize("name", KEPT)
def test_groups_that_are_left_as_they_are(name: str):
    change, reason = KEPT[name]
    model = nn.ModuleDict({"this": block(), "other": block()})
    change(model["this"])
    seen = snapshot(model["this"])
    merged = MergedProjections(model)
    assert snapshot(model["this"]) == seen
    assert merged.num_merged == {"qkv": 1, "gate_up": 0}
    assert list(merged.kept) == (["this.qkv"] if reason else [])
    assert reason is None or reason in merged.kept["this.qkv"]


def test_a_model_is_not_merged_twice():
    model = tiny("llama")
    merged = MergedProjections(model)
    second = MergedProjections(model)
    assert second.num_merged == {"qkv": 0, "gate_up": 0}
    assert second.kept["model.layers.1.mlp.gate_up"] == "gate_proj has a forward of its own"
    second.detach()
    with Gemms() as gemms:
        logits(model, ids(1, 3))
    assert gemms.count == GEMMS
    merged.detach()


# Which result goes to whom


class Calls:
    """Calls siblings of a merged block one by one; each must be right, after so many GEMMs."""

    def __init__(self, **options):
        self.module = block(**options)
        MergedProjections(self.module)
        self.x = self.module.x

    def __call__(self, name: str, x: torch.Tensor, num_gemms: int) -> torch.Tensor:
        linear = self.module.get_submodule(f"{name}_proj")
        with Gemms() as gemms:
            out = linear(x)
        assert gemms.count == num_gemms, f"{name} took {gemms.count} GEMMs"
        expected = x @ linear.weight.T
        assert near(out, expected if linear.bias is None else expected + linear.bias)
        return out


@pytest.mark.parametrize("bias", [False, True])
def test_siblings_get_views_of_one_result_once(bias: bool):
    call = Calls(bias=bias)
    outs = [call("q", call.x, 1), call("k", call.x, 0), call("v", call.x, 0)]
    assert len({out.untyped_storage().data_ptr() for out in outs}) == 1
    again = [call("v", call.x, 1), call("k", call.x, 1)]
    assert not {out.data_ptr() for out in again} & {out.data_ptr() for out in outs}


def test_siblings_may_be_called_in_any_order():
    call = Calls()
    call("k", call.x, 1), call("v", call.x, 1), call("q", call.x, 1), call("v", call.x, 0), call("k", call.x, 0)
    call("q", call.x, 1), call("q", call.x, 1), call("k", call.x, 0), call("k", call.x, 1), call("v", call.x, 0)


def test_another_input_is_another_result():
    call = Calls()
    same = call.x.clone()
    call("q", call.x, 1), call("k", same, 1), call("v", same + 1, 1), call("k", call.x, 0), call("v", call.x[:], 1)
    call("q", same, 1), call("q", call.x, 1), call("v", same, 0), call("k", call.x, 0), call("k", same, 0)


def test_siblings_of_other_parents_do_not_take_the_result():
    one, two = Calls(), Calls()
    for factor, call in ((2, one), (-1, two)):
        for linear in siblings(call.module):
            linear.weight.mul_(factor)
    one("q", one.x, 1), two("k", one.x, 1), two("q", one.x, 1), one("k", one.x, 1), two("v", one.x, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_an_aborted_step_left_is_not_taken_later(mode: Callable):
    model, x = tiny("llama"), None
    attention = model.model.layers[1].self_attn
    tokens, others = ids(2, 3), ids(2, 3) - 1
    expected = logits(model, others)
    MergedProjections(model)

    def abort(module, arguments):
        nonlocal x
        x = weakref.ref(arguments[0])
        raise ZeroDivisionError

    hook = attention.k_proj.register_forward_pre_hook(abort)
    with mode():
        with pytest.raises(ZeroDivisionError):
            logits(model, tokens)
        hook.remove()
        assert x() is None
        with Gemms() as gemms:
            assert near(logits(model, others), expected)
    assert gemms.count == GEMMS


def test_an_input_that_changed_in_place_is_another_one():
    call = Calls()
    call("q", call.x, 1), call.x.add_(1), call("k", call.x, 1), call("q", call.x, 1), call("v", call.x, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bias", [False, True])
def test_a_parameter_that_changed_between_siblings_counts(bias: bool, mode: Callable):
    call = Calls(bias=bias)
    linear = call.module.k_proj
    with mode():
        x = call.x + 1
        call("q", x, 1), (linear.bias if bias else linear.weight).add_(1), call("k", x, 1), call("v", x, 0)


def test_gradients_are_those_of_the_parameters():
    module, plain = block(bias=True), block(bias=True)
    MergedProjections(module)
    module.q_proj(module.x)
    with torch.enable_grad():
        for each in (module, plain):
            x = each.x.requires_grad_()
            (each.q_proj(x).sum() + each.k_proj(x).square().sum() + each.v_proj(x).sum()).backward()
    assert all(
        near(found.grad, expected.grad)
        for found, expected in zip([*module.parameters(), module.x], [*plain.parameters(), plain.x], strict=True)
    )


def test_no_result_outlives_its_last_sibling_nor_its_input():
    call = Calls()
    held = [weakref.ref(call(name, call.x, name == "q")) for name in "qkv"]
    assert [out() for out in held] == [None] * 3
    assert not any(vars(call.x).values())
    x = call.x.clone()
    call("q", x, 1)
    left = [weakref.ref(value[0]) for value in vars(x).values()]
    assert len(left) == 2 and all(part() is not None for part in left)
    del x
    assert [part() for part in left] == [None] * 2
