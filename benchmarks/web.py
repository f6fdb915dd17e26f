"""What a plan costs in a browser: the site of `car-run plan web` on a static host on loopback, in headless Chromium.

    python -m benchmarks.web                       # the shipped plan, about a minute
    python -m benchmarks.web --plan emoji.plan --images 20 -o web.json

One JSON object goes to stdout, or to a file. Seconds:

    load              the machine's load average before and after
    site_bytes        all files of the site
    first_image       from the page's first byte to the first image, with an empty cache; the service worker, which
                      isolates the page, loads it twice
    ready             of that, until the plan is open
    again             the same at the second visit
    image             median of an image after that: another seed, the same control, no previews, with its PNG
    ort_cpu           median of `Plan.generate` for the same on the same cores; measured in turns with the page
    ratio             median of image ÷ ort_cpu
    cpu, ort_cpu_cpu  processor seconds of an image, which other work on the machine leaves alone

The browser sets the priority of its processes that run pages; here they have this one's, as `ort-cpu` does, so that
other work on the machine slows both alike.
"""

from __future__ import annotations

import argparse
import base64
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from car_runtime import default_plan, open_plan
from car_serve.site import write_site

CONTROL = Path(__file__).resolve().parent.parent / "examples/umbrella.png"
DRAW = """async (form) => {
  const began = performance.now();
  await (await import('/studio/main.js')).client.draw(form);
  return (performance.now() - began) / 1000;
}"""


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks.web", description="What a plan costs in a browser.")
    parser.add_argument("--plan", type=Path, help="plan folder of format 2 (default: the plan in the package)")
    parser.add_argument("--branches", metavar="A,B", help="those of its branches that the page has (default: all)")
    parser.add_argument("--onnxruntime", type=Path, help="the npm package onnxruntime-web (see make web)")
    parser.add_argument("--images", type=int, default=12, help="images after the first (default: 12)")
    parser.add_argument("--warmup", type=int, default=6, help="images before those, not counted (default: 6)")
    parser.add_argument("--threads", type=int, default=2, help="threads of ort-cpu (default: 2)")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser (default: that on PATH)")
    parser.add_argument("-o", "--output", type=Path, help="file for the JSON (default: stdout)")
    return parser.parse_args(arguments)


class _Handler(SimpleHTTPRequestHandler):
    def guess_type(self, path: Any) -> str:
        return "text/javascript" if str(path).endswith((".js", ".mjs")) else super().guess_type(path)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def host(folder: Path) -> Iterator[str]:
    """A static host on loopback; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def visit(context: Any, address: str) -> dict[str, float]:
    """A visit from the first byte to the first image, by a person who clicks an example at once."""
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(address, wait_until="commit")
    began = time.perf_counter()
    while not page.locator("html[data-ready]").count():
        share_priority()  # a page that becomes isolated gets another process
        time.sleep(0.02)
    ready = time.perf_counter() - began
    page.click("#draw") if page.locator("#examples").is_hidden() else page.click("#examples button")
    page.wait_for_function("() => document.querySelector('#images img')?.src.startsWith('blob:')")
    found = {"ready": ready, "first_image": time.perf_counter() - began}
    page.close()
    return found


def pages() -> Iterator[tuple[Path, list[str]]]:
    """The browser's processes that run pages, descendants of this one: folder in /proc, fields; Linux alone."""
    parents, found = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            renders = b"--type=renderer" in (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        parents[int(folder.name)] = int(fields[1])
        if renders:
            found[int(folder.name)] = fields

    def ours(process: int) -> bool:
        return process == os.getpid() or (process in parents and ours(parents[process]))

    return ((Path("/proc", str(process)), fields) for process, fields in found.items() if ours(process))


def processor_seconds() -> float:
    """What pages took so far."""
    return sum((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") for _, fields in pages())


def share_priority() -> None:
    """Give all threads of pages the priority of this process, where the system allows it."""
    for folder, _ in pages():
        with suppress(OSError):
            for thread in (folder / "task").iterdir():
                os.setpriority(os.PRIO_PROCESS, int(thread.name), os.getpriority(os.PRIO_PROCESS, 0))


def measure(args: argparse.Namespace, folder: Path, address: str) -> dict[str, Any]:
    """All figures but the size."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, open_plan(args.plan, "ort-cpu", threads=args.threads) as plan:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context()
        first, again = visit(context, address), visit(context, address)
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("html[data-ready]", state="attached")
        control = base64.b64encode(CONTROL.read_bytes()).decode()
        rows = []
        for seed in range(args.warmup + args.images):
            share_priority()
            before = processor_seconds()
            image = page.evaluate(DRAW, {"control": control, "seed": seed})
            cpu = processor_seconds() - before
            began, own = time.perf_counter(), time.process_time()
            plan.generate(CONTROL, seed=seed)
            rows.append((image, time.perf_counter() - began, cpu, time.process_time() - own))
        browser.close()
    image, ort_cpu, cpu, ort_cpu_cpu = (
        statistics.median(column) for column in zip(*rows[args.warmup :], strict=True)
    )
    ratio = statistics.median(row[0] / row[1] for row in rows[args.warmup :])
    return {
        **first,
        "again": again["first_image"],
        "image": image,
        "ort_cpu": ort_cpu,
        "ratio": ratio,
        "cpu": cpu,
        "ort_cpu_cpu": ort_cpu_cpu,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the report. Returns the exit code."""
    args = parse_args(arguments)
    args.plan = args.plan or default_plan()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "site"
        size = write_site(args.plan, folder, args.onnxruntime, args.branches and args.branches.split(","))
        with host(folder) as address:
            found = measure(args, folder, address)
    report = {"load": [load, os.getloadavg()[0]], "cores": os.cpu_count(), "site_bytes": size}
    report |= {name: round(value, 4) for name, value in found.items()}
    text = json.dumps(report, indent=1)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
