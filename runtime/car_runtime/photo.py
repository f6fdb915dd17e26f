"""The control map of a photo, as a plan's convention has it: derived here, or by a network of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.control_checks import CROPPED, aspect_warning, prepare_control
from car_runtime.controls import derive
from car_runtime.conventions import ControlConvention
from car_runtime.editing.edit import Edit, prepare
from car_runtime.errors import ImageError, RequestError
from car_runtime.format.manifest import Manifest
from car_runtime.images import WHITE, Source, open_image
from car_runtime.request import check_fit, check_threads

WITHOUT_NETWORK = frozenset({"canny", "soft-hed", "dome", "dodge"})
"""Annotators that are here, and no network."""


def control_of_photo(
    photo: Source,
    manifest: Manifest,
    *,
    branch: str | None = None,
    fit: str | None = None,
    annotator: str | Path | None = None,
    threads: int | None = None,
    edit: Edit | None = None,
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """The map, uint8 [S, S, 3], and warnings about the photo.

    branch: for which of the plan's branches; None for the default one. annotator: ONNX file of a network with its
    description next to it (`annotator.open_annotator`); None derives the map by arithmetic. edit: what is done with
    the photo; where a part is drawn anew, the map is of the square that the model sees, whatever `fit`, in its place
    in the frame, uint8 [H, W, 3]. Raises ImageError, RequestError.
    """
    model, size = manifest.model, manifest.model.image_size
    convention = model.convention if branch is None else model.conventions.get(branch)
    if convention is None:
        raise ImageError(
            f"{branch or model.control_type!r} cannot be derived from a photo; give the control image with --control"
        )
    settings: dict[str, Any] = {"annotator": annotator, "threads": threads}
    if edit is None or not edit.is_part:
        return map_of_photo(photo, convention, size, fit=fit, **settings)
    image, frame = open_image(photo), prepare(manifest, edit).frame
    made, said = map_of_photo(frame.cut_alike(image, WHITE), convention, size, **settings)
    return frame.put_alike(made, image, convention.ground), said


def map_of_photo(
    photo: Source,
    convention: ControlConvention,
    size: int,
    *,
    fit: str | None = None,
    annotator: str | Path | None = None,
    threads: int | None = None,
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """The same for a convention and a side in pixels."""
    check_fit(fit)
    check_threads(threads)
    image = open_image(photo)
    fit = fit or convention.fit
    warnings = [aspect_warning("photo", image.size, size, fit, 1 if fit == "stretch" else CROPPED)]
    if annotator is not None:
        from car_runtime.annotator import open_annotator

        made = open_annotator(annotator, convention, threads=threads)(image, size, fit)
    else:
        made = derive(image, convention, size, fit=fit)
        if convention.annotator not in WITHOUT_NETWORK:
            warnings.append(
                f"{convention.control_type} maps of this plan are those of the network {convention.annotator!r}, and "
                "this one is derived without it; give it with --annotator"
            )
    return made, tuple(warning for warning in warnings if warning)


def converted_map(
    source: Source, given: ControlConvention, wanted: ControlConvention, size: int, *, fit: str | None = None
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """A map of one convention as one of another of the same type: polarity and axes; uint8 [S, S, 3], and warnings.

    Raises ImageError, RequestError: a map of another type.
    """
    check_fit(fit)
    if given.control_type != wanted.control_type:
        raise RequestError(
            f"a map of {given.control_type!r} cannot become one of {wanted.control_type!r}; make it of the photo"
        )
    square, warnings = prepare_control(open_image(source), given, size, fit or wanted.fit)
    pixels = np.array(square, np.uint8)
    if given.polarity != wanted.polarity:
        pixels = 255 - pixels
    for channel, (of, to) in enumerate(zip(given.axes, wanted.axes, strict=True)):
        if of != to:
            pixels[..., channel] = 255 - pixels[..., channel]
    return pixels, warnings
