"""A module imports only from lower layers, and heavy libraries stay behind the modules that own them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import codefend

ROOT = Path(codefend.__file__).parent
# Layers from the lowest up: a subpackage imports from its own layer or a lower one. Strings that name modules count.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"types"}),
    frozenset({"core"}),
    frozenset({"encoders"}),
    frozenset({"purifiers", "victims", "attacks", "tasks"}),
    frozenset({"prompts"}),
    frozenset({"defense"}),
    frozenset({"bench"}),
    frozenset({"training"}),
    frozenset({"gateway", "contrib"}),
    frozenset({"integrations"}),
    frozenset({"cli"}),
)
LAYER_OF = {subpackage: layer for layer, subpackages in enumerate(LAYERS) for subpackage in subpackages}
PEERS = {"purifiers", "victims", "attacks", "tasks"}  # none of these may know another
GATEWAY_NEVER = {"attacks", "tasks", "training", "bench", "contrib"}  # serving stays light
VICTIMS_DOOR = {"gateway/pocket.py"}  # the one module through which the gateway reaches models
# Registries name entries of `contrib` and `integrations` as strings and import them on demand only.
REGISTRIES = {
    "encoders/__init__.py",
    "purifiers/__init__.py",
    "attacks/table.py",
    "victims/__init__.py",
    "training/__init__.py",
}
OWNERS = {  # library -> where it may be imported
    "PIL": {"core"},
    "transformers": {"victims", "prompts", "contrib"},
    "gguf": {"victims"},
    "diffusers": {"contrib"},
    "starlette": {"gateway"},
    "uvicorn": {"gateway"},
    "typer": {"cli"},
}
NOT_TORCH_ON_IMPORT = {"__init__", "types", "cli"}

Import = tuple[str, str]  # dotted name; "now" when the module is imported, "later" in a function, "types" for checkers
FILES = sorted(ROOT.rglob("*.py"))
SUBPACKAGES = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}


@cache  # each file is read by three tests
def imports_of(source: str) -> frozenset[Import]:
    """Every module that ``source`` imports, lazily or not, and every module of this project that a string names."""
    tree = ast.parse(source)
    when: dict[int, str] = {}
    for node in ast.walk(tree):
        if is_type_checking(node):
            when.update((id(inner), "types") for inner in ast.walk(node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            when.update((id(inner), "later") for inner in ast.walk(node))
    imports: set[Import] = set()
    for node in ast.walk(tree):
        imports |= {(name, when.get(id(node), "now")) for name in modules_in(node)}
    return frozenset(imports)


def modules_in(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide which layer is meant"
        assert node.module is not None
        return [f"{node.module}.{name.name}" for name in node.names]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and is_module(node.value.partition(":")[0]):
        return [node.value.partition(":")[0]]
    return []


def is_module(name: str) -> bool:
    """Whether ``name`` is a module of this project, such as ``"codefend.bench.judge"``."""
    first, *rest = name.split(".")
    path = ROOT.joinpath(*rest)
    return first == "codefend" and bool(rest) and (path.with_suffix(".py").is_file() or path.is_dir())


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def subpackage_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def project_subpackages(imports: frozenset[Import]) -> set[str]:
    parts = [name.split(".") for name, _ in imports if name.split(".")[0] == "codefend"]
    return {part[1] if len(part) > 1 and part[1] in SUBPACKAGES else "__init__" for part in parts}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path: Path) -> None:
    own, file = subpackage_of(path), path.relative_to(ROOT).as_posix()
    if own in ("__init__", "__main__"):  # the front door looks its names up lazily, on every layer
        return
    assert own in LAYER_OF, f"give {own} a layer in ARCHITECTURE.md and in this test"
    for other in project_subpackages(imports_of(path.read_text())) - {own, "__init__"}:
        if other in {"contrib", "integrations"} and file in REGISTRIES:
            continue
        if other == "victims" and own == "gateway":
            assert file in VICTIMS_DOOR, f"the gateway reaches models through {', '.join(VICTIMS_DOOR)} only"
        assert LAYER_OF[other] < LAYER_OF[own], f"{own} (layer {LAYER_OF[own]}) imports {other} ({LAYER_OF[other]})"
        assert not (own == "gateway" and other in GATEWAY_NEVER), f"the gateway may not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_heavy_libraries_stay_with_their_owners(path: Path) -> None:
    own = subpackage_of(path)
    for name, when in imports_of(path.read_text()):
        library = name.partition(".")[0]
        if when == "types":
            continue
        assert own in OWNERS.get(library, {own}), f"{own} imports {library}, which belongs to {OWNERS[library]}"
        if library == "torch" and when == "now":
            assert own not in NOT_TORCH_ON_IMPORT, f"{own} imports torch when it is imported"


def test_no_circle_of_files() -> None:
    """Imports at the top of modules and inside functions; those for type checkers alone don't count."""
    modules = {".".join(("codefend", *path.relative_to(ROOT).with_suffix("").parts)): path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = {name for name, when in imports_of(path.read_text()) if when != "types"}
        if path.relative_to(ROOT).as_posix() in REGISTRIES or module == "codefend":
            names = set()  # a registry names its entries, and they import its neighbours
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        edges[module] = (targets & set(modules)) - {module, "codefend"}
    while edges:
        free = {module for module, needs in edges.items() if not needs & set(edges)}
        assert free, f"circular: {sorted(edges)}"
        edges = {module: needs for module, needs in edges.items() if module not in free}


def test_this_check_sees_lazy_imports_and_strings() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from codefend.bench import evaluate
import torch.nn
def f():
    from codefend import victims
    import PIL.Image
    return import_module("codefend.attacks.pgd")
"""
    imports = imports_of(source)
    assert ("torch.nn", "now") in imports
    assert ("PIL.Image", "later") in imports
    assert ("codefend.bench.evaluate", "types") in imports
    assert {"bench", "victims", "attacks"} == project_subpackages(imports)
