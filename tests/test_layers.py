"""A module imports only from lower layers, and heavy libraries stay behind the modules that own them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import codefend

ROOT = Path(codefend.__file__).parent
# Floors from the ground up: a room imports from its own floor or a lower one. Strings that name modules count.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"types"}),
    frozenset({"core"}),
    frozenset({"encoders"}),
    frozenset({"purifiers", "victims", "attacks", "tasks"}),
    frozenset({"prompts"}),
    frozenset({"defense"}),
    frozenset({"bench"}),
    frozenset({"training"}),
    frozenset({"gateway", "integrations", "contrib"}),
    frozenset({"cli"}),
    frozenset({"__init__"}),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PEERS = {"purifiers", "victims", "attacks", "tasks"}  # none of these may know another
GATEWAY_NEVER = {"attacks", "tasks", "training", "bench", "contrib"}  # serving stays light
VICTIMS_DOOR = {"gateway/pocket.py"}  # the one module through which the gateway reaches models
# Registries name entries of `contrib` and `integrations` as strings and import them only when one is asked for.
REGISTRIES = {"purifiers/__init__.py", "attacks/table.py", "victims/__init__.py"}
OWNERS = {  # library -> where it may be imported
    "PIL": {"core"},
    "transformers": {"victims", "prompts", "contrib"},
    "gguf": {"victims"},
    "diffusers": {"purifiers", "contrib"},
    "starlette": {"gateway"},
    "uvicorn": {"gateway"},
    "typer": {"cli"},
}
NOT_TORCH_ON_IMPORT = {"__init__", "types", "cli"}

Import = tuple[str, str]  # dotted name; "now" when the module is imported, "later" in a function, "types" for checkers


@cache  # each file is asked about three times
def imports_of(source: str) -> set[Import]:
    """Every module that ``source`` imports, lazily or not; names imported from a package count as its modules."""
    tree = ast.parse(source)
    when: dict[int, str] = {}
    for node in ast.walk(tree):
        if is_type_checking(node):
            when.update((id(inner), "types") for inner in ast.walk(node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            when.update((id(inner), "later") for inner in ast.walk(node))
    found: set[Import] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(name.name, when.get(id(node), "now")) for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which layer is meant"
            assert node.module is not None
            inside = node.module == "codefend"
            names = [f"codefend.{name.name}" for name in node.names] if inside else [node.module]
            found |= {(name, when.get(id(node), "now")) for name in names}
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def project_parts(found: set[Import]) -> set[str]:
    names = {name.split(".")[1] if "." in name else "__init__" for name, _ in found if name.split(".")[0] == "codefend"}
    return {name if name in LAYERS or name in TOP else "__init__" for name in names}


TOP = {path.stem for path in ROOT.iterdir()}
FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path: Path) -> None:
    part, found = part_of(path), imports_of(path.read_text())
    assert part in LAYERS, f"give {part} a layer in ARCHITECTURE.md and in this test"
    if path == ROOT / "__init__.py":  # the front door looks its names up lazily, in every layer
        return
    for other in project_parts(found) - {part}:
        assert LAYERS[other] <= LAYERS[part], f"{part} (L{LAYERS[part]}) imports {other} (L{LAYERS[other]})"
        assert not {part, other} <= STRANGERS, f"{part} and {other} are both L2 and may not know each other"
        assert not (part == "gateway" and other in GATEWAY_NEVER), f"the gateway may not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_heavy_libraries_stay_with_their_owners(path: Path) -> None:
    part = part_of(path)
    for name, when in imports_of(path.read_text()):
        library = name.partition(".")[0]
        if when == "types":
            continue
        assert part in OWNERS.get(library, {part}), f"{part} imports {library}, which belongs to {OWNERS[library]}"
        if library == "torch" and when == "now":
            assert part not in NOT_TORCH_ON_IMPORT, f"{part} imports torch when it is imported"


def test_modules_of_one_layer_do_not_import_in_circles() -> None:
    edges: dict[str, set[str]] = {}
    for path in FILES:
        if path != ROOT / "__init__.py":
            edges.setdefault(part_of(path), set()).update(project_parts(imports_of(path.read_text())) - {part_of(path)})
    while edges:
        free = {part for part, needs in edges.items() if not needs & set(edges)}
        assert free, f"circular: {sorted(edges)}"
        edges = {part: needs for part, needs in edges.items() if part not in free}


def test_this_check_sees_lazy_and_hidden_imports() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from codefend.bench import evaluate
import torch.nn
def f():
    from codefend import victims
    import PIL.Image
"""
    found = imports_of(source)
    assert ("torch.nn", "now") in found
    assert ("PIL.Image", "later") in found
    assert ("codefend.bench", "types") in found
    assert {"evaluate", "victims"} <= project_parts(found)
