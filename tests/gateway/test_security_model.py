"""Every test that the security model names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "security-model.md"
NAMED = re.findall(r"`((?:tests/\w+/)?test_\w+\.py)(?:::(test_\w+))?`", PAGE.read_text())


def test_the_page_names_tests() -> None:
    assert len(NAMED) > 40


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_what_holds_a_promise_exists(file: str, name: str) -> None:
    path = HERE.parents[1] / file if "/" in file else HERE / file
    functions = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert not name or name in functions
