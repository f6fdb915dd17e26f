"""Images of a checkpoint, one for each line of a file of requests: what `car-run batch` is for a plan.

    python -m car_train.evaluation.requests runs/car wanted.jsonl -o images/ --cfg 4 --top-k 900 --top-p 0.95

`car_train.evaluation.draw` starts it, once for each process. A line is {"name": …, "control": path or null, "class":
index, "seed": number}; its image is DIR/NAME.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from car_train import checkpoint
from car_train.errors import UserError, error_lines
from car_train.evaluation.generate import uniform_numbers
from car_train.images import save_png, to_pixels
from car_train.model import Model
from car_train.model.sample import sample
from car_train.streams import Terminated, terminated_politely
from car_train.training.stages import control_pyramids

Pixels = NDArray[np.uint8]


@torch.no_grad()
def draw(model: Model, requests: Sequence[dict[str, Any]], sampling: dict[str, Any], device: str) -> Pixels:
    """The images of some requests, uint8 [N, H, W, 3], by the reference loop in one batch.

    All have a control, or none has.
    """
    assert model.car is not None
    config = model.config.vqvae
    controls = None
    if requests[0]["control"] is not None:
        maps = []
        for request in requests:
            with Image.open(request["control"], formats=["PNG"]) as opened:
                maps.append(np.asarray(opened.convert("RGB")))
        controls = control_pyramids(maps, config, device)
    labels = torch.tensor([request["class"] for request in requests], device=device)
    uniforms = uniform_numbers([request["seed"] for request in requests], config.tokens).to(device)
    return to_pixels(sample(model.vqvae, model.car, labels, uniforms, controls, **sampling)[1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m car_train.evaluation.requests", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    for name, kind in (("cfg", float), ("top-k", int), ("top-p", float), ("batch", int), ("threads", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    try:
        with terminated_politely():
            _run(args)
    except (UserError, OSError) as error:
        print(f"car_train: error: {error_lines(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return 143 if isinstance(stop, Terminated) else 130
    return 0


def _run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    model = checkpoint.load(args.checkpoint).to(args.device)
    sampling = {"cfg": args.cfg, "top_k": args.top_k, "top_p": args.top_p}
    args.output.mkdir(exist_ok=True)
    requests = [json.loads(line) for line in args.file.read_text(encoding="utf-8").splitlines()]
    for alike in ([r for r in requests if r["control"]], [r for r in requests if not r["control"]]):
        for start in range(0, len(alike), args.batch):
            part = alike[start : start + args.batch]
            for request, image in zip(part, draw(model, part, sampling, args.device), strict=True):
                save_png(Image.fromarray(image), args.output / f"{request['name']}.png")


if __name__ == "__main__":
    sys.exit(main())
