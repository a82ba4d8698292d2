"""Banks larger than memory: shards are read when a step draws from them, and the last ones are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from codefend.core.runs import load_checkpoint
from codefend.training import pair_tables
from codefend.types import CodefendError

KEPT = 16  # shards in memory
SPREAD = 4  # shards that one draw mixes


class StreamedBank:
    """The pairs of some folders, safetensors or Parquet. A draw depends on its random numbers alone: it resumes."""

    def __init__(self, folders: Sequence[str]) -> None:
        """Raises CodefendError when a folder, or all of them, hold no pairs."""
        self.parts = [part for folder in folders for part in _parts(Path(folder))]
        if not self.parts:
            raise CodefendError("training needs pairs: make some with `codefend pairs`, then --set pairs=FOLDER")
        sizes = np.array([size for _, _, size in self.parts], dtype=float)
        self._odds = sizes / sizes.sum()
        self._read = _remembering()  # of this bank: another one's shards don't push these out

    def __getstate__(self) -> dict[str, Any]:
        """Without the shards in memory, which no worker process that isn't a fork could be sent."""
        return {name: value for name, value in self.__dict__.items() if name != "_read"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._read = _remembering()

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Pairs ``[count, 3, H, W]`` in [0, 1] from up to SPREAD shards, some mirrored. Raises CodefendError for mixed
        sizes."""
        picks = rng.choice(len(self.parts), size=min(SPREAD, count), p=self._odds)
        clean, attacked = [], []
        for share, pick in zip(np.array_split(np.arange(count), len(picks)), picks, strict=True):
            path, group, size = self.parts[int(pick)]
            rows = torch.from_numpy(rng.integers(size, size=len(share)))
            first, second = self._read(path, group)
            clean.append(first[rows])
            attacked.append(second[rows])
        if len({part.shape[1:] for part in clean}) > 1:
            raise CodefendError("the pairs have several sizes; training needs one size")
        first, second = torch.cat(clean).float() / 255, torch.cat(attacked).float() / 255
        return (first.flip(-1), second.flip(-1)) if rng.random() < 0.3 else (first, second)


def _remembering() -> Callable[[Path, int], tuple[Tensor, Tensor]]:
    return lru_cache(maxsize=KEPT)(_read)


def _parts(folder: Path) -> list[tuple[Path, int, int]]:
    """File, row group (-1 for safetensors) and size of every shard."""
    found = []
    for path in sorted(folder.glob("pairs-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.append((path, -1, int(file.get_slice("clean").get_shape()[0])))
    for path in sorted(folder.glob("*.parquet")):
        found += [(path, group, size) for group, size in enumerate(pair_tables.groups(path)) if size]
    if not found:
        raise CodefendError(f"{folder} holds no pairs; make some with `codefend pairs --run {folder}`")
    return found


def _read(path: Path, group: int) -> tuple[Tensor, Tensor]:
    if group >= 0:
        return pair_tables.read_group(path, group)[:2]
    tensors, _ = load_checkpoint(path)
    return tensors["clean"], tensors["attacked"]
