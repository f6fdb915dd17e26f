"""Edits by tokens that are kept: branch at a scale, in-paint, extend. What a later `GenerationConfig.edit` will do.

- branch: the coarse scales 0 … `scale` of an earlier result (or of an image, encoded), the finer ones drawn anew.
  With another class this is a restyle.
- paint: an image and a mask; tokens outside the mask are kept.
- extend: an image put into a smaller frame of the square; what is outside is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from car_runtime import Plan
from car_runtime.images import WHITE, fitted, on_ground
from car_serve.errors import bad_request
from car_serve.jobs import Results


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What is kept of what. Exactly one of `scale`, `mask` and `frame` says how; one of `id` and `image` of what."""

    id: str | None = None
    """An earlier result."""
    index: int = 0
    """Which of its images."""
    image: Image.Image | None = None
    scale: int | None = None
    """The last scale that is kept."""
    mask: NDArray[np.bool_] | None = None
    """bool [H, W], true where the image is drawn anew."""
    frame: tuple[float, float, float, float] | None = None
    """Left, top, right, bottom of where the image goes, shares of the new square, 0…1."""
    rule: str = "published"


def repaint_of(mask: Image.Image, *, transparent: bool = False) -> NDArray[np.bool_]:
    """The pixels to draw anew, bool [H, W]: where a mask is light, or (OpenAI's way) where it is transparent."""
    if transparent:
        if mask.mode != "RGBA":
            raise bad_request("mask has no transparent pixels; make those transparent that are to be drawn", "mask")
        return np.asarray(mask.getchannel("A")) < 128
    return np.asarray(on_ground(mask, (0, 0, 0)).convert("L")) >= 128


def keep(plan: Plan, results: Results, edit: Edit) -> dict[str, Any]:
    """`known_tokens` and `known_mask` of an edit, as settings. Raises ServeError, RequestError."""
    if sum(part is not None for part in (edit.scale, edit.mask, edit.frame)) != 1:
        raise bad_request("edit is unclear; give exactly one of scale, mask and frame", "edit")
    if (edit.id is None) == (edit.image is None):
        raise bad_request("edit has no source; give exactly one of id and image", "edit")
    if edit.frame is not None:
        return _extended(plan, results, edit, edit.frame)
    tokens = _tokens(plan, results, edit)
    if edit.mask is not None:
        if not edit.mask.any():
            raise bad_request("the mask marks nothing; paint what is to be drawn anew", "edit.mask")
        known = plan.known_mask(edit.mask, rule=edit.rule)  # type: ignore[arg-type]  # checked there
    else:
        scales = plan.manifest.scales
        if edit.scale is None or not 0 <= edit.scale < len(scales) - 1:
            raise bad_request(
                f"edit.scale is {edit.scale}; give 0…{len(scales) - 2}, the last scale to keep", "edit.scale"
            )
        known = np.arange(plan.manifest.tokens) < scales[edit.scale].stop
    if (tokens[known] < 0).any():
        raise bad_request("the result was not drawn as far as that; choose a coarser scale", "edit")
    return {"known_tokens": tokens, "known_mask": known}


def _tokens(plan: Plan, results: Results, edit: Edit) -> NDArray[np.int64]:
    """int64 [L]: a result's own tokens, which are exact, or those of the encoder."""
    if edit.id is None:
        return np.asarray(plan.encode(edit.image)[0])  # type: ignore[arg-type]  # one of the two is there
    job = results.find(edit.id)
    if job.plan != plan.manifest.name:
        raise bad_request(f"the result is of the plan {job.plan!r}; edit it with that one", "edit.id")
    if not 0 <= edit.index < len(job.images):
        raise bad_request(f"edit.index is {edit.index}; the result has images 0…{len(job.images) - 1}", "edit.index")
    return job.tokens[edit.index].copy()


def _extended(plan: Plan, results: Results, edit: Edit, frame: tuple[float, float, float, float]) -> dict[str, Any]:
    size = plan.manifest.model.image_size
    left, top, right, bottom = (round(share * size) for share in frame)
    if not (0 <= left < right <= size and 0 <= top < bottom <= size):
        raise bad_request(f"edit.frame is {list(frame)}; give left < right and top < bottom in 0…1", "edit.frame")
    if (left, top, right, bottom) == (0, 0, size, size):
        raise bad_request("edit.frame covers the whole square; leave room to draw in", "edit.frame")
    image = edit.image
    if image is None:
        pixels = results.find(edit.id or "").images[edit.index if edit.index >= 0 else 0]
        if pixels is None:
            raise bad_request("the result has no finished image; extend one that was drawn to the end", "edit.id")
        image = Image.fromarray(pixels)
    inner = fitted(on_ground(image, WHITE), size, "crop", WHITE).resize(
        (right - left, bottom - top), Image.Resampling.LANCZOS
    )
    # The margin continues the image's edge, so that coarse tokens of the border are near what they will be.
    pad = ((top, size - bottom), (left, size - right), (0, 0))
    canvas = np.pad(np.asarray(inner, np.uint8), pad, mode="edge")
    repaint = np.ones((size, size), np.bool_)
    repaint[top:bottom, left:right] = False
    known = plan.known_mask(repaint, rule=edit.rule)  # type: ignore[arg-type]  # checked there
    return {"known_tokens": plan.encode(canvas)[0], "known_mask": known}
