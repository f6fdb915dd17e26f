"""What stands before every route: who may ask, from where, how much; and what every answer carries.

Host and Origin are checked against DNS rebinding and other sites' pages; a token is asked for when one was set, which
any host but loopback needs. Bodies are counted as they come in, whatever their header says.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from car_serve.errors import ServeError
from car_serve.limits import Limits, RateLimit
from car_serve.metrics import Metrics

CSP = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
COOKIE = "car_token"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/health/live", "/health/ready")
"""Without a token: what an orchestrator asks."""
DRAWING = ("/v1/pictures", "/v1/controls", "/v1/images/generations", "/v1/images/edits")
"""What the rate limit counts."""


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware; see the module."""

    def __init__(
        self, app: ASGIApp, *, limits: Limits, metrics: Metrics, token: str | None, hosts: tuple[str, ...]
    ) -> None:
        """hosts: names that requests may come by; "*" for any, which only a token allows."""
        self._app, self._limits, self._metrics = app, limits, metrics
        self._token, self._hosts = token, hosts
        self._rate = RateLimit(limits.rate_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then let it through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = _Counted(receive, self._limits.max_body)
        status = 500
        started = False

        async def answer(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                _harden(MutableHeaders(scope=message), scope["path"])
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, counted, answer)
        except ServeError as error:
            if not started:
                await _refuse(error, answer)
        finally:
            route = getattr(scope.get("route", self), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        path: str = scope["path"]
        self._check_host(headers)
        if self._token is not None and path not in OPEN_PATHS and not self._has_token(headers):
            opening = path == "/" and b"token=" in scope.get("query_string", b"")
            if not opening:  # which checks the token itself, and sets the cookie
                raise ServeError(401, "no_token", "the token is missing or wrong; send Authorization: Bearer TOKEN")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > self._limits.max_body:
            self._metrics.rejected.labels("too_large").inc()
            raise _too_large(self._limits.max_body)
        if scope["method"] == "POST" and path in DRAWING:
            try:
                self._rate.take((scope.get("client") or ("", 0))[0])
            except ServeError:
                self._metrics.rejected.labels("rate").inc()
                raise

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if "*" not in self._hosts and name not in self._hosts:
            raise ServeError(
                403, "bad_host", f"the host {host[:80]!r} is not this server's; allow it with --allow-host"
            )
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host:
            raise ServeError(
                403, "bad_origin", f"the page {origin[:80]!r} is not this server's; open the studio here"
            )
        if headers.get("sec-fetch-site", "none") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            raise ServeError(403, "bad_origin", "another site's page asks; open the studio here")

    def _has_token(self, headers: Headers) -> bool:
        given = headers.get("authorization", "")
        token = given[7:] if given[:7].lower() == "bearer " else ""
        if not token:
            try:
                cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
            except CookieError:
                cookie = None
            token = cookie.value if cookie is not None else ""
        return same_token(token, self._token or "")


def _netloc(origin: str) -> str | None:
    """Host and port of an origin; None for what is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def same_token(given: str, wanted: str) -> bool:
    """Compare in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(), wanted.encode())


class _Counted:
    """Receives a body of at most so many bytes."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._left, self._most = receive, most, most

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise _too_large(self._most)
        return message


def _too_large(most: int) -> ServeError:
    return ServeError(413, "too_large", f"the body has over {most} bytes; send smaller images")


def _harden(headers: MutableHeaders, path: str) -> None:
    headers["Content-Security-Policy"] = CSP
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    headers["Cross-Origin-Resource-Policy"] = "same-origin"
    headers["X-Frame-Options"] = "DENY"
    if path.startswith("/v1/"):
        headers.setdefault("Cache-Control", "no-store")


async def _refuse(error: ServeError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
