"""attach: a transformers model on our pages answers as before, refuses the rest, and is itself again after detach."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import threading

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from graphattn.errors import (
    BackendError,
    InvalidArgumentError,
    NoActivePlanError,
    OutOfPagesError,
    UnsupportedModelError,
)
from graphattn.hf import attach, detach
from tests.snapshot import snapshot
from tests.tiny import FAMILIES, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = 4


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def make(family: str = "llama", **options) -> PreTrainedModel:
    """A tiny model whose norms stay in float64, where those of transformers pass through float32."""
    model = tiny(family, **options)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            shape, eps = tuple(module.weight.shape), module.variance_epsilon
            module.forward = functools.partial(
                torch.nn.functional.rms_norm, normalized_shape=shape, weight=module.weight, eps=eps
            )
    return model


def ragged(*lens: int, side: str = "left") -> dict[str, torch.Tensor]:
    """Random rows of these lengths, padded with random tokens."""
    longest = max(lens)
    mask = torch.zeros(len(lens), longest, dtype=torch.long)
    for row, length in enumerate(lens):
        mask[row, longest - length :] = 1
    ids = torch.randint(1, 128, mask.shape, generator=torch.Generator().manual_seed(sum(lens)))
    return {"input_ids": ids, "attention_mask": mask if side == "left" else mask.flip(1)}


def generate(model: PreTrainedModel, inputs: dict, **options) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**inputs, **{"max_new_tokens": 10, "do_sample": False, **options})


def assert_same_logits(found, expected, mask: torch.Tensor | None = None) -> None:
    found, expected = found.logits, expected.logits
    kept = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=1e-9)


def no_plan_is_active(handle) -> bool:
    spec = handle.layers[0].spec
    q, kv = (torch.zeros(1, heads, spec.head_dim, dtype=torch.float64) for heads in (spec.num_heads, spec.num_kv_heads))
    try:
        handle.layers[0](q, kv, kv)
    except NoActivePlanError:
        return True
    return False


# What is promised to stay equal


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_ragged_rows_are_as_before(family: str, side: str):
    model = make(family)
    inputs = ragged(9, 1, 8, 4, side=side)
    if side == "none":
        del inputs["attention_mask"]
    before = model(**inputs)
    with attach(model, page_size=PAGE) as handle:
        after = model(**inputs)
        assert after.past_key_values.get_seq_length() == 9
        assert handle.backend == "reference"
    assert_same_logits(after, before, inputs.get("attention_mask"))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_as_before(family: str, options: dict):
    model, inputs = make(family), ragged(8, 1, 4, 7, 8)  # whole pages, and a row that is padding through two chunks
    before = generate(model, inputs)
    with attach(model, page_size=PAGE) as handle:
        assert torch.equal(generate(model, inputs, **options), before)
        assert handle.pages.num_used == 0
    assert torch.equal(generate(model, inputs), before)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20, "temperature": 2.0},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 4, "do_sample": True, "length_penalty": 0.5},
        {"num_beams": 3, "eos_token_id": list(range(0, 128, 9)), "pad_token_id": 0, "early_stopping": True},
    ],
    ids=str,
)
def test_sampled_and_searched_tokens_are_as_before(options: dict):
    model, inputs = make(), ragged(8, 1, 4, 7)
    before = generate(model, inputs, **options)
    with attach(model, page_size=PAGE) as handle:
        assert torch.equal(generate(model, inputs, **options), before)
        assert handle.pages.num_used == 0


@pytest.mark.parametrize("help_from", ["model", "attached model", "prompt"])
def test_assisted_tokens_are_as_before(help_from: str):
    model, inputs = make(), ragged(9)
    before = generate(model, inputs, max_new_tokens=20)
    options = {"prompt_lookup_num_tokens": 3}
    if help_from != "prompt":
        helper = make()  # the same weights but for one, so that some of its drafts are wrong
        helper.lm_head.weight[: 128 // 3] = 0
        options = {"assistant_model": helper}
    with attach(model, page_size=PAGE), attach(helper) if help_from == "attached model" else contextlib.nullcontext():
        assert torch.equal(generate(model, inputs, max_new_tokens=20, **options), before)


@pytest.mark.parametrize("cache", [None, DynamicCache], ids=["returned", "own"])
def test_decoding_by_hand(cache):
    model, inputs = make(), ragged(5, 2, 4)
    before = generate(model, inputs)
    past = own = cache and cache()
    ids, mask, step = inputs["input_ids"], inputs["attention_mask"], inputs["input_ids"]
    with attach(model, page_size=PAGE):
        for _ in range(10):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
            out = model(step, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True)
            past = own if cache else out.past_key_values
            step = out.logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, step], 1), torch.cat([mask, torch.ones_like(step)], 1)
        assert past.get_seq_length() == 14
    assert torch.equal(ids, before)


def test_positional_arguments():
    model, inputs = make(), ragged(5, 2)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    before = model(ids, mask)
    with attach(model):
        assert_same_logits(model(ids, mask), before, mask)
        assert_same_logits(model.forward(ids, mask), before, mask)
        with pytest.raises(TypeError, match="multiple values"):
            model(ids, mask, input_ids=ids)


def test_embeddings_in_place_of_ids():
    model, inputs = make(), ragged(6, 3)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    before, logits = generate(model, {"inputs_embeds": embeds, **inputs}), model(inputs_embeds=embeds, **inputs)
    with attach(model, page_size=PAGE):
        assert torch.equal(generate(model, {"inputs_embeds": embeds, **inputs}), before)
        assert_same_logits(model(inputs_embeds=embeds, **inputs), logits, inputs["attention_mask"])


def test_a_turn_after_a_generation():
    model, inputs = make(), ragged(6, 3)
    first = generate(model, inputs)
    turn = torch.cat([first, ragged(5, 5)["input_ids"]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 15, dtype=torch.long)], 1)
    before = generate(model, {"input_ids": turn, "attention_mask": mask})
    with attach(model, page_size=PAGE):
        past = generate(model, inputs, return_dict_in_generate=True).past_key_values
        again = generate(model, {"input_ids": turn, "attention_mask": mask, "past_key_values": past})
    assert torch.equal(again, before)


@pytest.mark.parametrize("window", [2, 5, 8])
def test_a_window(window: int):
    model, inputs = make("mistral", sliding_window=window), ragged(13, 1, 7)
    before, logits = generate(model, inputs), model(**inputs)
    with attach(model, page_size=PAGE) as handle:
        assert handle.layers[0].spec.window == window
        assert torch.equal(generate(model, inputs), before)
        assert_same_logits(model(**inputs), logits, inputs["attention_mask"])


def test_a_soft_cap():
    model = tiny("gemma2", layer_types=["full_attention"] * 2, attn_logit_softcapping=2.0, attn_implementation="eager")
    inputs = ragged(13)
    before = generate(model, inputs)
    with attach(model, page_size=PAGE) as handle:
        assert handle.layers[0].spec.softcap == 2.0
        assert torch.equal(generate(model, inputs), before)


# The cache


ACTIONS = ("extend", "extend", "select", "mask", "repeat", "crop", "copy")


@given(data=st.data())
@settings(max_examples=50)
def test_any_history_of_a_cache_gives_the_logits_of_its_tokens(data):
    """Chunks, padding before the first token, reordering, forgetting: against the model on the whole rows at once."""
    model, oracle = _pair()
    ids_BC, mask_BC = torch.empty(2, 0, dtype=torch.long), torch.empty(2, 0, dtype=torch.long)
    past, random = None, torch.Generator().manual_seed(0)
    with attach(model, page_size=PAGE) as handle, torch.no_grad():
        for _ in range(data.draw(st.integers(3, 12))):
            action = data.draw(st.sampled_from(ACTIONS)) if past else "extend"
            if action == "extend":
                count = data.draw(st.integers(1, 6))
                pads = [0 if row.any() else data.draw(st.integers(0, count)) for row in mask_BC]
                new_BT = torch.tensor([[0] * pad + [1] * (count - pad) for pad in pads])
                mask_BC = torch.cat([mask_BC, new_BT], 1)
                ids_BC = torch.cat([ids_BC, torch.randint(128, new_BT.shape, generator=random)], 1)
                out = model(ids_BC[:, -count:], attention_mask=mask_BC, past_key_values=past)
                past, whole = out.past_key_values, oracle(ids_BC, attention_mask=mask_BC)
                kept = new_BT.bool()
                torch.testing.assert_close(out.logits[kept], whole.logits[:, -count:][kept], rtol=0, atol=1e-9)
            elif action == "crop":
                count = data.draw(st.integers(0, past.get_seq_length()))
                past.crop(-count)
                kept_columns = ids_BC.shape[1] - count
                ids_BC, mask_BC = ids_BC[:, :kept_columns], mask_BC[:, :kept_columns]
            elif action == "copy":
                copied, cropped = copy.deepcopy(past), past
                past = copied
                cropped.reset()
            elif len(mask_BC) < 5:
                rows = data.draw(st.lists(st.sampled_from(range(len(mask_BC))), min_size=1, max_size=4))
                if action == "repeat":
                    rows = [row for row in range(len(mask_BC)) for _ in range(2)]
                    past.batch_repeat_interleave(2)
                elif action == "mask":
                    rows = sorted(set(rows))
                    past.batch_select_indices(torch.tensor([row in rows for row in range(len(mask_BC))]))
                else:
                    past.reorder_cache(torch.tensor(rows))
                ids_BC, mask_BC = ids_BC[rows], mask_BC[rows]
            assert (past.get_seq_length(), past.batch_size) == (ids_BC.shape[1], ids_BC.shape[0])
            pages = handle.pages
            pages.check()
            assert pages.num_used == sum(map(pages.pages_for, mask_BC.sum(1).tolist()))
        out = past = copied = cropped = None
        assert handle.pages.num_used == 0


@functools.cache
def _pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    return make("qwen3"), make("qwen3")


def test_the_pool_grows():
    model, inputs = make(), ragged(300, 20)
    before = generate(model, inputs)
    with attach(model, page_size=PAGE) as handle:
        out = model(**ragged(30))
        first = handle.pages.num_pages
        assert torch.equal(generate(model, inputs), before)
        assert handle.pages.num_pages > first and handle.pages.num_used == 8
        both = torch.cat([ragged(30)["input_ids"], ragged(7)["input_ids"]], 1)
        continued = model(both[:, 30:], past_key_values=out.past_key_values)
    torch.testing.assert_close(continued.logits, model(both).logits[:, 30:], rtol=0, atol=1e-9)


def test_growth_under_inference_mode():
    model, inputs = make(), ragged(300)
    before = generate(model, inputs)
    with attach(model, page_size=PAGE):
        with torch.inference_mode():
            assert torch.equal(generate(model, inputs), before)
        assert torch.equal(generate(model, inputs), before)


def test_out_of_pages_leaves_everything_usable():
    model = make()
    ids = ragged(40, 40)["input_ids"]
    before = model(ids[:, :24])
    with attach(model, page_size=PAGE, num_pages=13) as handle:  # 12 pages: 24 tokens for each of two rows
        past = model(ids[:, :20]).past_key_values
        with pytest.raises(OutOfPagesError, match=r"10 pages needed, 2 of 12 free .* attach with more num_pages"):
            model(ids[:, 20:], past_key_values=past)
        with pytest.raises(OutOfPagesError, match="10 pages needed"):
            copy.deepcopy(past)
        with pytest.raises(OutOfPagesError, match="5 pages needed"):
            past.reorder_cache(torch.tensor([1, 1]))
        assert (past.get_seq_length(), handle.pages.num_used) == (20, 10)
        continued = model(ids[:, 20:24], past_key_values=past)
        torch.testing.assert_close(continued.logits, before.logits[:, 20:], rtol=0, atol=1e-9)
        assert handle.pages.num_free == 0
        del past, continued
        gc.collect()
        assert handle.pages.num_used == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_forward_leaves_no_trace(error: type[BaseException]):
    model, ids = make(), ragged(12)["input_ids"]

    def fail(*args):
        raise error("inside")

    before = model(ids)
    with attach(model, page_size=PAGE) as handle:
        past = model(ids[:, :7]).past_key_values
        hook = model.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(error, match="inside"):
            model(ids[:, 7:], past_key_values=past)
        with pytest.raises(error, match="inside"):
            model(ids)
        hook.remove()
        gc.collect()
        assert no_plan_is_active(handle)
        assert (past.get_seq_length(), handle.pages.num_used) == (7, 2)
        continued = model(ids[:, 7:], past_key_values=past)
        torch.testing.assert_close(continued.logits, before.logits[:, 7:], rtol=0, atol=1e-9)


def test_pages_without_a_cache_are_held_until_the_call_returns():
    model, inputs = make(), ragged(9, 4)
    before = model(**inputs)
    with attach(model, page_size=PAGE) as handle:
        out = model(**inputs, use_cache=False)
        assert out.past_key_values is None and handle.pages.num_used == 0
        assert_same_logits(out, before, inputs["attention_mask"])
        model.config.use_cache = False
        assert model(**inputs).past_key_values is None


# One instance, and only while attached


def test_two_attached_models_take_turns():
    first, second = make(), make("qwen3", seed=1)
    inputs = ragged(6, 3)
    before = [generate(model, inputs) for model in (first, second)]
    with attach(first, page_size=PAGE), attach(second, page_size=8):
        step, past, mask = [inputs["input_ids"]] * 2, [None, None], inputs["attention_mask"]
        tokens = [inputs["input_ids"]] * 2
        for _ in range(10):
            for index, model in enumerate((first, second)):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step[index].shape[1] :]
                out = model(step[index], attention_mask=mask, position_ids=positions, past_key_values=past[index])
                past[index], step[index] = out.past_key_values, out.logits[:, -1:].argmax(-1)
                tokens[index] = torch.cat([tokens[index], step[index]], 1)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        with pytest.raises(InvalidArgumentError, match="did not make"):
            first(step[0], past_key_values=past[1])
    assert all(map(torch.equal, tokens, before))


def test_threads_take_turns_on_one_attached_model():
    model, inputs = make(), ragged(6, 3, 9)
    before = generate(model, inputs)
    results = []
    with attach(model, page_size=PAGE):

        def run():
            with torch.no_grad():
                results.extend(generate(model, inputs) for _ in range(4))

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 12 and all(torch.equal(result, before) for result in results)


def test_a_model_of_the_attached_models_config_says_what_is_wrong():
    model = make()
    with attach(model):
        other = type(model)(model.config).eval()
    with pytest.raises(UnsupportedModelError, match="LlamaAttention has attn_implementation='graphattn' and was not"):
        other(torch.tensor([[1]]))


def test_another_model_of_the_same_config_is_unchanged():
    model = make()
    other = type(model)(model.config).eval()
    assert other.config is model.config
    seen, inputs = snapshot(other), ragged(6, 3)
    before = other(**inputs)
    with attach(model):
        model(**inputs)
        assert snapshot(other) == seen
        assert torch.equal(other(**inputs).logits, before.logits)
        assert isinstance(other(**inputs).past_key_values, DynamicCache)


def test_detach_restores_the_model_exactly():
    model = make()
    hook = model.register_forward_hook(lambda *args: None)
    seen = snapshot(model)
    handle = attach(model, page_size=PAGE)
    assert snapshot(model) != seen
    assert model.config._attn_implementation == "graphattn" and len(handle.layers) == 2
    assert "2 layers, reference" in repr(handle)
    generate(model, ragged(5, 2))
    model.eval()
    assert model.state_dict().keys() == seen["weights"].keys()
    handle.detach()
    assert snapshot(model) == seen
    assert handle.layers == [] and "detached" in repr(handle)
    handle.detach()
    assert snapshot(model) == seen
    hook.remove()


def test_detach_restores_a_forward_of_the_instance():
    model = make()
    model.forward = functools.partial(model.forward)
    forward = model.forward
    with attach(model):
        generate(model, ragged(3))
    assert model.forward is forward


def test_leaving_the_context_by_an_exception_detaches():
    model = make()
    seen = snapshot(model)
    with pytest.raises(ZeroDivisionError), attach(model):
        raise ZeroDivisionError
    assert snapshot(model) == seen


def test_attaching_twice_raises_and_keeps_the_first():
    model, inputs = make(), ragged(5, 2)
    before = generate(model, inputs)
    with attach(model):
        with pytest.raises(UnsupportedModelError, match="attached already: detach it first"):
            attach(model)
        assert torch.equal(generate(model, inputs), before)
    with attach(model):
        assert torch.equal(generate(model, inputs), before)


def test_a_cache_outlives_detach_but_serves_no_more():
    model, ids = make(), ragged(5)["input_ids"]
    with attach(model) as handle:
        past = model(ids).past_key_values
    with pytest.raises(InvalidArgumentError, match="holds pages of an attached model"):
        model(ids[:, :1], past_key_values=past)
    with attach(model), pytest.raises(InvalidArgumentError, match="did not make"):
        model(ids[:, :1], past_key_values=past)
    del past
    gc.collect()
    assert handle.pages.num_used == 0


@pytest.mark.parametrize("change", [lambda model: model.float(), lambda model: model.set_attn_implementation("sdpa")])
def test_a_model_that_was_changed_after_attach_is_noticed(change):
    model, inputs = make(), ragged(3)
    with attach(model):
        change(model)
        with pytest.raises(InvalidArgumentError, match="moved, cast or set to attn_implementation="):
            model(**inputs)


def test_a_copy_of_an_attached_model_has_pages_of_its_own():
    model, inputs = make(), ragged(6, 3)
    before = generate(model, inputs)
    with attach(model, page_size=PAGE) as handle:
        past = model(**inputs).past_key_values
        copied = copy.deepcopy(model)
        model.lm_head.weight.zero_()
        assert torch.equal(generate(copied, inputs), before)
        with pytest.raises(InvalidArgumentError, match="did not make"):
            copied(inputs["input_ids"], past_key_values=past)
        assert handle.pages.num_used == 3
    assert torch.equal(generate(copied, inputs), before)


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"backend": "flashinfer"}, BackendError, "flashinfer cannot serve"),
        ({"backend": "flash"}, InvalidArgumentError, "choose auto"),
        ({"num_pages": 1}, InvalidArgumentError, "at least 2"),
        ({"page_size": 0}, InvalidArgumentError, "page_size"),
    ],
    ids=str,
)
def test_options_that_cannot_be_leave_the_model_as_it_was(options: dict, error: type[Exception], reason: str):
    model = make()
    seen = snapshot(model)
    with pytest.raises(error, match=reason):
        attach(model, **options)
    assert snapshot(model) == seen


# What is refused


def _mask(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


CALLS = {
    "4D mask": ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"\(2, 1, 4, 4\): only a \(2, 4\) mask"),
    "mask per layer type": ({"attention_mask": {"full_attention": None}}, "is dict: only a"),
    "short mask": ({"attention_mask": torch.ones(2, 3)}, r"\(2, 3\): only a \(2, 4\) mask"),
    "additive mask": ({"attention_mask": torch.full((2, 4), -1e9)}, "other values than 0 and 1"),
    "hole": ({"attention_mask": _mask([1, 1, 1, 1], [1, 0, 1, 1])}, r"rows \[1\] has padding between tokens"),
    "packing": ({"position_ids": _mask([0, 1, 0, 1])}, "several sequences packed"),
    "weights": ({"output_attentions": True}, "attention weights are never formed"),
    "nothing": ({"input_ids": None}, "neither input_ids nor inputs_embeds"),
    "tuple": ({"past_key_values": ()}, "is a tuple that this attachment did not make"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_not_served(name: str):
    options, reason = CALLS[name]
    model, ids = make(), ragged(4, 4)["input_ids"]
    with attach(model) as handle:
        with pytest.raises(InvalidArgumentError, match=reason):
            model(**{"input_ids": ids, **options})
        assert handle.pages.num_used == 0


def test_training_and_grad_are_refused():
    model, inputs = make(), ragged(4)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with attach(model):
        model.train()
        with pytest.raises(InvalidArgumentError, match="training mode or with grad"):
            model(**inputs)
        model.eval()
        with torch.enable_grad(), pytest.raises(InvalidArgumentError, match="training mode or with grad"):
            model(**inputs)
        model.requires_grad_(False)
        with torch.enable_grad():
            model(**inputs)
            with pytest.raises(InvalidArgumentError, match="training mode or with grad"):
                model(inputs_embeds=embeds.requires_grad_())


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (_mask([1, 1, 1], [0, 1, 1]), _mask([1, 1, 1, 1], [1, 1, 1, 1])),
        (_mask([1, 1, 1], [0, 1, 1]), _mask([1, 1, 1, 1], [0, 0, 1, 1])),
        (_mask([1, 1, 1], [0, 1, 1]), None),
    ],
    ids=["shows", "hides", "none"],
)
def test_a_mask_that_changes_history_is_refused(first: torch.Tensor, then: torch.Tensor | None):
    model, ids = make(), ragged(4, 4)["input_ids"]
    with attach(model):
        past = model(ids[:, :3], attention_mask=first).past_key_values
        with pytest.raises(InvalidArgumentError, match=r"changes earlier columns of rows \[1\]"):
            model(ids[:, 3:], attention_mask=then, past_key_values=past)


def test_generation_after_right_padding_is_refused():
    model = make()
    with attach(model), pytest.raises(InvalidArgumentError, match="pad on the left what is to be continued"):
        generate(model, ragged(5, 3, side="right"))


def test_caches_of_other_kinds_are_refused():
    model, inputs = make(), ragged(4, 2)
    filled = model(**inputs).past_key_values
    one_row = model(input_ids=inputs["input_ids"][:1]).past_key_values
    with attach(model):
        for kind, options in (
            ("StaticCache", {"cache_implementation": "static"}),
            ("DynamicCache", {"cache_implementation": "offloaded"}),
            ("DynamicCache", {"past_key_values": filled}),
        ):
            with pytest.raises(InvalidArgumentError, match=f"is a {kind} that this attachment did not make"):
                generate(model, inputs, **options)
        assert filled.get_seq_length() == 4
        one_row = model(input_ids=inputs["input_ids"][:1]).past_key_values
        with pytest.raises(InvalidArgumentError, match="2 rows over a cache of 1"):
            model(inputs["input_ids"], past_key_values=one_row)
        with pytest.raises(InvalidArgumentError, match=r"crop\(2\) of 4 columns"):
            one_row.crop(2)
        with pytest.raises(InvalidArgumentError, match=r"crop\(-5\) of 4 columns"):
            one_row.crop(-5)


def _late_bidirectional() -> PreTrainedModel:
    model = tiny("llama")
    model.config.is_causal = False
    return model


def _window_in_the_mask_alone() -> PreTrainedModel:
    model = tiny("qwen2", layer_types=["sliding_attention"] * 2, use_sliding_window=True, sliding_window=4)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    return model


ROPE = {"rope_type": "default", "rope_theta": 1e4}
SIZES = {"vocab_size": 128, "num_heads": 4, "num_layers": 2, "d_model": 64, "d_ff": 96, "d_kv": 16}
GPTJ = {"n_layer": 2, "n_head": 4, "n_embd": 64, "rotary_dim": 8}
MODELS = {
    "no model of transformers": (lambda: torch.nn.Linear(2, 2), "Linear is no transformers PreTrainedModel"),
    "training": (lambda: tiny("llama").train(), "training mode: call model.eval"),
    "encoder-decoder": (lambda: T5ForConditionalGeneration(T5Config(**SIZES)).eval(), "attends to an encoder"),
    "cross-attention": (lambda: tiny("gpt2", add_cross_attention=True, n_layer=2, n_head=4), "attends to an encoder"),
    "with a vision tower": (lambda: _seeing(), r"has parts besides its decoder \(vision_config\)"),
    "encoder": (
        lambda: BertLMHeadModel(BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)).eval(),
        "layer 0 is not causal",
    ),
    "both directions": (_late_bidirectional, "layer 0 is not causal"),
    "window in the mask": (
        _window_in_the_mask_alone,
        "layer 0 asks for window=None, but its mask is not the causal one",
    ),
    "mask of its own": (lambda: tiny("doge"), "layer 0 asks for window=None, but its mask is not the causal one"),
    "no interface, gptj": (
        lambda: tiny("gptj", **GPTJ),
        r"interface was called for layers \[\], expected is each of 2",
    ),
    "no interface, bloom": (lambda: tiny("bloom", n_layer=2, n_head=4), r"interface was called for layers \[\]"),
    "called twice": (lambda: tiny("diffllama"), r"called for layers \[0, 0, 1, 1\], expected is each of 2 once"),
    "chunks": (lambda: tiny("llama4_text", intermediate_size_mlp=96), "layer 0 is chunked_attention"),
    "state": (lambda: tiny("mamba", num_hidden_layers=2, state_size=4), "keeps a state besides keys and values"),
    "dynamic rope": (
        lambda: tiny("llama", rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0}),
        "rope type dynamic",
    ),
    "longrope": (
        lambda: tiny(
            "llama",
            rope_parameters={**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        ),
        "rope type longrope",
    ),
}


def _seeing() -> PreTrainedModel:
    """A composite model, whose images would change masks."""
    text = tiny("gemma3_text").config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    return Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_not_served(name: str):
    make_model, reason = MODELS[name]
    model = make_model()
    seen = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        attach(model)
    assert snapshot(model) == seen


def test_a_model_whose_handle_is_gone_can_be_detached():
    model = tiny("llama")
    config, forward = model.config, type(model).forward
    attach(model)
    with pytest.raises(UnsupportedModelError, match=r"attached already: .*graphattn.hf.detach\(model\)"):
        attach(model)
    detach(model)
    assert model.config is config and model.forward.__func__ is forward
    with pytest.raises(InvalidArgumentError, match="LlamaForCausalLM is not attached"):
        detach(model)


def test_positions_that_a_model_counts_by_its_mask() -> None:
    """OPT does, where it is given no positions; the mask reaches it."""
    model = make("opt", ffn_dim=96, word_embed_proj_dim=64)
    inputs = ragged(3, 9, 6)
    expected = model(**inputs)
    with attach(model, page_size=PAGE):
        assert_same_logits(model(**inputs), expected, inputs["attention_mask"])


def test_padding_is_left_out_of_the_loss_of_experts() -> None:
    model = tiny("mixtral", dtype=torch.float32, num_local_experts=4, num_experts_per_tok=2)
    inputs = ragged(3, 9, 6) | {"output_router_logits": True}
    expected = model(**inputs).aux_loss
    assert (model(inputs["input_ids"], output_router_logits=True).aux_loss - expected).abs() > 1e-3
    with attach(model, page_size=PAGE):
        torch.testing.assert_close(model(**inputs).aux_loss, expected, rtol=0, atol=1e-5)


def test_what_is_not_causal_is_refused() -> None:
    model = make()
    with attach(model, page_size=PAGE), pytest.raises(InvalidArgumentError, match="is_causal=False"):
        model(**ragged(3, 4), is_causal=False)


def test_attention_that_would_drop_out_is_refused() -> None:
    model = make()
    with attach(model, page_size=PAGE):
        model.model.train()
        with pytest.raises(InvalidArgumentError, match="called in training mode"):
            model(**ragged(3, 4))


def test_a_compiled_model_breaks_its_graph_at_the_call() -> None:
    model = make()
    inputs = ragged(3, 4)
    expected = model(**inputs)
    with attach(model, page_size=PAGE):
        assert_same_logits(torch.compile(model, backend="eager")(**inputs), expected, inputs["attention_mask"])


@pytest.mark.parametrize("head", ["TokenClassification", "SequenceClassification"])
def test_other_heads(head: str) -> None:
    config = make().config
    config.pad_token_id = 0
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config, dtype=torch.float64).eval()
    inputs = ragged(3, 9, 6)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model(**inputs)
    if head == "SequenceClassification":
        with pytest.raises(UnsupportedModelError, match=r"its head gives \[3, 2\] for .*check=False leaves that out"):
            attach(model, page_size=PAGE)
    with attach(model, page_size=PAGE, check=head == "TokenClassification"):
        mask = inputs["attention_mask"] if head == "TokenClassification" else None
        assert_same_logits(model(**inputs), expected, mask)
