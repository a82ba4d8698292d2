"""Small corpora for tests: a folder, a WebDataset archive and a Parquet file with the same images."""

from __future__ import annotations

import io
import json
import multiprocessing as mp
import os
import random
import signal
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from codefend.core import images
from codefend.purifiers.corpus import CorpusOptions, CorpusReport, purify_corpus
from codefend.purifiers.image_files import FolderOptions

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def image(seed: int, side: int = 8) -> bytes:
    return images.encode(torch.rand(3, side, side + 2, generator=torch.Generator().manual_seed(seed)))


def write_folder(folder: Path, count: int = 6) -> Path:
    for index in range(count):
        path = folder / ("a" if index % 2 else "b") / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(index))
    (folder / "labels.csv").write_text("name,label\n")
    return folder


def write_tar(path: Path, count: int = 6, *, extra: Mapping[str, bytes] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {f"{i:03d}.{end}": image(i) if end == "png" else b"label" for i in range(count) for end in ("cls", "png")}
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for number, (name, data) in enumerate({**files, **(extra or {})}.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), 1_700_000_000 + number, 0o640
            archive.addfile(info, io.BytesIO(data))
    return path


def read_tar(path: Path | io.BytesIO) -> dict[str, bytes]:
    source = {"fileobj": path} if isinstance(path, io.BytesIO) else {"name": path}
    with tarfile.open(mode="r:*", **source) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]


def write_table(path: Path, count: int = 6, *, broken: int = -1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [b"no image" if index == broken else image(index) for index in range(count)]
    rows = [{"bytes": data, "path": f"{index:03d}.png"} for index, data in enumerate(files)]
    table = pa.table({"id": list(range(count)), "image": pa.array(rows, type=IMAGE_TYPE), "tags": [["x", "y"]] * count})
    pq.write_table(table.replace_schema_metadata({"huggingface": '{"info": 1}'}), path, row_group_size=4)
    return path


def write_all(folder: Path, count: int = 6) -> Path:
    write_folder(folder / "loose", count)
    write_tar(folder / "wds" / "000.tar", count)
    write_table(folder / "data" / "train.parquet", count)
    return folder


def run(sources: Path | str, sink: Path | str, purifier: str = "bitdepth", **settings: object) -> CorpusReport:
    names = ("column", "keep_others", "shard")
    corpus = {name: settings.pop(name) for name in names if name in settings}
    engine = {"engine": settings.pop("engine")} if "engine" in settings else {}
    options = CorpusOptions(FolderOptions(purifier=purifier, **settings), **corpus)  # type: ignore[arg-type]
    return purify_corpus([str(sources)], str(sink), options, **engine)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """All files, the manifest included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_at_random(work: Callable[[], object], kills: int, within: float, seed: int) -> int:
    """Run ``work`` in forked processes, killed after at most ``within`` seconds, until one finishes; the kills."""
    chance, context, hits = random.Random(seed), mp.get_context("fork"), 0
    while True:
        process = context.Process(target=work)
        process.start()
        process.join(chance.uniform(0, within) if hits < kills else None)
        if process.exitcode is not None:
            assert process.exitcode == 0
            return hits
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        hits += 1


def manifest(sink: Path, unit: str) -> list[dict[str, object]]:
    (path,) = (sink / ".codefend" / "manifest").glob(f"{unit}.*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4096])
