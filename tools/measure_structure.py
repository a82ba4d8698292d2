"""Measure a checkout: subpackages, pairs with an import, lines, and the files that a command visits.

Usage: python tools/measure_structure.py [SRC] [--journey COMMAND ...], e.g. --journey purify photo.png -o clean.png
"""

from __future__ import annotations

import ast
import sys
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any


def main(arguments: list[str]) -> None:
    at = arguments.index("--journey") if "--journey" in arguments else len(arguments)
    src = Path(arguments[0] if at else "src").resolve()
    package = src / "codefend"
    files = sorted(package.rglob("*.py"))
    print(f"subpackages {len({top(package, file) for file in files})}")
    print(f"pairs of subpackages with an import {len(pairs(package, files))}")
    texts = [file.read_text(encoding="utf-8") for file in files]
    print(f"lines {sum(len(text.splitlines()) for text in texts)}, of code {sum(map(code_lines, texts))}")
    if at < len(arguments):
        journey(src, arguments[at + 1 :])


def top(package: Path, file: Path) -> str:
    """The subpackage of a file; ``__main__`` belongs to the front door, ``__init__``."""
    return file.relative_to(package).parts[0].removesuffix(".py").replace("__main__", "__init__")


def pairs(package: Path, files: list[Path]) -> set[tuple[str, str]]:
    """Ordered pairs of subpackages: one imports the other, or names one of its modules in a string."""
    modules = {module_name(package, file): file for file in files}
    edges = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for name in names_in(node):
                if isinstance(node, ast.Constant) and name not in modules:
                    continue  # the name of a logger, say
                while name not in modules and "." in name:
                    name = name.rpartition(".")[0]
                if name in modules:
                    edges.add((top(package, file), top(package, modules[name])))
    return {(a, b) for a, b in edges if a != b}


def code_lines(text: str) -> int:
    """Lines that are neither blank, nor a comment, nor part of a docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        has_body = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if has_body and ast.get_docstring(node) is not None:
            documented.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(number not in documented and line.strip()[:1] not in ("", "#") for number, line in lines)


def module_name(package: Path, file: Path) -> str:
    return ".".join((package.name, *file.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")


def names_in(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [f"{node.module}.{name.name}" for name in node.names]
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("codefend."):
        return [node.value.partition(":")[0]]
    return []


def journey(src: Path, command: list[str]) -> None:
    """Run ``codefend COMMAND`` and print the calls of the package's functions, and count their files.

    What runs while a module is imported, such as class bodies and registries, is no step of the journey.
    """
    sys.path.insert(0, str(src))
    from codefend.cli import main as codefend

    calls: list[tuple[str, str]] = []
    imports = 0

    def record(frame: FrameType, event: str, _: Any) -> None:
        nonlocal imports
        code = frame.f_code
        if code.co_name == "<module>":
            imports += {"call": 1, "return": -1}.get(event, 0)
        elif event == "call" and not imports and code.co_filename.startswith(str(src)) and code.co_name[0] != "<":
            calls.append((str(Path(code.co_filename).relative_to(src)), code.co_name))

    sys.setprofile(record)
    codefend(command)
    sys.setprofile(None)
    stretches = [(file, [name for _, name in stretch]) for file, stretch in groupby(calls, key=lambda call: call[0])]
    for file, names in stretches:
        print(f"  {file}: {' '.join(dict.fromkeys(names))}")
    files = {file for file, _ in calls}
    print(f"journey: {len(calls)} calls in {len(files)} files with {len(stretches) - 1} changes of file")


if __name__ == "__main__":
    main(sys.argv[1:])
