"""nano-vLLM as it is installed, on graphattn and a GPU, beside flash-attn if that is there.

PYTHONPATH=<unpacked wheel>:<xxhash> pytest -m gpu tests/test_nanovllm_gpu.py
"""

from __future__ import annotations

import gc
from importlib.util import find_spec

import pytest
import torch
from nano_engines import Forced, Package, forget, tokens, why_no_package
from test_nanovllm import check_logits

from graphattn.integrations import nanovllm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_no_package() is not None, reason=str(why_no_package())),
]
SMALL = {"gpu_memory_utilization": 0.3}


@pytest.fixture(autouse=True)
def _restored():
    default = torch.get_default_dtype()
    forget()
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_default_device("cpu")
    torch.set_default_dtype(default)
    gc.collect()
    torch.cuda.empty_cache()
    nanovllm.uninstall()
    forget()


@pytest.fixture
def package(tmp_path):
    torch.cuda.init()
    return Package(tmp_path, torch.bfloat16, head_dim=64)


def test_logits(package):
    """Replayed steps and eager ones are the same bits, and as near to float32 as plain torch in bfloat16 is."""
    captured = check_logits(package, "cuda", **SMALL)
    eager = check_logits(package, "cuda", enforce_eager=True, **SMALL)
    assert captured.keys() == eager.keys()
    differ = [at for at in captured if not torch.equal(captured[at], eager[at])]
    assert not differ, f"text and place: {differ}"


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs flash-attn to compare with")
def test_logits_beside_flash_attn(package):
    texts = [tokens(length + 12, seed=length) for length in (3, 250, 256, 300, 520)]

    def logits() -> dict:
        engine = package.engine(**SMALL)
        forced = Forced(engine, texts)
        package.generate(engine, [text[:-12] for text in texts], [12] * len(texts))
        engine.exit()
        return forced.logits

    theirs = logits()
    nanovllm.install()
    ours = logits()
    exact = [package.reference(torch.tensor([text])).logits[0].detach() for text in texts]
    off = [
        torch.stack([found[text, place] - exact[text][place] for text, place in theirs]).square().mean() ** 0.5
        for found in (ours, theirs)
    ]
    assert off[0] <= 2 * off[1] + 1e-3, off


def test_norm_and_rotation_are_taken_over(package):
    nanovllm.install()
    engine = package.engine(**SMALL)
    layers = [module.attn for module in engine.model_runner.model.modules() if hasattr(module, "attn")]
    assert layers and all(layer.rotary is not None for layer in layers)
    engine.exit()


def test_decode_steps_replay_and_allocate_nothing(package):
    nanovllm.install()
    engine = package.engine(max_num_seqs=20, **SMALL)
    runner = engine.model_runner
    allocated, decode = [], runner.graphattn.decode

    def counted(rows):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        hidden = decode(rows)
        allocated.append(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
        return hidden

    runner.graphattn.decode = counted
    package.generate(engine, [tokens(9, seed) for seed in range(17)], [40] * 17)
    assert allocated == [0] * 39
    assert runner.graphattn.runner.counts == {"replay": 39}
    del runner.graphattn.decode
    engine.exit()


def test_rows_beyond_the_captured_length(package):
    nanovllm.install()
    engine = package.engine(max_model_len=256, **SMALL)
    answer = package.generate(engine, [tokens(250)], [300])[0]
    assert len(answer) == 300
    assert engine.model_runner.graphattn.runner.counts == {"replay": 299}
    engine.exit()


def test_cache_and_graphs_keep_to_their_share(package):
    nanovllm.install()
    free, total = torch.cuda.mem_get_info()
    engine = package.engine(gpu_memory_utilization=0.8, max_num_seqs=512)
    taken = torch.cuda.memory_reserved()  # some forks count what torch holds, and no other process
    assert taken <= 0.8 * total + (64 << 20), f"{taken} of {total} bytes"
    assert engine.model_runner.graphattn.runner.uses_graphs
    engine.exit()
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    assert free - torch.cuda.mem_get_info()[0] < 512 << 20, "what is left are a context of NCCL and loaded kernels"
