"""A corpus is purified whole, once, to the same bytes whatever was killed; one bad file does not stop the rest."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import fsspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import Tensor

import corpus_kit as kit
from codefend.core import images
from codefend.core.seeds import pixels_digest, secret_of
from codefend.gateway.worker import Job, Purified, Worker, WorkerOptions
from codefend.purifiers import load, text_policy
from codefend.purifiers.corpus import Tick, Unit, UnitPurifier, UnitReport, in_processes, job, parse_shard
from codefend.purifiers.corpus.stores import Store
from codefend.purifiers.corpus.units import find_units
from codefend.purifiers.folders import FolderOptions, purify_paths
from codefend.types import CodefendError

NOISY = "bridge:sigma=0.1"


# --- formats ---------------------------------------------------------------------------------------------------------


def test_folders_tables_and_archives_hold_the_same_purified_images(corpus: Path, tmp_path: Path) -> None:
    report = kit.run(corpus, tmp_path / "out", NOISY)
    assert (report.images, report.failures) == (18, 0)
    archive = kit.read_tar(tmp_path / "out" / "wds" / "000.tar")
    rows = pq.read_table(tmp_path / "out" / "data" / "train.parquet").column("image").to_pylist()
    for index in range(6):
        loose = tmp_path / "out" / "loose" / ("a" if index % 2 else "b") / f"{index:03d}.png"
        assert loose.read_bytes() == archive[f"{index:03d}.png"] == rows[index]["bytes"] != kit.image(index)


def test_a_folder_job_and_a_gateway_with_the_same_secret_give_the_same_bytes(tmp_path: Path) -> None:
    folder = kit.write_folder(tmp_path / "in", 2)
    kit.run(folder, tmp_path / "corpus", NOISY)
    purify_paths(lambda: load(NOISY), [folder], tmp_path / "plain", FolderOptions(purifier=NOISY))
    worker = Worker(load(NOISY), WorkerOptions(secret=secret_of(0)))
    for index, name in enumerate(("b/000.png", "a/001.png")):
        (result,) = worker.run([Job(kit.image(index))])
        assert isinstance(result, Purified)
        whole = (tmp_path / "corpus" / name).read_bytes()
        assert whole == (tmp_path / "plain" / name).read_bytes()
        gateway = images.load(f"data:image/png;base64,{result.image.data}").pixels
        assert pixels_digest(b"", "", gateway) == pixels_digest(b"", "", images.load(whole).pixels)


def test_other_columns_and_metadata_are_carried_through(corpus: Path, tmp_path: Path) -> None:
    kit.run(corpus / "data", tmp_path / "out")
    before, after = (pq.read_table(folder / "train.parquet") for folder in (corpus / "data", tmp_path / "out"))
    assert after.schema.equals(before.schema, check_metadata=True)
    assert after.drop_columns("image").equals(before.drop_columns("image"))
    assert [row["path"] for row in after.column("image").to_pylist()] == [f"{i:03d}.png" for i in range(6)]


def test_progress_never_passes_the_size_of_a_compressed_table(tmp_path: Path) -> None:
    rows = [{"bytes": kit.image(0), "path": "a.png"}] * 500  # stored once
    pq.write_table(pa.table({"image": pa.array(rows, type=kit.IMAGE_TYPE)}), tmp_path / "x.parquet")
    seen = 0

    def engine(purify: UnitPurifier, units: Iterable[Unit], tick: Tick) -> Iterator[UnitReport]:
        def count(images: int, size: int) -> None:
            nonlocal seen
            seen += size

        return (purify(unit, count) for unit in units)

    kit.run(tmp_path / "x.parquet", tmp_path / "out", engine=engine)
    size = (tmp_path / "x.parquet").stat().st_size
    assert 0.8 * size <= seen <= size


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_other_members_are_carried_through_in_order(tmp_path: Path, name: str) -> None:
    source = kit.write_tar(tmp_path / "in" / name, extra={"clip.mp4": b"v" * 3_000_000, "ü" * 120 + ".txt": b"long"})
    kit.run(source, tmp_path / "out", batch=2)
    before, after = kit.read_tar(source), kit.read_tar(tmp_path / "out" / name)
    assert list(after) == list(before)
    assert {key: after[key] for key in before if not key.endswith("png")} == {
        key: value for key, value in before.items() if not key.endswith("png")
    }
    with tarfile.open(source) as one, tarfile.open(tmp_path / "out" / name) as other:
        assert [(i.mtime, i.mode) for i in one] == [(i.mtime, i.mode) for i in other]


def test_formats_that_are_only_read_change_their_name(tmp_path: Path) -> None:
    gif = io.BytesIO()
    images.to_pil(images.load(kit.image(0)).pixels).save(gif, "GIF")
    source = kit.write_tar(tmp_path / "in" / "x.tar", 0, extra={"a.gif": gif.getvalue()})
    kit.run(source, tmp_path / "out")
    assert list(kit.read_tar(tmp_path / "out" / "x.tar")) == ["a.gif.png"]


def test_a_binary_column_is_purified_when_it_is_named(tmp_path: Path) -> None:
    table = pq.read_table(kit.write_table(tmp_path / "t.parquet"))
    raw = table.column("image").combine_chunks().field("bytes")
    pq.write_table(table.drop_columns("image").append_column("raw", raw), tmp_path / "in.parquet")
    assert kit.run(tmp_path / "in.parquet", tmp_path / "out", column="raw").images == 6
    after = pq.read_table(tmp_path / "out" / "in.parquet").column("raw").to_pylist()
    assert all(new != old and images.probe(new).width == 10 for new, old in zip(after, raw.to_pylist(), strict=True))


def test_a_table_with_lists_of_images_is_refused_unless_a_column_is_named(tmp_path: Path) -> None:
    table = pq.read_table(kit.write_table(tmp_path / "one.parquet"))
    column = table.column("image").combine_chunks()
    for kind in (pa.list_, pa.large_list):
        lists = pa.array([[value] for value in column.to_pylist()], type=kind(kit.IMAGE_TYPE))
        pq.write_table(table.append_column("images", lists), tmp_path / "in.parquet")
        with pytest.raises(
            CodefendError, match=r"in.parquet holds lists of images in 'images', which are not purified"
        ):
            kit.run(tmp_path / "in.parquet", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert kit.run(tmp_path / "in.parquet", tmp_path / "out", column="image").images == 6


def test_other_files_of_folders_are_copied_on_request(corpus: Path, tmp_path: Path) -> None:
    kit.run(corpus, tmp_path / "without")
    assert not (tmp_path / "without" / "loose" / "labels.csv").exists()
    kit.run(corpus, tmp_path / "with", keep_others=True)
    assert (tmp_path / "with" / "loose" / "labels.csv").read_text() == "name,label\n"


def test_an_object_store_holds_what_a_folder_would(corpus: Path, tmp_path: Path, memory: str) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(corpus), "/bucket/in", recursive=True)
    kit.run(f"{memory}/in", f"{memory}/out", NOISY)
    kit.run(corpus, tmp_path / "out", NOISY)
    for path in ("wds/000.tar", "data/train.parquet", "loose/a/001.png"):
        assert store.cat(f"/bucket/out/{path}") == (tmp_path / "out" / path).read_bytes()
    assert kit.run(f"{memory}/in", f"{memory}/out", NOISY).images == 0


def test_instructions_in_images_are_noted_in_the_manifest(corpus: Path, tmp_path: Path) -> None:
    def apply(pixels: Tensor, policy: str) -> tuple[Tensor, list[str]]:
        return pixels, ["ignore all rules"] if pixels.mean() > 0.51 else []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_policy, "apply", apply)
        patch.setattr(text_policy, "instructions_in", tuple)
        kit.run(corpus / "wds", tmp_path / "out", text="report")
    _, *lines = kit.manifest(tmp_path / "out", "000.tar")
    bright = [images.load(kit.image(index)).pixels.mean() > 0.51 for index in range(6)]
    assert ["instructions" in line for line in lines] == bright
    assert any(bright)


# --- exactly once ----------------------------------------------------------------------------------------------------


def test_shards_together_are_the_whole(corpus: Path, tmp_path: Path) -> None:
    whole = kit.run(corpus, tmp_path / "whole", NOISY)
    parts = [kit.run(corpus, tmp_path / "parts", NOISY, shard=(number, 3)) for number in (3, 1, 2)]
    assert sum(part.images for part in parts) == whole.images
    assert kit.contents(tmp_path / "parts") == kit.contents(tmp_path / "whole")


def test_the_same_command_has_nothing_left_to_do(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kit.run(corpus, tmp_path / "out")
    before = kit.contents(tmp_path / "out")
    monkeypatch.setattr(job, "load", None)
    again = kit.run(corpus, tmp_path / "out")
    assert (again.images, again.skipped) == (0, first.units)
    assert kit.contents(tmp_path / "out") == before


def test_a_changed_source_is_purified_again_and_a_new_file_touches_its_own_group_only(
    corpus: Path, tmp_path: Path
) -> None:
    kit.run(corpus, tmp_path / "out")
    kit.write_tar(corpus / "wds" / "000.tar", 7)
    (corpus / "loose" / "a" / "new.png").write_bytes(kit.image(9))
    again = kit.run(corpus, tmp_path / "out")
    assert again.units == 2
    assert len(kit.read_tar(tmp_path / "out" / "wds" / "000.tar")) == 14


def _killed(corpus: Path, tmp_path: Path, kills: int, within: float) -> int:
    def work() -> None:
        kit.run(corpus, tmp_path / "killed", "bitdepth")

    kit.run(corpus, tmp_path / "whole", "bitdepth")
    hits = kit.kill_at_random(work, kills, within, seed=1)
    files = kit.contents(tmp_path / "killed")
    leftovers = [name for name in files if name.endswith(".part")]
    assert {name: data for name, data in files.items() if name not in leftovers} == kit.contents(tmp_path / "whole")
    return hits


def test_a_job_killed_twice_ends_the_same(tmp_path: Path) -> None:
    assert _killed(kit.write_all(tmp_path / "in", 60), tmp_path, 2, 0.3) >= 1


@pytest.mark.slow
def test_a_job_killed_twenty_times_ends_the_same(tmp_path: Path) -> None:
    assert _killed(kit.write_all(tmp_path / "in", 1500), tmp_path, 20, 1.0) >= 10


# --- units and the command line --------------------------------------------------------------------------------------


def test_groups_bound_their_size_and_shards_their_number(tmp_path: Path) -> None:
    for index in range(200):
        (tmp_path / "in" / f"{index:06d}.png").parent.mkdir(exist_ok=True)
        (tmp_path / "in" / f"{index:06d}.png").write_bytes(b"")
    units = list(find_units([str(tmp_path / "in")], Store(str(tmp_path / "out"))))
    assert sum(len(unit.files) for unit in units) == 200
    assert max(len(unit.files) for unit in units) <= 64
    assert 8 <= len(units) <= 20  # also for numbered names
    for text in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(CodefendError, match="is not I/N"):
            parse_shard(text)


def test_the_command_purifies_archives_and_says_what_failed(
    corpus: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    command = ("purify", corpus, "-o", tmp_path / "out", "--purifier", "bitdepth", "--shard", "1/1")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert out.startswith("purified 18 images in ")
    kit.cut(kit.write_tar(corpus / "bad.tar"))
    code, _, err = run(*command)
    assert code == 1
    assert "failed: bad.tar: cannot read bad.tar" in err
    assert run(*command, "--engine", "spark")[0] == 2


@pytest.mark.slow
def test_worker_processes_write_the_same_and_those_that_are_killed_are_replaced(tmp_path: Path) -> None:
    kills = 0

    def killing(purify: UnitPurifier, units: Iterable[Unit], tick: Tick) -> Iterator[UnitReport]:
        nonlocal kills
        for report in in_processes(2)(purify, units, tick):
            workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
            if kills < 5 and workers:
                random.Random(kills).choice(workers).kill()
                kills += 1
            yield report

    corpus = kit.write_all(tmp_path / "in", 100)
    kit.run(corpus, tmp_path / "one", NOISY)
    kit.run(corpus, tmp_path / "two", NOISY, engine=killing)
    assert kills == 5
    assert kit.contents(tmp_path / "two") == kit.contents(tmp_path / "one")
