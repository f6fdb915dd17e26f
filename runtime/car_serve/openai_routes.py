"""OpenAI's images API, such that the `openai` client works unchanged.

`prompt` is a class, by name or index; "" is no class. `image` of an edit is the control map or, with a `mask`, the
image to edit (its control is derived from it). Beyond OpenAI's fields: seed, cfg, top_k, top_p, control_strength,
and control or photo for generations, which the client sends by `extra_body`.
"""

from __future__ import annotations

import io
import re
from collections.abc import AsyncIterator
from time import time
from typing import Any, Literal

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from car_runtime import Plan
from car_runtime.images import png_bytes
from car_serve import receipts, uploads
from car_serve.edits import repaint_of
from car_serve.errors import bad_request
from car_serve.forms import EditForm, PictureForm, body_of, read_form
from car_serve.jobs import Job
from car_serve.own_routes import ERRORS
from car_serve.service import Service
from car_serve.streams import EventStream, event, wait_or_cancel

MAX_SIDE = 2048
"""Of an answer that is enlarged."""


class GenerationForm(BaseModel):
    """OpenAI's fields, of which those that mean nothing here are taken and left."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    prompt: str = Field(default="", max_length=1000, description="class, by name or index; empty: none")
    model: str | None = Field(default=None, max_length=200, description="plan, by name; names of no plan: the first")
    n: int | None = Field(default=None, ge=1, le=1024)
    size: str | None = Field(
        default=None, max_length=20, description="auto, the plan's own, or SIDExSIDE to enlarge to"
    )
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=16)
    control: str | None = Field(default=None, description="control map, base64")
    photo: str | None = Field(default=None, description="photo, base64")
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    cfg: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    control_strength: float | None = None


class EditsForm(GenerationForm):
    """The same with an image, and the mask of what to draw anew in it, transparent there."""

    image: str = Field(description="base64, or a file of a multipart body")
    mask: str | None = None


def router(service: Service) -> APIRouter:
    """The routes of a service."""
    routes = APIRouter(prefix="/v1", responses=ERRORS)

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The plans, in the form of OpenAI's list of models."""
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "car"} for name in service.names]
        return {"object": "list", "data": entries}

    @routes.post("/images/generations", openapi_extra=body_of(GenerationForm))
    async def generations(request: Request) -> Response:
        """Draw images of a class."""
        form = await read_form(request, GenerationForm)
        return await _run(service, request, form, "image_generation")

    @routes.post("/images/edits", openapi_extra=body_of(EditsForm))
    async def edits(request: Request) -> Response:
        """Draw images that follow an image, or draw a part of one anew."""
        form = await read_form(request, EditsForm)
        return await _run(service, request, form, "image_edit")

    return routes


async def _run(service: Service, request: Request, form: GenerationForm, kind: str) -> Response:
    side = _side(form.size)
    job = await to_thread.run_sync(_submit, service, form)
    if form.stream:
        events = _events(job, kind, side, form.partial_images or 0)
        return EventStream(events, job.cancel, service.limits.write_timeout)
    await wait_or_cancel(request, job)
    if job.error is not None:
        raise job.error
    return JSONResponse(await to_thread.run_sync(_answer, job, side, form.response_format))


def _submit(service: Service, form: GenerationForm) -> Job:
    plan = service.batcher(form.model if form.model in service.names else None).plan
    return service.submit(_our_form(plan, service.limits.max_pixels, form))


def _side(size: str | None) -> int | None:
    """The longer side of the answer in pixels; None: as the image is."""
    if size in (None, "", "auto"):
        return None
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size or "")
    if found is None or found[1] != found[2] or not 8 <= int(found[1]) <= MAX_SIDE:
        raise bad_request(f"size is {size!r}; give auto or a square such as 256x256, at most {MAX_SIDE}", "size")
    return int(found[1])


def _our_form(plan: Plan, max_pixels: int, form: GenerationForm) -> PictureForm:
    """The same request in our own fields."""
    model = plan.manifest.model
    settings: dict[str, Any] = {
        "plan": plan.manifest.name,
        "label": form.prompt.strip() or None,
        "n": form.n or 1,
        "previews": _partial(len(plan.manifest.scales), (form.partial_images or 0) if form.stream else 0),
        **{name: getattr(form, name) for name in ("seed", "cfg", "top_k", "top_p", "control_strength")},
        "control": form.control,
        "photo": form.photo,
    }
    if isinstance(form, EditsForm):
        if form.mask is not None:
            mask = uploads.decode(uploads.from_base64(form.mask, "mask"), "mask", max_pixels)
            repaint = repaint_of(mask, transparent=True)
            settings["edit"] = EditForm(image=form.image, mask=uploads.to_base64(png_bytes(_grey(repaint))))
            if form.control is None and form.photo is None and model.control_type is not None:
                settings |= {"photo": form.image, "fit": "stretch"}  # a map of all of the image
        elif model.control_type is None:
            raise bad_request("this plan follows no control image; send a mask to edit the image", "mask")
        else:
            settings["control"] = form.image
    elif form.control is None and form.photo is None and model.control_type is not None and plan.manifest.format == 1:
        # A map with nothing on it whose features do not count: as near as such a plan comes to a class alone.
        ground = model.convention.ground if model.convention is not None else (0, 0, 0)
        blank = np.broadcast_to(np.array(ground, np.uint8), (model.image_size, model.image_size, 3))
        settings |= {"control": uploads.to_base64(png_bytes(np.ascontiguousarray(blank))), "control_strength": 0.0}
    return PictureForm(**settings)


def _grey(mask_HW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.repeat(np.where(mask_HW, np.uint8(255), np.uint8(0))[..., None], 3, axis=2)


def _answer(job: Job, side: int | None, response_format: str | None) -> dict[str, Any]:
    data = []
    for i in range(len(job.images)):
        encoded = uploads.to_base64(_png(job, i, side))
        data.append(
            {"url": f"data:image/png;base64,{encoded}"} if response_format == "url" else {"b64_json": encoded}
        )
    about = {"size": _size(job.images[0], side), "output_format": "png", "usage": _usage(job)}
    return {"created": int(time()), "data": data, **about}


def _png(job: Job, image: int, side: int | None) -> bytes:
    """An image as it is, with its receipt, or resized without."""
    pixels = job.images[image]
    if pixels is None or side in (None, max(pixels.shape[:2])):
        return receipts.png(job, image)
    return _resized(pixels, side)


def _dimensions(pixels: NDArray[np.uint8] | None, side: int | None) -> tuple[int, int]:
    """Width and height of an answer."""
    height, width = (0, 0) if pixels is None else pixels.shape[:2]
    scale = 1.0 if side is None or pixels is None else side / max(height, width)
    return max(1, round(scale * width)), max(1, round(scale * height))


def _size(pixels: NDArray[np.uint8] | None, side: int | None) -> str:
    width, height = _dimensions(pixels, side)
    return f"{width}x{height}"


def _resized(pixels: NDArray[np.uint8], side: int | None) -> bytes:
    size = _dimensions(pixels, side)
    if size == pixels.shape[1::-1]:
        return png_bytes(pixels)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS).save(stream, "PNG")
    return stream.getvalue()


def _usage(job: Job) -> dict[str, Any]:
    """Tokens that were drawn."""
    drawn = int((job.tokens >= 0).sum())
    details = {"text_tokens": 0, "image_tokens": 0}
    return {"input_tokens": 0, "output_tokens": drawn, "total_tokens": drawn, "input_tokens_details": details}


async def _events(job: Job, kind: str, side: int | None, wanted: int) -> AsyncIterator[bytes]:
    """True states of the images on their way, `wanted` of each, then the finished ones."""
    about = {"quality": "auto", "background": "opaque", "output_format": "png"}
    partial = _partial(job.request.schedule.drawn, wanted)
    sent = 0
    async for _ in job.changes():
        while sent < len(job.scales):
            scale = job.scales[sent]
            sent += 1
            data: dict[str, Any] = {**about, "size": _size(scale.pixels, side), "created_at": int(time())}
            if scale.last:
                png = await to_thread.run_sync(_png, job, scale.image, side)
                done = {"type": f"{kind}.completed", "b64_json": uploads.to_base64(png), "usage": _usage(job)}
                yield event(f"{kind}.completed", done | data)
            elif scale.index in partial and scale.pixels is not None:
                png = await to_thread.run_sync(_resized, scale.pixels, side)
                data["partial_image_index"] = partial.index(scale.index)
                name = f"{kind}.partial_image"
                yield event(name, {"type": name, "b64_json": uploads.to_base64(png)} | data)
    if job.error is not None:
        yield event("error", {"type": "error", **job.error.body()})


def _partial(drawn: int, wanted: int) -> list[int]:
    """The scales that are sent before the last one, spread evenly."""
    count = min(wanted, drawn - 1)
    return [round((i + 1) * drawn / (count + 1)) - 1 for i in range(count)]
