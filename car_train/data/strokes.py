"""Unfinished drawings: control maps of lines with some of their strokes left out.

A branch that is trained on whole sketches alone takes an empty part for an empty part of the image. One that also saw
unfinished ones follows what is there and completes the rest.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

LINES = ("light-on-dark", "dark-on-light")
"""Polarities of conventions whose maps are lines."""
CELLS = (6, 24)
"""Random points that cut the lines of a map into strokes, fewest and most."""


def drop_strokes(control: NDArray[np.uint8], polarity: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A map of lines without some of its strokes: uint8 [H, W, 3] → the same; what is left stays as it is.

    A stroke is what is connected and nearest to the same one of some random points, so that a long outline is several
    strokes. Each is left out with one probability, which is uniform in [0, 1) and differs from map to map.
    """
    ground = 0 if polarity == LINES[0] else 255
    lines = (control != ground).any(2)
    count, component_HW = cv2.connectedComponents(lines.astype(np.uint8))
    points_P2 = rng.random((int(rng.integers(CELLS[0], CELLS[1] + 1)), 2)) * lines.shape
    where_HW2 = np.moveaxis(np.indices(lines.shape), 0, -1)
    cell_HW = np.square(where_HW2[:, :, None] - points_P2).sum(-1).argmin(-1)
    dropped = rng.random((count, len(points_P2))) < rng.random()
    out = control.copy()
    out[lines & dropped[component_HW, cell_HW]] = ground
    return out
