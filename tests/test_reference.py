"""The generated reference pages are complete. Versions of the site."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from codefend.gateway.config import SECRETS, Settings
from codefend.gateway.engine import Outcome
from codefend.gateway.headers import HEADERS, report
from codefend.gateway.rewrite import EncodedImage
from codefend.gateway.routes import GROUPS
from codefend.gateway.worker import Purified

ROOT = Path(__file__).parent.parent


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reference")
    load_tool("docs_reference").write(folder)
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_every_setting_has_a_line_and_secrets_are_marked(pages: dict[str, str]) -> None:
    lines = {line.split("`")[1]: line for line in pages["configuration"].splitlines() if line.startswith("| `")}
    assert lines.keys() >= set(Settings.model_fields)
    assert "| `2048` | shrink images" in lines["max_side"]
    assert {name for name, line in lines.items() if "never a flag" in line} == set(SECRETS)


def test_routes_and_metrics_are_complete(pages: dict[str, str]) -> None:
    routes = [route for paths in GROUPS.values() for route in paths]
    assert all(f"`{route}`" in pages["gateway"] for route in routes)
    for name in ("codefend_requests_total", "codefend_purify_seconds", "codefend_workers_answering"):
        assert f"| `{name}` |" in pages["gateway"]


def test_every_header_of_the_gateway_is_described() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "src" / "codefend" / "gateway").glob("*.py")]
    literals = {name for text in sources for name in re.findall(r"x-codefend-[a-z-]*[a-z]", text)}
    assert literals <= HEADERS.keys()
    image = Purified(EncodedImage("image/png", ""), score=0.5, texts=())
    outcome = Outcome(images=(image,), bypassed=("timeout",))
    names = {name.decode() for name, _ in report(outcome, purifier="jpeg", request_id="1", scores="exact", votes=3)}
    assert names == {name for name, (place, _) in HEADERS.items() if "answer" in place}


def test_pages_say_that_they_are_generated(pages: dict[str, str]) -> None:
    assert all("Generated from the " in text for text in pages.values())


def test_a_version_of_the_site_is_added_to_the_others(tmp_path: Path) -> None:
    tool, site, folder = load_tool("docs_version"), tmp_path / "site", tmp_path / "pages"
    site.mkdir()
    for version in ("0.9", "0.10", "0.8"):
        (site / "index.html").write_text(version, encoding="utf-8")
        tool.add(site, folder, version)
    entries = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    assert [(entry["version"], entry["aliases"]) for entry in entries] == [
        ("0.10", ["latest"]),
        ("0.9", []),
        ("0.8", []),
    ]
    assert [(folder / name / "index.html").read_text() for name in ("latest", "0.9", "0.8")] == ["0.10", "0.9", "0.8"]
