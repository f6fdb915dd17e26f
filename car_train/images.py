"""Tensors as pixels, and contact sheets of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from car_train.files import written_aside

COLUMNS, SIDES = 4, (96, 256)
"""Groups in a line of a contact sheet; sides of its images, from least to most."""

Pixels = NDArray[np.uint8]


def to_pixels(x_B3HW: Tensor) -> Pixels:
    """f32 [B, 3, H, W] in [-1, 1] → uint8 [B, H, W, 3], rounded."""
    return ((x_B3HW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def contact_sheet(groups: Sequence[Sequence[NDArray[Any]]], heads: Sequence[str]) -> Image.Image:
    """Groups of images side by side, four groups a line, with the names of a group's images above.

    groups: uint8 [H, W, 3] each, all of one size. Images smaller than 96 pixels are enlarged by a whole factor, those
    larger than 256 reduced.
    """
    side = groups[0][0].shape[0]
    tile = min(side * math.ceil(SIDES[0] / side), max(SIDES)) if side < SIDES[0] else min(side, SIDES[1])
    way = Image.Resampling.NEAREST if tile >= side else Image.Resampling.LANCZOS
    gap, top = 4, 16
    columns = min(COLUMNS, len(groups))
    width, height = len(heads) * (tile + 1) + gap, tile + gap
    sheet = Image.new("RGB", (columns * width + gap, top + math.ceil(len(groups) / columns) * height + gap), "grey")
    draw = ImageDraw.Draw(sheet)
    for at, group in enumerate(groups):
        for k, pixels in enumerate(group):
            x, y = gap + at % columns * width + k * (tile + 1), top + at // columns * height
            sheet.paste(Image.fromarray(pixels).resize((tile, tile), way), (x, y))
            if at < columns:
                draw.text((x + 2, 2), heads[k], fill="white")
    return sheet


def save_png(image: Image.Image, target: Path) -> None:
    """Write a whole PNG, or leave what was there. Raises OSError."""
    with written_aside(target) as file:
        image.save(file, "PNG")
