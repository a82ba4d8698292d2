"""Render docs/notebooks/*.ipynb as pages of the site. Usage: python tools/notebook_pages.py"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"


def render(path: Path) -> str:
    """The notebook as Markdown: texts as they are, cells of code as blocks. Links to notebooks lead to their pages."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            shell, _, rest = source.partition("\n")
            source = f"```sh\n{rest}\n```" if shell.startswith("%%bash") else f"```py\n{source}\n```"
        parts.append(source.replace(".ipynb)", ".md)"))
    title, *rest = parts
    heading, _, text = title.partition("\n")
    download = f"*[Download this notebook]({path.name}). It is run by the slow tests.*"
    return "\n\n".join([heading, download, text.strip(), *rest]) + "\n"


if __name__ == "__main__":
    for notebook in sorted(FOLDER.glob("*.ipynb")):
        notebook.with_suffix(".md").write_text(render(notebook), encoding="utf-8")
