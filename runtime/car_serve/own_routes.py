"""Our own routes: capabilities, control maps, images with every scale as it is drawn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from car_runtime.images import png_bytes
from car_serve import receipts
from car_serve.batcher import Batcher
from car_serve.capabilities import capabilities
from car_serve.errors import ServeError
from car_serve.forms import ControlForm, PictureForm, body_of, read_form
from car_serve.jobs import Job, ScaleEvent
from car_serve.requests import job_of, map_of
from car_serve.service import Service
from car_serve.streams import EventStream, event, wait_or_cancel
from car_serve.uploads import to_base64

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": "refused: what, value and remedy as JSON"}
    for status in (400, 404, 413, 415, 422, 429, 503)
}


def router(service: Service) -> APIRouter:
    """The routes of a service."""
    routes = APIRouter(prefix="/v1", responses=ERRORS)

    @routes.get("/capabilities")
    async def get_capabilities() -> dict[str, Any]:
        """What can be asked of this server."""
        return capabilities(service)

    @routes.post("/controls", openapi_extra=body_of(ControlForm))
    async def make_control(request: Request) -> dict[str, Any]:
        """The control map that a plan would follow, from a photo or a map."""
        form = await read_form(request, ControlForm)
        return await to_thread.run_sync(lambda: map_of(service.batcher(form.plan).plan, service.limits, form))

    @routes.post("/pictures", openapi_extra=body_of(PictureForm))
    async def draw(request: Request) -> Response:
        """Draw images. As events with `Accept: text/event-stream`, else one JSON answer at the end."""
        form = await read_form(request, PictureForm)
        stream = wants_events(request)
        if not stream:
            form.previews = False
        job = await to_thread.run_sync(service.submit, form)
        if stream:
            return _stream(service, job, cancel=True)
        await wait_or_cancel(request, job)
        return await _answer(job)

    @routes.get("/pictures/{id}")
    async def find(id: str, request: Request) -> Response:
        """A result that is kept: all its events again, or its state as JSON."""
        job = service.results.find(id)
        if wants_events(request):
            return _stream(service, job, cancel=False)
        return await _answer(job, whole=False)

    @routes.delete("/pictures/{id}")
    async def cancel(id: str) -> dict[str, Any]:
        """Stop drawing, within one scale."""
        job = service.results.find(id)
        finished = job.finished
        job.cancel()
        return {"id": job.id, "state": job.state if finished else "cancelling"}

    return routes


async def warm_up(service: Service, batcher: Batcher) -> None:
    """Draw two images with a plan, one with guidance, all the way to their last event.

    What engine and libraries do only once, 500 ms of the 64×64 plan, is done before anyone waits for it.
    """
    name, model = batcher.name, batcher.plan.manifest.model
    control = None
    if model.control_type is not None:
        lines = np.zeros((model.image_size, model.image_size, 3), np.uint8)
        lines[model.image_size // 4 :: 8] = 255
        control = to_base64(png_bytes(lines))
    for cfg in (1.0, 0.0):
        form = PictureForm.model_validate({"plan": name, "control": control, "class": 0, "cfg": cfg})
        job = await to_thread.run_sync(job_of, batcher.plan, service.results, service.limits, form)
        batcher.submit(job)
        async for _ in _events(job):
            pass
        if job.error is not None:
            raise job.error
    service.metrics.forget(name)


def wants_events(request: Request) -> bool:
    """Whether the caller reads server-sent events."""
    return "text/event-stream" in request.headers.get("accept", "")


async def _answer(job: Job, *, whole: bool = True) -> Response:
    """A job as JSON; `whole`: one that failed is an error of the call."""
    if whole and job.error is not None:
        raise job.error
    if whole and not job.finished:  # the caller has left, and reads this no more
        raise ServeError(499, "cancelled", "the caller left; send it again")
    return JSONResponse(await to_thread.run_sync(receipts.answer, job))


def _stream(service: Service, job: Job, *, cancel: bool) -> EventStream:
    """A job's events from its first one on. `cancel`: a reader that leaves takes the job along."""
    return EventStream(_events(job), job.cancel if cancel else lambda: None, service.limits.write_timeout)


async def _events(job: Job) -> AsyncIterator[bytes]:
    about = {"id": job.id, "place": job.place, "seeds": list(job.request.seeds), "warnings": job.about["warnings"]}
    yield event("queued", about)
    sent = 0
    async for _ in job.changes():
        while sent < len(job.scales):
            scale = job.scales[sent]
            # The first one is encoded by now: a thread would cost more than it saves.
            yield _scale(job, scale) if scale.index == 0 else await to_thread.run_sync(_scale, job, scale)
            sent += 1
            if scale.last:
                yield await to_thread.run_sync(_finished, job, scale.image)
    if job.error is not None:
        yield event("error", {"id": job.id, "status": job.error.status, **job.error.body()["error"]})
    else:
        timings = {name: round(seconds, 6) for name, seconds in job.timings.items()}
        yield event("done", {"id": job.id, "timings": timings, "warnings": job.about["warnings"]})


def _scale(job: Job, scale: ScaleEvent) -> bytes:
    place = job.plan.manifest.scales[scale.index]
    data: dict[str, Any] = {
        "id": job.id,
        "image": scale.image,
        "index": scale.index,
        "side": place.side,
        "last": scale.last,
        "tokens": job.tokens[scale.image, place.start : place.stop].tolist(),
        "seconds": round(scale.seconds, 6),
    }
    if scale.index in job.previews and scale.webp is not None:
        data["preview"] = to_base64(scale.webp)
    return event("scale", data)


def _finished(job: Job, image: int) -> bytes:
    data = {
        "id": job.id,
        "image": image,
        "seed": job.request.seeds[image],
        "png": to_base64(receipts.png(job, image)),
        "receipt": receipts.receipt(job, image),
    }
    return event("picture", data)
