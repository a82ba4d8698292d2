"""Freeze the shipped test sets: src/codefend/data/scenes_{test,shift}.zip. Run once."""

from __future__ import annotations

from codefend.core.assets import PACKAGE
from codefend.core.files import write_atomic
from codefend.tasks.scene_tasks import FROZEN, freeze

if __name__ == "__main__":
    for split, count in FROZEN.items():
        write_atomic(PACKAGE / "data" / f"scenes_{split}.zip", freeze(split, count))  # type: ignore[arg-type]
