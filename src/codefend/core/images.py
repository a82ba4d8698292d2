"""Read and write images: files, bytes and data URLs <-> float32 ``[3, H, W]``, RGB, in ``[0, 1]``.

Only this module and `animations` import Pillow. The format is detected from the content, never from the name, and
the size is read from the header before any pixel is decoded. Every fault raises a ``CodefendError`` of one line.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from codefend.core.files import write_atomic
from codefend.core.signatures import HEAD, format_of_head
from codefend.types import CodefendError

MAX_PIXELS = 64_000_000
WHITE = (255, 255, 255)


class _Format(NamedTuple):
    decoder: type[ImageFile.ImageFile]  # Pillow's own lookup opens a phone's two-image JPEG (MPO) as an animation
    suffixes: tuple[str, ...]
    writable: bool = True
    alpha: bool = False
    lossless: bool = False


_FORMATS = {
    "PNG": _Format(PngImageFile, (".png",), alpha=True, lossless=True),
    "JPEG": _Format(JpegImageFile, (".jpg", ".jpeg", ".jpe", ".jfif")),
    "WEBP": _Format(WebPImageFile, (".webp",), alpha=True),
    "BMP": _Format(BmpImageFile, (".bmp",), lossless=True),
    "GIF": _Format(GifImageFile, (".gif",), writable=False),
    "TIFF": _Format(TiffImageFile, (".tif", ".tiff"), alpha=True, lossless=True),
}
_SUFFIXES = {suffix: kind for kind, format in _FORMATS.items() for suffix in format.suffixes}
READABLE = frozenset(_SUFFIXES)  # file name suffixes that a folder job reads
UNSUPPORTED = frozenset({".avif", ".heic", ".heif", ".jp2", ".jxl"})  # of images that no decoder here reads
_WRITABLE = tuple(kind for kind, format in _FORMATS.items() if format.writable)

_PILLOW = threading.Lock()  # Pillow's pixel limit and Python's warning filters are global to the process

Source = str | Path | bytes


@dataclass(frozen=True)
class Probe:
    """The header of an image, read without decoding. ``width`` and ``height`` are before EXIF orientation."""

    format: str
    width: int
    height: int
    animated: bool


@dataclass(frozen=True)
class LoadedImage:
    """An image composited on ``background``, with the alpha, format and colour profile needed to write it back."""

    pixels: Tensor  # [3, H, W] float32 in [0, 1]
    alpha: Tensor | None = None  # [1, H, W] in [0, 1]; None when opaque
    format: str = "PNG"
    icc: bytes | None = None  # the RGB colour profile of the pixels, if they have one
    background: tuple[int, int, int] = WHITE

    def recombine(self, pixels: Tensor) -> Tensor:
        """Give ``pixels`` ``[3, H, W]`` this image's alpha: ``[4, H, W]``, or unchanged when it was opaque.

        Composited on ``background``, the result equals ``pixels``. Fully transparent pixels take the background's
        colour, so that a viewer that ignores alpha shows no hidden content.
        """
        if self.alpha is None:
            return pixels
        alpha, behind = self.alpha.to(pixels), _colour(self.background).to(pixels)
        straight = behind + (pixels - behind) / alpha.clamp_min(1 / 65535)
        return torch.cat([torch.where(alpha > 0, straight, behind).clamp(0, 1), alpha])


# --- reading ---------------------------------------------------------------------------------------------------------


def load(
    source: Source,
    *,
    max_pixels: int = MAX_PIXELS,
    first_frame: bool = False,
    background: tuple[int, int, int] = WHITE,
    max_side: int = 0,
) -> LoadedImage:
    """Read a file, the bytes of one, or a data URL. EXIF orientation is applied, 16 bits are scaled, alpha composited.

    With ``max_side`` (pixels; 0: never) a larger image is shrunk by area averaging, in which every pixel of the file
    counts equally: an image-scaling attack (Xiao et al., USENIX Security 2019) finds no pixels that decide alone.

    Raises CodefendError when the source is missing, not an image of a known format, damaged, over ``max_pixels``, or
    animated while ``first_frame`` is false.
    """
    with _opened(source) as (stream, name), decoding(name, max_pixels):
        image, header = open_header(stream, name)
        _check_size(image, name, max_pixels)
        if header.animated and not first_frame:
            raise CodefendError(f"{name} is animated or has several pages; use the first one with --first-frame")
        image.load()
        _check_size(image, name, max_pixels)  # again: a GIF's frame can be larger than the canvas in its header
        return _from_decoded(_upright(image, in_place=True), name, header.format, background, max_side)


def probe(source: Source, *, max_pixels: int | None = None) -> Probe:
    """Read format, size and animation from the header alone. Raises CodefendError as ``load`` does."""
    with _opened(source) as (stream, name), decoding(name, max_pixels):
        image, header = open_header(stream, name)
        if max_pixels is not None:
            _check_size(image, name, max_pixels)
        return header


def is_pil(image: object) -> bool:
    """Whether ``image`` is a Pillow image."""
    return isinstance(image, Image.Image)


def from_pil(image: Image.Image, *, background: tuple[int, int, int] = WHITE, max_side: int = 0) -> LoadedImage:
    """Convert a PIL image of any mode, EXIF orientation applied; ``max_side`` as in `load`.

    Raises CodefendError when it cannot be converted.
    """
    with decoding("the image", None):
        return _from_decoded(_upright(image), "the image", image.format or "PNG", background, max_side)


@contextmanager
def _opened(source: Source) -> Iterator[tuple[IO[bytes], str]]:
    if isinstance(source, bytes):
        yield io.BytesIO(source), "the image"
        return
    if isinstance(source, str) and source[:5].lower() == "data:":
        yield io.BytesIO(decode_data_url(source)), "the data URL"
        return
    path, name = Path(source), _printable(source)
    try:
        if path.is_dir():
            raise CodefendError(f"{name} is a folder; name an image file")
        if not path.exists():
            raise CodefendError(f"no such file: {name}")
        if not path.is_file():
            raise CodefendError(f"{name} is not a regular file")
        stream = path.open("rb")
    except CodefendError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise CodefendError(f"cannot open {name}: {getattr(error, 'strerror', None) or error}") from error
    with stream:
        yield stream, name


@contextmanager
def decoding(name: str, max_pixels: int | None) -> Iterator[None]:
    """Apply our pixel limit to Pillow, silence its warnings, and turn every decoder exception into a CodefendError."""
    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about size and EXIF: both are handled here
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            yield
        except CodefendError:
            raise
        except Image.DecompressionBombError as error:
            claimed = re.search(r"\d+", str(error))  # Pillow's message starts with the size
            raise CodefendError(_too_many(name, int(claimed[0]) if claimed else 0, max_pixels or 0)) from error
        except Exception as error:  # decoders raise nearly every type on damaged data
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise CodefendError(f"{name} is damaged, truncated or of an unsupported kind ({reason})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = before


def open_header(stream: IO[bytes], name: str) -> tuple[ImageFile.ImageFile, Probe]:
    """Open without decoding pixels, inside `decoding`. Raises CodefendError."""
    head = stream.read(HEAD)
    stream.seek(0)
    kind = format_of_head(head)
    if kind is None:
        problem = "not a PNG, JPEG, WebP, BMP, GIF or TIFF image" if head else "empty"
        raise CodefendError(f"cannot read {name}: it is {problem}")
    image = _FORMATS[kind].decoder(stream)
    width, height = image.size
    if width < 1 or height < 1:
        raise CodefendError(f"{name} is damaged: it claims {width}x{height} pixels")
    return image, Probe(kind, width, height, bool(getattr(image, "is_animated", False)))


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise CodefendError(_too_many(name, image.width * image.height, max_pixels))


def _upright(image: Image.Image, *, in_place: bool = False) -> Image.Image:
    try:
        if not in_place:
            return ImageOps.exif_transpose(image)
        ImageOps.exif_transpose(image, in_place=True)  # a copy of 64 megapixels takes 256 MB
        return image
    except Exception:  # with broken EXIF, viewers show the image as stored
        return image


# --- modes -> tensors ------------------------------------------------------------------------------------------------


def _from_decoded(
    image: Image.Image, name: str, kind: str, background: tuple[int, int, int], max_side: int = 0
) -> LoadedImage:
    icc = _rgb_profile(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        pixels, alpha = _deep_grey(image, name)
        pixels, alpha = _shrink_tensor(pixels, max_side), alpha if alpha is None else _shrink_tensor(alpha, max_side)
    else:
        pixels, alpha = _eight_bits(image, max_side)
    if alpha is not None and bool((alpha == 1).all()):
        alpha = None
    if alpha is not None:
        pixels = pixels * alpha + _colour(background) * (1 - alpha)
    return LoadedImage(pixels.contiguous(), alpha, kind, icc, background)


def _shrunk_size(width: int, height: int, max_side: int) -> tuple[int, int] | None:
    longest = max(width, height)
    if not max_side or longest <= max_side:
        return None
    return max(1, round(width * max_side / longest)), max(1, round(height * max_side / longest))


def _shrink_tensor(values: Tensor, max_side: int) -> Tensor:
    size = _shrunk_size(values.shape[2], values.shape[1], max_side)
    return values if size is None else F.interpolate(values[None], size[::-1], mode="area")[0]


def _eight_bits(image: Image.Image, max_side: int) -> tuple[Tensor, Tensor | None]:
    transparent = image.has_transparency_data
    mode = "RGBA" if transparent else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    size = _shrunk_size(image.width, image.height, max_side)
    if size is not None:
        image = image.resize(size, Image.Resampling.BOX)  # weights colours by their alpha
    array = np.array(image)
    planes = torch.from_numpy(array).permute(2, 0, 1).contiguous()  # permuted while a value takes one byte, not four
    values = planes.to(torch.float32).div_(255)
    return (values[:3], values[3:]) if transparent else (values, None)


def _deep_grey(image: Image.Image, name: str) -> tuple[Tensor, Tensor | None]:
    """16-bit and float grey: scaled to [0, 1] by the depth that the file declares, never clipped to 8 bits."""
    array = np.array(image)
    if image.mode == "F":
        top = 1.0
    else:
        declared = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # TIFF BitsPerSample: 12-bit scans arrive as 16
        top = float(2 ** min(int(declared), 16) - 1)
    values = torch.from_numpy(array.astype(np.float32)) / top
    if not bool(((values >= 0) & (values <= 1)).all()):  # also false for nan
        raise CodefendError(
            f"{name} holds values of more than 16 bits (mode {image.mode}); convert it to 8 or 16 bits first"
        )
    keyed = image.info.get("transparency")
    alpha = None if not isinstance(keyed, int) else torch.from_numpy((array != keyed).astype(np.float32))[None]
    return values[None].expand(3, -1, -1), alpha


def _rgb_profile(image: Image.Image) -> bytes | None:
    # A CMYK or grey profile would be wrong for the RGB pixels that we write. Bytes 16-20 name the space (ICC.1, 7.2.6).
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) and profile[16:20] == b"RGB " else None


def _colour(rgb: tuple[int, int, int]) -> Tensor:
    return torch.tensor(rgb, dtype=torch.float32).view(3, 1, 1) / 255


# --- writing ---------------------------------------------------------------------------------------------------------


def quantize8(images: Tensor) -> Tensor:
    """Round ``[..., H, W]`` in ``[0, 1]`` to the 256 levels that an 8-bit file can hold."""
    return (images.clamp(0, 1) * 255).round() / 255


def to_pil(pixels: Tensor) -> Image.Image:
    """Turn ``[3, H, W]`` or ``[4, H, W]`` in ``[0, 1]`` into an 8-bit RGB or RGBA image."""
    if pixels.ndim != 3 or pixels.shape[0] not in (3, 4):
        raise ValueError(f"expected [3, H, W] or [4, H, W], got {tuple(pixels.shape)}")
    levels = pixels.detach().to("cpu", torch.float32).clamp(0, 1).mul_(255).round_().to(torch.uint8)
    return Image.merge("RGBA"[: len(levels)], [Image.fromarray(plane.numpy()) for plane in levels])


def format_of(path: str | Path) -> str:
    """The image format of a file name, PNG without a suffix. Raises CodefendError for one that cannot be written."""
    suffix = Path(path).suffix.lower()
    kind = _SUFFIXES.get(suffix) if suffix else "PNG"
    if kind in _WRITABLE:
        return kind
    reason = "holds only 256 colours" if kind == "GIF" else "is not an image suffix"
    raise CodefendError(f"cannot write {_printable(path)}: {suffix} {reason}; use .png, .jpg, .webp, .bmp or .tiff")


def is_lossless(kind: str, *, quality: int | None = None) -> bool:
    """Whether ``encode`` with these settings preserves every 8-bit pixel."""
    return _FORMATS[kind].lossless or (kind == "WEBP" and quality is None)


def encode(
    pixels: Tensor, kind: str = "PNG", *, quality: int | None = None, subsampling: int = 0, icc: bytes | None = None
) -> bytes:
    """Encode ``[3, H, W]`` or ``[4, H, W]`` in ``[0, 1]``, never resized. Metadata other than ``icc`` is dropped.

    ``quality`` 1-100 is for JPEG (95 when None) and WebP (lossless when None); ``subsampling`` of JPEG's chroma is 0, 1
    or 2: none, along the rows, both ways. Alpha is composited on white where the format has none. Raises CodefendError
    when the format is unknown or cannot hold an image of this size.
    """
    if kind not in _WRITABLE:
        raise CodefendError(f"cannot write {kind}; known: {', '.join(_WRITABLE)}")
    if pixels.shape[0] == 4 and not _FORMATS[kind].alpha:
        pixels = pixels[:3] * pixels[3:] + _colour(WHITE).to(pixels) * (1 - pixels[3:])
    options: dict[str, Any] = {} if icc is None or kind == "BMP" else {"icc_profile": icc}
    if kind == "JPEG":
        options |= {"quality": quality or 95, "subsampling": subsampling}
    elif kind == "PNG":
        options |= {"compress_level": 4}  # of photographs as small as by zlib's default, 6, in a sixth less time
    elif kind == "WEBP":
        options |= {"lossless": True, "exact": True} if quality is None else {"quality": quality, "exact": True}
    buffer = io.BytesIO()
    try:
        to_pil(pixels).save(buffer, format=kind, **options)
    except OSError as error:  # JPEG allows 65,500 pixels a side, WebP 16,383
        size = f"{pixels.shape[2]}x{pixels.shape[1]}"
        raise CodefendError(f"an image of {size} cannot be written as {kind} ({error}); use PNG") from error
    return buffer.getvalue()


def save(path: str | Path, pixels: Tensor, *, quality: int | None = None, icc: bytes | None = None) -> None:
    """Write an image atomically, in the format of the file name's suffix; an existing file is replaced.

    Raises CodefendError for an unknown suffix or when the path cannot be written.
    """
    write_atomic(path, encode(pixels, format_of(path), quality=quality, icc=icc))


# --- data URLs -------------------------------------------------------------------------------------------------------


def decode_data_url(url: str) -> bytes:
    """Return the bytes of a ``data:`` URL (RFC 2397), whatever its media type. Raises CodefendError when malformed."""
    head, comma, body = url.partition(",")
    if head[:5].lower() != "data:" or not comma:
        raise CodefendError("not a data URL: expected data:image/...;base64,...")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise CodefendError("the data URL is not valid base64") from error


def encode_data_url(pixels: Tensor, kind: str = "PNG", *, quality: int | None = None) -> str:
    """Encode an image as ``data:image/...;base64,...``. Raises CodefendError as ``encode`` does."""
    body = base64.b64encode(encode(pixels, kind, quality=quality)).decode("ascii")
    return f"data:image/{kind.lower()};base64,{body}"


def _printable(source: str | Path) -> str:
    text = "".join(c if c.isprintable() else "?" for c in str(source))  # a name may hold newlines or undecodable bytes
    return text if len(text) <= 200 else f"{text[:200]}..."


def _too_many(name: str, count: int, limit: int) -> str:
    return f"{name} has {count:,} pixels, over the limit of {limit:,}; raise it with --max-pixels {count}"
