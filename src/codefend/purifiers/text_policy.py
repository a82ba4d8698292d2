"""What happens to text in images: policies from lenient to strict. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from codefend.types import CodefendError

if TYPE_CHECKING:
    from torch import Tensor

    from codefend.purifiers.ocr import TextRegion

TextPolicyName = Literal["off", "report", "quote", "redact", "redact-all", "block"]
TEXT_POLICIES: tuple[TextPolicyName, ...] = get_args(TextPolicyName)


class TextBlocked(CodefendError):
    """An image holds text that reads like an instruction, and the policy is to block."""


def apply(image: Tensor, policy: TextPolicyName) -> tuple[Tensor, list[TextRegion]]:
    """The image ``[3, H, W]`` under ``policy``, and its lines of text; without reading it when that is "off".

    "redact" fills the lines that read like instructions and "redact-all" every line; the others leave the image as it
    is. Raises TextBlocked for an instruction under "block", and under the two that fill where it covers too much of the
    image to be filled; CodefendError without the `ocr` extra.
    """
    if policy == "off":
        return image, []
    from codefend.purifiers.redact import read, redact, select

    regions = read(image)
    if policy == "block" and (lines := select(regions, "instructions")):
        count = f"{len(lines)} of {len(regions)} lines"
        raise TextBlocked(f"text in the image reads like instructions to a model ({count})")
    if policy in ("redact", "redact-all"):
        filled = redact(image, select(regions, "all" if policy == "redact-all" else "instructions"))
        if filled is image and instructions_in(regions):
            raise TextBlocked("text that reads like instructions to a model covers too much of the image to be filled")
        return filled, regions
    return image, regions


def instructions_in(regions: Sequence[TextRegion]) -> tuple[str, ...]:
    """What the lines that read like instructions say."""
    return tuple(region.text for region in regions if region.instruction)
