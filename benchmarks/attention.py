"""Where a transformer looks: the attention of chosen tokens to all coarser ones, as figures of one image.

    python -m benchmarks.attention runs/var --image umbrella.png --class 4 -o attention.png
    python -m benchmarks.attention runs/car --image umbrella.png --tokens 0.5,0.5 --tokens 0.2,0.8 -o attention.png

The image's own tokens are given (teacher forcing), without control. A token is chosen by its place in the last
scale, x,y in 0…1. A row of the figure is a token and a block (first, middle, last unless `--blocks`); its panels are
the scales, coarse first, each as the weights of that scale's tokens, mean over the heads, enlarged; the number is the
share of the whole attention that the scale receives.

Shape legend: N tokens of the last scale, L of all, H heads of width d, C width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness.cli import Log, guarded, make_parser
from benchmarks.harness.errors import BenchmarkError
from car_train import checkpoint
from car_train.data.images import UNREADABLE, fitted, open_image
from car_train.files import check_writable, written_aside
from car_train.model import Model
from car_train.model.kernels import linear
from car_train.model.var import Attention

Floats = NDArray[np.float64]


def attention_weights(layer: Attention, x_1LC: Tensor, last: int) -> Tensor:
    """The weights softmax(q·k) of the last `last` tokens, f32 [H, N, L], by the layer's own projections."""
    L, C = x_1LC.shape[1:]
    q, k, _ = linear(x_1LC[0], layer.qkv_weight).split(C, dim=-1)
    heads = (L, layer.heads, C // layer.heads)
    q_LHd, k_LHd = layer.scaled(q, k, heads, x_1LC.dtype)
    return torch.einsum("nhd,lhd->hnl", q_LHd[-last:], k_LHd).softmax(-1)


@torch.no_grad()
def attention(model: Model, pixels_HW3: NDArray[np.uint8], label: int) -> list[Floats]:
    """Of each block of the base, the weights of the last scale's tokens, f64 [N, L], mean over the heads."""
    assert model.car is not None
    x = torch.from_numpy(pixels_HW3.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    inputs = model.vqvae.quantizer.decode(model.vqvae.encode(x))[1]
    weights: list[Floats] = []

    def record(layer: torch.nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(layer, Attention)
        found_HNL = attention_weights(layer, given[0], model.config.vqvae.sides[-1] ** 2)
        weights.append(found_HNL.double().mean(0).numpy())

    hooks = [block.attn.register_forward_pre_hook(record) for block in model.car.base.blocks]
    try:
        model.car(torch.tensor([label]), inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return weights


def per_scale(weights_L: Floats, sides: Sequence[int]) -> list[Floats]:
    """One token's weights as a square for each scale, [S, S]."""
    ends = np.cumsum(np.square(sides))
    return [part.reshape(s, s) for part, s in zip(np.split(weights_L, ends[:-1]), sides, strict=True)]


def place(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no place; give x,y in 0…1, such as 0.5,0.5") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} lies outside of the image; give x,y in 0…1")
    return x, y


def figure(
    pixels: NDArray[np.uint8], found: Sequence[Floats], sides: Sequence[int], tokens: Any, blocks: Sequence[int]
) -> bytes:
    """The figure as PNG; rows: tokens × blocks, columns: the image with the token, then the scales."""
    from benchmarks.analysis.plots import COLOURS, page

    side = sides[-1]
    rows = [(token, block) for token in tokens for block in blocks]
    with page(1.0 * len(rows) + 0.3, len(rows), 1 + len(sides)) as (panels, finished):
        axes = iter(panels)
        for (x, y), block in rows:
            column, row = min(int(x * side), side - 1), min(int(y * side), side - 1)
            shown = next(axes)
            shown.imshow(pixels)
            scale = pixels.shape[0] / side
            shown.plot((column + 0.5) * scale, (row + 0.5) * scale, "o", color=COLOURS[1], markersize=4)
            shown.set_title(f"block {block}", fontsize=7)
            shown.set_axis_off()
            for square in per_scale(found[block][row * side + column], sides):
                panel = next(axes)
                panel.imshow(square, cmap="magma", vmin=0)
                panel.set_title(f"{square.sum():.0%}", fontsize=7)
                panel.set_axis_off()
        return finished()


def run(args: argparse.Namespace, log: Log) -> None:
    model = checkpoint.load(args.checkpoint)
    if model.car is None:
        raise BenchmarkError(f"{args.checkpoint} holds a tokenizer only; give a transformer")
    depth, classes = len(model.car.base.blocks), model.car.base.config.classes
    blocks = args.blocks or sorted({0, depth // 2, depth - 1})
    if not all(0 <= block < depth for block in blocks):
        raise BenchmarkError(f"blocks are {blocks}; give some of 0…{depth - 1}")
    label = classes if args.label is None else args.label
    if not 0 <= label <= classes:
        raise BenchmarkError(f"class is {label}; give 0…{classes - 1}, or leave it out")
    check_writable(args.output, ".png")
    config = model.config.vqvae
    try:
        image = open_image(args.image)
    except UNREADABLE as error:
        raise BenchmarkError(f"{args.image}: can't be read ({error}); give an image") from error
    ground = (255, 255, 255)
    pixels = np.asarray(fitted(image, config.image_size, "crop", ground).convert("RGBA"))
    alpha = pixels[..., 3:] / 255
    rgb = np.round(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    found = attention(model, rgb, label)
    log(f"{depth} blocks, {config.tokens} tokens")
    with written_aside(args.output) as file:
        file.write_bytes(figure(rgb, found, config.sides, args.tokens or [(0.5, 0.5), (0.1, 0.1)], blocks))
    print(args.output)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("attention", __doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint or run of a transformer, with or without a branch")
    parser.add_argument("--image", type=Path, required=True, help="the image whose tokens are given")
    parser.add_argument("--class", dest="label", type=int, help="its class (default: no class)")
    parser.add_argument("--tokens", type=place, action="append", help="x,y of a token; repeatable (default: two)")
    parser.add_argument("--blocks", type=int, nargs="+", help="(default: first, middle, last)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the figure, .png")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("benchmarks.attention", lambda log: run(args, log))


if __name__ == "__main__":
    sys.exit(main())
