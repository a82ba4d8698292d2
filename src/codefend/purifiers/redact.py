"""Fill text in images from its surroundings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from codefend.purifiers import instructions, ocr
from codefend.purifiers.base import Purifier
from codefend.purifiers.ocr import Point, TextRegion
from codefend.types import CodefendError

_MARGIN = 0.25  # around a line, as a share of its height
_PLATE_TOLERANCE = 0.06  # of a pixel's colours to the plate's, in [0, 1]
_PAGE_SHARE = 0.5  # of a row above or below the lines: more of the plate's colour there is a page's background
_PLAIN = 0.4  # of a line's pixels of one colour: less is a line on a scene
_STROKE = 0.35  # of a line's height: more than any stroke is wide
_FAINTEST = 0.02  # contrast of a stroke to what surrounds it, in [0, 1]
_FAINT = 0.5  # the same: text of less than this over much of an image is flattened, not filled
_MUCH = 0.15  # of an image under lines of text
_THIN = 0.2  # of a line's height: letters without a plate have strokes as wide as this at most
MOST_FILLED = 0.5  # of an image: what is filled from less than as much again is a guess


@dataclass(frozen=True)
class RedactOptions:
    scope: str = "instructions"  # or "all": every text

    def __post_init__(self) -> None:
        if self.scope not in ("instructions", "all"):
            raise CodefendError(f"redact scope must be instructions or all, not {self.scope!r}")


class Redact(Purifier):
    """Fill the text that reads like an instruction, or all text, from its surroundings; needs the `ocr` extra."""

    name = "redact"
    differentiable = False
    tiled = False  # a line of text may cross tiles
    options_class = RedactOptions
    options: RedactOptions

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        scope = self.options.scope
        return torch.stack([redact(image, select(read(image), scope)) for image in images.detach()])


def read(image: Tensor) -> list[TextRegion]:
    """Lines of text in ``[3, H, W]``, marked by `instructions.mark`. Raises CodefendError without the `ocr` extra."""
    return instructions.mark(ocr.read(image))


def select(regions: Sequence[TextRegion], scope: str) -> list[TextRegion]:
    """The regions that ``scope``, "instructions" or "all", names."""
    return [region for region in regions if scope == "all" or region.instruction]


def redact(image: Tensor, regions: Sequence[TextRegion]) -> Tensor:
    """``[3, H, W]`` with the regions filled from their surroundings: plates whole, other lines by their strokes.

    Faint text over much of the image is flattened instead (`flatten`). Where OCR still reads something after that,
    lines are filled whole. An image of which that would be more than `MOST_FILLED` returns as it is: the same tensor.
    """
    flat, regions = flatten(image, regions)
    mask = text_mask(flat, regions)
    if mask.float().mean() > MOST_FILLED:
        return image
    if not mask.any():
        return flat
    filled = inpaint(flat, mask)
    left = _still_legible(filled, regions)
    mask = text_mask(flat, regions, whole=left)
    if mask.float().mean() > MOST_FILLED:
        return image
    return inpaint(flat, mask) if left else filled


def flatten(image: Tensor, regions: Sequence[TextRegion]) -> tuple[Tensor, Sequence[TextRegion]]:
    """``[3, H, W]`` without strokes as faint and thin as those of the regions, and the regions that are still legible.

    OCR misses some rows of text that covers an image, and to fill the others would take more of the scene than the
    text does. So the whole image is opened, or closed for dark letters (Serra 1982), with the smallest square after
    which OCR reads less than half of the lines; no pixel changes by more than the letters' contrast. The image and all
    regions return as they are where the text is not faint, covers little of the image, or has strokes too wide.
    """
    inside = torch.zeros(image.shape[-2:], dtype=torch.bool, device=image.device)
    for region in regions:
        _cover(inside, region, 0.0)
    if inside.float().mean() < _MUCH:
        return image, regions
    for size in range(3, max(_odd(region.height * _THIN) for region in regions) + 1, 2):
        light, dark = _relief(image, size)
        sign, relief = max((-1, light), (1, dark), key=lambda pair: float(pair[1][:, inside].sum()))
        contrast = float(relief.mean(0)[inside].quantile(0.95))
        flat = image + sign * relief.clamp(max=contrast)
        if contrast <= _FAINT and 2 * len(left := _still_legible(flat, regions)) < len(regions):
            return flat, left
    return image, regions


def _still_legible(image: Tensor, regions: Sequence[TextRegion]) -> list[TextRegion]:
    """The regions in which OCR reads something."""
    centres = [line.centre for line in ocr.read(image)]
    return [region for region in regions if any(_contains(region, centre) for centre in centres)]


def text_mask(image: Tensor, regions: Sequence[TextRegion], whole: Sequence[TextRegion] = ()) -> Tensor:
    """Which pixels ``[H, W]`` belong to the regions: plates and the lines on them, lines of ``whole``, and strokes."""
    boxes = {region: _inside(image, region, region.height * _MARGIN) for region in regions}
    plain = [region for region in regions if _is_plain(image, region)]
    under, plates = torch.zeros(2, *image.shape[-2:], dtype=torch.bool, device=image.device)
    for region in plain:
        under |= boxes[region]
    for block in _blocks(plain, len(under)):
        plates |= _plate(image, under, *block)
    mask: Tensor = plates.clone()
    for region, box in boxes.items():
        mask |= box if region in whole or (plates & box).any() else _strokes(image, region, box)
    return mask


def _inside(image: Tensor, region: TextRegion, margin: float = 0.0) -> Tensor:
    mask = torch.zeros(image.shape[-2:], dtype=torch.bool, device=image.device)
    _cover(mask, region, margin)
    return mask


def _is_plain(image: Tensor, region: TextRegion) -> bool:
    """Whether the line stands on one colour; a line of which no pixel is in the image does."""
    pixels = image[:, _inside(image, region)]
    if not pixels.numel():
        return True
    colour = pixels.median(1).values
    return float(((pixels - colour[:, None]).abs().amax(0) <= _PLATE_TOLERANCE / 2).float().mean()) >= _PLAIN


def _strokes(image: Tensor, region: TextRegion, inside: Tensor) -> Tensor:
    """Pixels ``[H, W]`` ``inside`` the line that are lighter, or darker, than anything wider than a stroke around them.

    The polarity is that which differs more; a pixel of margin.
    """
    if not inside.any():
        return inside
    reliefs = _relief(image.mean(0, keepdim=True), _odd(region.height * _STROKE))
    contrast = max((relief[0] for relief in reliefs), key=lambda values: float(values[inside].sum()))
    strokes = inside & (contrast > max(float(contrast[inside].quantile(0.9)) / 2, _FAINTEST))
    return inside & (_dilate(strokes[None].to(image.dtype), 3)[0] > 0)


def _odd(size: float) -> int:
    """The side of a square with a middle: odd, near ``size``, at least 3."""
    return max(2 * round(size / 2) + 1, 3)


def _relief(image: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How much lighter, and how much darker, values of ``[C, H, W]`` are than anything as wide as ``size`` around them.

    The differences to grey opening and closing with a square (Serra 1982).
    """
    eroded, dilated = -_dilate(-image, size), _dilate(image, size)
    return image - _dilate(eroded, size), -_dilate(-dilated, size) - image


def _dilate(values: Tensor, size: int) -> Tensor:
    return F.max_pool2d(values[None], size, stride=1, padding=size // 2)[0]


def _contains(region: TextRegion, point: Point) -> bool:
    (left, right), (top, bottom) = ((min(values), max(values)) for values in zip(*region.box, strict=True))
    return left <= point[0] <= right and top <= point[1] <= bottom


def _cover(mask: Tensor, region: TextRegion, margin: float) -> None:
    """Set the pixels of the region's quadrangle, which is convex, grown by ``margin`` pixels."""
    (left, right), (top, bottom) = (
        (max(int(min(values) - margin), 0), ceil(max(values) + margin)) for values in zip(*region.box, strict=True)
    )
    part = mask[top:bottom, left:right]
    rows, columns = (torch.arange(size, device=mask.device) + 0.5 for size in part.shape)
    rows, columns = rows[:, None] + top, columns[None] + left
    inside = torch.ones_like(part)
    for (x0, y0), (x1, y1) in zip(region.box, (*region.box[1:], region.box[0]), strict=True):
        length = max(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5, 1e-6)
        distance = ((x1 - x0) * (rows - y0) - (y1 - y0) * (columns - x0)) / length  # above 0 on the inner side
        inside &= distance >= -margin
    part |= inside


def _blocks(regions: Sequence[TextRegion], height: int) -> list[tuple[int, int]]:
    """Rows of lines that follow each other, from first to last, with half of a line around them."""
    blocks: list[tuple[int, int]] = []
    for region in sorted(regions, key=lambda region: min(y for _, y in region.box)):
        rows = [y for _, y in region.box]
        top, bottom = max(int(min(rows) - region.height / 2), 0), min(ceil(max(rows) + region.height / 2), height)
        if blocks and top <= blocks[-1][1]:
            top, bottom = blocks[-1][0], max(bottom, blocks.pop()[1])
        blocks.append((top, bottom))
    return blocks


def _plate(image: Tensor, mask: Tensor, top: int, bottom: int) -> Tensor:
    """The rest of a plate of one colour on which the lines from ``top`` to ``bottom`` stand; nothing on a page.

    Without it, the plate would stay behind as an object of the scene. A page is a background that goes on above or
    below the lines.
    """
    plate = torch.zeros_like(mask)
    if not mask[top:bottom].any():  # corners outside of the image
        return plate
    colour = image[:, top:bottom][:, mask[top:bottom]].median(1).values  # letters cover less than half of their lines
    same = (image - colour[:, None, None]).abs().amax(0) <= _PLATE_TOLERANCE
    beyond = [float(same[row].float().mean()) for row in (top - 1, bottom) if 0 <= row < len(same)]
    if beyond and max(beyond) < _PAGE_SHARE:
        plate[top:bottom] = same[top:bottom]
    return plate


def inpaint(image: Tensor, mask: Tensor) -> Tensor:
    """``[3, H, W]`` with the pixels of ``mask`` ``[H, W]`` diffused from their border: means of ever larger windows.

    Known pixels are averaged down a pyramid, and each unknown pixel takes the finest mean that exists (push-pull,
    Gortler et al. 1996, "The Lumigraph"). Without any known pixel the image becomes grey.
    """
    known = (~mask)[None, None].to(image.dtype)
    levels = [(image[None] * known, known)]
    while min(levels[-1][0].shape[-2:]) > 1:
        values, weights = levels[-1]
        values, weights = (F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in (values, weights))
        levels.append((values, weights))
    values, weights = levels[-1]
    filled = torch.where(weights > 0, values / weights.clamp(min=1e-6), torch.full_like(values, 0.5))
    if not bool((weights > 0).all()):
        filled = torch.where(weights > 0, filled, filled.mean((2, 3), keepdim=True))
    for values, weights in reversed(levels[:-1]):
        coarse = F.interpolate(filled, size=values.shape[-2:], mode="bilinear", align_corners=False)
        share = weights.clamp(max=1)
        filled = torch.where(weights > 0, values / weights.clamp(min=1e-6), coarse) * share + coarse * (1 - share)
    return torch.where(mask, filled[0].clamp(0, 1), image)
