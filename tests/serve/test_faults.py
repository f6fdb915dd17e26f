"""Load and faults: every accepted request ends in its images or in a clear error, and the queue is empty again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest

from car_runtime import GenerationConfig, RunError, open_plan
from fixtures.serving import ROOT, SHIPPED, Server, body, empty, image64, metric, pixels

pytest.importorskip("fastapi")
CONTROLS = ("umbrella.png", "heart.png", "clock.png", "guitar.png")


def request(i: int) -> dict[str, Any]:
    """One of 16 different requests."""
    settings = {"class": i % 7, "cfg": (0.0, 1.0, 2.5)[i % 3], "top_k": 50 + i % 5}
    return body(control=image64(CONTROLS[i % 4]), seed=i, **settings)


def test_64_requests_of_8_users_are_equal_to_serial_ones(url: str) -> None:
    with open_plan(SHIPPED, threads=1) as plan:
        expected = {}
        for i in range(16):
            asked = request(i)
            settings = {name: asked[name] for name in ("seed", "cfg", "top_k")}
            control = ROOT / "examples" / CONTROLS[i % 4]
            expected[i] = plan.generate(GenerationConfig(control=control, label=asked["class"], **settings)).images[0]

    def one(i: int) -> bool:
        answer = client.post(f"{url}/v1/pictures", json=request(i % 16), timeout=60)
        assert answer.status_code == 200, answer.text
        return bool(np.array_equal(pixels(answer.json()["images"][0]["png"]), expected[i % 16]))

    with httpx.Client() as client, ThreadPoolExecutor(8) as users:
        assert all(users.map(one, range(64)))
    empty(url)


def test_a_storm_of_disconnects_leaves_the_server_as_it_was(url: str) -> None:
    def drawn(i: int) -> Any:
        answer = httpx.post(f"{url}/v1/pictures", json=request(i), timeout=60)
        assert answer.status_code == 200, answer.text
        return pixels(answer.json()["images"][0]["png"])

    before = [drawn(i) for i in range(8)]
    data = json.dumps(body(n=8)).encode()
    port = int(url.rpartition(":")[2])
    for i in range(60):
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            accept = b"Accept: text/event-stream\r\n" if i % 2 else b""
            head = b"POST /v1/pictures HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n" + accept
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
            if i % 3 == 0:
                connection.settimeout(0.05)
                with suppress(TimeoutError):
                    connection.recv(100)
    began = time.monotonic()
    empty(url)
    assert time.monotonic() - began < 5  # 480 images would take a multiple
    assert metric(url, "car_cancelled_total") > 0
    with ThreadPoolExecutor(8) as users:
        after = list(users.map(drawn, range(8)))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_reader_that_takes_nothing_holds_up_nobody(url: str) -> None:
    data = json.dumps(body(n=16)).encode()
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 5) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = b"POST /v1/pictures HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n"
        head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data)
        connection.sendall(head + data)
        assert httpx.post(f"{url}/v1/pictures", json=body(), timeout=30).status_code == 200
    empty(url)


def test_a_reader_that_takes_nothing_for_too_long_is_dropped() -> None:
    """On the application itself: loopback's buffers take more than a stream has."""
    from car_serve.app import create_app
    from car_serve.limits import Limits

    app = create_app([open_plan(SHIPPED, threads=1)], Limits(write_timeout=0.3))
    asked = [{"type": "http.request", "body": json.dumps(body(n=8)).encode()}]
    sent: list[Any] = []

    async def receive() -> Any:
        return asked.pop() if asked else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 2:
            await asyncio.Event().wait()

    headers = {"host": "127.0.0.1", "content-type": "application/json", "accept": "text/event-stream"}
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/pictures", "query_string": b""}
    scope |= {"headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    with suppress(Exception):  # as uvicorn sees it, which then closes the connection
        asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    service = app.state.service
    assert len(sent) == 3
    until = time.monotonic() + 10
    while service.busy and time.monotonic() < until:
        time.sleep(0.02)
    assert [job.state for job in service.results._jobs.values()] == ["cancelled"]
    service.close()


def test_cancelling_by_id_stops_within_a_scale(url: str) -> None:
    with httpx.stream(
        "POST", f"{url}/v1/pictures", json=body(n=16), headers={"Accept": "text/event-stream"}, timeout=30
    ) as answer:
        text, id = "", ""
        for part in answer.iter_text():
            text += part
            if "event: scale" in text and not id:
                id = json.loads(text.split("data: ")[1].split("\n")[0])["id"]
                assert httpx.delete(f"{url}/v1/pictures/{id}").status_code == 200
    assert '"code": "cancelled"' in text
    assert text.count("event: picture") < 16
    assert httpx.get(f"{url}/v1/pictures/{id}").json()["state"] == "cancelled"
    empty(url)


def test_a_full_queue_is_answered_429_and_accepted_requests_end(start: Callable[..., Server]) -> None:
    server = start("--queue", "2")
    with ThreadPoolExecutor(16) as users:
        answers = list(
            users.map(
                lambda i: httpx.post(f"{server.url}/v1/pictures", json=body(n=4, seed=i * 4), timeout=60), range(16)
            )
        )
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"
        else:
            assert len(answer.json()["images"]) == 4
    empty(server.url)


def test_sigterm_under_load_finishes_what_was_accepted(start: Callable[..., Server]) -> None:
    server = start()
    outcomes: list[object] = []

    def user(i: int) -> None:
        try:
            answer = httpx.post(f"{server.url}/v1/pictures", json=body(n=4, seed=4 * i), timeout=60)
            outcomes.append(answer.status_code)
        except httpx.ConnectError:
            outcomes.append("refused")

    threads = [threading.Thread(target=user, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        if metric(server.url, "car_in_flight") >= 4:
            break
        time.sleep(0.02)
    server.process.send_signal(signal.SIGTERM)
    late = None
    for _ in range(100):
        try:
            late = httpx.post(f"{server.url}/v1/pictures", json=body(), timeout=30)
        except httpx.TransportError:
            break
        if late.status_code == 503:
            assert late.headers["Retry-After"]
            assert httpx.get(f"{server.url}/health/ready").status_code == 503
            break
    for thread in threads:
        thread.join(60)
    assert server.process.wait(30) == 0, server.log.read_text()
    assert outcomes.count(200) >= 4
    assert set(outcomes) <= {200, 503, "refused"}
    assert late is not None


def test_a_token_is_asked_for_and_other_hosts_need_one(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, browser_file, shown = tmp_path / "token.txt", tmp_path / "browser", tmp_path / "shown"
    token = "a+token/of&20=chars;#%"
    file.write_text(f"{token}\n")
    browser_file.write_text(f'#!/bin/sh\nprintf %s "$1" > {shown}\n')
    browser_file.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(browser_file))
    url = start("--token-file", str(file), "--rate", "3", "--open").url
    assert httpx.get(f"{url}/v1/capabilities").status_code == 401
    assert httpx.get(f"{url}/?token=wrong").status_code == 401
    good = {"Authorization": f"Bearer {token}"}
    assert httpx.get(f"{url}/v1/capabilities", headers=good).status_code == 200
    opened = httpx.get(shown.read_text())
    assert opened.status_code == 303
    assert httpx.get(f"{url}/?token={quote(token, safe='+')}").status_code == 303  # as one types it
    assert "httponly" in opened.headers["set-cookie"].lower()
    with httpx.Client(cookies=opened.cookies) as browser:
        assert browser.get(f"{url}/v1/capabilities").status_code == 200
    codes = [httpx.post(f"{url}/v1/pictures", json=body(), headers=good).status_code for _ in range(4)]
    assert codes == [200, 200, 200, 429]


def test_another_host_without_a_token_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from car_runtime.cli.main import main

    assert main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "--token-file" in capsys.readouterr().err


def test_a_token_file_is_read_whole_and_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from car_runtime.cli.main import main

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text("a-token-of-24-characters" + " " * 5000)
    (tmp_path / "short").write_text("short")
    for name, says in (("pipe", "cannot read"), ("large", "cannot read"), ("short", "has 5 characters")):
        assert main(["serve", "--port", "0", "--token-file", str(tmp_path / name)]) == 2
        text = capsys.readouterr().err
        assert says in text
        assert text.count("\n") == 1


@pytest.fixture
def batcher() -> Iterator[Any]:
    """A batcher on the shipped plan that waits long enough for company."""
    from car_serve.batcher import Batcher
    from car_serve.limits import Limits
    from car_serve.metrics import Metrics

    with open_plan(SHIPPED, threads=1) as plan:
        made = Batcher("p", plan, Limits(batch_wait_ms=200), Metrics())
        made._crowded = True  # as after a batch of several: the first request waits for others
        yield made
        made.close()


def test_an_engine_error_in_mid_batch_ends_one_job_alone(batcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from car_runtime.request import resolve
    from car_serve.jobs import Job

    plan = batcher.plan
    configs = [GenerationConfig(control=ROOT / "examples/heart.png", label=3, seed=i) for i in range(4)]
    expected = [plan.generate(config).images[0] for config in configs]
    jobs = [Job(request=resolve(plan.manifest, config), plan=plan) for config in configs]
    stream = plan.stream_many

    def failing(given: Any, **settings: Any) -> Iterator[Any]:
        for scale in stream(given, **settings):
            if scale.index == 3 and any(given[position] is jobs[1].request for position in scale.requests):
                raise RunError("the engine failed on purpose")
            yield scale

    monkeypatch.setattr(plan, "stream_many", failing)
    for job in jobs:
        batcher.submit(job)
    until = time.monotonic() + 30
    while not all(job.finished for job in jobs) and time.monotonic() < until:
        time.sleep(0.01)
    assert [job.state for job in jobs] == ["done", "failed", "done", "done"]
    assert jobs[1].error is not None
    assert jobs[1].error.code == "engine_error"
    for i in (0, 2, 3):
        assert np.array_equal(jobs[i].images[0], expected[i])
    assert batcher.alive


def test_only_previews_that_are_shown_are_decoded(batcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from car_runtime.request import resolve
    from car_serve.jobs import Job

    plan, decoded = batcher.plan, []
    run = plan._backend.run

    def counting(graph: str, *tensors: Any) -> None:
        if graph == "decoder":
            decoded.append(graph)
        run(graph, *tensors)

    monkeypatch.setattr(plan._backend, "run", counting)
    request = resolve(plan.manifest, GenerationConfig(control=ROOT / "examples/heart.png", n=2))
    jobs = [Job(request=request, plan=plan, previews=previews) for previews in ((), (1, 4))]
    for job in jobs:
        batcher.submit(job)
    until = time.monotonic() + 30
    while not all(job.finished for job in jobs) and time.monotonic() < until:
        time.sleep(0.01)
    assert len(decoded) == 2 * (1 + 2 + 1)  # each job's last scale, and two of one job's, of two images each
    shown = [sorted({scale.index for scale in job.scales if scale.pixels is not None}) for job in jobs]
    last = len(plan.manifest.scales) - 1
    assert shown == [[last], [1, 4, last]]


@pytest.mark.parametrize(("previews", "threads"), [((), {"engine p"}), ((0,), {"engine p", "decoder p_0"})])
def test_a_batch_without_previews_stays_on_one_thread(
    batcher: Any, monkeypatch: pytest.MonkeyPatch, previews: Sequence[int], threads: set[str]
) -> None:
    from car_runtime.request import resolve
    from car_serve.jobs import Job

    plan, seen, take = batcher.plan, [], batcher._take

    def watching(*given: Any) -> None:
        seen.append(threading.current_thread().name)
        take(*given)

    monkeypatch.setattr(batcher, "_take", watching)
    config = GenerationConfig(control=ROOT / "examples/heart.png", label=3, seed=5)
    job = Job(request=resolve(plan.manifest, config), plan=plan, previews=previews)
    batcher.submit(job)
    until = time.monotonic() + 30
    while not job.finished and time.monotonic() < until:
        time.sleep(0.01)
    assert set(seen) == threads
    assert [scale.index for scale in job.scales] == list(range(len(plan.manifest.scales)))
    assert np.array_equal(job.images[0], plan.generate(config).images[0])


def test_people_of_every_kind_at_once(url: str) -> None:
    """Those of `locust`, bounded, on loopback; another machine is refused."""
    if find_spec("locust") is None:  # to import it would patch this process
        pytest.skip("locust is not installed")
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "benchmarks/locustfile.py"), "--headless", "--json"]
    flags = ["-u", "6", "-r", "6", "-t", "8s", "--stop-timeout", "30"]
    done = subprocess.run([*command, *flags, "--host", url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    counts = {entry["name"]: entry["num_requests"] for entry in json.loads(done.stdout)}
    assert counts["draw"] > 0
    assert counts["first preview"] > 0
    empty(url)
    other = subprocess.run([*command, "--host", "http://192.0.2.1"], capture_output=True, text=True, timeout=60)
    assert other.returncode != 0
    assert "give one of this machine" in other.stderr
