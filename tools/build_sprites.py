"""Make src/codefend/data/sprites_{fluent,noto}.npz from the emoji packages.

    python tools/build_sprites.py FLUENT_ASSETS_DIR NOTO_TTF

FLUENT_ASSETS_DIR: `assets` of npm `@lobehub/fluent-emoji-3d` 1.1.0 (MIT); NOTO_TTF: NotoColorEmoji.ttf of Debian's
`fonts-noto-color-emoji` (images Apache-2.0, font OFL). Needs Pillow with FreeType.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from codefend.core.assets import PACKAGE
from codefend.tasks.objects import THINGS

DATA = PACKAGE / "data"

SIZE = 96


def fit(image: Image.Image) -> np.ndarray:
    """Crop to the drawing, fit into SIZE x SIZE, premultiply; uint8 [4, SIZE, SIZE]."""
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    pixels = np.asarray(image, dtype=np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    side = max(image.size)
    square = np.zeros((side, side, 4), np.float32)
    top, left = (side - image.height) // 2, (side - image.width) // 2
    square[top : top + image.height, left : left + image.width] = pixels
    channels = [Image.fromarray(square[..., c]).resize((SIZE, SIZE), Image.Resampling.LANCZOS) for c in range(4)]
    return np.stack([np.asarray(c) for c in channels]).round().clip(0, 255).astype(np.uint8)


def fluent(folder: Path, code: str) -> Image.Image:
    for name in (code, f"{code}-fe0f"):
        if (folder / f"{name}.webp").exists():
            return Image.open(folder / f"{name}.webp").convert("RGBA")
    raise SystemExit(f"no drawing of {code} in {folder}")


def noto(font: ImageFont.FreeTypeFont, code: str) -> Image.Image:
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((8, 8), chr(int(code, 16)), font=font, embedded_color=True)
    return image


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    font = ImageFont.truetype(sys.argv[2], 109)  # the one size of Noto's bitmaps
    DATA.mkdir(exist_ok=True)
    for style, read in (("fluent", lambda c: fluent(Path(sys.argv[1]), c)), ("noto", lambda c: noto(font, c))):
        rgba = np.stack([fit(read(thing.code)) for thing in THINGS])
        np.savez_compressed(DATA / f"sprites_{style}.npz", rgba=rgba)


if __name__ == "__main__":
    main()
