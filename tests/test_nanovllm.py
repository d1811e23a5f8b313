"""nano-vLLM on graphattn: the same tokens, none of its faults, and undone without a trace."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import nano_cpu
import pytest
import torch
from nano_engines import Forced, Minimal, Package, forget, why_no_package
from tiny import tiny

from graphattn import InvalidArgumentError
from graphattn.integrations import nanovllm
from graphattn.integrations.nanovllm import layout
from graphattn.integrations.nanovllm.serving import OPEN

ROOT = Path(__file__).parent.parent
needs_package = pytest.mark.skipif(why_no_package() is not None, reason=str(why_no_package()))


@pytest.fixture(autouse=True)
def _restored():
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    forget()
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for left in list(OPEN):  # by a test that failed
        left.close()
    nanovllm.uninstall()
    forget()
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    return nano_cpu.Cuda(monkeypatch, tmp_path)


@pytest.fixture
def package(cuda, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "flash_attn", nano_cpu.flash_attn())
    return Package(tmp_path)


@pytest.fixture(params=["minimal", pytest.param("package", marks=needs_package)])
def nano(request, monkeypatch):
    """Either engine, importable, with a flash-attn of its own."""
    if request.param == "package":
        return request.getfixturevalue("package")
    torch.set_default_dtype(torch.float64)
    return Minimal(monkeypatch)


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests(seed: int = 0, lens=(5, 300, 250, 513, 600, 17, 1, 600, 255, 257)) -> tuple[list[list[int]], list[int]]:
    """Prompts of which some begin alike, and how many tokens are to follow each; ends around those of blocks."""
    prompts = [tokens(length, seed if length > 255 else seed + length) for length in lens]
    return prompts, [3 + 7 * index % 13 for index in range(len(lens))]


def answers(nano, asked=None, **options) -> list[list[int]]:
    engine = nano.engine(**options)
    try:
        return nano.generate(engine, *(asked or requests()))
    finally:
        engine.exit()


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


# Installing


def test_uninstall_restores_it(nano):
    theirs = answers(nano)
    modules = [sys.modules[f"nanovllm.{name}"] for name in layout.FUNCTIONS]
    kinds = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    owners = [*modules, *(kind for kind in kinds if kind.__module__.split(".")[0] in ("nanovllm", "nano_minimal"))]
    before = [dict(vars(owner)) for owner in owners]
    assert nanovllm.install() is nanovllm.install()
    assert [dict(vars(owner)) for owner in owners] != before
    engine = nano.engine()
    with pytest.raises(InvalidArgumentError, match="1 engines of nano-vLLM run on graphattn"):
        nanovllm.uninstall()
    engine.exit()
    nanovllm.uninstall()
    assert [dict(vars(owner)) for owner in owners] == before
    assert answers(nano) == theirs
    nanovllm.uninstall()


@needs_package
def test_without_flash_attn(package, monkeypatch):
    monkeypatch.delitem(sys.modules, "flash_attn")
    with pytest.raises(ModuleNotFoundError, match="flash_attn"):
        package.engine()
    forget()
    nanovllm.install()
    assert "flash_attn" not in sys.modules
    assert [len(answer) for answer in answers(package)] == requests()[1]
    nanovllm.uninstall()
    with pytest.raises(ImportError, match="flash-attn, which is not installed"):
        package.engine()


def _break(what: str) -> None:
    runner, blocks = sys.modules["nanovllm.engine.model_runner"], sys.modules["nanovllm.engine.block_manager"]
    if what == "method":
        runner.ModelRunner = type("ModelRunner", (), {k: v for k, v in vars(runner.ModelRunner).items() if k != "run"})
    elif what == "parameters":

        class BlockManager:
            def __init__(self, num_blocks, num_heads):
                self.free_block_ids = list(range(num_blocks))

        blocks.BlockManager = BlockManager
    elif what == "use":

        class BlockManager:
            def __init__(self, num_blocks, block_size):
                self.free = list(range(num_blocks))

        blocks.BlockManager = BlockManager
    elif what == "order":

        class ModelRunner(runner.ModelRunner):
            def __init__(self, config, rank, event):
                self.allocate_kv_cache()
                self.warmup_model()
                self.capture_cudagraph()

        names = {k: v for k, v in vars(runner.ModelRunner).items() if k not in ("__dict__", "__weakref__")}
        runner.ModelRunner = type("ModelRunner", (), names | {"__init__": ModelRunner.__init__})
    else:
        del sys.modules["nanovllm.utils.context"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("method", "ModelRunner.run: it is not there"),
        ("parameters", r"takes \(self, num_blocks, num_heads\), known is \(self, num_blocks, block_size\)"),
        ("use", "BlockManager.__init__: it does not use free_block_ids"),
        ("order", "it calls allocate_kv_cache, warmup_model, capture_cudagraph in this order"),
        ("module", "there is no nanovllm.utils.context"),
    ],
)
def test_another_layout_is_refused(monkeypatch, what, message):
    Minimal(monkeypatch)
    _break(what)
    before = dict(vars(sys.modules["nanovllm.layers.attention"].Attention))
    with pytest.raises(nanovllm.LayoutError, match=message):
        nanovllm.install()
    assert dict(vars(sys.modules["nanovllm.layers.attention"].Attention)) == before


def test_layers_that_differ_are_refused(monkeypatch):
    import nano_minimal

    nano = Minimal(monkeypatch)
    nanovllm.install()
    make = nano_minimal.Model.__init__

    def uneven(self):
        make(self)
        self.attn[1].scale *= 2

    monkeypatch.setattr(nano_minimal.Model, "__init__", uneven)
    with pytest.raises(nanovllm.LayoutError, match="known are models whose layers are alike"):
        nano.engine()


SCRIPT = """
import sys
from nanovllm import LLM
import nano_minimal, torch
import nanovllm.engine.llm_engine as engine

assert __name__ == "__main__" and sys.argv[1:] == ["--flag", "1"] and sys.argv[0] == __file__, sys.argv
llm = LLM(nano_minimal.Model())
print(llm.generate([[1, 2, 3]], [4]), type(llm.model_runner.graphattn).__name__)
llm.exit()
"""


@pytest.fixture
def elsewhere(tmp_path):
    """The environment of another process that can import the minimal engine as nano-vLLM."""
    (tmp_path / "nanovllm").mkdir()
    text = "import sys, nano_minimal\nsys.modules.update(nano_minimal.modules())\n"
    (tmp_path / "nanovllm" / "__init__.py").write_text(text)
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests")))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_a_script_is_run_on_it(tmp_path, elsewhere):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "graphattn.integrations.nanovllm", str(script), "--flag", "1"]
    ran = subprocess.run(command, env=elsewhere, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("Serving\n")


def test_processes_of_other_ranks_have_it_too(tmp_path, elsewhere, monkeypatch):
    """They unpickle what makes their runner first, and nano-vLLM's config after it."""
    Minimal(monkeypatch)
    nano = nanovllm.install()
    (tmp_path / "ranks").write_bytes(pickle.dumps(nano.engine.ModelRunner))
    code = """
import pickle, sys
assert "nanovllm" not in sys.modules
ranks = pickle.load(open(sys.argv[1], "rb"))
from graphattn.integrations.nanovllm import steps
runner = sys.modules["nanovllm.engine.model_runner"].ModelRunner
assert runner.run_model.__module__ == steps.__name__ and ranks._runner is runner
"""
    command = [sys.executable, "-c", code, str(tmp_path / "ranks")]
    ran = subprocess.run(command, env=elsewhere, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
