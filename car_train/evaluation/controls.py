"""The control of a drawn image, derived from the image as it was from real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from car_train.conventions import ControlConvention, convention
from car_train.data.annotate import make_annotator
from car_train.data.controls import NEEDS_ALPHA, make_control
from car_train.data.pretrained import DEFAULT_ROOT as WEIGHTS_ROOT
from car_train.data.pretrained import PACKAGES
from car_train.evaluation.options import EvalOptions

WHITE_DIFFERENCE = 16
"""Grey levels of the strongest channel by which a pixel differs from white ground; decoders leave smaller ones."""

Pixels = NDArray[np.uint8]
Maker = Callable[[Sequence[Pixels]], list[Pixels]]


def silhouette(rgb: Pixels, difference: int = WHITE_DIFFERENCE) -> NDArray[np.bool_]:
    """Where an image on white shows its object, bool [H, W]: all but the white that is connected with the border.

    rgb: uint8 [H, W, 3]. difference: grey levels by which some channel must differ from white.
    """
    white = np.pad((255 - rgb.min(2) < difference).astype(np.uint8), 1, constant_values=1)
    areas = cv2.connectedComponents(white, connectivity=4)[1]
    return (areas != areas[0, 0])[1:-1, 1:-1]


def control_maker(control: str | ControlConvention, options: EvalOptions) -> tuple[Maker, str]:
    """(images uint8 [H, W, 3] → their controls uint8 [H, W, 3]; in words, how these are made).

    control: a convention or the name of a preset.
    With `annotator_onnx`: that network. HED controls that were given as files (`control_root`) are compared with
    those of the real HED network, if its weights are there; all others with what `car_train.data.controls` makes,
    which is what made them.
    Raises AnnotatorError.
    """
    how = convention(control)
    control_type = how.control_type
    published = WEIGHTS_ROOT.expanduser() / PACKAGES["hed"].file
    by_hed = control_type == "hed" and options.control_root is not None and published.is_file()
    if options.annotator_onnx is not None or by_hed:
        annotator = make_annotator(
            control_type,
            onnx=options.annotator_onnx,
            threads=torch.get_num_threads(),
            convention=how,
        )
        return annotator.batch, options.annotator_onnx.name if options.annotator_onnx else "the HED network"
    if control_type in NEEDS_ALPHA:
        about = (
            f"geometry of the silhouette: what differs from white by {WHITE_DIFFERENCE} grey levels or is enclosed"
        )
        return lambda images: [make_control(_with_alpha(p), how) for p in images], about
    about = "car_train.data.controls" + (
        ", an approximation of HED without its network" if control_type == "hed" else ""
    )
    return lambda images: [make_control(p, how) for p in images], about


def _with_alpha(rgb: Pixels) -> Pixels:
    return np.dstack([rgb, silhouette(rgb).astype(np.uint8) * 255])
