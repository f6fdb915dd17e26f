"""Masks of pixels as masks of tokens (VAR's zero-shot editing)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from car_runtime.errors import RequestError
from car_runtime.format.manifest import Scale

MASK_RULES = ("published", "strict")
"""How a mask of pixels becomes one of tokens."""


def known_mask_of(
    repaint_HW: Any, scales: Sequence[Scale], rule: Literal["published", "strict"] = "published"
) -> NDArray[np.bool_]:
    """Which tokens to keep, bool [L], when pixels where `repaint_HW` (bool, any size) is true are made anew.

    rule "published", that of VAR's zero-shot editing: a token of the last scale is kept when less than half of the
    area it covers is to be repainted, and what is kept (1, else 0), resized bilinearly to the side of each scale, is
    above 0.5 there; the single token of a 1×1 scale is kept always. A token of a coarser scale so goes by the few
    finest tokens around its centre.
    rule "strict": at every scale a token is kept when less than half of the area that it covers is to be repainted,
    and of an image that is repainted altogether none is.

    Asking for no repainted pixel at all would redraw every coarse token, and with it the whole image, for the
    smallest spot. Raises RequestError for another mask or rule.
    """
    repaint = np.asarray(repaint_HW)
    if repaint.ndim != 2 or repaint.dtype != np.bool_ or 0 in repaint.shape:
        raise RequestError(
            f"the repaint mask is {repaint.dtype} {list(repaint.shape)}; give booleans of shape [H, W]"
        )
    if rule not in MASK_RULES:
        raise RequestError(f"there is no mask rule {rule!r}; choose {' or '.join(MASK_RULES)}")
    if rule == "strict":
        keep = [_cover(repaint, scale.side) < 0.5 for scale in scales]
    else:
        finest_SS = _cover(repaint, scales[-1].side) < 0.5
        keep = [_resized(finest_SS, scale.side) > 0.5 for scale in scales]
        keep = [part | (part.size == 1) for part in keep]
    return np.concatenate([part.reshape(-1) for part in keep])


def _resized(mask_NN: NDArray[np.bool_], side: int) -> NDArray[np.float32]:
    """A mask at another side, f32 [side, side]: bilinear, corners not aligned, no antialiasing.

    To the bit what PyTorch's `interpolate` gives on a CPU with fused multiply-add: at 16 → 13 and others many values
    are 0.5 up to the last bit, and fall where the published code has them fall.
    """
    N, ratio = len(mask_NN), np.float64(np.float32(len(mask_NN)) / np.float32(side))
    at = np.maximum(ratio * (np.arange(side) + 0.5) - 0.5, 0).astype(np.float32)
    low = np.minimum(at.astype(np.int64), N - 1)
    high, far = np.minimum(low + 1, N - 1), at - low.astype(np.float32)
    values, resized = mask_NN.astype(np.float32), np.zeros((side, side), np.float32)
    ends = ((low, np.float32(1) - far), (high, far))
    for rows, down in ends:
        for columns, across in ends:
            resized += down[:, None] * across * values[rows][:, columns]
    return resized


def _cover(mask_HW: NDArray[np.bool_], side: int) -> NDArray[np.float64]:
    """Share of each cell of a side × side grid that the mask covers, exact when the grid cuts through pixels."""
    rows, columns = (_overlap(side, length) for length in mask_HW.shape)
    return np.asarray(rows @ mask_HW.astype(np.float64) @ columns.T)


def _overlap(cells: int, pixels: int) -> NDArray[np.float64]:
    """[cells, pixels]: the share of each cell's length that each pixel takes; rows sum to 1."""
    edges, grid = np.arange(cells + 1) * (pixels / cells), np.arange(pixels + 1)
    shared = np.minimum(edges[1:, None], grid[None, 1:]) - np.maximum(edges[:-1, None], grid[None, :-1])
    return np.asarray(np.maximum(shared, 0) * (cells / pixels))
