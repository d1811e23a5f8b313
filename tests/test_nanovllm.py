"""nano-vLLM on graphattn: the same tokens, and none of its faults."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import nano_cpu
import pytest
import torch
from nano_engines import COLD, Forced, Package, answers, needs_package, requests, tokens
from tiny import tiny

from graphattn import InvalidArgumentError
from graphattn.integrations import nanovllm
from graphattn.integrations.nanovllm.ahead import Ahead
from graphattn.integrations.nanovllm.rotation import take_over

pytest_plugins = ("nano_fixtures",)
pytestmark = pytest.mark.usefixtures("restored")


# Tokens


def test_tokens_are_the_same(nano):
    theirs = answers(nano)
    assert len({tuple(answer) for answer in theirs}) == len(theirs)
    assert answers(nano, enforce_eager=True) == theirs
    nanovllm.install()
    assert answers(nano) == theirs
    assert answers(nano, enforce_eager=True) == theirs


def test_steps_run_at_buckets(nano):
    nanovllm.install()
    engine = nano.engine(max_num_seqs=11)
    nano.generate(engine, *requests())
    runner = engine.model_runner.graphattn.runner
    assert runner.ladder.sizes == (1, 2, 4, 6, 8, 11)
    assert sum(runner.counts.values()) == sum(runner.rows.values()) > 0
    assert max(runner.rows) == 10
    engine.exit()


def test_preempted_sequences_come_back(nano, monkeypatch):
    asked = [tokens(250, seed) for seed in range(3)], [20] * 3  # each grows into a second block, of which one is left
    theirs = answers(nano, asked)
    if nano.is_package and not nano.chunks:
        with pytest.raises(AssertionError):
            answers(nano, asked, blocks=4)
        pytest.skip("the scheduler of this version fails where it preempts")
    nanovllm.install()
    engine = nano.engine(blocks=5)
    freed = []
    manager = type(engine.blocks if not nano.is_package else engine.scheduler.block_manager)
    name = "deallocate" if nano.is_package else "release"
    release = getattr(manager, name)
    monkeypatch.setattr(manager, name, lambda self, seq: (freed.append(len(seq)), release(self, seq))[1])
    assert nano.generate(engine, *asked) == theirs
    assert [length for length in freed if length < 270], "nothing was preempted"
    engine.exit()


def test_prompts_in_parts(nano):
    if not nano.is_package:
        options = {"max_num_batched_tokens": 100}
    else:
        answers(nano)  # imports it
        options = {"max_num_batched_tokens": 300}
        if not nano.chunks:
            pytest.skip("this version computes prompts whole")
    theirs = answers(nano)
    assert answers(nano, **options) == theirs
    nanovllm.install()
    assert answers(nano, **options) == theirs


def test_block_0_is_never_given_out(nano):
    nanovllm.install()
    engine = nano.engine()
    manager = engine.scheduler.block_manager if nano.is_package else engine.blocks
    assert 0 not in manager.free_block_ids and len(manager.free_block_ids) == 23
    engine.exit()


@needs_package
def test_norm_and_rotation_are_taken_over_in_bfloat16(cuda, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "flash_attn", nano_cpu.flash_attn())
    nanovllm.install()
    assert all(layer.attn.rotary is not None for layer in layers(Package(tmp_path, torch.bfloat16)))


@needs_package
def test_norm_and_rotation_are_taken_over_if_they_are_the_same(package, monkeypatch):
    asked = [tokens(length, seed=length) for length in (3, 60, 300)], [6] * 3
    theirs = answers(package, asked)
    rotary = type(layers(package)[0].rotary_emb)
    nanovllm.install()
    assert all(layer.attn.rotary is not None for layer in layers(package))
    assert answers(package, asked) == theirs
    nanovllm.uninstall()

    turn = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda self, at, q, k: turn(self, at, 1.001 * q, k))
    theirs = answers(package, asked)
    nanovllm.install()
    with pytest.warns(RuntimeWarning, match="of .*Attention stay its own.*something else"):
        found = layers(package)
    assert all(layer.attn.rotary is None for layer in found), "a query a thousandth longer"
    assert answers(package, asked) == theirs


@needs_package
def test_norm_and_rotation_stay_where_more_stands_between_them(package, monkeypatch):
    def longer(self, positions, hidden):
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim)).split(heads, 1)
        q, k = self.rotary_emb(positions, 4 * self.q_norm(q.clone()), self.k_norm(k.clone()))
        return self.o_proj(self.attn(q, k, v.contiguous()).flatten(1, -1))

    monkeypatch.setattr(type(layers(package)[0]), "forward", longer)
    asked = [tokens(length, seed=length) for length in (3, 60, 300)], [6] * 3
    theirs = answers(package, asked)
    nanovllm.install()
    assert all(layer.attn.rotary is None for layer in layers(package))
    assert answers(package, asked) == theirs


@pytest.mark.parametrize("error", [KeyError("what it lacks"), torch.OutOfMemoryError("out of memory")], ids=str)
def test_a_trial_that_raises_leaves_the_model_as_it_was(error):
    class Attention(torch.nn.Module):
        num_heads, num_kv_heads, head_dim = 2, 1, 8

    class Turns(torch.nn.Module):
        def forward(self, *inputs):
            raise error

    model = torch.nn.Linear(16, 16)
    model.attn, model.rotary_emb = Attention(), (turns := Turns())
    config = SimpleNamespace(max_position_embeddings=16, rope_theta=1e4, hidden_size=16)
    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            take_over(model, Attention, config)
    else:
        with pytest.warns(RuntimeWarning, match="Linear stay its own.*KeyError: 'what it lacks'"):
            take_over(model, Attention, config)
    assert model.rotary_emb is turns and model.attn.rotary is None


@needs_package
@pytest.mark.parametrize("max_num_seqs", [1, 2])
def test_engines_of_few_rows(package, max_num_seqs):
    asked = [tokens(length, seed=length) for length in (3, 60, 300)], [6] * 3
    theirs = answers(package, asked)
    nanovllm.install()
    assert answers(package, asked, max_num_seqs=max_num_seqs) == theirs


@needs_package
def test_what_is_random_stays_so(package):
    drawn = []
    for install in (lambda: None, nanovllm.install):
        install()
        torch.manual_seed(0)
        engine = package.engine()
        drawn.append(torch.rand(3).tolist())
        engine.exit()
    assert drawn[0] == drawn[1]


@needs_package
def test_nothing_is_left_to_compile(package, monkeypatch):
    """Dynamo compiles a size of 1 for itself, the first other as it is, and the second other for any."""
    engine, seen = package.engine(), []
    sampler = type(engine.model_runner.sampler)
    engine.exit()
    draw = sampler.forward

    def counted(self, logits, *rest, **named):
        seen.append(len(logits))
        return draw(self, logits, *rest, **named)

    monkeypatch.setattr(sampler, "forward", counted)
    nanovllm.install()
    engine = package.engine()
    assert 1 in seen and len(set(seen)) > 2
    engine.exit()


def layers(package: Package) -> list:
    engine = package.engine()
    found = [module for module in engine.model_runner.model.modules() if hasattr(module, "attn")]
    engine.exit()
    return found


@needs_package
def test_what_was_drawn_is_not_sent(package):
    nanovllm.install()
    engine, sent = package.engine(), []
    state = engine.model_runner.graphattn.runner.state
    decode = engine.model_runner.graphattn.decode

    def counted(rows):
        before = state.num_sent
        hidden = decode(rows)
        sent.append((rows.drawn, state.num_sent - before))
        return hidden

    engine.model_runner.graphattn.decode = counted
    engine.model_runner.sampler(torch.zeros(3, 128), torch.ones(3))  # in no step
    package.generate(engine, [tokens(9, seed) for seed in range(3)], [8, 8, 8])
    assert [drawn for drawn, _ in sent[1:]] == [[0, 1, 2]] * 6 and None not in sent[0][0]
    assert [count for _, count in sent[1:]] == [0] * 6
    if len(inspect.signature(engine.model_runner.prepare_sample).parameters) == 1:
        asked = engine.model_runner.graphattn.temperatures[0]
        assert asked == [COLD] * 3
    del engine.model_runner.graphattn.decode
    engine.exit()


@needs_package
def test_the_next_step_is_launched_before_this_one_is_read(package, monkeypatch):
    """Rows end by what is drawn, each at another step, and others come; tokens are those of steps one by one."""
    asked = [tokens(length, seed=length) for length in (3, 60, 250, 300, 17, 254)], [40, 30, 40, 9, 40, 40]
    whole = answers(package, asked)
    end = max(range(128), key=lambda token: len({answer.index(token) for answer in whole if token in answer}))
    theirs = [answer[: answer.index(end) + 1] if end in answer else answer for answer in whole]
    assert theirs != whole

    found, of = [], Ahead.of
    monkeypatch.setattr(
        Ahead, "of", lambda self, rows: found.append((len(self._rows), len(rows.seqs))) or of(self, rows)
    )
    nanovllm.install()
    for late in (0, 2):
        engine = package.engine()
        engine.scheduler.eos = end
        params = sys.modules["nanovllm"].SamplingParams
        waiting = [(prompt, params(temperature=COLD, max_tokens=count)) for prompt, count in zip(*asked, strict=True)]
        outputs = {}
        while waiting or not engine.is_finished():
            while waiting and (len(waiting) > late or len(outputs) > 1 or engine.is_finished()):
                engine.add_request(*waiting.pop(0))
            outputs |= dict(engine.step()[0])
        engine.exit()
        assert [list(outputs[key]) for key in sorted(outputs)] == theirs
    assert any(before == now for before, now in found) and any(before > now for before, now in found)


@needs_package
def test_no_step_ahead_where_it_must_not_be(package, monkeypatch):
    monkeypatch.setattr(Ahead, "__init__", lambda *args: pytest.fail("a step ahead"))
    asked = [tokens(9)], [6]
    nanovllm.install()
    answers(package, asked, enforce_eager=True)
    engine = package.engine()
    engine.model_runner.graphattn.scheduler = lambda: SimpleNamespace(waiting=[None])  # somebody waits
    package.generate(engine, *asked)
    engine.exit()


@needs_package
def test_a_step_ahead_takes_the_pages_that_will_be_given_out(package, monkeypatch):
    """Blank ones: one whose tokens a prompt may be found to have is not written to before it is given out."""
    found, of = [], Ahead.of
    monkeypatch.setattr(Ahead, "of", lambda self, rows: found.append(of(self, rows) is not None) or of(self, rows))
    asked = [tokens(length, seed=length) for length in (250, 509, 253)], [9] * 3
    theirs = answers(package, asked)
    nanovllm.install()
    engine = package.engine()
    assert package.generate(engine, *asked) == theirs
    assert found == [True] * 7  # of 8 steps; two of them begin pages
    found.clear()
    for page in engine.scheduler.block_manager.free_block_ids:
        engine.scheduler.block_manager.blocks[page].hash = 7
    assert package.generate(engine, *asked) == theirs
    assert found == [True] * 5
    engine.exit()


@needs_package
@pytest.mark.parametrize("renewed", ["scheduler", "block_manager"])
def test_a_scheduler_that_was_replaced(package, renewed):
    """Its pages are given out in another order; those of the first are free by its own account only."""
    asked = [tokens(length, seed=length) for length in (250, 509, 253, 3, 254)], [30] * 5
    theirs = answers(package, asked)
    nanovllm.install()
    engine = package.engine(blocks=40)
    package.generate(engine, [tokens(300, seed=1), tokens(300, seed=2)], [3, 3])
    first = engine.scheduler.block_manager
    engine.model_runner.config.num_kvcache_blocks = len(first.blocks)
    if renewed == "scheduler":
        engine.scheduler = type(engine.scheduler)(engine.model_runner.config)
    else:
        engine.scheduler.block_manager = type(first)(len(first.blocks), first.block_size)
    assert package.generate(engine, *asked) == theirs
    engine.exit()


@needs_package
def test_a_prompt_that_is_cached_whole(package):
    """Versions without chunks share every full block; the row then feeds no token, and its logits are another's."""
    prompt = tokens(600, seed=5)
    asked = [prompt, tokens(40, seed=6), prompt[:512]], [8, 8, 8]
    alone = answers(package, (asked[0][2:], [8]))[0]
    if not package.chunks:
        with pytest.raises(IndexError):  # it is alone in its batch, else it would be answered as its neighbour
            answers(package, asked)
    nanovllm.install()
    assert answers(package, asked)[2] == alone


@needs_package
@pytest.mark.parametrize("eager", [False, True])
def test_logits_in_bfloat16(cuda, monkeypatch, tmp_path, eager):
    monkeypatch.setitem(sys.modules, "flash_attn", nano_cpu.flash_attn())
    check_logits(Package(tmp_path, torch.bfloat16), "cpu", enforce_eager=eager)


def check_logits(package: Package, device: str, **options) -> dict:
    """Logits of given texts, prefilled and decoded, against transformers' in float32; the rule is twice what plain
    torch in bfloat16 is off by."""
    nanovllm.install()
    texts = [tokens(length + 12, seed=length) for length in (3, 250, 256, 300, 520)]
    engine = package.engine(**options)
    forced = Forced(engine, texts)
    package.generate(engine, [text[:-12] for text in texts], [12] * len(texts))
    engine.exit()
    assert len(forced.logits) == 12 * len(texts)
    plain = tiny("qwen3", dtype=torch.bfloat16, **package.config).to(device)
    plain.set_attn_implementation("eager")
    errors = {"ours": [], "plain": []}
    for index, text in enumerate(texts):
        with torch.no_grad():
            exact = package.reference(torch.tensor([text])).logits[0]
            rounded = plain(torch.tensor([text], device=device)).logits[0].float().cpu()
        for place in range(len(text) - 13, len(text) - 1):
            errors["ours"].append(forced.logits[index, place] - exact[place])
            errors["plain"].append(rounded[place] - exact[place])
    ours, rounded = (torch.stack(errors[name]) for name in ("ours", "plain"))
    assert ours.square().mean() ** 0.5 <= 2 * rounded.square().mean() ** 0.5 + 1e-3
    assert ours.abs().max() <= 2 * rounded.abs().max() + 1e-2
    return forced.logits


# Its faults


@needs_package
def test_a_batch_between_its_buckets(package):
    """17 rows where 20 are allowed: its largest bucket is 16."""
    asked = [tokens(9, seed) for seed in range(17)], [4] * 17
    expected = answers(package, asked, max_num_seqs=20, enforce_eager=True)
    with pytest.raises(StopIteration):
        answers(package, asked, max_num_seqs=20)
    nanovllm.install()
    assert answers(package, asked, max_num_seqs=20) == expected


@needs_package
def test_a_row_of_more_blocks_than_were_captured(package, cuda):
    """Nothing keeps a row below `max_model_len`; its graphs have room for no more blocks than that."""
    asked, options = ([tokens(250)], [20]), {"max_model_len": 256}
    expected = answers(package, asked, enforce_eager=True, **options)
    try:
        assert answers(package, asked, **options) == expected
    except RuntimeError as error:
        assert "must match the existing size" in str(error)
    else:  # a fork: the steps beyond leave the graph
        assert sum(graph.num_replays for graph in cuda.graphs) < 19
    nanovllm.install()
    engine = package.engine(**options)
    assert package.generate(engine, *asked) == expected
    assert engine.model_runner.graphattn.runner.rows == {1: 19}
    engine.exit()


@needs_package
def test_a_row_longer_than_the_positions(package):
    nanovllm.install()
    with pytest.raises(InvalidArgumentError, match="row 0: 1025 tokens, max_seq_len is 1024"):
        answers(package, ([tokens(1020)], [20]))


@needs_package
def test_nothing_is_left_of_a_longer_batch(package):
    long, short = ([tokens(600, seed) for seed in range(4)], [3] * 4), ([tokens(7)], [3])
    engine = package.engine()
    for asked in (long, short):
        package.generate(engine, *asked)
    tables = engine.model_runner.graph_vars["block_tables"]
    assert (tables[:, 1:] > 0).any(), "it clears its tables now"
    engine.exit()

    nanovllm.install()
    engine = package.engine()
    for asked in (long, short):
        package.generate(engine, *asked)
    state = engine.model_runner.graphattn.runner.state
    csr = state.csr(4, 0)
    state.stage(4, [1], [9], [[[3]]])
    state.feed(4)
    assert csr.indptr_B1.tolist() == [0, 1, 2, 3, 4]
    assert csr.indices_P[:4].tolist() == [3, 0, 0, 0], "padding is on the null page"
    engine.exit()


@needs_package
def test_decode_steps_make_no_device_tensors(package, cuda):
    def uploads_of_a_step() -> int:
        engine = package.engine()
        run, found = engine.model_runner.prepare_decode, []

        def counted(seqs):
            before = cuda.num_uploads
            prepared = run(seqs)
            found.append(cuda.num_uploads - before)
            return prepared

        engine.model_runner.prepare_decode = counted
        package.generate(engine, *requests())
        engine.exit()
        assert len(set(found)) == 1
        return found[0]

    assert uploads_of_a_step() == 5
    nanovllm.install()
    assert uploads_of_a_step() == 0


@needs_package
def test_the_cache_leaves_room_for_graphs(package, cuda, monkeypatch):
    """It gives the cache all of its share, and captures afterwards."""
    from graphattn.runner import DecodeRunner

    per_graph = cuda.per_graph = cuda.total // 32
    engine = package.engine(gpu_memory_utilization=1.0)
    assert engine.model_runner.kv_cache.nbytes + cuda.used > cuda.total
    engine.exit()

    cuda.used = 0
    capture, close = DecodeRunner.capture, DecodeRunner.close

    def taking(self, *arguments, **options):
        cuda.used += per_graph * len(self.ladder)
        return capture(self, *arguments, **options)

    def giving(self):
        cuda.used -= per_graph * len(self.ladder)
        close(self)

    monkeypatch.setattr(DecodeRunner, "capture", taking)
    monkeypatch.setattr(DecodeRunner, "close", giving)
    nanovllm.install()
    engine = package.engine(gpu_memory_utilization=1.0)
    assert cuda.used == per_graph * len(engine.model_runner.graphattn.runner.ladder)
    assert 0.9 * cuda.total < engine.model_runner.kv_cache.nbytes + cuda.used <= cuda.total
    engine.exit()
    assert cuda.used == 0
