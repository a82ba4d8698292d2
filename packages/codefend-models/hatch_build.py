"""Weights and data are taken from the repository; an unpacked source distribution holds them as the package does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class FilesOfTheRepository(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if (Path(self.root) / "PKG-INFO").exists():  # a source distribution
            return
        repository = Path(self.root).parent.parent
        package = "codefend_models" if self.target_name == "wheel" else "src/codefend_models"
        for source, place in self.config["files"].items():
            build_data["force_include"][str(repository / source)] = f"{package}/{place}"
