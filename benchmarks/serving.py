"""What serving costs: `car-run serve` in a process of its own, asked over loopback.

    python -m benchmarks.serving                                  # the shipped plan, 1 … 32 users, about 3 minutes
    python -m benchmarks.serving --users 1,8 --seconds 5 -o serving.json --plot serving.png --studio

One JSON object goes to stdout, or to a file, with a line for each wave on stderr. What is compared is measured in
turns, so that both meet the same machine; seconds and MB:

    load              the machine's load average before and after
    generate_p50      `Plan.generate` in this process, with the server's threads
    http_p50          the same request over HTTP, one user; overhead_ms: median of the differences
    cpu_ms            processor time of an image by `Plan.generate`, of the server for the same over HTTP, and for a
                      draft of live mode: what stays the same on a machine that others use, too
    first_scale_p50   from the call of `Plan.stream` to the first scale's preview as WebP, in this process
    first_preview_p50 from the request to the first scale's event; first_preview_ratio: median of preview ÷ scale
    batch4_per_s      images a second of `Plan.generate(n=4)`, control and class anew; saturation_ratio: median of 8
                      users over HTTP ÷ that; batch4_kept_per_s, saturation_kept_ratio: with both kept
    waves             for each number of users: images_per_s, p50, p95, failed, images so far, and the server's memory
    batch_images      size of a batch (at most) → batches
    rss_mb_per_1000   memory's slope over the images of five more waves of 8 users: by now kept results and buffers of
                      all users are there
    studio            with --studio, in Chromium: from pressing the pen to the first image, ms, and images a second
                      while it moves, live mode, three strokes
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from car_runtime import GenerationConfig, Plan, default_plan, open_plan
from car_serve.uploads import webp

CONTROL = Path(__file__).resolve().parent.parent / "examples/umbrella.png"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks.serving", description="What serving costs.")
    parser.add_argument("--plan", type=Path, help="plan folder (default: the plan in the package)")
    parser.add_argument("--users", default="1,2,4,8,16,32", help="numbers of users (default: 1,2,4,8,16,32)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each wave (default: 10)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the engine (default: 2)")
    parser.add_argument("--control", type=Path, default=CONTROL, help="control image (default: an example)")
    parser.add_argument("--studio", action="store_true", help="also live mode, in Chromium by playwright")
    parser.add_argument("-o", "--output", type=Path, help="file for the JSON (default: stdout)")
    parser.add_argument("--plot", type=Path, help="file for the diagrams (.png)")
    return parser.parse_args(arguments)


@contextmanager
def served(plan: Path, threads: int) -> Iterator[tuple[str, int]]:
    """A server's address and process number."""
    command = [sys.executable, "-m", "car_runtime", "serve", str(plan), "--port", "0", "--threads", str(threads)]
    process = subprocess.Popen([*command, "--queue", "256"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"studio and API: (\S+)/$", line.strip()):
                break
        else:
            raise SystemExit("benchmarks.serving: the server did not start; try car-run serve")
        yield found[1], process.pid
    finally:
        process.terminate()
        process.wait(60)


def rss(pid: int) -> float:
    """Memory of a process, MB; 0 where /proc is not."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


class User:
    """A connection that stays open, and as little HTTP as it takes: what users cost, the server does not get here."""

    def __init__(self, url: str, control: str) -> None:
        """control: base64, of every request."""
        address = url.removeprefix("http://")
        host, _, port = address.partition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=120)
        self._head = f"POST /v1/pictures HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        self._fields = f'"control": "{control}", "class": 0'

    def __enter__(self) -> User:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, seed: int) -> int:
        """Ask for an image, read the whole answer, return its status."""
        body = f'{{{self._fields}, "seed": {seed}}}'
        self._socket.sendall(f"{self._head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        answer = b""
        while not (head := re.match(rb"HTTP/1.1 (\d+).*\ncontent-length: (\d+).*?\r\n\r\n", answer, re.I | re.S)):
            answer += self._more()
        missing = head.end() + int(head[2]) - len(answer)
        while missing > 0:
            missing -= len(self._more())
        return int(head[1])

    def _more(self) -> bytes:
        part = self._socket.recv(1 << 16)
        if not part:
            raise ConnectionError("the server left")
        return part


class Caller:
    """A connection that stays open, of the standard library's own client."""

    def __init__(self, url: str) -> None:
        self._connection = HTTPConnection(url.removeprefix("http://"), timeout=120)

    def post(self, body: dict[str, Any], accept: str = "application/json") -> int:
        """Ask for an image, read the whole answer, return its status."""
        answer = self._ask(body, accept)
        answer.read()
        return answer.status

    def first_preview(self, body: dict[str, Any]) -> float:
        """Seconds from the request to its first scale; the whole stream is read."""
        began, found, data = time.perf_counter(), 0.0, b""
        answer = self._ask(body, "text/event-stream")
        while part := answer.read1(65536):
            data += part
            if not found and b"event: scale" in data:
                found = time.perf_counter() - began
        return found

    def _ask(self, body: dict[str, Any], accept: str) -> HTTPResponse:
        headers = {"Content-Type": "application/json", "Accept": accept}
        self._connection.request("POST", "/v1/pictures", json.dumps(body), headers)
        return self._connection.getresponse()


def in_turns(plan: Plan, control: Path, url: str, runs: int = 30) -> dict[str, float]:
    """An image in this process, over HTTP, and as a stream, in turns, so that all meet the same machine.

    Both keep the control's features, as they are of the same pixels each time.
    """
    names = ("generate", "http", "overhead", "first_scale", "first_preview")
    taken: dict[str, list[float]] = {name: [] for name in names}
    caller = Caller(url)
    encoded = base64.b64encode(control.read_bytes()).decode()
    for seed in range(runs):
        config = GenerationConfig(control=control, label=0, seed=seed)
        began = time.perf_counter()
        plan.generate(config)
        taken["generate"].append(time.perf_counter() - began)
        body = {"control": encoded, "class": 0, "seed": seed}
        began = time.perf_counter()
        _expect(caller.post(body))
        taken["http"].append(time.perf_counter() - began)
        taken["overhead"].append(taken["http"][-1] - taken["generate"][-1])
        taken["first_scale"].append(first_scale(plan, config))
        taken["first_preview"].append(caller.first_preview(body))
    medians = {f"{name}_p50": statistics.median(values) for name, values in taken.items()}
    ratios = [after / before for before, after in zip(taken["first_scale"], taken["first_preview"], strict=True)]
    overhead = 1000 * medians.pop("overhead_p50")
    return {**medians, "overhead_ms": overhead, "first_preview_ratio": statistics.median(ratios)}


def _expect(status: int) -> None:
    if status != 200:
        raise SystemExit(f"benchmarks.serving: the server answered {status}; see its messages")


def cpu_ms(plan: Plan, control: Path, url: str, pid: int, runs: int = 30) -> dict[str, float]:
    """Processor time of an image in this process and in the server's, milliseconds."""

    def server() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    encoded = base64.b64encode(control.read_bytes()).decode()
    began = time.process_time()
    for seed in range(runs):
        plan.generate(GenerationConfig(control=control, label=0, seed=seed))
    found = {"generate": time.process_time() - began}
    draft, caller = {"cfg": 0, "previews": False}, Caller(url)
    for name, changes, accept in (("http", {}, "application/json"), ("draft", draft, "text/event-stream")):
        before = server()
        for seed in range(runs):
            body = {"control": encoded, "class": 0, "seed": seed, **changes}
            _expect(caller.post(body, accept))
        found[name] = server() - before
    return {name: 1000 * seconds / runs for name, seconds in found.items()}


def first_scale(plan: Plan, config: GenerationConfig) -> float:
    """Seconds from the call to the first scale's preview, encoded as the server encodes it."""
    began = time.perf_counter()
    scales = plan.stream(config)
    webp(next(scales).preview()[0])
    return time.perf_counter() - began


def saturation(plan: Plan, control: Path, url: str, turns: int = 5, seconds: float = 4) -> dict[str, float]:
    """Images a second of batches of 4 in this process and of 8 users over HTTP, in turns.

    Batches are as `benchmarks.latency --batch 4` has them, control and class computed anew for each; and with both
    kept, as the server keeps them here, where all users send the same. The first user of a wave is drawn alone: in 4
    seconds that weighs half a percent.
    """
    encoded = base64.b64encode(control.read_bytes()).decode()
    rates: dict[str, list[float]] = {"batch4_per_s": [], "batch4_kept_per_s": [], "http": []}
    for turn in range(turns):
        for name in ("batch4_per_s", "batch4_kept_per_s"):
            began, images = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                if name == "batch4_per_s":
                    plan.forget()
                images += len(plan.generate(GenerationConfig(control=control, label=0, seed=4 * images, n=4)).images)
            rates[name].append(images / (time.perf_counter() - began))
        rates["http"].append(wave(url, encoded, 8, seconds, first=turn * 1000)["images_per_s"])
    http = rates.pop("http")
    ratios = {
        f"{ratio}_ratio": statistics.median(users / batches for users, batches in zip(http, rates[name], strict=True))
        for ratio, name in (("saturation", "batch4_per_s"), ("saturation_kept", "batch4_kept_per_s"))
    }
    return {name: statistics.median(found) for name, found in rates.items()} | ratios


def wave(url: str, control: str, users: int, seconds: float, first: int = 0) -> dict[str, float]:
    """So many users, each asking again as soon as it is answered."""
    until = time.perf_counter() + seconds

    def user(number: int) -> list[tuple[float, bool]]:
        taken: list[tuple[float, bool]] = []
        with User(url, control) as asking:
            while (began := time.perf_counter()) < until:
                status = asking.ask(first + number * 10_000 + len(taken))
                taken.append((time.perf_counter() - began, status == 200))
        return taken

    began = time.perf_counter()
    with ThreadPoolExecutor(users) as pool:
        taken = [one for part in pool.map(user, range(users)) for one in part]
    good = sorted(seconds for seconds, fine in taken if fine)
    return {
        "users": users,
        "images_per_s": len(good) / (time.perf_counter() - began),
        "p50": good[len(good) // 2],
        "p95": good[int(len(good) * 0.95)],
        "failed": len(taken) - len(good),
        "images": len(good),
    }


def live(url: str) -> dict[str, list[float]]:
    """Live mode in a browser: a person draws a circle of two seconds, three times."""
    from playwright.sync_api import sync_playwright

    watch = """() => { window.shown = []; window.down = 0; let last = '';
      new MutationObserver(() => { const img = document.querySelector('#images img');
        if (img?.src && img.src !== last) { last = img.src; shown.push(performance.now()); }
      }).observe(document.querySelector('#images'), { subtree: true, attributes: true, childList: true });
      document.querySelector('#pad').addEventListener('pointerdown', () => {
        down = performance.now(); shown = []; }, true); }"""
    found: dict[str, list[float]] = {"first_ms": [], "images_per_s": []}
    with sync_playwright() as playwright:
        options: dict[str, Any] = {
            "executable_path": shutil.which("chromium"),
            "args": ["--no-sandbox", "--disable-gpu"],
        }
        browser = playwright.chromium.launch(**options)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(120_000)
        page.goto(f"{url}/")
        page.wait_for_selector("html[data-ready]")
        page.evaluate(watch)
        page.click(".switch")
        page.wait_for_timeout(1000)  # a hand on its way to the canvas
        box = page.locator("#pad").bounding_box()
        assert box is not None
        for stroke in range(3):
            radius = (0.2 + 0.1 * stroke) * box["width"]
            middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            page.mouse.move(middle[0], middle[1] - radius)  # the examples are below
            page.mouse.down()
            began = time.perf_counter()
            while (passed := time.perf_counter() - began) < 2:
                page.mouse.move(middle[0] + radius * math.sin(3 * passed), middle[1] - radius * math.cos(3 * passed))
                time.sleep(0.02)
            count = page.evaluate("shown.length")
            page.wait_for_function("() => shown.length > 0")
            shown, down = page.evaluate("[shown, down]")
            page.mouse.up()
            found["first_ms"].append(shown[0] - down)
            found["images_per_s"].append(count / passed)
            page.wait_for_timeout(1500)
        browser.close()
    return found


def plot(report: dict[str, Any]) -> bytes:
    """Throughput, latency and memory against users, and the sizes of batches, as PNG."""
    from benchmarks.analysis.plots import OURS, page

    waves = report["waves"]
    users = [str(found["users"]) for found in waves]
    with page(5.2, 2, 2) as (panels, finished):
        for axes, name in zip(panels, ("images/s", "seconds", "batches", "server's memory, MB"), strict=True):
            axes.set_title(name, loc="left")
            axes.set_xlabel("images of a batch, at most" if name == "batches" else "users")
        panels[0].plot(users, [found["images_per_s"] for found in waves], "o-", color=OURS)
        for key, style in (("p50", "o-"), ("p95", "o:")):
            panels[1].plot(users, [found[key] for found in waves], style, color=OURS, label=key)
        panels[1].legend(frameon=False)
        sizes = {size: count for size, count in report["batch_images"].items() if count}
        panels[2].bar(list(sizes), list(sizes.values()), color=OURS)
        panels[3].plot(users, [found["rss_mb"] for found in waves], "o-", color=OURS)
        for axes in (panels[0], panels[1], panels[3]):
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        return finished()


def histogram(text: str) -> dict[str, int]:
    """Batches of each size in the text of /metrics, where they are cumulative."""
    found = re.findall(r'car_batch_images_bucket{le="([^"]+)",[^}]*} (\S+)', text)
    counts = [int(float(count)) for _, count in found]
    return {
        size.removesuffix(".0"): count - before
        for (size, _), before, count in zip(found, [0, *counts], counts, strict=False)
    }


def slope(waves: Sequence[dict[str, float]]) -> float:
    """MB of memory for 1,000 more images, by least squares."""
    if len(waves) < 2:
        return 0.0
    images = [sum(found["images"] for found in waves[: i + 1]) / 1000 for i in range(len(waves))]
    return float(statistics.linear_regression(images, [found["rss_mb"] for found in waves]).slope)


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    args = parse_args(arguments)
    path = args.plan or default_plan()
    report: dict[str, Any] = {"plan": path.name, "cores": os.cpu_count(), "threads": args.threads}
    load = [os.getloadavg()[0]]
    control = base64.b64encode(args.control.read_bytes()).decode()
    with served(path, args.threads) as (url, pid), open_plan(path, threads=args.threads) as plan:
        report |= in_turns(plan, args.control, url) | saturation(plan, args.control, url)
        report["cpu_ms"] = cpu_ms(plan, args.control, url, pid)
        report["waves"] = []
        for users in [int(text) for text in args.users.split(",")]:
            found = wave(url, control, users, args.seconds)
            report["waves"].append({**found, "rss_mb": rss(pid)})
            print(
                f"{users:3} users: {found['images_per_s']:6.2f} images/s, p50 {found['p50']:.3f} s", file=sys.stderr
            )
        report["batch_images"] = histogram(urlopen(f"{url}/metrics").read().decode())
        steady = [{**wave(url, control, 8, args.seconds / 2), "rss_mb": rss(pid)} for _ in range(5)]
        report["rss_mb_per_1000"] = slope(steady)
        if args.studio:
            report["studio"] = live(url)
    report["load"] = [round(value, 1) for value in (*load, os.getloadavg()[0])]
    line = json.dumps(report)
    if args.output is None:
        print(line)
    else:
        args.output.write_text(line + "\n", encoding="utf-8")
    if args.plot is not None:
        args.plot.write_bytes(plot(report))


if __name__ == "__main__":
    main()
