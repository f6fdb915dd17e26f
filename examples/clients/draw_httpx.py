"""Draw over our own routes and see every scale: server-sent events with httpx.

    python examples/clients/draw_httpx.py CONTROL.png CLASS OUT.png [SERVER]

pip install httpx. CAR_TOKEN is the server's token, if it has one.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path

import httpx


def main(control: str, label: str, output: str, server: str = "http://127.0.0.1:8080") -> None:
    """Print a line for each scale, and write the image."""
    headers = {"Accept": "text/event-stream", "Authorization": f"Bearer {os.environ.get('CAR_TOKEN', 'none')}"}
    files, data = {"control": Path(control).read_bytes()}, {"class": label, "seed": "7"}
    with httpx.stream(
        "POST", f"{server}/v1/pictures", files=files, data=data, headers=headers, timeout=600
    ) as answer:
        if answer.is_error:
            raise SystemExit(json.loads(answer.read())["error"]["message"])
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                show(name, json.loads(line.removeprefix("data: ")), output)


def show(name: str, event: dict[str, object], output: str) -> None:
    """One event."""
    if name == "scale":
        print(f"scale {event['index']}: {event['side']}×{event['side']} tokens", file=sys.stderr)
    elif name == "picture":
        Path(output).write_bytes(base64.b64decode(str(event["png"])))
        print(output)
    elif name == "error":
        raise SystemExit(str(event["message"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
