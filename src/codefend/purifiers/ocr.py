"""Text in images: regions, text and confidence, by RapidOCR's PP-OCR networks on ONNX Runtime.

The networks come with the package's wheel, and their files are named here, so that nothing is downloaded. Detection
sees the image at a size that bounds its cost; recognition sees each region at full size.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from math import atan2, hypot, pi, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codefend.types import CodefendError

DETECTION_PIXELS = 120_000  # images near this size are detected at their own, and at half of it
_SCALES = (0.5, 2.0)  # the smallest text that is found is some 7 pixels high after scaling
_SAME_LINE = 0.5  # of the middle of a line found at the second scale, from which it was found before
_MIN_CONFIDENCE = 0.5
_MIN_CHARACTERS = 3  # letters and digits: shorter readings are mostly shapes of objects
_MODELS = {
    "Det": "PP-OCRv6_det_small.onnx",
    "Rec": "PP-OCRv6_rec_small.onnx",
    "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",  # lines that are upside down
}
_LOCK = threading.Lock()  # RapidOCR keeps the options of a call in its object

_MISSING = "reading text in images needs the `ocr` extra: pip install 'codefend[ocr]'"

Point = tuple[float, float]


@dataclass(frozen=True)
class TextRegion:
    """A line of text: what it says, the recognition's confidence in [0, 1], and its corners in pixels.

    The corners go round from the text's top left. ``instruction`` is set by `purifiers.instructions.mark`.
    """

    text: str
    confidence: float
    box: tuple[Point, Point, Point, Point]
    instruction: bool = False

    @property
    def centre(self) -> Point:
        """The mean of the corners."""
        return sum(x for x, _ in self.box) / 4, sum(y for _, y in self.box) / 4

    @property
    def height(self) -> float:
        """The length of the side from the first to the last corner, in pixels."""
        (x0, y0), (x1, y1) = self.box[0], self.box[3]
        return hypot(x1 - x0, y1 - y0)

    @property
    def place(self) -> tuple[int, float, float]:
        """Quarter turns of the text, clockwise, and how far along and across its direction the centre lies."""
        (x0, y0), (x1, y1) = self.box[0], self.box[1]
        (x, y), quarter = self.centre, round(2 * atan2(y1 - y0, x1 - x0) / pi) % 4
        return quarter, *((x, y), (y, -x), (-x, -y), (-y, x))[quarter]


@lru_cache(maxsize=1)
def engine() -> Any:
    """The loaded networks, one for the process. Raises CodefendError without the `ocr` extra or its models."""
    try:
        rapidocr: Any = import_module("rapidocr")
    except ImportError as error:
        raise CodefendError(f"{_MISSING} ({error})") from error
    folder = Path(rapidocr.__file__).parent / "models"
    if missing := [file for file in _MODELS.values() if not (folder / file).is_file()]:
        raise CodefendError(f"the installed rapidocr has no {missing[0]}; install the version that codefend[ocr] names")
    params: dict[str, Any] = {f"{part}.model_path": str(folder / file) for part, file in _MODELS.items()}
    params |= {
        "Global.log_level": "error",
        "Global.use_preprocess_img": False,
        "Det.box_thresh": 0.5,
        "Det.limit_type": "max",
        "Det.limit_side_len": 1 << 20,  # never: `read` has scaled it
        "Rec.rec_batch_num": 1,  # no padding to the widest of a batch
        "Rec.rec_img_shape": [3, 48, 48],
        "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
    }
    return rapidocr.RapidOCR(params=params)


def check_installed() -> None:
    """Raise CodefendError when the `ocr` extra is not installed, without loading the networks."""
    if find_spec("rapidocr") is None or find_spec("onnxruntime") is None:
        raise CodefendError(_MISSING)


def read(image: Tensor) -> list[TextRegion]:
    """Lines of text in ``[3, H, W]``, from top to bottom, upright ones first. Raises CodefendError without `ocr`."""
    with _LOCK:
        ocr, pixels = engine(), _bgr(image)
        regions = [_recognise(ocr, pixels, corners) for corners in _detect(ocr, pixels)]
    return _in_reading_order(_with_common_direction([region for region in regions if region is not None]))


def _with_common_direction(regions: Sequence[TextRegion]) -> list[TextRegion]:
    """Turn lines that were read upside down among more text of their axis that was not: the network errs on some."""
    letters: Counter[int] = Counter()
    for region in regions:
        letters[region.place[0]] += len(region.text)
    common = []
    for region in regions:
        quarter, box = region.place[0], region.box
        turned = letters[quarter] < letters[(quarter + 2) % 4]
        common.append(replace(region, box=box[2:] + box[:2]) if turned else region)
    return common


def _in_reading_order(regions: Sequence[TextRegion]) -> list[TextRegion]:
    """For each direction of text, line after line, and along it among regions whose centres are within half a line."""
    rows: list[list[TextRegion]] = []
    for region in sorted(regions, key=lambda region: (region.place[0], region.place[2])):
        quarter, _, across = region.place
        first = rows[-1][0] if rows else region
        if rows and quarter == first.place[0] and across - first.place[2] < first.height / 2:
            rows[-1].append(region)
        else:
            rows.append([region])
    return [region for row in rows for region in sorted(row, key=lambda region: region.place[1])]


def _bgr(image: Tensor) -> Any:
    levels = (image.detach().cpu().float().clamp(0, 1) * 255).round().byte()
    return np.ascontiguousarray(levels.permute(1, 2, 0).numpy()[..., ::-1])


def _recognise(ocr: Any, pixels: Any, corners: Any) -> TextRegion | None:
    """The line inside the corners, or None where there is no legible text."""
    crop = import_module("rapidocr.utils.process_img").get_rotate_crop_image(pixels, corners.copy())
    if not min(crop.shape[:2]):
        return None
    line = ocr(crop, use_det=False, use_cls=True, use_rec=False).img_list[0]
    quarters = int(_is_tall(corners)) + 2 * int(not np.array_equal(line, crop))  # turns that the line was given
    corners = np.roll(corners, -quarters, axis=0)
    result = ocr(line, use_det=False, use_cls=False, use_rec=True)
    text, score = (result.txts[0].strip(), float(result.scores[0])) if result.txts else ("", 0.0)
    if score < _MIN_CONFIDENCE or sum(map(str.isalnum, text)) < _MIN_CHARACTERS:
        return None
    box = tuple((float(x), float(y)) for x, y in corners)
    return TextRegion(text, round(score, 3), box)  # type: ignore[arg-type]


def _is_tall(corners: Any) -> bool:
    """Whether RapidOCR turns the line by a quarter, counterclockwise."""
    width, height = (
        max(int(np.linalg.norm(corners[a] - corners[b])) for a, b in sides)
        for sides in (((0, 1), (2, 3)), ((0, 3), (1, 2)))
    )
    return bool(height >= 1.5 * width)


def _detect(ocr: Any, pixels: Any) -> list[Any]:
    """Corners of each line, ``[4, 2]`` float32 in the image's pixels; large or dense letters need the second scale."""
    height, width = pixels.shape[:2]
    scale = min(max(sqrt(DETECTION_PIXELS / (height * width)), _SCALES[0]), _SCALES[1])
    fine = _detect_at(ocr, pixels, scale)
    return fine + [box for box in _detect_at(ocr, pixels, scale / 2) if _covered(_middle(box), fine) < _SAME_LINE]


def _middle(box: Any) -> Any:
    """The middle quarter of a line, along it: the margin around what was found grows with the pixels of its scale."""
    turned = np.linalg.norm(box[3] - box[0]) > np.linalg.norm(box[1] - box[0])
    across = box[[1, 0, 3, 2] if turned else [3, 2, 1, 0]]
    return box * 0.625 + across * 0.375


def _detect_at(ocr: Any, pixels: Any, scale: float) -> list[Any]:
    cv2 = import_module("cv2")
    height, width = pixels.shape[:2]
    size = (max(round(width * scale), 32), max(round(height * scale), 32))
    resized = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    boxes = ocr(resized, use_det=True, use_cls=False, use_rec=False).boxes
    return [] if boxes is None else [np.float32(box * (width / size[0], height / size[1])) for box in boxes]


def _covered(box: Any, others: Sequence[Any]) -> float:
    """The share of the upright rectangle around ``box`` that those around ``others`` cover, at most."""
    low, high = box.min(0), box.max(0)
    common = [np.prod(np.clip(np.minimum(high, o.max(0)) - np.maximum(low, o.min(0)), 0, None)) for o in others]
    return float(sum(common) / max(np.prod(high - low), 1e-6))
