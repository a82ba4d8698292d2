"""Reading and writing images: conversions, one-line errors, complete files."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from codefend.core import images
from codefend.types import CodefendError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 10 % 256, y * 15 % 256, (x + y) * 6 % 256], -1).astype(np.uint8))


def levels(pixels: torch.Tensor) -> np.ndarray:
    return np.asarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + body + struct.pack(">I", zlib.crc32(b"IHDR" + body))
    data = zlib.compress(b"\0")
    idat = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return b"\x89PNG\r\n\x1a\n" + chunk + idat


# --- conversions -----------------------------------------------------------------------------------------------------


def test_png_is_read_exactly() -> None:
    image = gradient()
    loaded = images.load(encoded(image))
    assert loaded.pixels.shape == (3, 16, 24)
    assert loaded.pixels.dtype == torch.float32
    assert loaded.alpha is None
    np.testing.assert_array_equal(levels(loaded.pixels), np.asarray(image))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_by_content_not_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "misnamed.dat"
    path.write_bytes(encoded(gradient(), kind))
    loaded = images.load(path)
    assert (loaded.format, tuple(loaded.pixels.shape)) == (kind, (3, 16, 24))
    assert np.abs(levels(loaded.pixels).astype(int) - np.asarray(gradient()).astype(int)).mean() < 12
    header = images.probe(path)
    assert (header.format, header.width, header.height, header.animated) == (kind, 24, 16, False)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    array = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        loaded = images.load(encoded(Image.fromarray(array), kind))
        expected = torch.tensor([0, 256 / 65535, 32768 / 65535, 1.0]).expand(3, 1, 4)
        torch.testing.assert_close(loaded.pixels, expected)


def test_16_bit_rgb_is_scaled() -> None:
    body = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = zlib.compress(b"\0" + struct.pack(">6H", 0, 32768, 65535, 65535, 257, 0))
    chunks = [(b"IHDR", body), (b"IDAT", data), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    )
    pixels = images.load(png).pixels
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([0, 128 / 255, 1.0]))
    torch.testing.assert_close(pixels[:, 0, 1], torch.tensor([1.0, 1 / 255, 0]))


def test_float_and_32_bit_images_pass_in_range_and_are_refused_beyond() -> None:
    inside = encoded(Image.fromarray(np.array([[0.0, 0.25, 1.0]], dtype=np.float32)), "TIFF")
    torch.testing.assert_close(images.load(inside).pixels[0, 0], torch.tensor([0.0, 0.25, 1.0]))
    for beyond in (np.array([[0.0, 300.0]], np.float32), np.array([[np.nan]], np.float32), np.array([[-5]], np.int32)):
        with pytest.raises(CodefendError, match="convert it to 8 or 16 bits"):
            images.load(encoded(Image.fromarray(beyond), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    image = gradient().convert(mode)
    loaded = images.load(encoded(image, kind))
    np.testing.assert_array_equal(levels(loaded.pixels), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_is_not_inverted() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = images.load(encoded(red, "JPEG", quality=95)).pixels
    assert pixels[0].min() > 0.95
    assert pixels[1:].max() < 0.05


def test_palette_transparency_is_alpha() -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    loaded = images.load(encoded(image, "PNG", transparency=0))
    assert loaded.alpha is not None
    assert loaded.alpha[0, 0].tolist() == [0, 1, 0, 0]
    assert loaded.pixels[:, 0, 0].tolist() == [1, 1, 1]  # white shows through
    np.testing.assert_array_equal(levels(loaded.pixels)[0, 1], [200, 100, 50])


def test_16_bit_grey_with_a_transparent_value() -> None:
    array = np.array([[7, 40000]], dtype=np.uint16)
    loaded = images.load(encoded(Image.fromarray(array), "PNG", transparency=7))
    assert loaded.alpha is not None
    assert loaded.alpha.flatten().tolist() == [0, 1]


def test_alpha_is_composited_on_the_background() -> None:
    half = encoded(Image.new("RGBA", (3, 3), (255, 0, 0, 51)))
    on_white, on_black = images.load(half), images.load(half, background=(0, 0, 0))
    torch.testing.assert_close(on_white.pixels[:, 0, 0], torch.tensor([1.0, 0.8, 0.8]))
    torch.testing.assert_close(on_black.pixels[:, 0, 0], torch.tensor([0.2, 0.0, 0.0]))
    opaque = images.load(encoded(Image.new("RGBA", (3, 3), (9, 8, 7, 255))))
    assert opaque.alpha is None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255  # only the upper left is white
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that stores the image for this tag
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = images.load(encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))).pixels
    assert pixels.shape == (3, 8, 16)
    assert pixels[:, 1, 1].min() > 0.9
    assert max(pixels[:, 1, -2].max(), pixels[:, -2, 1].max(), pixels[:, -2, -2].max()) < 0.1


def test_broken_exif_does_not_refuse_the_image() -> None:
    pixels = images.load(encoded(gradient(), "JPEG", exif=b"Exif\0\0garbage" * 3)).pixels
    assert pixels.shape == (3, 16, 24)


def test_phone_jpeg_with_a_second_image_is_not_an_animation() -> None:
    mpo = encoded(gradient(), "MPO", save_all=True, append_images=[gradient()])
    assert images.load(mpo).format == "JPEG"


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (7, 3)])
def test_tiny_images_are_read(size: tuple[int, int]) -> None:
    assert images.load(encoded(gradient(*size))).pixels.shape == (3, size[1], size[0])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_refused_without_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert images.probe(data).animated
    with pytest.raises(CodefendError, match="--first-frame"):
        images.load(data)
    pixels = images.load(data, first_frame=True).pixels
    assert pixels[0].min() > 0.9
    assert pixels[2].max() < 0.1


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_a_one_line_error(kind: str, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CodefendError, match="damaged, truncated") as caught:
        images.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"", "it is empty"), (b"hello", "not a PNG"), (b"<svg></svg>", "not a PNG"), (b"%PDF-1.7", "not a PNG")],
)
def test_files_that_are_no_images_are_named(data: bytes, text: str) -> None:
    with pytest.raises(CodefendError, match=text):
        images.load(data)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="no such file"):
        images.load(tmp_path / "none.png")
    with pytest.raises(CodefendError, match="is a folder"):
        images.load(tmp_path)
    with pytest.raises(CodefendError, match=r"^no such file: bad\?na\?me.png$"):
        images.load("bad\0na\nme.png")
    with pytest.raises(CodefendError, match=r"xxx\.\.\."):
        images.load("x" * 5000)


def test_pixel_limit_is_checked_before_decoding_and_names_its_flag() -> None:
    bomb = png_header(50_000, 50_000)
    with pytest.raises(
        CodefendError, match=r"2,500,000,000 pixels, over the limit of 64,000,000.*--max-pixels 2500000000"
    ):
        images.load(bomb)
    assert images.probe(bomb).width == 50_000
    with pytest.raises(CodefendError, match="--max-pixels"):
        images.probe(bomb, max_pixels=1000)


@pytest.mark.parametrize("kind", FORMATS)
def test_pixel_limit_can_be_lowered_and_raised(kind: str) -> None:
    data = encoded(gradient(100, 90), kind)
    for limit in (8_999, 100):  # the second is where Pillow's own check of twice the limit speaks first
        with pytest.raises(CodefendError, match=r"9,000 pixels.*--max-pixels 9000"):
            images.load(data, max_pixels=limit)
    assert images.load(data, max_pixels=9_000).pixels.shape == (3, 90, 100)


def test_a_limit_above_pillows_own_is_honoured() -> None:
    before = Image.MAX_IMAGE_PIXELS
    wide = encoded(Image.new("1", (60_000, 3_100)), "PNG")  # 186 million pixels: Pillow alone would refuse
    assert images.probe(wide, max_pixels=200_000_000).width == 60_000
    assert before == Image.MAX_IMAGE_PIXELS


def test_gif_frame_larger_than_its_canvas_is_held_to_the_limit() -> None:
    data = bytearray(encoded(gradient(40, 40), "GIF"))
    data[6:10] = struct.pack("<HH", 2, 2)  # the canvas shrinks, the frame doesn't
    with pytest.raises(CodefendError, match="over the limit"):
        images.load(bytes(data), max_pixels=1_000)


def loads_or_is_refused(data: bytes, max_pixels: int) -> bool:
    """Whether ``data`` is a valid image or a one-line CodefendError; other exceptions propagate."""
    try:
        pixels = images.load(data, max_pixels=max_pixels).pixels
    except CodefendError as error:
        return "\n" not in str(error)
    return pixels.shape[0] == 3 and bool(((pixels >= 0) & (pixels <= 1)).all())


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), st.binary(max_size=200))
def test_random_bytes_behind_a_real_signature_only_raise_user_errors(kind: str, junk: bytes) -> None:
    starts = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF\x40\0\0\0WEBPVP8 ", "BMP": b"BM"}
    start = starts.get(kind, b"GIF89a" if kind == "GIF" else b"II*\0")
    for data in (start + junk, junk):
        assert loads_or_is_refused(data, 10_000)


VALID = {kind: encoded(gradient(12, 10), kind) for kind in FORMATS}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_flipped_bytes_in_a_real_image_only_raise_user_errors(kind: str, data: st.DataObject) -> None:
    mutated = bytearray(VALID[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        mutated[data.draw(st.integers(0, min(len(mutated) - 1, 120)))] = data.draw(st.integers(0, 255))
    assert loads_or_is_refused(bytes(mutated), 100_000)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp", ".PNG", ""])
def test_lossless_formats_round_trip(suffix: str, tmp_path: Path) -> None:
    pixels = torch.rand(3, 9, 13, generator=torch.Generator().manual_seed(0))
    path = tmp_path / f"out{suffix}"
    images.save(path, pixels)
    assert images.is_lossless(images.format_of(path))
    torch.testing.assert_close(images.load(path).pixels, images.quantize8(pixels))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # no temporary file left


def test_jpeg_quality_is_high_by_default(tmp_path: Path) -> None:
    pixels = images.load(encoded(gradient(64, 64))).pixels
    images.save(tmp_path / "out.jpg", pixels)
    images.save(tmp_path / "low.jpg", pixels, quality=5)
    error = (images.load(tmp_path / "out.jpg").pixels - pixels).abs().mean()
    assert error < 0.01
    assert error < (images.load(tmp_path / "low.jpg").pixels - pixels).abs().mean()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_survives_when_the_format_has_it(kind: str) -> None:
    rng = np.random.default_rng(1)
    rgba = rng.integers(0, 256, (6, 7, 4), dtype=np.uint8)
    rgba[0, 0, 3], rgba[0, 1, 3] = 0, 255
    loaded = images.load(encoded(Image.fromarray(rgba)))
    again = images.load(images.encode(loaded.recombine(loaded.pixels), kind))
    assert loaded.alpha is not None
    assert again.alpha is not None
    torch.testing.assert_close(again.alpha, loaded.alpha)
    torch.testing.assert_close(again.pixels, loaded.pixels, atol=0.6 / 255, rtol=0)
    straight = levels(loaded.recombine(loaded.pixels))
    np.testing.assert_array_equal(straight[0, 1, :3], rgba[0, 1, :3])
    np.testing.assert_array_equal(straight[0, 0], [255, 255, 255, 0])  # nothing hides where nothing shows


def test_alpha_is_flattened_on_white_when_the_format_has_none() -> None:
    rgba = torch.tensor([1.0, 0.0, 0.0, 0.5]).view(4, 1, 1).expand(4, 8, 8)
    pixels = images.load(images.encode(rgba, "BMP")).pixels
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([1.0, 128 / 255, 128 / 255]), atol=1 / 255, rtol=0)


def test_metadata_is_dropped_except_the_rgb_profile() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    loaded = images.load(encoded(gradient(), "JPEG", exif=exif, icc_profile=profile))
    assert loaded.icc == profile
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP"):
        data = images.encode(loaded.pixels, kind, icc=loaded.icc)
        assert b"a secret" not in data
        assert images.load(data).icc == (None if kind == "BMP" else profile)
    assert images.load(images.encode(loaded.pixels)).icc is None
    cmyk = profile[:16] + b"CMYK" + profile[20:]
    assert images.load(encoded(gradient(), "PNG", icc_profile=cmyk)).icc is None


def test_unwritable_endings_and_sizes_are_user_errors(tmp_path: Path) -> None:
    for name, why in (("a.gif", "256 colours"), ("a.txt", "not an image suffix"), ("a.mp4", ".png")):
        with pytest.raises(CodefendError, match=why):
            images.save(tmp_path / name, torch.rand(3, 4, 4))
    with pytest.raises(CodefendError, match="known: PNG"):
        images.encode(torch.rand(3, 4, 4), "XYZ")
    with pytest.raises(CodefendError, match="cannot be written as JPEG"):
        images.encode(torch.zeros(3, 1, 65_600), "JPEG")
    (tmp_path / "a.png").write_text("")
    with pytest.raises(CodefendError, match="cannot write"):
        images.save(tmp_path / "a.png" / "b.png", torch.rand(3, 4, 4))
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.png"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jpg"
    images.save(path, torch.rand(3, 4, 4))
    before = path.read_bytes()
    with pytest.raises(CodefendError):
        images.save(path, torch.zeros(3, 1, 65_600))
    assert path.read_bytes() == before


def test_quantize8_is_idempotent_and_within_half_a_level() -> None:
    values = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(2)) * 1.2 - 0.1
    rounded = images.quantize8(values)
    assert (rounded - values.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    torch.testing.assert_close(images.quantize8(rounded), rounded, rtol=0, atol=0)
    torch.testing.assert_close((rounded * 255).round(), rounded * 255, rtol=0, atol=1e-4)


def test_pil_round_trip_and_shape_check() -> None:
    image = gradient()
    np.testing.assert_array_equal(np.asarray(images.to_pil(images.from_pil(image).pixels)), np.asarray(image))
    with pytest.raises(ValueError, match="expected"):
        images.to_pil(torch.rand(1, 3, 4, 4))


# --- data URLs -------------------------------------------------------------------------------------------------------


def test_data_url_round_trip() -> None:
    pixels = images.quantize8(torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(3)))
    url = images.encode_data_url(pixels)
    assert url.startswith("data:image/png;base64,")
    torch.testing.assert_close(images.load(url).pixels, pixels)
    torch.testing.assert_close(images.load(url.replace("image/png", "image/jpeg")).pixels, pixels)


@pytest.mark.parametrize("url", ["data:", "data:image/png;base64", "data:;base64,@@@", "data:;base64,é"])
def test_malformed_data_urls(url: str) -> None:
    with pytest.raises(CodefendError):
        images.load(url)


def test_large_images_are_shrunk_by_area_averaging() -> None:
    pixels = torch.zeros(3, 40, 60)
    pixels[:, ::4, ::4] = 1.0  # one pixel of 16: what an image-scaling attack sets for nearest-neighbour scaling
    shrunk = images.load(images.encode(pixels), max_side=15).pixels
    assert shrunk.shape == (3, 10, 15)
    torch.testing.assert_close(shrunk, torch.full_like(shrunk, 1 / 16), atol=1 / 255, rtol=0)
    assert images.load(images.encode(pixels), max_side=60).pixels.shape == (3, 40, 60)


def test_a_shrunk_image_keeps_alpha_and_16_bits() -> None:
    rgba = torch.cat([torch.ones(3, 8, 8), torch.zeros(1, 8, 8)])
    rgba[3, :, :4] = 1.0
    loaded = images.load(images.encode(rgba), max_side=4)
    assert loaded.alpha is not None
    assert loaded.alpha.shape == (1, 4, 4)
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 9), 40_000, np.uint16)).save(buffer, "PNG")
    torch.testing.assert_close(
        images.load(buffer.getvalue(), max_side=3).pixels, torch.full((3, 2, 3), 40_000 / 65_535)
    )
