"""The code in the documentation runs, and does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dense import DenseRows
from tiny import tiny

from graphattn import Attention, InvalidArgumentError, KVScales, MemoryLeakError, Planner, active_plans, memory

DOCS = Path(__file__).parent.parent / "docs"


def code(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def engine_code(device: str, dtype: torch.dtype) -> str:
    """The code of docs/engine.md, its model in another place or dtype."""
    made, page = "Model().eval()", "\n".join(code("engine.md"))
    assert page.count(made) == 1
    return page.replace(made, f"{made}.to({device!r}, {dtype})")


def engine_page(device: str, dtype: torch.dtype) -> tuple[dict, list[list[int]]]:
    """The page's names after that ran."""
    names: dict = {}
    exec(engine_code(device, dtype), names)
    return names, names["answers"]


def dense_greedy(model, prompt: list[int], num_tokens: int) -> list[int]:
    """The same model without pages: each layer attends densely over the whole row, recomputed for every token."""
    row = list(prompt)
    for _ in range(num_tokens):
        x = model.embed(torch.tensor(row)) + model.where(torch.arange(len(row)))
        for layer in model.layers:
            qkv = layer.qkv(x).unflatten(-1, (layer.heads + 2 * layer.kv_heads, -1)).transpose(0, 1)
            q, k, v = qkv.split([layer.heads, layer.kv_heads, layer.kv_heads])
            repeat = layer.heads // layer.kv_heads
            k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
            attended = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
            x = x + layer.out(attended.transpose(0, 1).flatten(1))
        row.append((x[-1] @ model.embed.weight.T).argmax().item())
    return row[len(prompt) :]


@torch.no_grad()
def test_engine_page() -> None:
    names, answers = engine_page("cpu", torch.float64)
    engine = names["engine"]
    for prompt, answer in zip([[1, 2, 3], [7], list(range(40))], answers, strict=True):
        assert answer == dense_greedy(engine.model, prompt, 8)
    assert engine.pool.num_used == 0
    assert engine.runner.counts == {"eager": 7}


def test_engine_is_about_60_lines() -> None:
    engine = next(block for block in code("engine.md") if "class Engine" in block)
    assert len(engine.splitlines()) <= 60


@pytest.mark.gpu
def test_engine_page_in_graphs() -> None:
    names, captured = engine_page("cuda", torch.bfloat16)
    runner = names["engine"].runner
    assert runner.counts == {"replay": 7}
    eager = names["Engine"](names["engine"].model, enforce_eager=True)
    assert eager.generate([[1, 2, 3], [7], list(range(40))], num_tokens=8) == captured


def test_capture_page_chooses(capsys: pytest.CaptureFixture) -> None:
    exec(code("capture.md")[-1], {})
    assert [line.split(") ")[0] + ")" for line in capsys.readouterr().out.splitlines()] == [
        "(8,)",
        "(3, 8)",
        "(1, 3, 8)",
    ]


def test_memory_page(capsys: pytest.CaptureFixture) -> None:
    """On a CPU of any size: nothing there is as large as the cache that is refused."""
    names: dict = {"model": tiny("llama", num_layers=1, dtype=torch.float32)}
    with pytest.raises(MemoryLeakError, match="MiB"), memory.watch("cpu"):
        exec("\n".join(code("memory.md")), names)
        kept = torch.zeros(1000)
    assert names["record"]["lines"][0]["name"] == "weights" and len(kept) == 1000
    assert names["missed"] == [] and "llm" in names
    said = capsys.readouterr().out
    assert "memory of cpu" in said and "KV pages" in said and "MiB are the margin" in said
    assert "a cache of" in said and "does not fit" in said and "on_kv_oom='shrink'" in said


def test_groups_page() -> None:
    """The window's layer gave pages back; another one, of other heads, is refused."""
    names: dict = {}
    exec("\n".join(code("groups.md")), names)
    assert names["held"] == [3, 13] and names["row"].pages[0][:10] == [0] * 10
    assert all(out.shape == (10, 4, 64) and out.isfinite().all() for out in names["outputs"])
    with pytest.raises(InvalidArgumentError, match="plan of group 0 was made for 4 query heads"), torch.no_grad():
        layer = Attention(2, 64, num_kv_heads=2)
        layer.bind(*(torch.zeros(9, 4, 2, 64) for _ in "kv"))
        with active_plans(names["plan"].groups):
            layer(torch.zeros(10, 2, 64), torch.zeros(10, 2, 64), torch.zeros(10, 2, 64))


def test_rope_page() -> None:
    """Its layer does what one does that is given rotated queries and keys."""
    names: dict = {}
    exec("\n".join(code("rope.md")), names)
    rows = DenseRows(names["layer"].spec, [0, 5], [7, 3], page_size=16, dtype=torch.float32, device="cpu")
    for rotary in (names["layer"].rotary, names["by_length"]):
        batch = rows.batch("cpu")
        plan = Planner([rows.spec], rows.cache.cache, "cpu").prefill()
        plan.plan(batch)
        found = []
        for taken in (rotary, None):
            layer = Attention(8, 64, num_kv_heads=2, rotary=taken)
            layer.bind(*(pages.clone() for pages in rows.cache.layers[0]))
            q, k, v = rows.packed
            if taken is None:
                q, k = rotary.rotate(q, k, batch.positions_N)
            with active_plans(plan.groups):
                found.append(layer(q, k, v))
        assert torch.equal(*found)


def variants_page(device: str, dtype: torch.dtype) -> dict:
    """The page's names after its code ran, its tensors and layer in another place or dtype if asked."""
    variant, layer = code("variants.md")
    layer = layer.replace(
        "layer = ga.Attention(", f"q, k, v = (x.to({device!r}, {dtype}) for x in (q, k, v))\nlayer = ga.Attention("
    )
    layer = layer.replace("variant=temperature)", f"variant=temperature).to({device!r})")
    names: dict = {}
    exec(variant + layer, names)
    return names


def check_variants_page(names: dict, tolerance: float) -> None:
    q, k, v = (names[name].double().transpose(0, 1) for name in "qkv")
    for temperatures, found in (([0.5, 1, 2, 4], names["answer"]), ([1, 2, 4, 8], names["warmer"])):
        divided = q / torch.tensor(temperatures, dtype=torch.float64, device=q.device)[:, None, None]
        options = {"is_causal": True, "enable_gqa": True}
        right = F.scaled_dot_product_attention(divided[None], k[None], v[None], **options)[0].transpose(0, 1)
        torch.testing.assert_close(found.double(), right, rtol=0, atol=tolerance)


def test_variants_page() -> None:
    check_variants_page(variants_page("cpu", torch.float64), 1e-6)  # the temperatures are float32
    check_variants_page(variants_page("cpu", torch.float32), 1e-5)


@pytest.mark.gpu
def test_variants_page_in_kernels() -> None:
    check_variants_page(variants_page("cuda", torch.bfloat16), 0.03)


def test_layouts_page(capsys: pytest.CaptureFixture) -> None:
    names: dict = {}
    exec("\n".join(code("layouts.md")), names)
    assert [names[name].layers[3][1].shape for name in ("pages", "other")] == [(16, 16, 2, 64), (16, 2, 16, 64)]
    assert "[16, 2, 16, 64]) HND" in capsys.readouterr().out


def test_cascade_page(capsys: pytest.CaptureFixture) -> None:
    """Its last output is dense attention over what the cache then holds, and rows share what it says."""
    names: dict = {}
    exec("\n".join(code("cascade.md")), names)
    assert capsys.readouterr().out.splitlines() == ["[3 3 0]", "[[2], []]"]
    for row, (table, length) in enumerate(zip(names["tables"], names["lens"], strict=True)):
        k, v = (
            cache[table.pages].flatten(0, 1)[:length].transpose(0, 1)[None]
            for cache in (names["k_cache"], names["v_cache"])
        )
        exact = F.scaled_dot_product_attention(names["q"][row][None, :, None], k, v, enable_gqa=True)[0, :, 0]
        torch.testing.assert_close(names["out"][row], exact)


def test_links_point_at_files() -> None:
    for page in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_fp8_page(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # it writes scales.json
    names = {"model": tiny("llama", dtype=torch.float32), "prompts": [[1, 2, 3], list(range(40))]}
    blocks = code("fp8.md")
    for block in blocks:
        exec(block, names)
        if "llm" in names:
            assert ", fp8)" in names["llm"].explain()
            names.pop("llm").close()
    assert names["layer"].kv_scales.tolist() == [[0.125, 0.125], [0.25, 0.5]]
    assert len(KVScales.load(tmp_path / "scales.json").k) == 2 and len(blocks) == 3
