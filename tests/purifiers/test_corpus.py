"""A corpus is purified whole, once, to the same bytes whatever was killed; one bad file does not stop the rest."""

from __future__ import annotations

import io
import json
import random
import resource
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import corpus_kit as kit
from codefend.core import images
from codefend.core.seeds import pixels_digest, secret_of
from codefend.gateway.worker import Job, Purified, Worker, WorkerOptions
from codefend.purifiers import load, text_policy
from codefend.purifiers.corpus import Tick, Unit, UnitPurifier, UnitReport, in_processes, job, parse_shard, units
from codefend.purifiers.corpus.stores import Store
from codefend.purifiers.corpus.units import find_units
from codefend.purifiers.folders import FolderOptions, purify_paths
from codefend.types import CodefendError

NOISY = "bridge:sigma=0.1"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return kit.write_all(tmp_path / "in")


@pytest.fixture
def memory() -> Iterator[str]:
    """An object store: nothing is renamed or appended to, and a file is there when its upload has ended."""
    yield "memory://bucket"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def manifest(sink: Path, unit: str) -> list[dict[str, object]]:
    (path,) = (sink / ".codefend" / "manifest").glob(f"{unit}.*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    _, *lines = manifest(tmp_path / "out", "000.tar")
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


# --- faults ----------------------------------------------------------------------------------------------------------


def test_broken_images_are_left_out_counted_and_explained(tmp_path: Path) -> None:
    source = tmp_path / "in"
    kit.write_tar(source / "x.tar", 2, extra={"bad.png": b"no image", "bad.txt": b"kept"})
    kit.write_table(source / "t.parquet", 4, broken=2)
    (source / "bad.jpg").write_bytes(b"no image")
    report = kit.run(source, tmp_path / "out")
    assert (report.images, report.failures) == (5, 3)
    assert {name for name, _ in report.failed} == {"x.tar/bad.png", "t.parquet/image:2", "bad.jpg"}
    assert set(kit.read_tar(tmp_path / "out" / "x.tar")) == {"000.png", "000.cls", "001.png", "001.cls", "bad.txt"}
    rows = pq.read_table(tmp_path / "out" / "t.parquet").to_pylist()
    assert [row["id"] for row in rows if row["image"] is None] == [2]
    assert not (tmp_path / "out" / "bad.jpg").exists()
    summary, *lines = manifest(tmp_path / "out", "x.tar")
    assert (summary["images"], summary["failed"]) == (2, 1)
    assert "not a PNG, JPEG" in str([line["error"] for line in lines if "error" in line])


def test_images_in_formats_that_are_not_read_fail_instead_of_passing_unpurified(tmp_path: Path) -> None:
    kit.write_tar(tmp_path / "in" / "x.tar", 1, extra={"photo.avif": b"ftypavif", "photo.txt": b"kept"})
    (tmp_path / "in" / "phone.HEIC").write_bytes(b"ftypheic")
    report = kit.run(tmp_path / "in", tmp_path / "out", keep_others=True)
    assert {name for name, _ in report.failed} == {"x.tar/photo.avif", "phone.HEIC"}
    assert "photo.avif" not in kit.read_tar(tmp_path / "out" / "x.tar")
    assert not (tmp_path / "out" / "phone.HEIC").exists()


def test_a_rerun_reports_the_images_that_failed_before(
    tmp_path: Path, memory: str, run: Callable[..., tuple[int, str, str]]
) -> None:
    kit.write_tar(tmp_path / "in" / "x.tar", 2, extra={"bad.png": b"no image"})
    kit.write_table(tmp_path / "in" / "t.parquet", 4, broken=2)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no image")
    for out in (str(tmp_path / "out"), f"{memory}/out"):
        command = ("purify", tmp_path / "in", "-o", out, "--purifier", "bitdepth")
        first, second = run(*command), run(*command)
        assert (first[0], second[0]) == (1, 1)
        assert first[2] == second[2]
        last = second[2].splitlines()[-1]
        assert (
            last == f"error: 3 images or files failed and were left out; images are listed in {out}/.codefend/failures"
        )
    listed = "".join(path.read_text() for path in (tmp_path / "out" / job.FAILURES).rglob("*.jsonl"))
    assert sorted(json.loads(line)["name"] for line in listed.splitlines()) == ["bad.jpg", "bad.png", "image:2"]
    shutil.rmtree(tmp_path / "in")
    kit.write_tar(tmp_path / "in" / "x.tar", 2)
    assert run(*command[:3], tmp_path / "out", *command[4:])[0] == 0, "a mended source has no failures"


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_members_are_images_by_content_whatever_their_name(tmp_path: Path, name: str) -> None:
    large = images.encode(torch.rand(3, 700, 700), "BMP")  # over the size that is copied unread
    members = {"bare": kit.image(0), "wrong.txt": kit.image(1), "large.bin": large, "x.dat": b"\0\0\0\x1cftypheic"}
    others = {"BM.txt": b"BMW and BMI, but no image", "empty": b"", "clip.mp4": b"\0\0\0\x18ftypmp42" * 100_000}
    source = kit.write_tar(tmp_path / "in" / name, 0, extra={**members, **others})
    report = kit.run(source, tmp_path / "out")
    after = kit.read_tar(tmp_path / "out" / name)
    assert list(after) == ["bare.png", "wrong.txt.png", "large.bin.bmp", *others]
    assert {key: after[key] for key in others} == others
    assert not {*members.values()} & {*after.values()}
    assert [name for name, _ in report.failed] == [f"{name}/x.dat"]


def test_other_files_of_folders_that_are_images_by_content_are_not_copied(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, data in (("page", kit.image(0)), ("notes", b"text"), ("none", b"")):
        (tmp_path / "in" / name).write_bytes(data)
    assert kit.run(tmp_path / "in", tmp_path / "out", keep_others=True).images == 1
    files = {path: data for path, data in kit.contents(tmp_path / "out").items() if not path.startswith(".")}
    assert sorted(files) == ["none", "notes", "page.png"]
    assert files["page.png"] != kit.image(0)


def test_a_folder_of_images_and_a_corpus_are_not_resumed_as_the_other(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    kit.write_folder(tmp_path / "in", 1)
    plain = ("purify", tmp_path / "in", "-o", tmp_path / "out", "--purifier", "bitdepth")
    assert run(*plain)[0] == 0
    assert "written without --workers" in run(*plain, "--shard", "1/1")[2]
    assert run(*plain, "--shard", "1/1", "--overwrite")[0] == 0
    assert "written as a corpus" in run(*plain)[2]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4096])


def _damage_a_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2048:2060] = b"\xff" * 12  # tarfile takes a damaged header after the first for the end
    path.write_bytes(data)


def _cut_between_members(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2048])


@pytest.mark.parametrize("damage", [_cut, _damage_a_header, _cut_between_members])
def test_a_damaged_archive_fails_alone_and_nothing_of_it_is_written(
    corpus: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(kit.write_tar(corpus / "wds" / "bad.tar"))
    report = kit.run(corpus, tmp_path / "out")
    assert (report.images, [name for name, _ in report.failed]) == (18, ["wds/bad.tar"])
    assert report.failed[0][1].startswith("cannot read wds/bad.tar")
    assert not list((tmp_path / "out" / "wds").glob("*bad*"))
    kit.write_tar(corpus / "wds" / "bad.tar")
    assert kit.run(corpus, tmp_path / "out").images == 6


def test_a_damaged_table_fails_alone(corpus: Path, tmp_path: Path) -> None:
    _cut(kit.write_table(corpus / "data" / "bad.parquet", 40))
    report = kit.run(corpus, tmp_path / "out")
    assert (report.images, [name for name, _ in report.failed]) == (18, ["data/bad.parquet"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"column": "picture"}, "has no column 'picture'; it has id: int64, image"),
        ({"column": "id"}, "column 'id' of train.parquet holds int64, no images"),
    ],
)
def test_a_column_without_images_is_one_line(corpus: Path, tmp_path: Path, settings: dict[str, str], text: str) -> None:
    with pytest.raises(CodefendError, match=text):
        kit.run(corpus / "data", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_sink_with_another_manifest_other_files_or_other_weights_is_refused(corpus: Path, tmp_path: Path) -> None:
    kit.run(corpus, tmp_path / "out")
    before = kit.contents(tmp_path / "out")
    with pytest.raises(CodefendError, match="seed was 0, now 1"):
        kit.run(corpus, tmp_path / "out", seed=1)
    assert kit.contents(tmp_path / "out") == before
    assert kit.run(corpus, tmp_path / "out", seed=1, overwrite=True).images == 18
    with pytest.raises(CodefendError, match="holds other files"):
        kit.run(corpus, corpus.parent)
    weights = tmp_path / "out" / ".codefend" / "config.json"
    weights.write_text(weights.read_text().replace('"weights": "', '"weights": "0'))
    shutil.rmtree(tmp_path / "out" / ".codefend" / "manifest")
    with pytest.raises(CodefendError, match="other weights"):
        kit.run(corpus, tmp_path / "out", seed=1)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("none", "no such file"),
        ("nope://bucket/x", "nope"),
        ("empty", "no images, Parquet files or tar archives"),
        ("notes.txt", "is neither an image nor"),
    ],
)
def test_sources_that_cannot_be_used_are_one_line(tmp_path: Path, source: str, text: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CodefendError, match=text):
        kit.run(source if "://" in source else tmp_path / source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corpus_never_overwrites_itself(corpus: Path) -> None:
    with pytest.raises(CodefendError, match="overwritten by its own output"):
        kit.run(corpus, corpus)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.parquet"])
def test_a_disk_without_room_leaves_nothing_half_written(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        source = kit.write_table(tmp_path / "in" / name, 30)
    else:
        source = kit.write_tar(tmp_path / "in" / name, extra={"clip.mp4": random.Random(0).randbytes(20_000)})
    with files_of_at_most(8000), pytest.raises(CodefendError, match=f"cannot write .*{name}: File too large"):
        kit.run(source, tmp_path / "out")
    assert list(kit.contents(tmp_path / "out")) == [job.CONFIG]
    kit.run(source, tmp_path / "out")
    kit.run(source, tmp_path / "undisturbed")
    assert kit.contents(tmp_path / "out") == kit.contents(tmp_path / "undisturbed")


def test_no_room_for_temporary_files_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kit.write_folder(tmp_path / "in", 120)
    monkeypatch.setattr(units, "GROUP", 1000)  # the lines of a unit are more than one buffer
    with files_of_at_most(1000), pytest.raises(CodefendError, match=r"cannot write a temporary file \(File too large"):
        kit.run(folder, tmp_path / "out")
    assert not (tmp_path / "out" / job.MANIFESTS).exists()


@pytest.mark.parametrize(
    ("module", "flags", "extra"), [("pyarrow", (), "parquet"), ("ray", ("--engine", "ray"), "ray")]
)
def test_a_missing_extra_is_one_line(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., tuple[int, str, str]],
    module: str,
    flags: tuple[str, ...],
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run("purify", corpus, "-o", tmp_path / "out", "--purifier", "bitdepth", *flags)
    assert code == 2
    assert f"pip install 'codefend[{extra}]'" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_is_one_line_and_done_again(
    corpus: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(fsspec.filesystem("memory"))

    def lost(self: object, *arguments: object, **settings: object) -> None:
        raise ConnectionError("connection reset by peer")

    monkeypatch.setattr(kind, "put_file", lost, raising=False)
    with pytest.raises(CodefendError, match="cannot use memory://bucket/out: connection reset by peer"):
        kit.run(corpus, f"{memory}/out")
    monkeypatch.undo()
    assert kit.run(corpus, f"{memory}/out").images == 18


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
    _cut(kit.write_tar(corpus / "bad.tar"))
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
