"""How graphattn gets into nano-vLLM, into the processes that it starts, and out again."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from nano_engines import Minimal, answers, forget, needs_package, requests

from graphattn import InvalidArgumentError
from graphattn.integrations import nanovllm
from graphattn.integrations.nanovllm import layout

pytest_plugins = ("nano_fixtures",)
pytestmark = pytest.mark.usefixtures("restored")

ROOT = Path(__file__).parent.parent


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


PARALLEL = """
import json, sys
from nanovllm import LLM
from nano_engines import Package

if __name__ == "__main__":
    package = Package.__new__(Package)
    package.folder = sys.argv[1]
    engine = package.engine(tensor_parallel_size=int(sys.argv[2]), max_num_seqs=5)
    print(json.dumps(package.generate(engine, *json.loads(sys.argv[3]))))
    assert engine.model_runner.graphattn.runner.rows
    engine.exit()
"""


@needs_package
@pytest.mark.slow
def test_tensor_parallel(package, tmp_path, elsewhere):
    """Two ranks, each with half of the heads, answer as one; processes that are spawned get the fakes by a
    sitecustomize, and graphattn from the engine that spawns them."""
    if not package.chunks:
        pytest.skip("the second rank of this version lacks fields of its sequences (cfg_scale)")
    (tmp_path / "nanovllm" / "__init__.py").unlink()
    (tmp_path / "nanovllm").rmdir()
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, pytest, nano_cpu, nano_engines\n"
        "from transformers import AutoTokenizer\n"
        "nano_cpu.Cuda(pytest.MonkeyPatch(), pathlib.Path(__file__).parent)\n"
    )
    (tmp_path / "script.py").write_text(PARALLEL)
    asked = json.dumps((requests()[0][:5], [6] * 5))
    path = os.pathsep.join([elsewhere["PYTHONPATH"], os.environ["PYTHONPATH"]])
    found = []
    for ranks in ("1", "2"):
        command = [sys.executable, "-m", "graphattn.integrations.nanovllm", "script.py", str(tmp_path), ranks, asked]
        ran = subprocess.run(
            command, cwd=tmp_path, env=elsewhere | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=200
        )
        assert ran.returncode == 0, ran.stderr
        found.append(ran.stdout.splitlines()[-1])
        (tmp_path / "store1").unlink(missing_ok=True)
    assert found[0] == found[1]
