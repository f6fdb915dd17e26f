"""Twenty drawings as a hand makes them, none of them from the data, and what a plan makes of each.

    python examples/doodles.py doodles.png                       # the shipped plan, its default control
    python examples/doodles.py doodles.png --control sketch      # another branch

Strokes are polylines that waver a little, two pixels wide as the studio's pen. Nothing is chosen: seed 0 for all.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

import car_runtime

Stroke = list[tuple[float, float]]
"""Points of one line, x and y from 0 to 1, from the upper left."""
WAVER = 0.006
"""Standard deviation of a point, as a share of the side."""
TILE = 128


def arc(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360) -> Stroke:
    """Part of an ellipse; degrees clockwise from the right."""
    steps = max(6, int(abs(stop - start) / 12))
    turns = [math.radians(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return [(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turns]


def closed(*points: tuple[float, float]) -> Stroke:
    return [*points, points[0]]


def box(left: float, top: float, right: float, bottom: float) -> Stroke:
    return closed((left, top), (right, top), (right, bottom), (left, bottom))


def star(x: float, y: float, outer: float, inner: float, points: int = 5) -> Stroke:
    turns = [math.pi * i / points - math.pi / 2 for i in range(2 * points)]
    radii = [inner if i % 2 else outer for i in range(2 * points)]
    return closed(*((x + r * math.cos(t), y + r * math.sin(t)) for r, t in zip(radii, turns, strict=True)))


HEART = [
    (
        0.5 + 0.36 * math.sin(t) ** 3,
        0.47 - 0.026 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
    )
    for t in (i * math.pi / 20 for i in range(41))
]
FACE = arc(0.5, 0.5, 0.4, 0.4)
DOODLES: dict[str, tuple[str, list[Stroke]]] = {
    "heart": ("smileys-emotion", [HEART]),
    "smile": (
        "smileys-emotion",
        [FACE, arc(0.36, 0.4, 0.04, 0.06), arc(0.64, 0.4, 0.04, 0.06), arc(0.5, 0.54, 0.22, 0.2, 10, 170)],
    ),
    "sad face": (
        "smileys-emotion",
        [FACE, arc(0.36, 0.42, 0.04, 0.05), arc(0.64, 0.42, 0.04, 0.05), arc(0.5, 0.76, 0.18, 0.14, 200, 340)],
    ),
    "star": ("travel-places", [star(0.5, 0.53, 0.42, 0.18)]),
    "sun": (
        "travel-places",
        [arc(0.5, 0.5, 0.22, 0.22)]
        + [
            [(0.5 + r * math.cos(t), 0.5 + r * math.sin(t)) for r in (0.29, 0.42)]
            for t in (i * math.pi / 4 for i in range(8))
        ],
    ),
    "moon": ("travel-places", [arc(0.48, 0.5, 0.38, 0.38, -60, -300) + arc(0.68, 0.5, 0.3, 0.33, -120, -240)[::-1]]),
    "house": (
        "travel-places",
        [
            box(0.2, 0.48, 0.8, 0.9),
            [(0.12, 0.5), (0.5, 0.12), (0.88, 0.5)],
            box(0.44, 0.65, 0.58, 0.9),
            box(0.27, 0.57, 0.38, 0.68),
        ],
    ),
    "tree": (
        "animals-nature",
        [
            arc(0.5, 0.36, 0.3, 0.29, 130, 410),
            [(0.43, 0.6), (0.42, 0.92), (0.58, 0.92), (0.57, 0.6)],
            [(0.31, 0.58), (0.43, 0.62), (0.57, 0.62), (0.69, 0.58)],
        ],
    ),
    "flower": (
        "animals-nature",
        [arc(0.5, 0.36, 0.09, 0.09)]
        + [
            arc(0.5 + 0.17 * math.cos(t), 0.36 + 0.17 * math.sin(t), 0.1, 0.1)
            for t in (i * math.pi / 3 for i in range(6))
        ]
        + [[(0.5, 0.62), (0.5, 0.95)], arc(0.6, 0.8, 0.1, 0.05)],
    ),
    "fish": (
        "animals-nature",
        [
            arc(0.42, 0.5, 0.3, 0.2, 25, 335),
            [(0.69, 0.41), (0.92, 0.28), (0.88, 0.5), (0.92, 0.72), (0.69, 0.59)],
            arc(0.26, 0.46, 0.025, 0.025),
        ],
    ),
    "cat": (
        "animals-nature",
        [
            arc(0.5, 0.56, 0.36, 0.32, -50, 230),
            [(0.2, 0.38), (0.18, 0.1), (0.4, 0.26), (0.6, 0.26), (0.82, 0.1), (0.8, 0.38)],
            arc(0.37, 0.52, 0.04, 0.05),
            arc(0.63, 0.52, 0.04, 0.05),
            closed((0.46, 0.63), (0.54, 0.63), (0.5, 0.68)),
            arc(0.43, 0.69, 0.07, 0.06, 0, 180),
            arc(0.57, 0.69, 0.07, 0.06, 0, 180),
        ],
    ),
    "mushroom": (
        "food-drink",
        [
            arc(0.5, 0.5, 0.4, 0.38, 180, 360),
            [(0.1, 0.5), (0.9, 0.5)],
            [(0.38, 0.5), (0.36, 0.88), (0.64, 0.88), (0.62, 0.5)],
            arc(0.38, 0.33, 0.07, 0.06),
            arc(0.64, 0.36, 0.08, 0.07),
        ],
    ),
    "apple": (
        "food-drink",
        [
            arc(0.36, 0.56, 0.24, 0.32, 60, 300) + arc(0.64, 0.56, 0.24, 0.32, 240, 480),
            [(0.5, 0.3), (0.54, 0.12)],
            arc(0.64, 0.17, 0.1, 0.05),
        ],
    ),
    "cup": (
        "food-drink",
        [
            [(0.2, 0.3), (0.24, 0.78), (0.34, 0.86), (0.56, 0.86), (0.66, 0.78), (0.7, 0.3)],
            arc(0.45, 0.3, 0.25, 0.06),
            arc(0.7, 0.5, 0.16, 0.14, -80, 100),
        ],
    ),
    "ice cream": (
        "food-drink",
        [arc(0.5, 0.33, 0.24, 0.24, 160, 380), closed((0.26, 0.42), (0.74, 0.42), (0.5, 0.95))],
    ),
    "car": (
        "travel-places",
        [
            [(0.06, 0.7), (0.06, 0.52), (0.24, 0.48), (0.36, 0.28), (0.68, 0.28), (0.8, 0.48), (0.94, 0.54)],
            [(0.94, 0.54), (0.94, 0.7), (0.06, 0.7)],
            arc(0.26, 0.72, 0.1, 0.1),
            arc(0.74, 0.72, 0.1, 0.1),
            closed((0.32, 0.46), (0.4, 0.34), (0.64, 0.34), (0.72, 0.46)),
        ],
    ),
    "boat": (
        "travel-places",
        [
            closed((0.1, 0.68), (0.9, 0.68), (0.76, 0.88), (0.24, 0.88)),
            [(0.5, 0.68), (0.5, 0.1)],
            closed((0.54, 0.14), (0.54, 0.6), (0.84, 0.6)),
            closed((0.46, 0.24), (0.46, 0.6), (0.2, 0.6)),
        ],
    ),
    "umbrella": (
        "travel-places",
        [
            arc(0.5, 0.5, 0.4, 0.36, 180, 360),
            *(arc(0.1 + 0.8 * (i + 0.5) / 4, 0.5, 0.1, 0.06, 180, 360) for i in range(4)),
            [(0.5, 0.14), (0.5, 0.8)],
            arc(0.43, 0.8, 0.07, 0.09, 0, 170),
        ],
    ),
    "balloon": (
        "activities",
        [
            arc(0.5, 0.38, 0.27, 0.32),
            closed((0.46, 0.75), (0.54, 0.75), (0.5, 0.7)),
            [(0.5, 0.75), (0.47, 0.83), (0.53, 0.9), (0.49, 0.97)],
        ],
    ),
    "key": (
        "objects",
        [
            arc(0.28, 0.32, 0.18, 0.18),
            arc(0.28, 0.32, 0.07, 0.07),
            [(0.4, 0.46), (0.82, 0.88)],
            [(0.43, 0.42), (0.87, 0.84), (0.82, 0.88)],
            [(0.66, 0.72), (0.58, 0.8)],
            [(0.76, 0.82), (0.68, 0.9)],
        ],
    ),
}
"""What it is → the group of its class, and the strokes."""


def drawn(strokes: Sequence[Stroke], side: int, seed: int) -> Image.Image:
    """White lines on black, as an edge map is, [side, side]."""
    rng, scale = np.random.default_rng(seed), 4
    image = Image.new("L", (side * scale, side * scale))
    pen = ImageDraw.Draw(image)
    for stroke in strokes:
        points = np.array(stroke) + rng.normal(0, WAVER, (len(stroke), 2))
        pen.line([tuple(p) for p in points * side * scale], fill=255, width=2 * scale * side // 128, joint="curve")
    return image.resize((side, side), Image.Resampling.BOX)


def sheet(pairs: Sequence[tuple[Image.Image, NDArray[np.uint8]]], columns: int = 5) -> Image.Image:
    """Drawing and image side by side, row by row."""
    rows = -(-len(pairs) // columns)
    page = Image.new("RGB", (columns * (2 * TILE + 8), rows * (TILE + 8)), "#808080")
    for i, (line, image) in enumerate(pairs):
        x, y = i % columns * (2 * TILE + 8), i // columns * (TILE + 8)
        page.paste(line.convert("RGB").resize((TILE, TILE)), (x, y))
        page.paste(Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS), (x + TILE, y))
    return page


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="PNG")
    parser.add_argument("--plan", type=Path, help="plan directory (default: the shipped one)")
    parser.add_argument("--control", default="canny", help="the branch (default: canny)")
    parser.add_argument("--style", default="noto", help="(default: noto)")
    args = parser.parse_args(argv)
    pairs = []
    with car_runtime.open_plan(args.plan) as plan:
        side = plan.manifest.model.image_size
        for i, (group, strokes) in enumerate(DOODLES.values()):
            line = drawn(strokes, side, i)
            found = plan.generate({args.control: line}, label=f"{args.style}-{group}", seed=0)
            pairs.append((line, found.images[0]))
    sheet(pairs).save(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
