"""Draw docs/images/demo.png: each example in the three styles of the shipped plan, three seeds each.

python examples/make_figure.py docs/images/demo.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import car_runtime

GROUPS = {
    "clock": "travel-places",
    "guitar": "objects",
    "heart": "smileys-emotion",
    "hugging-face": "smileys-emotion",
    "maple-leaf": "animals-nature",
    "umbrella": "travel-places",
}
TILE, GAP, SEEDS = 96, 4, 3


def main(output: str) -> None:
    here = Path(__file__).parent
    columns = 1 + 3 * SEEDS
    sheet = Image.new("RGB", (columns * (TILE + GAP) - GAP, len(GROUPS) * (TILE + GAP) - GAP), "white")
    with car_runtime.open_plan() as plan:
        for row, (name, group) in enumerate(GROUPS.items()):
            control = here / f"{name}.png"
            pictures = [np.asarray(Image.open(control).convert("RGB"))]
            for style in ("fluent", "noto", "twemoji"):
                pictures += list(plan.generate(control, label=f"{style}-{group}", n=SEEDS).images)
            for column, picture in enumerate(pictures):
                tile = Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.LANCZOS)
                sheet.paste(tile, (column * (TILE + GAP), row * (TILE + GAP)))
    sheet.save(output, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
