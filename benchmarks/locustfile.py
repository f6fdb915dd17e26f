"""People at a server, by kind, for `locust`; on loopback alone.

    car-run serve --port 8080
    locust -f benchmarks/locustfile.py --headless -u 8 -r 4 -t 30s --host http://127.0.0.1:8080

Six of ten wait for JSON, three read events, one branches from what it drew and changes its mind. A refusal because
the queue is full is waited for as `Retry-After` says, and counts as no failure; anything else that is no image does.
`first preview`: from the request to the first scale.
"""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from locust import HttpUser, between, events, task
from locust.env import Environment

CONTROLS = [
    base64.b64encode(path.read_bytes()).decode()
    for path in sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.png"))
]
ROUTE = "/v1/pictures"


@events.init.add_listener
def check_host(environment: Environment, **_: object) -> None:
    """Other machines are not loaded by mistake."""
    name = urlsplit(environment.host or "").hostname
    if name not in ("127.0.0.1", "localhost", "::1"):
        raise SystemExit(f"locustfile: the host is {environment.host!r}; give one of this machine with --host")


class Person(HttpUser):
    """One who draws, looks for a moment, and draws again."""

    wait_time = between(0.0, 0.5)

    @task(6)
    def draw(self) -> None:
        """An image as JSON."""
        with self.client.post(ROUTE, json=asked(), name="draw", catch_response=True) as answer:
            if answer.status_code == 429:
                self._wait(answer)
            elif answer.status_code != 200 or not answer.json()["images"]:
                answer.failure(f"{answer.status_code}: {answer.text[:200]}")

    @task(3)
    def watch(self) -> None:
        """An image as events."""
        names = [name for name, _ in self._events("watch", asked())]
        if names and names[-1] != "done":
            raise AssertionError(f"a stream ended with {names[-1]!r}")

    @task(1)
    def branch_and_leave(self) -> None:
        """Other fine scales for an image, of which only the first is looked at."""
        control = asked()["control"]
        drawn = [event for _, event in self._events("watch", asked(control=control))]
        if drawn:
            edit = {"id": drawn[0]["id"], "scale": 1}
            for _ in self._events("branch", asked(control=control, edit=edit), leave="scale"):
                pass

    def _events(self, name: str, body: dict[str, Any], leave: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """All events, or those up to the first of a name, after which the connection is closed."""
        began, seen = time.perf_counter(), False
        headers = {"Accept": "text/event-stream"}
        with self.client.post(
            ROUTE, json=body, headers=headers, name=name, stream=True, catch_response=True
        ) as answer:
            if answer.status_code == 429:
                self._wait(answer)
                return
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code}: {answer.text[:200]}")
                return
            event = ""
            for line in answer.iter_lines(decode_unicode=True):
                if line.startswith("event: "):
                    event = line[7:]
                    if event == "scale" and not seen:
                        seen = True
                        taken = 1000 * (time.perf_counter() - began)
                        self.environment.events.request.fire(
                            request_type="SSE", name="first preview", response_time=taken, response_length=0
                        )
                elif line.startswith("data: "):
                    yield event, json.loads(line[6:])
                    if event == leave:
                        answer.close()
                        break
            answer.request_meta["response_time"] = 1000 * (time.perf_counter() - began)

    def _wait(self, answer: Any) -> None:
        answer.success()
        time.sleep(float(answer.headers["Retry-After"]))


def asked(**changes: Any) -> dict[str, Any]:
    """A request of some control, class and seed."""
    chance = {"control": random.choice(CONTROLS), "class": random.randrange(8), "seed": random.randrange(1000)}
    return {**chance, **changes}
