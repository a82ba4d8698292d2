"""Banks of pairs to draw batches from: in memory, or streamed, where shards are read on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from codefend.core.checkpoints import load_checkpoint
from codefend.training import pair_tables
from codefend.training.pairs import read_pairs
from codefend.types import CodefendError

CACHED = 16  # shards in memory
SPREAD = 4  # shards that one draw mixes


class Bank:
    """The pairs of some folders in memory, 8 bits. Raises CodefendError when a folder, or all of them, hold none."""

    def __init__(self, folders: Sequence[str], *, without: Sequence[str] = ()) -> None:
        if not folders:
            raise CodefendError("training needs pairs: make some with `codefend pairs`, then --set pairs=FOLDER")
        shards = [shard for folder in folders for shard in read_pairs(folder, without=without)]
        if not shards:
            raise CodefendError(f"no pairs are left in {', '.join(folders)} without {', '.join(without)}")
        self.clean = torch.cat([clean for clean, _, _ in shards])
        self.attacked = torch.cat([attacked for _, attacked, _ in shards])

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Pairs ``[count, 3, H, W]`` in [0, 1]; three batches of ten are mirrored."""
        picks = torch.from_numpy(rng.integers(len(self.clean), size=count))
        return _mirror(rng, self.clean[picks], self.attacked[picks])


class StreamedBank:
    """The pairs of some folders, safetensors or Parquet, read on demand; the last shards stay in memory."""

    def __init__(self, folders: Sequence[str]) -> None:
        """Raises CodefendError when a folder, or all of them, hold no pairs."""
        self.parts = [part for folder in folders for part in _parts(Path(folder))]
        if not self.parts:
            raise CodefendError("training needs pairs: make some with `codefend pairs`, then --set pairs=FOLDER")
        sizes = np.array([size for _, _, size in self.parts], dtype=float)
        self._odds = sizes / sizes.sum()
        self._read = _cached_reader()  # one cache for each bank

    def __getstate__(self) -> dict[str, Any]:
        """Without the shards in memory: the bank can be sent to another process."""
        return {name: value for name, value in self.__dict__.items() if name != "_read"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._read = _cached_reader()

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Pairs ``[count, 3, H, W]`` in [0, 1] from up to SPREAD shards; three batches of ten are mirrored.

        Raises CodefendError for pairs of several sizes.
        """
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
        return _mirror(rng, torch.cat(clean), torch.cat(attacked))


def _mirror(rng: np.random.Generator, clean: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit pairs in [0, 1], mirrored with probability 0.3: a new view of the same perturbation."""
    clean, attacked = clean.float() / 255, attacked.float() / 255
    return (clean.flip(-1), attacked.flip(-1)) if rng.random() < 0.3 else (clean, attacked)


def _cached_reader() -> Callable[[Path, int], tuple[Tensor, Tensor]]:
    return lru_cache(maxsize=CACHED)(_read)


def _parts(folder: Path) -> list[tuple[Path, int, int]]:
    """File, row group (-1 for safetensors) and size of every shard."""
    parts = []
    for path in sorted(folder.glob("pairs-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            parts.append((path, -1, int(file.get_slice("clean").get_shape()[0])))
    for path in sorted(folder.glob("*.parquet")):
        parts += [(path, group, size) for group, size in enumerate(pair_tables.group_sizes(path)) if size]
    if not parts:
        raise CodefendError(f"{folder} holds no pairs; make some with `codefend pairs --run {folder}`")
    return parts


def _read(path: Path, group: int) -> tuple[Tensor, Tensor]:
    if group >= 0:
        return pair_tables.read_group(path, group)[:2]
    tensors, _ = load_checkpoint(path)
    return tensors["clean"], tensors["attacked"]
