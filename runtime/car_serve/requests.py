"""From the fields of a body to a job: images decoded, control derived, everything checked."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np

from car_runtime import GenerationConfig, Plan
from car_runtime.editing.edit import Edit
from car_runtime.images import png_bytes
from car_runtime.photo import control_of_photo
from car_runtime.request import resolve
from car_serve import uploads
from car_serve.edits import edit_of
from car_serve.errors import bad_request, over_http
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
    "control_cfg",
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
    edit = None if form.edit is None else edit_of(plan, results, limits, form.edit)
    control, warnings = _control(plan, limits, form, edit)
    settings = {name: getattr(form, name) for name in SETTINGS}
    settings |= {"label": form.label, "seed": secrets.randbelow(2**31) if form.seed is None else form.seed}
    about: dict[str, Any] = {}
    if form.edit is not None and edit is not None:
        settings["edit"] = edit
        about["edit"] = form.edit.model_dump(exclude={"image", "mask"}, exclude_none=True, exclude_defaults=True)
        if edit.extend is not None:
            about["edit"]["extend"] = list(edit.extend)
    request = resolve(plan.manifest, GenerationConfig(control=control, **settings))
    about["warnings"] = [*warnings, *request.warnings]
    scales = range(len(plan.manifest.scales)) if form.previews else ()
    previews = scales if isinstance(form.previews, bool) else frozenset(form.previews)
    return Job(request=request, plan=plan, previews=previews, about=about)


def _control(plan: Plan, limits: Limits, form: PictureForm, edit: Edit | None = None) -> tuple[Any, tuple[str, ...]]:
    """The control image, and warnings about the photo it is from."""
    if form.control is not None and form.photo is not None:
        raise bad_request("control and photo are both given; send one of them", "photo")
    param, given = ("control", form.control) if form.photo is None else ("photo", form.photo)
    if given is None or given == {}:
        return None, ()
    if isinstance(given, str):
        return _map(plan, limits, param, given, form.fit, edit)
    branches = plan.manifest.model.conventions
    for name in given:  # before any is decoded: a small body can hold many large images
        if name not in branches:
            known = ", ".join(branches) or "none"
            raise bad_request(f"there is no branch {name[:60]!r}; the plan has {known}", param)
    controls, said = {}, []
    for name, one in given.items():
        text, weight = (one, 1.0) if isinstance(one, str) else one
        image, warnings = _map(plan, limits, f"{param}.{name}", text, form.fit, edit, name)
        controls[name] = (image, weight)
        said += [warning if len(given) == 1 else f"{name}: {warning}" for warning in warnings]
    return controls, tuple(said)


def _map(
    plan: Plan,
    limits: Limits,
    param: str,
    text: str,
    fit: str | None,
    edit: Edit | None,
    branch: str | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """A map as it was sent, or made of a photo, and warnings about that."""
    image = uploads.decode(uploads.from_base64(text, param), param, limits.max_pixels)
    if param.startswith("control"):
        return image, ()
    made, warnings = control_of_photo(image, plan.manifest, branch=branch, fit=fit, edit=edit)
    return made, tuple(map(over_http, warnings))


def map_of(plan: Plan, limits: Limits, form: ControlForm) -> dict[str, Any]:
    """The control map that a plan would follow, as base64 PNG, and what is probably wrong with it."""
    if bool(form.photo) == bool(form.control):
        raise bad_request("there is nothing to make a map of; send exactly one of photo and control", "photo")
    asked = PictureForm.model_validate(form.model_dump(include={"photo", "control", "fit"}))
    made, said = _control(plan, limits, asked)
    model = plan.manifest.model
    request = resolve(plan.manifest, GenerationConfig(control=made, fit=form.fit))
    if request.control is None:
        raise bad_request("this plan follows no control; draw without one", "plan")
    if len(request.controls) > 1:
        raise bad_request("several branches are named; ask for the map of one at a time", "control")
    branch = request.controls[0].branch
    pixels = np.array(request.control, np.uint8)
    warnings = [*said, *request.warnings]
    if form.invert:
        pixels = 255 - pixels
        warnings = list(resolve(plan.manifest, GenerationConfig(control={branch: pixels})).warnings)
    return {
        "control": uploads.to_base64(png_bytes(pixels)),
        "type": model.branches[branch].control_type if model.branches else model.control_type,
        "size": len(pixels),
        "warnings": warnings,
    }
