"""From the fields of a body to a job: images decoded, control derived, everything checked."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
from PIL import Image

from car_runtime import GenerationConfig, Plan
from car_runtime.images import png_bytes
from car_runtime.photo import control_of_photo
from car_runtime.request import resolve
from car_serve import uploads
from car_serve.edits import edit_of
from car_serve.errors import bad_request
from car_serve.forms import ControlForm, PictureForm
from car_serve.jobs import Job, Results
from car_serve.limits import Limits

SETTINGS = (
    "n",
    "cfg",
    "top_k",
    "top_p",
    "preset",
    "more_smooth",
    "cfg_scales",
    "control_scales",
    "control_strength",
    "stop_after",
    "fit",
)
"""Fields that go to `GenerationConfig` as they are."""


def job_of(plan: Plan, results: Results, limits: Limits, form: PictureForm) -> Job:
    """A job that the engine can draw. Raises ServeError, RequestError, ImageError."""
    if form.n > limits.max_images:
        raise bad_request(f"n is {form.n}; this server draws at most {limits.max_images} at once", "n")
    control, warnings = _control(plan, limits, form)
    settings = {name: getattr(form, name) for name in SETTINGS}
    settings |= {"label": form.label, "seed": secrets.randbelow(2**31) if form.seed is None else form.seed}
    about: dict[str, Any] = {}
    if form.edit is not None:
        edit = edit_of(plan, results, limits, form.edit)
        settings["edit"] = edit
        about["edit"] = form.edit.model_dump(exclude={"image", "mask"}, exclude_none=True, exclude_defaults=True)
        if edit.extend is not None:
            about["edit"]["extend"] = list(edit.extend)
    request = resolve(plan.manifest, GenerationConfig(control=control, **settings))
    about["warnings"] = [*warnings, *request.warnings]
    scales = range(len(plan.manifest.scales)) if form.previews else ()
    previews = scales if isinstance(form.previews, bool) else frozenset(form.previews)
    return Job(request=request, plan=plan, previews=previews, about=about)


def _control(plan: Plan, limits: Limits, form: PictureForm) -> tuple[Any, tuple[str, ...]]:
    """The control image, and warnings about the photo it is from."""
    given = form.control
    if form.photo is not None:
        if given is not None:
            raise bad_request("control and photo are both given; send one of them", "photo")
        photo = uploads.decode(uploads.from_base64(form.photo, "photo"), "photo", limits.max_pixels)
        return control_of_photo(photo, plan.manifest, fit=form.fit)
    if given is None or given == {}:
        return None, ()
    if isinstance(given, dict):
        branches = plan.manifest.model.conventions
        for name in given:  # before any is decoded: a small body can hold many large images
            if name not in branches:
                known = ", ".join(branches) or "none"
                raise bad_request(f"there is no branch {name[:60]!r}; the plan has {known}", "control")
        return {name: _map(limits, text, f"control.{name[:40]}") for name, text in given.items()}, ()
    return _map(limits, given, "control"), ()


def _map(limits: Limits, text: str, param: str) -> Image.Image:
    return uploads.decode(uploads.from_base64(text, param), param, limits.max_pixels)


def map_of(plan: Plan, limits: Limits, form: ControlForm) -> dict[str, Any]:
    """The control map that a plan would follow, as base64 PNG, and what is probably wrong with it."""
    if (form.photo is None) == (form.control is None):
        raise bad_request("there is nothing to make a map of; send exactly one of photo and control", "photo")
    asked = PictureForm(photo=form.photo, control=form.control, fit=form.fit)
    made, said = _control(plan, limits, asked)
    request = resolve(plan.manifest, GenerationConfig(control=made, fit=form.fit))
    if request.control is None:
        raise bad_request("this plan follows no control; draw without one", "plan")
    pixels = np.array(request.control, np.uint8)
    warnings = [*said, *request.warnings]
    if form.invert:
        pixels = 255 - pixels
        warnings = list(resolve(plan.manifest, GenerationConfig(control=pixels)).warnings)
    return {
        "control": uploads.to_base64(png_bytes(pixels)),
        "type": plan.manifest.model.control_type,
        "size": len(pixels),
        "warnings": warnings,
    }
