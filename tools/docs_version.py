"""Add the built site to a folder of versions, for any static host.

Usage: make docs && .venv/bin/python tools/docs_version.py FOLDER

FOLDER/0.1/ is the site of this version, FOLDER/versions.json what the version selector reads, FOLDER/index.html leads
to the newest version. The format is that of mike, which Zensical's theme reads; mike itself builds with MkDocs and
commits to a branch, neither of which is needed here. Old versions are never rebuilt.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from codefend import __version__

SITE = Path(__file__).parent.parent / "site"
REDIRECT = '<!doctype html><meta http-equiv="refresh" content="0; url=latest/"><a href="latest/">documentation</a>\n'


def add(site: Path, folder: Path, version: str) -> None:
    """Copy ``site`` to ``folder/version`` and ``folder/latest``. Raises FileNotFoundError without a built site."""
    listing = folder / "versions.json"
    entries = json.loads(listing.read_text(encoding="utf-8")) if listing.exists() else []
    known = [entry["version"] for entry in entries if entry["version"] != version]
    newest = sorted([version, *known], key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    for name in (version, "latest") if newest[0] == version else (version,):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(site, folder / name)
    entries = [{"version": name, "title": name, "aliases": ["latest"] * (name == newest[0])} for name in newest]
    listing.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    (folder / "index.html").write_text(REDIRECT, encoding="utf-8")


if __name__ == "__main__":
    add(SITE, Path(sys.argv[1]), __version__.rpartition(".")[0])
