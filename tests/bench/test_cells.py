"""The names under which a cell is filed."""

from __future__ import annotations

from codefend.bench.cells import slug


def test_slugs_are_file_names_and_differ() -> None:
    labels = ["bridge", "bridge:evaluations=2", "bridge_evaluations=2", "../up", "8/255", ""]
    names = [slug(label) for label in labels]
    assert len(set(names)) == len(labels)
    assert all("/" not in name and not name.startswith(".") and name for name in names)
