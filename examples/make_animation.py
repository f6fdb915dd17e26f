"""Draw docs/images/scales.webp: controls of all five kinds, and what the shipped plan makes of them, scale by scale.

    python examples/make_animation.py docs/images/scales.webp

A row per control image, a column per style of its class, and below them the scale that is shown, as its grid of
tokens. The finished images come first, so that a viewer that shows one frame shows those. GIF and PNG (animated)
work as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import car_runtime

DRAWINGS = Path(__file__).parents[1] / "runtime" / "car_serve" / "studio"
"""The studio's examples: one of each kind."""
ROWS = (
    ("canny", "umbrella", "travel-places"),
    ("hed", "guitar", "objects"),
    ("sketch", "heart", "smileys-emotion"),
    ("depth", "cupcake", "food-drink"),
    ("normal", "maple-leaf", "animals-nature"),
)
"""Kind, drawing, group of classes."""
STYLES = ("flat", "fluent", "noto", "twemoji")
SEEDS = (1, 0)
TILE, GAP, MARGIN, GRID = 128, 8, 28, 32
STEP_MS, HOLD_MS = 550, 2200
INK, FAINT, ACCENT = "#1f2328", "#d0d7de", "#0969da"


def draw_scales(plan: car_runtime.Plan, seed: int) -> list[list[NDArray[np.uint8]]]:
    """Every image after every scale: [K scales][one image per row and column], each uint8 [H, W, 3]."""
    requests = [
        ({kind: DRAWINGS / f"{name}.png"}, f"{style}-{group}") for kind, name, group in ROWS for style in STYLES
    ]
    images = [
        [step.preview()[0] for step in plan.stream(control, label=label, seed=seed)] for control, label in requests
    ]
    return [list(of_scale) for of_scale in zip(*images, strict=True)]


def draw_frame(images: Sequence[NDArray[np.uint8]], sides: Sequence[int], scale: int) -> Image.Image:
    """One frame: labels, a row per control image, and the grids of the scales with `scale` marked."""
    columns, pitch = 1 + len(STYLES), TILE + GAP
    width, bottom = columns * pitch - GAP, MARGIN + len(ROWS) * pitch
    frame = Image.new("RGB", (width, bottom + GRID + 4), "white")
    pen, font = ImageDraw.Draw(frame), ImageFont.load_default(size=15)
    for column, text in enumerate(("control", *STYLES)):
        pen.text((column * pitch + TILE / 2, MARGIN / 2), text, INK, font, anchor="mm")
    for row, (kind, name, _) in enumerate(ROWS):
        with Image.open(DRAWINGS / f"{name}.png") as control:
            tiles = [control.convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)]
        ImageDraw.Draw(tiles[0]).text((6, 6), kind, "white", font, anchor="lt")
        drawn = images[row * len(STYLES) : (row + 1) * len(STYLES)]
        tiles += [Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS) for image in drawn]
        for column, tile in enumerate(tiles):
            frame.paste(tile, (column * pitch, MARGIN + row * pitch))
    draw_grids(pen, sides, scale, top=bottom + 2)
    text = f"scale {scale + 1} of {len(sides)}: {sides[scale]} x {sides[scale]} tokens"
    pen.text((width - 2, bottom + 2 + GRID / 2), text, INK, font, anchor="rm")
    return frame


def draw_grids(pen: ImageDraw.ImageDraw, sides: Sequence[int], scale: int, top: int) -> None:
    """Each scale as a square of side × side cells; those drawn so far are filled."""
    for index, side in enumerate(sides):
        left, cell = 2 + index * (GRID + GAP), GRID / side
        for row in range(side):
            for column in range(side):
                corner = (left + column * cell, top + row * cell)
                box = (*corner, corner[0] + cell - 2, corner[1] + cell - 2)  # a gap of one pixel
                pen.rectangle(box, fill=ACCENT if index == scale else INK if index < scale else FAINT)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what the shipped plan makes of every kind of control.")
    parser.add_argument("output", type=Path, help="the animation: .webp, .gif or .png")
    output: Path = parser.parse_args().output
    frames, durations = [], []
    with car_runtime.open_plan() as plan:
        sides = [scale.side for scale in plan.manifest.scales]
        for seed in SEEDS:
            frames += [draw_frame(images, sides, k) for k, images in enumerate(draw_scales(plan, seed))]
            durations += [STEP_MS] * (len(sides) - 1) + [HOLD_MS]
    frames, durations = frames[-1:] + frames[:-1], durations[-1:] + durations[:-1]
    options = {"quality": 80, "method": 6, "minimize_size": True} if output.suffix == ".webp" else {}
    frames[0].save(output, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)


if __name__ == "__main__":
    main()
