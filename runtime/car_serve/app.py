"""The application: every route around one `Service`.

app = create_app([open_plan("d16.plan")])      # uvicorn, hypercorn, or inside a Ray replica
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

from car_runtime import CarError, Plan, __version__
from car_serve import openai_routes, ops_routes, own_routes
from car_serve.errors import ServeError, served
from car_serve.forms import ControlForm, PictureForm
from car_serve.limits import Limits
from car_serve.security import LOOPBACK, Guard
from car_serve.service import Service

if TYPE_CHECKING:
    from car_runtime.format.manifest import Manifest

log = logging.getLogger("car_serve")
SWITCH = 0.0005
"""Seconds after which Python's threads take turns. By default 5 ms, a third of what the first scale of the 64×64
plan takes; an event would wait that long for the engine's thread."""
FORMS = (PictureForm, ControlForm, openai_routes.GenerationForm, openai_routes.EditsForm)


def create_app(
    plans: Sequence[Plan],
    limits: Limits | None = None,
    *,
    token: str | None = None,
    hosts: tuple[str, ...] = LOOPBACK,
    shelf: Mapping[str, Manifest] | None = None,
) -> FastAPI:
    """An application that draws with these plans, and closes them when it ends.

    token: asked of every request but health's. hosts: names it answers to; "*" for any, with a token.
    shelf: plans that are opened when they are asked for, by `opener` of the `Service`, which is `app.state.service`.
    """
    service = Service(plans, limits or Limits(), shelf=shelf or {})

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        before = sys.getswitchinterval()
        sys.setswitchinterval(min(before, SWITCH))
        for batcher in list(service.batchers.values()):
            await own_routes.warm_up(service, batcher)
        if service.opener is not None:
            await to_thread.run_sync(service.batcher, None)
        service.ready = True
        try:
            yield
        finally:
            await to_thread.run_sync(service.close)
            sys.setswitchinterval(before)

    app = FastAPI(title="car-serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(own_routes.router(service))
    app.include_router(openai_routes.router(service))
    app.include_router(ops_routes.router(service, token))
    if ops_routes.STUDIO.is_dir():
        app.mount("/studio", StaticFiles(directory=ops_routes.STUDIO), name="studio")
    app.add_middleware(Guard, limits=service.limits, metrics=service.metrics, token=token, hosts=hosts)
    for kind in (ServeError, CarError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


async def _answer(_: Request, error: Exception) -> Response:
    """Every error in one form."""
    if isinstance(error, HTTPException):
        text = f"{error.detail}; see /openapi.json for the routes"
        answer = ServeError(error.status_code, "http_error", text)
        return JSONResponse(answer.body(), error.status_code, headers=error.headers)
    if isinstance(error, RequestValidationError):
        answer = ServeError(422, "bad_field", "the address or its query is malformed; see /openapi.json")
    else:
        answer = served(error)
    if answer.status >= 500 and not isinstance(error, ServeError):
        log.error("a request failed", exc_info=error)
    return JSONResponse(answer.body(), answer.status, headers=answer.headers())


def _document(app: FastAPI) -> dict[str, object]:
    """The OpenAPI document, with the bodies that the routes read themselves."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, forms = models_json_schema(
            [(form, "validation") for form in FORMS], ref_template="#/components/schemas/{model}"
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(forms["$defs"])
        app.openapi_schema = document
    return app.openapi_schema
