"""How much of rendered text is still read after the tokenizer (the text task of VTBench), without a reading network.

Words are drawn letter by letter into the cells of a grid, dark on light and light on dark, at several sizes. The
reader knows grid and font and takes for each cell the letter whose image, of the same cell, correlates best with what
is there: a matched filter, which reads the drawn text itself without an error. What it misreads after the tokenizer
is what the tokenizer lost; guessing is right once in 26 letters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDS = tuple(
    "APPLE BRIDGE CLOUD DRUM EAGLE FJORD GHOST HOUSE ISLAND JUDGE KNIFE LEMON MOUSE NORTH OCEAN PIANO QUEEN RIVER "
    "SUGAR TIGER UNCLE VIOLIN WINDOW XENON YELLOW ZEBRA WAX QUIZ JAZZ VOW".split()
)
"""Every letter is in two words at least."""
SIZES = (8, 12, 16, 24, 32)
"""Heights of a cell in pixels."""
INKS = ((0, 255), (255, 0), (40, 200))
"""Grey levels of letters and ground."""

Pixels = NDArray[np.uint8]


@cache
def letter(text: str, size: int) -> NDArray[np.float64]:
    """A letter in the middle of its cell, [size, width] in 0…1; width is three quarters of the size."""
    cell = Image.new("L", (cell_width(size), size), 0)
    font = ImageFont.load_default(size * 0.9)
    ImageDraw.Draw(cell).text((cell.width / 2, size / 2), text, font=font, fill=255, anchor="mm")
    return np.asarray(cell, np.float64) / 255


def cell_width(size: int) -> int:
    return max(size * 3 // 4, 1)


def page(side: int, size: int, ink: tuple[int, int], rng: np.random.Generator) -> tuple[Pixels, list[str]]:
    """A square image of words, uint8 [side, side, 3], and the text of its lines; '' where no word has room."""
    letters, ground = ink
    rows, columns = side // size, side // cell_width(size)
    image = np.full((side, side), float(ground))
    lines = []
    for row in range(rows):
        fitting = [word for word in WORDS if len(word) <= columns]
        word = str(rng.choice(fitting)) if fitting else "".join(rng.choice(list(LETTERS), columns))
        lines.append(word)
        for column, text in enumerate(word):
            y, x = row * size, column * cell_width(size)
            cell = letter(text, size)
            image[y : y + size, x : x + cell.shape[1]] += (letters - ground) * cell
    return np.repeat(np.clip(image + 0.5, 0, 255).astype(np.uint8)[..., None], 3, 2), lines


def read(image_HW3: Pixels, size: int, lengths: list[int]) -> list[str]:
    """The text of each line, of so many letters each: per cell the letter of the largest absolute correlation."""
    grey = image_HW3.astype(np.float64).mean(2)
    known = np.stack([_normed(letter(text, size)) for text in LETTERS])
    lines = []
    for row, length in enumerate(lengths):
        y, width = row * size, cell_width(size)
        cells = [grey[y : y + size, k * width : (k + 1) * width] for k in range(length)]
        lines.append("".join(LETTERS[int(np.abs(known @ _normed(cell)).argmax())] for cell in cells))
    return lines


def _normed(cell: NDArray[np.float64]) -> NDArray[np.float64]:
    x = cell.ravel() - cell.mean()
    length = np.linalg.norm(x)
    return np.asarray(x / length if length > 0 else x)


def legibility(reconstruct: Callable[[Pixels], Pixels], side: int, seed: int = 0, pages: int = 4) -> dict[str, Any]:
    """Shares of letters and words read, by size, of the pages themselves and after `reconstruct`.

    reconstruct: uint8 [B, side, side, 3] → the same. pages: of every size and ink. Sizes that don't fit are left out.
    """
    report: dict[str, Any] = {}
    for size in (size for size in SIZES if size <= side and cell_width(size) <= side):
        rng = np.random.default_rng([seed, size])
        drawn = [page(side, size, ink, rng) for ink in INKS for _ in range(pages)]
        images = np.stack([image for image, _ in drawn])
        row: dict[str, float] = {}
        for name, shown in (("drawn", images), ("read", reconstruct(images))):
            pairs = [
                pair
                for image, (_, lines) in zip(shown, drawn, strict=True)
                for pair in zip(lines, read(image, size, [len(line) for line in lines]), strict=True)
            ]
            letters = [a == b for line, found in pairs for a, b in zip(line, found, strict=True)]
            row[f"{name}_letters"] = float(np.mean(letters))
            row[f"{name}_words"] = float(np.mean([a == b for a, b in pairs]))
        report[str(size)] = row
    return report
