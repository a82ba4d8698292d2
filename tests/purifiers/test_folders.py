"""Files and folders are purified whole or not at all, once, and one bad file doesn't stop the rest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from codefend.core import images
from codefend.core.images import from_pil
from codefend.purifiers import load
from codefend.purifiers.base import Purifier
from codefend.purifiers.folders import MANIFEST, FolderOptions, FolderReport, plan, purify_paths
from codefend.types import CodefendError
from pdf_kit import pdf
from purifiers_kit import PlainPurifier


class Noisy(PlainPurifier):
    """Inverts the image and adds seeded noise; counts the calls, and stops before call number ``stop``."""

    name = "noisy"

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.calls, self.stop = 0, stop

    def forward(self, batch: Tensor, *, generator: Generator | None = None) -> Tensor:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return (1 - batch + 0.1 * torch.randn(batch.shape, generator=generator)).clamp(0, 1)


def image_file(path: Path, seed: int = 0, size: tuple[int, int] = (8, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images.save(path, torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a.png", "b.jpg", "deep/c.webp", "deep/er/d.bmp")):
        image_file(tmp_path / "in" / name, seed)
    (tmp_path / "in" / "notes.txt").write_text("not an image, not an error")
    (tmp_path / "in" / ".hidden.png").write_text("")
    return tmp_path / "in"


def run(paths: list[Path], out: Path | str, purifier: Purifier | None = None, **options: object) -> FolderReport:
    return purify_paths(lambda: purifier or Noisy(), paths, out, FolderOptions(**{"purifier": "noisy", **options}))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and MANIFEST not in path.parts
    }


def never() -> Purifier:
    raise AssertionError("the purifier was loaded although there was nothing to do")


# --- one file --------------------------------------------------------------------------------------------------------


def test_one_file_to_one_file(tmp_path: Path) -> None:
    source = image_file(tmp_path / "in.png")
    assert run([source], tmp_path / "out.png") == FolderReport(done=1)
    before, after = images.load(source).pixels, images.load(tmp_path / "out.png").pixels
    assert after.shape == before.shape
    assert ((1 - before) - after).abs().mean() < 0.12
    assert {path.name for path in tmp_path.iterdir()} == {"in.png", "out.png"}  # nothing else is left beside it


def test_the_seed_decides_the_noise(tmp_path: Path) -> None:
    source = image_file(tmp_path / "in.png")
    for name, seed in (("a.png", 0), ("b.png", 0), ("c.png", 1)):
        run([source], tmp_path / name, seed=seed)
    files = contents(tmp_path)
    assert files["a.png"] == files["b.png"] != files["c.png"]


def test_an_output_that_exists_is_refused_before_the_purifier_loads(tmp_path: Path) -> None:
    source = image_file(tmp_path / "in.png")
    (tmp_path / "out.png").write_bytes(b"precious")
    with pytest.raises(CodefendError, match="exists already; use --overwrite"):
        purify_paths(never, [source], tmp_path / "out.png", FolderOptions())
    assert (tmp_path / "out.png").read_bytes() == b"precious"
    run([source], tmp_path / "out.png", overwrite=True)
    assert images.probe(tmp_path / "out.png").format == "PNG"


def test_one_bad_file_is_a_user_error_and_writes_nothing(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    for source, out in (
        (bad, "out.png"),
        (tmp_path / "none.png", "out.png"),
        (image_file(tmp_path / "ok.png"), "out.gif"),
    ):
        with pytest.raises(CodefendError):
            purify_paths(never, [source], tmp_path / out, FolderOptions())
    assert {path.name for path in tmp_path.iterdir()} == {"bad.png", "ok.png"}


@pytest.mark.parametrize(
    ("source", "out"), [("x" * 300 + ".png", "out.png"), ("in.png", "x" * 300 + ".png"), ("in.png", "x" * 300)]
)
def test_file_system_errors_are_user_errors(source: str, out: str, tmp_path: Path) -> None:
    image_file(tmp_path / "in.png")
    with pytest.raises(CodefendError, match="File name too long"):
        purify_paths(never, [tmp_path / source], tmp_path / out, FolderOptions())


def test_alpha_is_kept_or_flattened(tmp_path: Path) -> None:
    alpha = torch.linspace(0.2, 1, 80).view(1, 8, 10)
    images.save(tmp_path / "in.png", torch.cat([torch.rand(3, 8, 10), alpha]))
    run([tmp_path / "in.png"], tmp_path / "transparent.png")
    run([tmp_path / "in.png"], tmp_path / "flat.png", flatten=True)
    transparent, flat = images.load(tmp_path / "transparent.png"), images.load(tmp_path / "flat.png")
    assert transparent.alpha is not None
    torch.testing.assert_close(transparent.alpha, images.quantize8(alpha))
    assert flat.alpha is None


def test_a_purifier_that_runs_out_of_memory_or_changes_the_shape(tmp_path: Path) -> None:
    source = image_file(tmp_path / "in.png")

    class Hungry(PlainPurifier):
        def forward(self, batch: Tensor, *, generator: Generator | None = None) -> Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    class Cropping(PlainPurifier):
        def forward(self, batch: Tensor, *, generator: Generator | None = None) -> Tensor:
            return batch[..., 1:]

    with pytest.raises(CodefendError, match="not enough memory to purify 10x8"):
        run([source], tmp_path / "out.png", Hungry())
    with pytest.raises(RuntimeError, match="changed the shape"):
        run([source], tmp_path / "out.png", Cropping())


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_keeps_its_inner_paths(folder: Path, tmp_path: Path) -> None:
    assert run([folder], tmp_path / "out") == FolderReport(done=4)
    assert set(contents(tmp_path / "out")) == {"a.png", "b.jpg", "deep/c.webp", "deep/er/d.bmp"}
    for name in contents(tmp_path / "out"):
        assert images.probe(tmp_path / "out" / name) == images.probe(folder / name)


def test_the_same_command_has_nothing_left_to_do(folder: Path, tmp_path: Path) -> None:
    run([folder], tmp_path / "out")
    before = contents(tmp_path / "out")
    assert purify_paths(never, [folder], tmp_path / "out", FolderOptions(purifier="noisy")) == FolderReport(skipped=4)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stop", [0, 1])
def test_an_interrupted_run_resumes_and_ends_the_same(folder: Path, tmp_path: Path, batch: int, stop: int) -> None:
    run([folder], tmp_path / "whole", batch=batch)
    with pytest.raises(KeyboardInterrupt):
        run([folder], tmp_path / "parts", Noisy(stop), batch=batch)
    assert len(contents(tmp_path / "parts")) == stop * batch
    again = run([folder], tmp_path / "parts", batch=batch)
    assert again == FolderReport(done=4 - stop * batch, skipped=stop * batch)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_kill_between_the_row_and_the_file_is_repaired(folder: Path, tmp_path: Path) -> None:
    run([folder], tmp_path / "out")
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "deep" / "c.webp").unlink()  # promised by its row, never written
    (tmp_path / "out" / "deep" / ".c.webp.part").write_bytes(b"half")
    assert run([folder], tmp_path / "out") == FolderReport(done=1, skipped=3)
    assert contents(tmp_path / "out") == whole


def test_a_changed_source_is_purified_again(folder: Path, tmp_path: Path) -> None:
    run([folder], tmp_path / "out")
    image_file(folder / "a.png", seed=99, size=(9, 9))
    assert run([folder], tmp_path / "out") == FolderReport(done=1, skipped=3)
    assert images.probe(tmp_path / "out" / "a.png").height == 9


def test_files_of_others_in_the_output_folder_are_refused_or_overwritten(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "out" / "deep" / "c.webp"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"precious")
    with pytest.raises(CodefendError, match=r"c\.webp exists already; use --overwrite"):
        purify_paths(never, [folder], tmp_path / "out", FolderOptions())
    assert contents(tmp_path / "out") == {"deep/c.webp": b"precious"}
    shutil.rmtree(tmp_path / "out" / MANIFEST)
    assert run([folder], tmp_path / "out", overwrite=True).done == 4
    precious.write_bytes(b"edited since")  # an output that the user changed is the user's again
    with pytest.raises(CodefendError, match="exists already"):
        run([folder], tmp_path / "out")


def test_two_configs_never_mix_in_one_folder(folder: Path, tmp_path: Path) -> None:
    run([folder], tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(CodefendError, match=r"seed was 0, now 1"):
        run([folder], tmp_path / "out", seed=1)
    assert contents(tmp_path / "out") == before
    assert run([folder], tmp_path / "out", seed=1, overwrite=True) == FolderReport(done=4)
    after = contents(tmp_path / "out")
    assert all(after[name] != before[name] for name in before)
    assert json.loads((tmp_path / "out" / MANIFEST / "config.json").read_text())["seed"] == 1


def test_one_bad_file_does_not_stop_the_rest_and_is_tried_again(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    (folder / "link.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "phone.heic").write_bytes(b"ftypheic")  # a format that is not read, which nobody should miss unnoticed
    report = run([folder], tmp_path / "out", batch=2)
    assert (report.done, [name for name, _ in report.failed]) == (4, ["broken.png", "link.png", "phone.heic"])
    assert "damaged" in report.failed[0][1]
    (folder / "link.png").unlink()
    image_file(folder / "broken.png")
    assert run([folder], tmp_path / "out", batch=2).done == 1


def test_skipped_folders_are_failures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_file(tmp_path / "elsewhere" / "e.png")
    (folder / "album").symlink_to(tmp_path / "elsewhere")
    scan = os.scandir

    def guarded(path: str | int) -> Any:
        if not isinstance(path, int) and Path(path).name == "er":  # a descriptor: temporary folders being removed
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    report = run([folder], tmp_path / "out")
    assert (report.done, [name for name, _ in report.failed]) == (
        3,
        [str(folder / "album"), str(folder / "deep" / "er")],
    )
    assert "name the folder itself" in report.failed[0][1]
    assert "Permission denied" in report.failed[1][1]
    again = purify_paths(never, [folder], tmp_path / "out", FolderOptions(purifier="noisy"))
    assert (again.skipped, len(again.failed)) == (3, 2), "and are so again when all else is done"
    with pytest.raises(CodefendError, match="Permission denied"):
        purify_paths(never, [folder / "deep" / "er"], tmp_path / "new", FolderOptions())


def test_a_link_in_a_circle_and_a_name_too_long_for_its_new_ending_do_not_stop_the_rest(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / f"{'g' * 248}.gif").write_bytes((folder / "a.png").read_bytes())
    report = run([folder], tmp_path / "out")
    assert (report.done, [name[:4] for name, _ in report.failed]) == (4, ["gggg", "loop"])


def test_a_raised_limit_resumes_in_the_same_folder(folder: Path, tmp_path: Path) -> None:
    image_file(folder / "large.png", size=(40, 50))
    report = run([folder], tmp_path / "out", max_pixels=1000)
    assert report.done == 4
    assert report.failed[0][1].endswith("raise it with --max-pixels 2000")
    assert run([folder], tmp_path / "out", max_pixels=2000) == FolderReport(done=1, skipped=4)


def test_batches_group_images_of_one_size(tmp_path: Path) -> None:
    for seed, size in enumerate([(8, 8), (8, 9), (8, 8), (8, 8)]):
        image_file(tmp_path / "in" / f"{seed}.png", seed, size)
    purifier = Noisy()
    assert run([tmp_path / "in"], tmp_path / "out", purifier, batch=4).done == 4
    assert purifier.calls == 2
    for seed in range(4):
        before, after = (images.load(tmp_path / where / f"{seed}.png").pixels for where in ("in", "out"))
        assert ((1 - before) - after).abs().mean() < 0.12


def test_the_output_folder_inside_the_input_is_not_purified_again(folder: Path) -> None:
    assert run([folder], folder / "out").done == 4
    assert run([folder], folder / "out") == FolderReport(skipped=4)


def test_files_of_several_places_go_into_one_folder(tmp_path: Path) -> None:
    one, two = image_file(tmp_path / "x" / "one.png"), image_file(tmp_path / "y" / "two.jpg")
    run([one, two], tmp_path / "out.d")
    assert set(contents(tmp_path / "out.d")) == {"one.png", "two.jpg"}
    run([one], f"{tmp_path}/new.d/")
    assert set(contents(tmp_path / "new.d")) == {"one.png"}


# --- plans -----------------------------------------------------------------------------------------------------------


def test_gifs_become_png_beside_their_own_name_and_endings_can_be_forced(tmp_path: Path) -> None:
    for name in ("a.gif", "b.jpg", "c.png"):
        (tmp_path / name).write_bytes(b"")

    def targets(ending: str | None) -> list[str]:
        return [job.target.name for job in plan([tmp_path], tmp_path / "out", ending=ending)]

    assert targets(None) == ["a.gif.png", "b.jpg", "c.png"]
    assert targets("png") == ["a.png", "b.png", "c.png"]
    with pytest.raises(CodefendError, match=r"use \.png"):
        targets("gif")


def _twice(tmp_path: Path) -> tuple[list[Path], Path]:
    return [image_file(tmp_path / "x" / "a.png"), image_file(tmp_path / "y" / "a.png")], tmp_path / "out"


def _onto_itself(tmp_path: Path) -> tuple[list[Path], Path]:
    return [image_file(tmp_path / "x" / "a.png").parent], tmp_path / "x"


def _empty(tmp_path: Path) -> tuple[list[Path], Path]:
    (tmp_path / "empty").mkdir()
    return [tmp_path / "empty"], tmp_path / "out"


def _onto_a_file(tmp_path: Path) -> tuple[list[Path], Path]:
    return [image_file(tmp_path / "x" / "a.png").parent], image_file(tmp_path / "out.png")


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (_twice, "would both be written"),
        (_onto_itself, "its own output"),
        (_empty, "no images in"),
        (_onto_a_file, "name a folder"),
    ],
)
def test_plans_that_cannot_work(build: Callable[[Path], tuple[list[Path], Path]], text: str, tmp_path: Path) -> None:
    sources, out = build(tmp_path)
    with pytest.raises(CodefendError, match=text):
        purify_paths(never, sources, out, FolderOptions())


def test_large_images_are_shrunk_first_and_stay_so(tmp_path: Path) -> None:
    source, small = image_file(tmp_path / "a" / "large.png", size=(40, 20)), image_file(tmp_path / "a" / "small.png")
    run([source.parent], tmp_path / "out", max_side=16)
    assert images.load(tmp_path / "out" / "large.png").pixels.shape == (3, 16, 8)
    assert images.load(tmp_path / "out" / "small.png").pixels.shape == images.load(small).pixels.shape
    with pytest.raises(CodefendError, match="max_side"):
        run([source.parent], tmp_path / "out", max_side=8)


def test_files_are_shrunk_as_the_gateway_shrinks_them(tmp_path: Path) -> None:
    source = image_file(tmp_path / "large.png", size=(40, 60))
    purify_paths(lambda: load("identity"), [source], tmp_path / "out.png", FolderOptions("identity", max_side=15))
    expected = images.quantize8(images.load(source, max_side=15).pixels)
    assert torch.equal(images.load(tmp_path / "out.png").pixels, expected)
    assert torch.equal(from_pil(load("identity").purify(Image.open(source), max_side=15)).pixels, expected)


def test_the_pages_of_a_pdf_are_purified_once(tmp_path: Path) -> None:
    source = tmp_path / "report.pdf"
    source.write_bytes(pdf(0.25, 0.75))
    options = FolderOptions("identity", max_side=64)
    first = purify_paths(lambda: load("identity"), [source], tmp_path / "out", options)
    again = purify_paths(never, [source], tmp_path / "out", options)
    pages = [images.load(tmp_path / "out" / f"report-00{number}.png").pixels for number in (1, 2)]
    assert (first.done, again.skipped) == (2, 2)
    assert [page.shape for page in pages] == [(3, 32, 64)] * 2
    assert [round(float(page.mean()), 2) for page in pages] == [0.25, 0.75]
    with pytest.raises(CodefendError, match="has 2 pages; name a folder"):
        purify_paths(never, [source], tmp_path / "out.png", options)
    source.write_bytes(b"%PDF-1.7 broken")
    with pytest.raises(CodefendError, match=r"report\.pdf: the PDF is damaged"):
        purify_paths(never, [source], tmp_path / "out", options)
