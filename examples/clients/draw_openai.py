"""Draw with OpenAI's client, its images arriving coarse to fine.

    python examples/clients/draw_openai.py CONTROL.png CLASS OUT.png [SERVER]

pip install openai. CAR_TOKEN is the server's token, if it has one.
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI


def main(control: str, label: str, output: str, server: str = "http://127.0.0.1:8080") -> None:
    """Follow a control image; the partial images go next to the output."""
    client = OpenAI(base_url=f"{server}/v1", api_key=os.environ.get("CAR_TOKEN", "none"))
    stream = client.images.edit(
        image=Path(control), prompt=label, stream=True, partial_images=3, extra_body={"seed": 7}
    )
    for event in stream:
        image = base64.b64decode(event.b64_json)
        if event.type == "image_edit.partial_image":
            Path(output).with_suffix(f".{event.partial_image_index}.png").write_bytes(image)
        else:
            Path(output).write_bytes(image)
            print(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
