"""A corpus through `codefend purify`: what reading, writing and the manifest cost next to the purifier, and memory.

python benchmarks/corpus.py cost --images 40 --side 256 --purifier bridge
python benchmarks/corpus.py overlap --images 40 --side 256 --kind PNG --threads 1 --rounds 5
python benchmarks/corpus.py memory --images 500 2500 --side 64 --purifier bitdepth
python benchmarks/corpus.py ray --images 100 300 --side 256 --purifier bridge

Times of ``cost`` and ``ray`` are of the wall, for a machine with nothing else to do, and of the processor. A second
thread reads ahead and writes behind, so with a core to spare the wall says what a corpus adds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from skimage import data

from codefend import load_purifier
from codefend.core import images
from codefend.core.overlap import Overlap
from codefend.core.processes import keep_freed_memory
from codefend.purifiers.corpus import CorpusOptions, in_this_process, purify_corpus
from codefend.purifiers.image_files import FileSteps, FolderOptions, purify_files


@cache
def astronaut() -> torch.Tensor:
    pixels = data.astronaut().copy()  # type: ignore[no-untyped-call]
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def photograph(number: int, side: int, kind: str = "JPEG") -> bytes:
    """A file cut from scikit-image's astronaut; there are 200 of them."""
    return _cut(number % 200, side, kind)


@cache
def _cut(number: int, side: int, kind: str) -> bytes:
    pixels = astronaut()
    top, left = (number * 37) % 200, (number * 53) % 200
    part = F.interpolate(pixels[None, :, top : top + 300, left : left + 300], (side, side), mode="area")[0]
    return images.encode(part, kind, quality=90)


def write_tar(path: Path, numbers: range, side: int, kind: str = "JPEG") -> None:
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            content = photograph(number, side, kind)
            info = tarfile.TarInfo(f"{number:06d}.{kind.lower()}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_table(path: Path, numbers: range, side: int, kind: str = "JPEG") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(numbers.start, numbers.stop, 500):
            part = range(first, min(first + 500, numbers.stop))
            rows = [
                {"bytes": photograph(number, side, kind), "path": f"{number:06d}.{kind.lower()}"} for number in part
            ]
            writer.write_table(pa.table({"image": pa.array(rows, image), "label": list(part)}, schema))


WRITERS = {"tar": write_tar, "parquet": write_table}


class Seconds(NamedTuple):
    wall: float
    processor: float


def timed(work: Callable[[], object]) -> Seconds:
    start, before = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - start, time.process_time() - before)


def purify(source: Path, sink: Path, purifier: str) -> None:
    report = purify_corpus([str(source)], str(sink), CorpusOptions(FolderOptions(purifier)), in_this_process)
    assert not report.failures


def cost(arguments: argparse.Namespace) -> None:
    """Medians of interleaved rounds. The purifier is loaded before: once for a corpus, whatever its size."""
    count, side = arguments.images[0], arguments.side
    torch.set_num_threads(arguments.threads)
    purifier = load_purifier(arguments.purifier)
    pixels = [images.load(photograph(number, side)).pixels[None] for number in range(count)]

    def purify_alone() -> None:
        with torch.no_grad():
            for image in pixels:
                purifier.judge(image, purifier(image))

    with tempfile.TemporaryDirectory() as folder:
        seconds: dict[str, list[Seconds]] = {"purifier alone": [], **{ending: [] for ending in WRITERS}}
        for ending, write in WRITERS.items():
            write(Path(folder) / f"x.{ending}", range(count), side, arguments.kind)
            write(Path(folder) / f"first.{ending}", range(2), side)
            purify(Path(folder) / f"first.{ending}", Path(folder) / "first" / ending, arguments.purifier)
        for number in range(arguments.rounds):
            seconds["purifier alone"].append(timed(purify_alone))
            for ending in WRITERS:
                source, sink = Path(folder) / f"x.{ending}", Path(folder) / f"{ending}{number}"
                seconds[ending].append(timed(partial(purify, source, sink, arguments.purifier)))
    for kind in Seconds._fields:
        alone = statistics.median(getattr(times, kind) for times in seconds["purifier alone"])
        for label, times in seconds.items():
            values = [getattr(time, kind) / count * 1000 for time in times]
            middle, span = statistics.median(values), f"[{min(values):.2f}, {max(values):.2f}]"
            print(f"{kind}, {label}: {middle:.2f} ms an image {span}, {middle * count / 1000 / alone - 1:+.1%}")


def overlap(arguments: argparse.Namespace) -> None:
    """Reading, purifying and writing in turn, and with reading and writing in a second thread; wall time."""
    count, side, kind = arguments.images[0], arguments.side, arguments.kind
    torch.set_num_threads(arguments.threads)
    options = FolderOptions(arguments.purifier, format="png" if kind == "PNG" else None)
    steps = FileSteps(load_purifier(arguments.purifier), options)
    files = [[(f"x.{kind.lower()}", photograph(number, side, kind))] for number in range(count)]
    purify_files(steps.purifier, files[0], options)
    seconds: dict[str, list[float]] = {"in turn": [], "second thread": []}
    for _ in range(arguments.rounds):
        for label, times in seconds.items():
            small = bool if label == "in turn" else _never
            with Overlap(steps.read, steps.purify, steps.write, small=small) as running:
                times.append(timed(lambda running=running: list(running.run(files))).wall)  # type: ignore[misc]
    for label, times in seconds.items():
        print(f"{kind} {side}, {label}: {statistics.median(times) / count * 1000:.2f} ms an image")


def _never(files: object) -> bool:
    return False


def memory(arguments: argparse.Namespace) -> None:
    """Each size in a process of its own: the high-water mark never falls."""
    for ending, write in WRITERS.items():
        for count in arguments.images:
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / f"x.{ending}"
                write(source, range(count), arguments.side)
                command = [sys.executable, __file__, "one", str(source), f"{folder}/out", arguments.purifier]
                print(f"{ending}, {count} images: {subprocess.check_output(command, text=True).strip()}", flush=True)


def one(source: str, sink: str, purifier: str) -> None:
    seconds = timed(partial(purify, Path(source), Path(sink), purifier)).processor
    status = Path("/proc/self/status").read_text()  # getrusage counts the parent's memory at the start, too
    peak = int(status.partition("VmHWM:")[2].split()[0])
    print(f"peak {peak / 1024:.0f} MiB, {seconds:.1f} s")


class ProcessTree:
    """Seconds of the processor of this process and all below it, also of those that have ended; sampled."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, float], float] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def total(self) -> float:
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self.seconds[process.pid, process.create_time()] = times.user + times.system
        return sum(self.seconds.values())

    def _watch(self) -> None:
        while True:
            self.total()
            time.sleep(0.5)


def on_ray(arguments: argparse.Namespace) -> None:
    """One process without an engine, then one and two workers of one thread, on a folder of images.

    Each does a smaller corpus as well: the difference is what an image costs, without what starting costs.
    """
    import ray

    from codefend.integrations.ray import RayOptions
    from codefend.integrations.ray import on_ray as engine

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.images:
            (Path(folder) / f"in{count}").mkdir()
            for number in range(count):
                (Path(folder) / f"in{count}" / f"{number:06d}.jpg").write_bytes(photograph(number, arguments.side))
        options = CorpusOptions(FolderOptions(arguments.purifier))
        ray.init(address="local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False)
        tree = ProcessTree()
        for label, chosen in (
            ("no engine", in_this_process),
            ("ray, 1 worker", engine(RayOptions(1))),
            ("ray, 2 workers", engine(RayOptions(2))),
        ):
            for count in arguments.images:
                start, before = time.perf_counter(), tree.total()
                purify_corpus([f"{folder}/in{count}"], f"{folder}/{label}{count}", options, chosen)
                wall, cpu = time.perf_counter() - start, tree.total() - before
                print(f"{label}, {count} images: {wall:.1f} s, {cpu:.1f} s of CPU", flush=True)
        ray.shutdown()


def main() -> None:
    keep_freed_memory()  # as the command does
    if sys.argv[1] == "one":
        one(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["cost", "overlap", "memory", "ray"])
    parser.add_argument("--images", type=int, nargs="+", required=True)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="of cost and overlap")
    parser.add_argument("--kind", default="JPEG", help="of the image files, of cost and overlap")
    parser.add_argument("--threads", type=int, default=2, help="of cost and overlap, for the network")
    parser.add_argument("--purifier", default="bridge")
    arguments = parser.parse_args()
    {"cost": cost, "overlap": overlap, "memory": memory, "ray": on_ray}[arguments.verb](arguments)


if __name__ == "__main__":
    main()
