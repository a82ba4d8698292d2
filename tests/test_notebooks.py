"""The notebooks: stored without outputs, rendered as pages, and executed in the slow suite."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_notebooks_are_stored_without_outputs() -> None:
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name


def test_pages_hold_text_and_code_and_link_to_pages() -> None:
    spec = importlib.util.spec_from_file_location("notebook_pages", ROOT / "tools" / "notebook_pages.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = tool.render(ROOT / "docs" / "notebooks" / "defend.ipynb")
    assert page.startswith("# Defend a model\n\n*[Download this notebook](defend.ipynb)")
    assert "```py\nimport matplotlib" in page
    assert "](attack-and-measure.md)" in page
    assert "```sh\ncodefend train own-bridge" in tool.render(ROOT / "docs" / "notebooks" / "train-your-own.ipynb")


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # of the kernel's own libraries
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="optional: the extra docs runs notebooks")
    import nbformat

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(tmp_path)}}).execute()
