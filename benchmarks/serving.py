"""What serving costs: `car-run serve` in a process of its own, asked over loopback.

    python -m benchmarks.serving                                  # the shipped plan, 1 … 32 users, about 3 minutes
    python -m benchmarks.serving --users 1,8 --seconds 5 -o serving.json

One JSON object goes to stdout, or to a file, with a table on stderr:

    generate_p50      `Plan.generate` in this process, with the server's threads; seconds, as all times
    http_p50          the same request over HTTP, one user; overhead_ms: median of the differences, in turns
    first_preview_p50 from the request to the first scale's preview; first_scale_p50 is the scale alone, in process
    users             for each number of users: images_per_s, p50, p95, failed, and the server's memory after it
    batch_images      how many batches had at most so many images
    rss_slope_mb      memory after the last wave less memory after the first one, MB
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from car_runtime import GenerationConfig, default_plan, open_plan

CONTROL = Path(__file__).resolve().parent.parent / "examples/umbrella.png"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks.serving", description="What serving costs.")
    parser.add_argument("--plan", type=Path, help="plan folder (default: the plan in the package)")
    parser.add_argument("--users", default="1,2,4,8,16,32", help="numbers of users (default: 1,2,4,8,16,32)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each wave (default: 10)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the engine (default: 2)")
    parser.add_argument("--control", type=Path, default=CONTROL, help="control image (default: an example)")
    parser.add_argument("-o", "--output", type=Path, help="file for the JSON (default: stdout)")
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


def in_turns(plan_path: Path, control: Path, threads: int, client: Any, url: str, runs: int = 40) -> dict[str, float]:
    """An image in this process, over HTTP, and as a stream, in turns, so that all meet the same machine.

    Both keep the control's features, as they are of the same pixels each time.
    """
    names = ("generate", "http", "overhead", "first_scale", "first_preview")
    taken: dict[str, list[float]] = {name: [] for name in names}
    encoded = base64.b64encode(control.read_bytes()).decode()
    with open_plan(plan_path, threads=threads) as plan:
        for seed in range(runs):
            began = time.perf_counter()
            result = plan.generate(GenerationConfig(control=control, label=0, seed=seed))
            taken["generate"].append(time.perf_counter() - began)
            taken["first_scale"].append(sum(result.timings[name] for name in ("control", "condition", "scale_0")))
            body = {"control": encoded, "class": 0, "seed": seed}
            began = time.perf_counter()
            client.post(f"{url}/v1/pictures", json=body).raise_for_status()
            taken["http"].append(time.perf_counter() - began)
            taken["overhead"].append(taken["http"][-1] - taken["generate"][-1])
            taken["first_preview"].append(first_preview(client, url, body))
    medians = {f"{name}_p50": statistics.median(values) for name, values in taken.items()}
    return {**medians, "overhead_ms": 1000 * medians.pop("overhead_p50")}


def first_preview(client: Any, url: str, body: dict[str, Any]) -> float:
    """Seconds from the request to its first scale."""
    began, found, text = time.perf_counter(), 0.0, ""
    with client.stream("POST", f"{url}/v1/pictures", json=body, headers={"Accept": "text/event-stream"}) as answer:
        for part in answer.iter_text():
            text += part
            if "event: scale" in text and not found:
                found = time.perf_counter() - began
    return found


def wave(client: Any, url: str, control: str, users: int, seconds: float) -> dict[str, float]:
    """So many users, each asking again as soon as it is answered."""
    until = time.perf_counter() + seconds

    def user(number: int) -> list[tuple[float, bool]]:
        taken: list[tuple[float, bool]] = []
        while (began := time.perf_counter()) < until:
            body = {"control": control, "class": 0, "seed": number * 10_000 + len(taken)}
            status = client.post(f"{url}/v1/pictures", json=body).status_code
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
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    import httpx

    args = parse_args(arguments)
    plan = args.plan or default_plan()
    report: dict[str, Any] = {"plan": plan.name, "cores": os.cpu_count(), "threads": args.threads}
    control = base64.b64encode(args.control.read_bytes()).decode()
    limits = httpx.Limits(max_connections=256)
    with served(plan, args.threads) as (url, pid), httpx.Client(timeout=120, limits=limits) as client:
        report |= in_turns(plan, args.control, args.threads, client, url)
        report["waves"] = []
        for users in [int(text) for text in args.users.split(",")]:
            found = wave(client, url, control, users, args.seconds)
            report["waves"].append({**found, "rss_mb": rss(pid)})
            print(
                f"{users:3} users: {found['images_per_s']:6.2f} images/s, p50 {found['p50']:.3f} s", file=sys.stderr
            )
        text = client.get(f"{url}/metrics").text
        report["batch_images"] = dict(re.findall(r'car_batch_images_bucket{le="([^"]+)",[^}]*} (\S+)', text))
        report["rss_slope_mb"] = report["waves"][-1]["rss_mb"] - report["waves"][0]["rss_mb"]
    line = json.dumps(report)
    if args.output is None:
        print(line)
    else:
        args.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
