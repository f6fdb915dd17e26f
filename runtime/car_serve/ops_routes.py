"""Health, metrics and the studio's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response

from car_serve.errors import ServeError
from car_serve.security import COOKIE, same_token
from car_serve.service import Service

STUDIO = Path(__file__).parent / "studio"


def router(service: Service, token: str | None) -> APIRouter:
    """The routes of a service."""
    routes = APIRouter()

    @routes.get("/health/live")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "live"}

    @routes.get("/health/ready", responses={503: {"description": "warming up or draining"}})
    async def ready() -> Response:
        """Whether to send requests here: warmed up, not draining, every engine thread alive."""
        alive = all(batcher.alive for batcher in list(service.batchers.values()))
        status = "draining" if service.draining else "ready" if service.ready and alive else "starting"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/", include_in_schema=False)
    async def studio(request: Request) -> Response:
        """The studio; with `?token=` it is remembered in a cookie first."""
        given = request.query_params.get("token")
        if token is not None and given is not None:
            typed = given.replace(" ", "+")  # a + in an address is read as a space, which no token has
            if not same_token(typed, token):
                raise ServeError(401, "no_token", "the token is wrong; look into the token file")
            answer: Any = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return answer  # type: ignore[no-any-return]
        if not (STUDIO / "index.html").is_file():
            raise ServeError(
                404, "no_studio", "this installation has no studio; see /v1/capabilities and /openapi.json"
            )
        return FileResponse(STUDIO / "index.html", headers={"Cache-Control": "no-cache"})

    return routes
