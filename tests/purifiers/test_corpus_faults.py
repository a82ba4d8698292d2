"""A corpus with faults: damaged images and archives, sources and sinks that cannot be used, full disks."""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
import torch

import corpus_kit as kit
from codefend.core import images
from codefend.purifiers.corpus import CorpusOptions, job, purify_corpus, units
from codefend.purifiers.image_files import FolderOptions
from codefend.types import CodefendError


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
    summary, *lines = kit.manifest(tmp_path / "out", "x.tar")
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


def _damage_a_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2048:2060] = b"\xff" * 12  # tarfile takes a damaged header after the first for the end
    path.write_bytes(data)


def _cut_between_members(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2048])


@pytest.mark.parametrize("damage", [kit.cut, _damage_a_header, _cut_between_members])
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
    kit.cut(kit.write_table(corpus / "data" / "bad.parquet", 40))
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


def test_two_files_with_one_output_are_refused(tmp_path: Path) -> None:
    for folder, name in (
        ("one", "i0.png"),
        ("one", "i1.png"),
        ("two", "i0.png"),
        ("three", "a.jpg"),
        ("three", "a.png"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(kit.image(len(name)))
    options = CorpusOptions(FolderOptions(purifier="bitdepth"))
    with pytest.raises(CodefendError, match=r"i0\.png and another file would both be written to i0\.png"):
        purify_corpus([str(tmp_path / "one"), str(tmp_path / "two")], str(tmp_path / "out"), options)
    with pytest.raises(CodefendError, match=r"a\.png and another file would both be written to a\.png"):
        kit.run(tmp_path / "three", tmp_path / "out", format="png")
    assert not (tmp_path / "out").exists()
    assert kit.run(tmp_path / "three", tmp_path / "out").images == 2


@pytest.mark.parametrize("batch", [1, 4])
def test_a_member_whose_output_is_another_s_fails(tmp_path: Path, batch: int) -> None:
    members = {"a.jpg": kit.image(0), "a.png": kit.image(1), "b.img": kit.image(2), "b.img.png": kit.image(3)}
    source = kit.write_tar(tmp_path / "in" / "x.tar", 0, extra=members)
    report = kit.run(source, tmp_path / "out", format="png", batch=batch)
    assert list(kit.read_tar(tmp_path / "out" / "x.tar")) == ["a.png", "b.img.png"]
    assert (report.images, [name for name, _ in report.failed]) == (2, ["x.tar/a.png", "x.tar/b.img.png"])
    assert "would both be written to a.png" in report.failed[0][1]


def test_an_image_by_content_does_not_replace_another_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in" / "inner").mkdir(parents=True)
    between = [f"page.html.{index:03d}.png" for index in range(100)]  # other groups
    for name in ("page.html", "page.html.png", "page.php", *between):
        (tmp_path / "in" / "inner" / name).write_bytes(kit.image(len(name)))
    report = kit.run(tmp_path / "in", tmp_path / "out", keep_others=True, format="png")
    assert [name for name, _ in report.failed] == ["inner/page.html"]
    files = {path.name for path in (tmp_path / "out" / "inner").iterdir()}
    assert files == {"page.html.png", "page.php.png", *between}


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
