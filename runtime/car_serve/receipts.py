"""What an image was made with: in the answer, and inside the PNG, so that the file alone restores everything."""

from __future__ import annotations

import json
from typing import Any

from car_runtime import __version__
from car_runtime.images import png_bytes
from car_runtime.receipt import receipts_of
from car_serve.jobs import Job
from car_serve.uploads import to_base64

PNG_LEVEL = 3
"""zlib's: half the time of the usual 6 for files 2 to 4 % larger, 8 % at 64×64."""


def receipt(job: Job, image: int) -> dict[str, Any]:
    """All settings of one image by the names of `generate`; sent again they make the same image.

    Where it is not the default branch at weight 1 that it follows, `branches` has each one's weight.
    """
    request, plan, model = job.request, job.plan, job.plan.manifest.model
    known = not request.classless
    weights = {control.branch: control.weight for control in request.controls}
    usual = not weights or weights == {model.default_branch or model.control_type: 1.0}
    name = model.names[request.label] if known and model.names else None
    return {
        "id": job.id,
        "index": image,
        "version": __version__,
        "plan": plan.manifest.name,
        "backend": plan.backend_name,
        "class": {"index": request.label, "name": name} if known else None,
        **({} if usual else {"branches": weights}),
        "seed": request.seeds[image],
        "cfg": request.sampling.cfg,
        "top_k": request.sampling.top_k,
        "top_p": request.sampling.top_p,
        **request.schedule.settings(),
        **({"more_smooth": True} if request.more_smooth else {}),
        **({"control_cfg": request.control_cfg} if request.control_cfg else {}),
        **({"edit": job.about["edit"]} if "edit" in job.about else {}),
    }


def png(job: Job, image: int) -> bytes:
    """A finished image as PNG, with its receipt as a text chunk.

    Next to it the runtime's own, which encloses the control map, for `car-run again`, `vary` and `restyle`.
    """
    pixels = job.images[image]
    if pixels is None:
        raise ValueError(f"image {image} of {job.id} is not finished")
    about: dict[str, object] = {
        "Software": f"car_runtime {__version__}",
        "receipt": json.dumps(receipt(job, image)),
    }
    about |= receipts_of(job.plan.manifest, job.request, job.tokens, {image: pixels})[0]
    profile = None if job.request.edit is None else job.request.edit.profile
    return png_bytes(pixels, about, profile, level=PNG_LEVEL)


def answer(job: Job) -> dict[str, Any]:
    """A job as JSON: its state, and what there is of its images."""
    images = [
        {"index": i, "seed": seed, "png": to_base64(png(job, i)), "receipt": receipt(job, i)}
        for i, seed in enumerate(job.request.seeds)
        if job.images[i] is not None
    ]
    return {
        "id": job.id,
        "state": job.state,
        "images": images,
        "warnings": job.about.get("warnings", []),
        "timings": {name: round(seconds, 6) for name, seconds in job.timings.items()},
        **({} if job.error is None else job.error.body()),
    }
