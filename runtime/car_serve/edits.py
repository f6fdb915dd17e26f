"""From the field `edit` of a request to the runtime's `Edit`: which image is changed, and what of it is drawn anew.

- scale: the coarse scales 0 … `scale` are kept, the finer ones drawn anew (branch; with another class, restyle).
- mask: what is light in the mask is drawn anew, the other pixels stay (in-paint).
- frame: the image goes into a smaller frame of a new, larger square (extend).
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from car_runtime import CarError, Plan
from car_runtime.editing.edit import MASK_LEVEL, Edit
from car_runtime.images import on_ground, text_chunks
from car_runtime.receipt import receipt_of
from car_serve.errors import bad_request
from car_serve.forms import EditForm
from car_serve.jobs import Job, Results
from car_serve.limits import Limits
from car_serve.uploads import check_size, decode, from_base64


def edit_of(plan: Plan, results: Results, limits: Limits, form: EditForm) -> Edit:
    """The edit that a form asks for. Raises ServeError, ImageError."""
    if sum(part is not None for part in (form.scale, form.mask, form.frame)) != 1:
        raise bad_request("edit is unclear; give exactly one of scale, mask and frame", "edit")
    if (form.id is None) == (form.image is None):
        raise bad_request("edit has no source; give exactly one of id and image", "edit")
    if form.scale is not None:
        return _branch(plan, results, limits, form, form.scale)
    image = _image(plan, results, limits, form)
    if form.frame is not None:
        return Edit(image=image, extend=_margins(image, form.frame, limits.max_pixels), rule=form.rule)  # type: ignore[arg-type]
    mask = decode(from_base64(form.mask or "", "edit.mask"), "edit.mask", limits.max_pixels)
    light = Image.fromarray(repaint_of(mask)).resize(image.size, Image.Resampling.NEAREST)
    if not np.asarray(light).any():
        raise bad_request("the mask marks nothing; paint what is to be drawn anew", "edit.mask")
    return Edit(image=image, mask=light.convert("L"), rule=form.rule)  # type: ignore[arg-type]  # checked there


def repaint_of(mask: Image.Image, *, transparent: bool = False) -> NDArray[np.bool_]:
    """The pixels to draw anew, bool [H, W]: where a mask is light, or (OpenAI's way) where it is transparent."""
    if transparent:
        if mask.mode != "RGBA":
            raise bad_request("mask has no transparent pixels; make those transparent that are to be drawn", "mask")
        return np.asarray(mask.getchannel("A")) < MASK_LEVEL
    return np.asarray(on_ground(mask, (0, 0, 0)).convert("L")) >= MASK_LEVEL


def _branch(plan: Plan, results: Results, limits: Limits, form: EditForm, scale: int) -> Edit:
    """Tokens that are kept are exact where they are known, of an earlier result or from a PNG's receipt.

    Else, and of an image that was put back into a photo, they are the encoder's. With the last scale nothing is drawn
    anew: that shows the scales of a PNG again.
    """
    scales, size = plan.manifest.scales, plan.manifest.model.image_size
    if not 0 <= scale < len(scales):
        raise bad_request(f"edit.scale is {scale}; give 0…{len(scales) - 1}, the last scale to keep", "edit.scale")
    if form.id is None:
        tokens_L, part = _receipt_tokens(plan, limits, from_base64(form.image or "", "edit.image"))
    else:
        job = _earlier(plan, results, form, form.id)
        tokens_L, part = job.tokens[form.index].copy(), job.request.edit is not None and not job.request.edit.whole
        if (tokens_L[: scales[scale].stop] < 0).any():
            raise bad_request("the result was not drawn as far as that; choose a coarser scale", "edit.scale")
    if tokens_L is None or (part and scale < len(scales) - 1):
        return Edit(image=_image(plan, results, limits, form), from_scale=scale + 1)
    # The tokens say it all: a result may be branched before it is finished.
    return Edit(image=Image.new("RGB", (size, size)), from_scale=scale + 1, tokens=tokens_L)


def _receipt_tokens(plan: Plan, limits: Limits, data: bytes) -> tuple[NDArray[np.int64] | None, bool]:
    """Tokens [L] of a PNG of this very plan, if it has them, and whether it was put back into a photo.

    Of one that was changed after it was drawn there are none.
    """
    check_size(data, "edit.image", limits.max_pixels)
    try:
        receipt = receipt_of(text_chunks(io.BytesIO(data)), plan.manifest)
    except CarError:
        return None, False
    if receipt is None or not receipt.is_of(decode(data, "edit.image", limits.max_pixels)):
        return None, False
    return receipt.tokens, receipt.settings.get("edit") == "part"


def _image(plan: Plan, results: Results, limits: Limits, form: EditForm) -> Image.Image:
    if form.id is None:
        return decode(from_base64(form.image or "", "edit.image"), "edit.image", limits.max_pixels)
    pixels = _earlier(plan, results, form, form.id).images[form.index]
    if pixels is None:
        raise bad_request("the result has no finished image; edit one that was drawn to the end", "edit.id")
    return Image.fromarray(pixels)


def _earlier(plan: Plan, results: Results, form: EditForm, id: str) -> Job:
    """An earlier result of this plan that has the image. Raises ServeError."""
    job = results.find(id)
    name = job.plan.manifest.name
    if name != plan.manifest.name:
        raise bad_request(f"the result is of the plan {name!r}; edit it with that one", "edit.id")
    if not 0 <= form.index < len(job.images):
        raise bad_request(f"edit.index is {form.index}; the result has images 0…{len(job.images) - 1}", "edit.index")
    return job


def _margins(
    image: Image.Image, frame: tuple[float, float, float, float], max_pixels: int
) -> tuple[int, int, int, int]:
    """Pixels of the image that the new square goes beyond it: left, top, right, bottom."""
    left, top, right, bottom = frame
    if not (left < right and top < bottom):
        raise bad_request(f"edit.frame is {list(frame)}; give left < right and top < bottom in 0…1", "edit.frame")
    side = image.width / (right - left)
    if abs(image.height - side * (bottom - top)) > 0.02 * image.height + 1:
        raise bad_request(
            f"edit.frame {list(frame)} has not the image's shape; keep its width ÷ height", "edit.frame"
        )
    if side * side > max_pixels:
        raise bad_request(
            f"edit.frame makes the image {side:.0f}×{side:.0f}, over {max_pixels} pixels; send a smaller one",
            "edit.frame",
        )
    before, above = round(left * side), round(top * side)
    after, below = (
        max(0, round(side) - start - own) for start, own in ((before, image.width), (above, image.height))
    )
    if not any((before, above, after, below)):
        raise bad_request("edit.frame covers the whole square; leave room to draw in", "edit.frame")
    return before, above, after, below
