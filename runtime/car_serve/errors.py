"""What a client is answered when something goes wrong: a status, what it is about, and what to do."""

from __future__ import annotations

from typing import Any

from car_runtime import CarError, UserError
from car_runtime.errors import error_line

REMEDIES = {
    "--list-classes shows them": "/v1/capabilities lists them",
    "see --list-classes": "/v1/capabilities lists them",
    "give control=…, on the command line --control FILE or --photo FILE": "send control or photo",
    "give the control image with --control": "send the map itself as control",
    "give it with --annotator": "send a map of that network's as control",
}
"""What of the runtime's remedies is a flag of its command, and what it is over HTTP."""


class ServeError(Exception):
    """A request that is not served. `code` is one word for programs; the message ends with the remedy after "; ".

    It may quote the request: it is made one line of at most 280 printable characters.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(error_line(message))
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON answer; the fields of OpenAI's errors are among ours."""
        message = str(self)
        what, _, remedy = message.rpartition("; ")
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": message,
                "what": what or message,
                "remedy": remedy if what else "",
                "param": self.param,
                "code": self.code,
                "type": kind,
            }
        }

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, where waiting helps."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}


def bad_request(message: str, param: str | None = None) -> ServeError:
    """400: a field that cannot be used."""
    return ServeError(400, "bad_request", message, param=param)


def over_http(message: str) -> str:
    """A line of the runtime's with the remedies that there are here."""
    for of_command, here in REMEDIES.items():
        message = message.replace(of_command, here)
    return message


def served(error: BaseException) -> ServeError:
    """An error of the runtime as an answer; of what is not meant for a client nothing but its kind is said."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, UserError):
        return bad_request(over_http(str(error)))
    if isinstance(error, CarError):
        return ServeError(
            500, "engine_error", "the engine failed while it drew; try again, the server's log says more"
        )
    return ServeError(500, "internal_error", f"{type(error).__name__} inside the server; its log says where")
