"""Server-sent events that end with their reader, and waiting that ends with its caller."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from car_serve.jobs import Job


def event(name: str, data: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


class EventStream(StreamingResponse):
    """A stream of events. `ended` is called in any case, also when the reader left before the first event."""

    def __init__(self, events: AsyncIterator[bytes], ended: Callable[[], None], write_timeout: float) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._ended, self._write_timeout = ended, write_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; a reader that takes nothing for `write_timeout` seconds is dropped."""

        async def bounded(message: Message) -> None:
            await asyncio.wait_for(send(message), self._write_timeout)

        try:
            await super().__call__(scope, receive, bounded)
        finally:
            self._ended()


async def wait_or_cancel(request: Request, job: Job) -> None:
    """Until a job has ended; when the caller leaves, the job is cancelled."""
    done = asyncio.ensure_future(job.wait())
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (done, gone):
            task.cancel()
        if not job.finished:
            job.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
