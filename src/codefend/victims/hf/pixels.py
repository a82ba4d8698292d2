"""From [0, 1] pixels to a processor's ``pixel_values``, differentiably: one function per family of processors.

Each repeats the geometry of one of the library's Pillow image processors (their own helper functions choose the
sizes, so that both always agree) on tensors. Parity is tested against the processor itself for every family.

B images of one size become ``pixel_values`` in exactly the layout that the processor gives for B single images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.types import CodefendError
from codefend.victims.hf.resample import Levels

Family = Callable[[Any, Levels, Tensor], Tensor]  # processor, arithmetic, levels [B,3,H,W] -> pixel_values


def pixel_values(processor: Any, images: Tensor, *, exact: bool = False) -> Tensor:
    """The ``pixel_values`` of an image processor for images ``[B, 3, H, W]`` in [0, 1], in float32.

    ``exact`` repeats its 8-bit rounding to the level; without it the function is smooth, for attacks.
    Raises CodefendError for an unknown family of processors.
    """
    ops = Levels(exact)
    with torch.autocast(images.device.type, enabled=False):  # in bfloat16 products of levels are off by two and more
        return family(processor)(processor, ops, ops.read(images)).float()


def family(processor: Any) -> Family:
    """The function for this processor. Raises CodefendError naming the families when there is none."""
    from transformers.image_processing_backends import PilBackend

    kind = type(processor).__name__.removesuffix("Fast").removesuffix("Pil")
    if kind in FAMILIES:
        return FAMILIES[kind]
    plain = isinstance(processor, PilBackend) and all(
        getattr(type(processor), name) is getattr(PilBackend, name) for name in ("_preprocess", "resize", "pad")
    )
    if not plain or processor.do_pad:
        raise CodefendError(
            f"no differentiable form of {kind} is known; known: {', '.join(FAMILIES)} and plain resizing"
        )
    return _plain


def _normalize(processor: Any, levels: Tensor) -> Tensor:
    if processor.do_rescale:
        levels = levels * processor.rescale_factor
    if not processor.do_normalize:
        return levels
    mean, std = (levels.new_tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    return (levels - mean) / std


def _sides(size: Any, height: int, width: int) -> tuple[int, int]:
    """The size that the library's plain ``resize`` would give an image of height x width."""
    from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
    from transformers.image_utils import ChannelDimension, get_image_size_for_max_height_width

    sizes: dict[str, int] = {key: value for key, value in dict(size).items() if value}
    if {"shortest_edge", "longest_edge"} <= sizes.keys():
        sides = get_size_with_aspect_ratio((height, width), sizes["shortest_edge"], sizes["longest_edge"])
    elif "shortest_edge" in sizes:
        edge, way = sizes["shortest_edge"], ChannelDimension.FIRST
        blank = _blank(height, width)
        sides = get_resize_output_image_size(blank, edge, default_to_square=False, input_data_format=way)
    elif "max_height" in sizes:
        sides = get_image_size_for_max_height_width((height, width), sizes["max_height"], sizes["max_width"])
    else:
        sides = (sizes["height"], sizes["width"])
    return int(sides[0]), int(sides[1])


def _blank(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image that takes no memory, for functions of the library that only read its shape."""
    return np.broadcast_to(np.uint8(0), (3, height, width))


def _fit(processor: Any, ops: Levels, levels: Tensor) -> Tensor:
    """The plain chain: resize, crop, rescale, normalize."""
    if processor.do_resize:
        height, width = levels.shape[-2:]
        levels = ops.resize(levels, *_sides(processor.size, height, width), processor.resample)
    if processor.do_center_crop:
        levels = _center_crop(levels, processor.crop_size["height"], processor.crop_size["width"])
    return _normalize(processor, levels)


def _center_crop(levels: Tensor, height: int, width: int) -> Tensor:
    tall, wide = levels.shape[-2:]
    if tall < height or wide < width:  # the library pads with black to the crop's size, the odd pixel first
        more_y, more_x = max(height - tall, 0), max(width - wide, 0)
        levels = F.pad(levels, ((more_x + 1) // 2, more_x // 2, (more_y + 1) // 2, more_y // 2))
        tall, wide = levels.shape[-2:]
    top, left = (tall - height) // 2, (wide - width) // 2
    return levels[..., top : top + height, left : left + width]


def _plain(processor: Any, ops: Levels, levels: Tensor) -> Tensor:
    """CLIP, SigLIP, BLIP and similar -> ``[B, 3, h, w]``."""
    return _fit(processor, ops, levels)


def _llava(processor: Any, ops: Levels, levels: Tensor) -> Tensor:
    """LLaVA-1.5: optionally padded to a square with the mean colour, then the plain chain -> ``[B, 3, h, w]``."""
    height, width = levels.shape[-2:]
    if processor.do_pad and height != width:
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        colour = levels.new_tensor([int(value * 255) for value in processor.image_mean]).view(3, 1, 1)
        levels = F.pad(levels - colour, (left, side - width - left, top, side - height - top)) + colour
    return _fit(processor, ops, levels)


def _anyres(processor: Any, ops: Levels, levels: Tensor) -> Tensor:
    """LLaVA-NeXT and -OneVision: the whole image, then tiles of the best grid -> ``[B, 1 + tiles, 3, h, w]``."""
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.image_utils import ChannelDimension

    size = dict(processor.size)
    whole = (size["height"], size["width"]) if size.get("height") else (size["shortest_edge"],) * 2
    tile = processor.crop_size["height"] if processor.crop_size else whole[0]
    height, width = levels.shape[-2:]
    grid = select_best_resolution((height, width), processor.image_grid_pinpoints)
    tall, wide = get_patch_output_size(_blank(height, width), grid, ChannelDimension.FIRST)
    scaled = ops.resize(levels, tall, wide, processor.resample)
    top, left = (grid[0] - tall) // 2, (grid[1] - wide) // 2
    canvas = F.pad(scaled, (left, grid[1] - wide - left, top, grid[0] - tall - top))
    parts = [ops.resize(levels, *whole, processor.resample), *_tiles(canvas, tile, tile)]
    return torch.stack([_fit(processor, ops, part) for part in parts], 1)


def _tiles(levels: Tensor, height: int, width: int) -> list[Tensor]:
    return [tile for band in levels.split(height, -2) for tile in band.split(width, -1)]


def _idefics3(processor: Any, ops: Levels, levels: Tensor) -> Tensor:
    """Idefics3 and SmolVLM: tiles of the enlarged image, then the whole -> ``[B, tiles + 1, 3, m, m]``."""
    from transformers.models.idefics3 import image_processing_pil_idefics3 as home

    filter_, side = processor.resample, processor.max_image_size["longest_edge"]
    if processor.do_resize:
        height, width = levels.shape[-2:]
        if longest := dict(processor.size).get("longest_edge"):
            sides = home.get_resize_output_image_size(_blank(height, width), longest)
        else:
            sides = _sides(processor.size, height, width)
        levels = ops.resize(levels, *sides, filter_)
    if not processor.do_image_splitting:
        parts = [ops.resize(levels, side, side, filter_)]
    else:
        height, width = levels.shape[-2:]
        levels = ops.resize(levels, *_whole_tiles(height, width, side), filter_)
        parts = _tiles(levels, side, side)
        if len(parts) > 1:
            parts.append(ops.resize(levels, side, side, filter_))
    return torch.stack([_normalize(processor, part) for part in parts], 1)


def _whole_tiles(height: int, width: int, side: int) -> tuple[int, int]:
    """The longer side up to a multiple of ``side``, the other after it in proportion and up to a multiple."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        return math.ceil(int(width / aspect) / side) * side, width
    height = math.ceil(height / side) * side
    return height, math.ceil(int(height * aspect) / side) * side


def _internvl(processor: Any, ops: Levels, levels: Tensor) -> Tensor:
    """InternVL and GOT-OCR2: tiles of the grid nearest in aspect, then the whole -> ``[B * tiles, 3, h, w]``."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    tall, wide = processor.size["height"], processor.size["width"]
    if not processor.crop_to_patches or processor.max_patches <= 1:
        return _fit(processor, ops, levels)
    height, width = levels.shape[-2:]
    columns, rows = get_optimal_tiled_canvas(
        (height, width), (tall, wide), processor.min_patches, processor.max_patches
    )
    parts = _tiles(ops.resize(levels, tall * rows, wide * columns, processor.resample), tall, wide)
    if len(parts) > 1:
        parts.append(ops.resize(levels, tall, wide, processor.resample))
    return torch.stack([_normalize(processor, part) for part in parts], 1).flatten(0, 1)


def _qwen(processor: Any, ops: Levels, levels: Tensor) -> Tensor:
    """Qwen2-VL, 2.5 and 3: whole patches in the order of their merged blocks -> ``[B * patches, 3 * t * p * p]``."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    patch, merge, frames = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    if processor.do_resize:
        low, high = processor.size["shortest_edge"], processor.size["longest_edge"]
        height, width = levels.shape[-2:]
        height, width = smart_resize(height, width, factor=patch * merge, min_pixels=low, max_pixels=high)
        levels = ops.resize(levels, height, width, processor.resample)
    x = _normalize(processor, levels)
    batch, colours, height, width = x.shape
    step = patch * merge
    blocks = x.view(batch, colours, height // step, merge, patch, width // step, merge, patch)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # [B, rows, columns, m, m, 3, 1, p, p]
    return blocks.expand(*blocks.shape[:6], frames, patch, patch).reshape(-1, colours * frames * patch * patch)


def _gemma3(processor: Any, ops: Levels, levels: Tensor) -> Tensor:
    """Gemma 3: the whole image, then the crops of pan and scan -> ``[B * (1 + crops), 3, h, w]``."""
    crops = []
    if processor.do_pan_and_scan:
        height, width = levels.shape[-2:]
        names = ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
        settings = {f"pan_and_scan_{name}": getattr(processor, f"pan_and_scan_{name}") for name in names}
        # The processor's own method crops an image of indices, so the boxes are its own.
        crops = processor.pan_and_scan(np.arange(height * width).reshape(1, height, width), **settings)
    parts = [levels]
    for crop in crops:
        (top, left), (tall, wide) = divmod(int(crop[0, 0, 0]), levels.shape[-1]), crop.shape[-2:]
        parts.append(levels[..., top : top + tall, left : left + wide])
    return torch.stack([_fit(processor, ops, part) for part in parts], 1).flatten(0, 1)


FAMILIES: dict[str, Family] = {
    "LlavaImageProcessor": _llava,
    "LlavaNextImageProcessor": _anyres,
    "LlavaOnevisionImageProcessor": _anyres,
    "Qwen2VLImageProcessor": _qwen,
    "Idefics3ImageProcessor": _idefics3,
    "SmolVLMImageProcessor": _idefics3,
    "GotOcr2ImageProcessor": _internvl,
    "Gemma3ImageProcessor": _gemma3,
}
