"""A server under steady load, 80 % of what it can do, from callers of every kind; ten minutes with the slow tests.

Every accepted request ends in its images or in a clear error, the queue is empty again, and memory returns.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from fixtures.serving import Server, body, empty, image64, pixels

CONTROLS = [image64(f"{name}.png") for name in ("umbrella", "heart", "clock", "guitar")]
STREAM = {"Accept": "text/event-stream"}


class Callers:
    """Callers of a server, each of which returns one word for how its request ended."""

    def __init__(self, server: Server) -> None:
        self.url = f"{server.url}/v1/pictures"
        self.client = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=128))
        self.first: dict[int, Any] = {}
        """The first image of each seed: all later ones must be equal to it."""

    def asked(self, number: int, **changes: Any) -> dict[str, Any]:
        return body(control=CONTROLS[number % 4], seed=number % 16, **changes)

    def ended(self, number: int, png: str) -> str:
        image = pixels(png)
        return "image" if np.array_equal(self.first.setdefault(number % 16, image), image) else "wrong image"

    def waits(self, number: int) -> str:
        """One JSON answer."""
        answer = self.client.post(self.url, json=self.asked(number))
        if answer.status_code != 200:
            return refused(answer)
        return self.ended(number, answer.json()["images"][0]["png"])

    def reads(self, number: int) -> str:
        """All events."""
        with self.client.stream("POST", self.url, json=self.asked(number), headers=STREAM) as answer:
            found = list(events(answer)) if answer.status_code == 200 else []
            if not found:
                answer.read()
                return refused(answer)
        names = [name for name, _ in found]
        if names != ["queued", *["scale"] * 7, "picture", "done"]:
            return f"broken stream: {names}"
        return self.ended(number, found[-2][1]["png"])

    def leaves(self, number: int) -> str:
        """Closes the connection after the first event."""
        return self._until(number, lambda event: None)

    def cancels(self, number: int) -> str:
        """Cancels by id after the first event."""
        return self._until(number, lambda event: self.client.delete(f"{self.url}/{event['id']}"))

    def asks_nonsense(self, number: int) -> str:
        """Sends what cannot be used."""
        answer = self.client.post(self.url, json=self.asked(number, cfg=-1.0 - number))
        return "refused 400" if answer.json()["error"]["remedy"] and answer.status_code == 400 else "wrong refusal"

    def _until(self, number: int, act: Callable[[dict[str, Any]], object]) -> str:
        with self.client.stream("POST", self.url, json=self.asked(number, n=2), headers=STREAM) as answer:
            if answer.status_code != 200:
                answer.read()
                return refused(answer)
            _, event = next(events(answer))
            act(event)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            state = self.client.get(f"{self.url}/{event['id']}").json()["state"]
            if state in ("done", "cancelled"):
                return str(state)
            time.sleep(0.02)
        return f"left {state}"


def events(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a stream as they come."""
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def refused(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    return f"refused {answer.status_code}" if error["what"] and error["remedy"] else "unclear refusal"


def capacity(callers: Callers, seconds: float) -> float:
    """Images a second with four callers that never rest."""
    until = time.monotonic() + seconds

    def user(number: int) -> int:
        count = 0
        while time.monotonic() < until:
            assert callers.waits(number) == "image"
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(user, range(4))) / seconds


def soak(server: Server, seconds: float) -> dict[str, Any]:
    """80 % of the capacity for so long, with callers that come by chance.

    The capacity is looked at every minute: what else the machine does is not the server's.
    """
    callers, chance = Callers(server), random.Random(7)
    kinds = [callers.waits] * 5 + [callers.reads] * 3 + [callers.leaves, callers.cancels, callers.asks_nonsense]
    began, number, memory, rates = time.monotonic(), 0, [], []
    outcomes: Counter[str] = Counter()
    while (left := began + seconds - time.monotonic()) > 0:
        rates.append(0.8 * capacity(callers, min(5.0, seconds / 2)))
        ends, at = [], time.monotonic()
        until = at + min(60.0, left)
        with ThreadPoolExecutor(96) as pool:
            while at < until:
                time.sleep(max(0.0, at - time.monotonic()))
                ends.append(pool.submit(chance.choice(kinds), number))
                number += 1
                at += chance.expovariate(rates[-1])
                if number % 20 == 0:
                    memory.append(server.rss() / 2**20)
            outcomes.update(end.result() for end in ends)
        empty(server.url)
    third = len(memory) // 3
    early, late = memory[third : 2 * third], memory[-third:]
    return {
        "seconds": seconds,
        "requests": number,
        "rates": [round(min(rates), 2), round(max(rates), 2)],
        "outcomes": dict(outcomes),
        "memory_mb": [round(max(part)) for part in (early, late)] if third else [],
    }


CLEAR = {"image", "done", "cancelled", "refused 400", "refused 429"}


def test_a_steady_load_leaves_nothing_behind(start: Callable[..., Server]) -> None:
    found = soak(start(), 6)
    assert set(found["outcomes"]) <= CLEAR, found
    assert found["outcomes"]["image"] >= 3, found


@pytest.mark.slow
def test_ten_minutes_of_steady_load_leave_nothing_behind(start: Callable[..., Server]) -> None:
    found = soak(start(), 600)
    print(json.dumps(found), file=sys.stderr)
    assert set(found["outcomes"]) <= CLEAR, found
    assert found["outcomes"]["image"] >= 0.6 * found["requests"], found
    early, late = found["memory_mb"]
    assert late < 1.05 * early + 5, found
