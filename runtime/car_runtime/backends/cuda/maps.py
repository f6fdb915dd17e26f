"""What graphs of feature maps launch: the control encoder 𝓕, and the tokenizer's encoder and decoder.

A layer is a function of maps and returns maps, whose launches it appends to the net's list. Maps lie in a few slots
of scratch memory; with all of them at address 0 the same code says how large the slots have to be.

Shapes: maps are fp16 [rows, N], channels last, as car_kernels.images has them: N stored channels, of which C count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from car_runtime.backends.cuda.kernels import Launch, kernels, launch, named
from car_runtime.backends.cuda.weights import Weights, padded
from car_runtime.errors import RunError
from car_runtime.format.parameters import UnsupportedGraphError

SLOTS = 3
"""A residual block keeps its input, or what it carries across, while it makes one map of another."""
FILLS = 108
"""Programs that fill a GPU once: the multiprocessors of an A100; an RTX 4090 has 128, an H100 132."""
_INDEX = 2**31
Shapes = Mapping[str, tuple[int, ...]]
"""A parameter's name → its shape, as the plan's table has it."""


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Square feature maps, one after the other in a slot."""

    slot: int
    channels: int
    sides: tuple[int, ...]

    @property
    def N(self) -> int:  # noqa: N802
        """Channels that are stored."""
        return padded(self.channels)

    @property
    def firsts(self) -> list[int]:
        """The row at which each map begins."""
        return list(accumulate((side * side for side in self.sides[:-1]), initial=0))

    @property
    def rows(self) -> int:
        """Pixels of all maps."""
        return sum(side * side for side in self.sides)

    @property
    def pixels(self) -> int:
        """Of each map, where all are of one size."""
        return self.sides[0] ** 2


class Net:
    """Layers on maps. `half`: fp16 or bf16; `scratch`: addresses of the slots and of `moments` and `affine`."""

    def __init__(self, weights: Weights, half: str, scratch: Mapping[str, int] | None = None) -> None:
        self._weights, self._half, self._scratch = weights, half, scratch or {}
        self.launches: list[Launch] = []
        self.sizes: dict[str, int] = {}
        """Scratch memory's names → bytes that the layers so far need."""

    def address(self, maps: Maps) -> int:
        """Of the first row."""
        return self._scratch.get(f"map{maps.slot}", 0)

    def scratch(self, name: str) -> int:
        """Address of scratch memory."""
        return self._scratch.get(name, 0)

    def new(
        self, channels: int, sides: tuple[int, ...], live: Sequence[Maps] = (), stored: int | None = None
    ) -> Maps:
        """Maps in a slot that none of `live` is in."""
        slot = next(i for i in range(SLOTS) if all(i != other.slot for other in live))
        maps = Maps(slot=slot, channels=channels, sides=sides)
        N = maps.N if stored is None else stored
        if maps.rows * N >= _INDEX:
            raise RunError(
                f"{maps.rows} pixels of {channels} channels are too many for the kernels; give fewer images"
            )
        self._need(f"map{slot}", 2 * maps.rows * N)
        return maps

    def put(self, name: str, grid: tuple[int, ...], /, **arguments: int) -> None:
        """Add a launch."""
        self.launches.append(launch(named(name, self._half), grid, **arguments))

    def conv(
        self,
        x: Maps,
        weight: str,
        channels: int,
        live: Sequence[Maps] = (),
        *,
        reach: int = 3,
        stride: int = 1,
        lead: int | None = None,
        doubled: bool = False,
        silu: bool = False,
        add: Maps | None = None,
    ) -> Maps:
        """A convolution; `weight`: its module's name. `live`: maps that are needed later on."""
        lead = reach // 2 if lead is None else lead
        sides = tuple(((side << doubled) - 1) // stride + 1 for side in x.sides)
        out = self.new(channels, sides, (x, *live, *([add] if add else [])))
        w, bias = self._weights.conv(f"{weight}.weight", channels, x.channels, reach), f"{weight}.bias"
        name, grid = _tiles("conv", out)
        self.put(
            name, grid,
            a=self.address(x), w=w, bias=self._weights.vector(bias, channels), x=self.address(add) if add else 0,
            out=self.address(out), maps=self._places(out, x), K=x.N, N=out.N, reach=reach, lead=lead, stride=stride,
            doubled=int(doubled), silu=int(silu), adds=int(add is not None),
        )  # fmt: skip
        return out

    def features(self, x: Maps, weight: str, channels: int, out: int, *, reach: int = 3) -> None:
        """The last convolution of a control encoder, f32 [rows, channels] to an address."""
        made = replace(x, channels=channels)
        name, grid = _tiles("conv_wide", made)
        self.put(
            name, grid,
            a=self.address(x), w=self._weights.conv(f"{weight}.weight", channels, x.channels, reach),
            bias=self._weights.vector(f"{weight}.bias", channels), out=out, maps=self._places(made, x), K=x.N,
            N=made.N, reach=reach, lead=reach // 2, stride=1,
        )  # fmt: skip

    def norm(self, x: Maps, weight: str, live: Sequence[Maps] = (), *, silu: bool = True) -> Maps:
        """Group norm with 32 groups (fewer where the channels don't divide), then SiLU; maps of one size."""
        assert len(set(x.sides)) == 1
        groups = math.gcd(32, x.channels)
        tile, most = kernels()["group_moments.all"].constants, kernels()["group_affine.all"].constants["GP"]
        if x.channels // groups > most:
            raise UnsupportedGraphError(f"{weight} has groups of more than {most} channels")
        B, P, N, chunks = len(x.sides), x.pixels, x.N, -(-x.pixels // tile["BP"])
        self._need("moments", 8 * B * chunks * N)
        self._need("affine", 8 * B * N)
        moments, affine = (self._scratch.get(name, 0) for name in ("moments", "affine"))
        out = self.new(x.channels, x.sides, (x, *live))
        self.put(
            "group_moments.all", (chunks, -(-N // tile["BN"]), B),
            a=self.address(x), out=moments, P=P, N=N, chunks=chunks,
        )  # fmt: skip
        self.put(
            "group_affine.all", (groups, B),
            moments=moments, weight=self._weights.floats(f"{weight}.weight", x.channels),
            bias=self._weights.floats(f"{weight}.bias", x.channels), out=affine, P=P, channels=x.channels, N=N,
            groups=groups, chunks=chunks,
        )  # fmt: skip
        last = kernels()["group_norm.all"].constants
        self.put(
            "group_norm.all", (-(-P // last["BP"]), -(-N // last["BN"]), B),
            a=self.address(x), affine=affine, out=self.address(out), P=P, N=N, silu=int(silu),
        )  # fmt: skip
        return out

    def residual(self, x: Maps, at: str, channels: int) -> Maps:
        """x + conv3(SiLU(norm(conv3(SiLU(norm(x)))))); where channels change a 1×1 convolution carries x across."""
        h = self.norm(x, f"{at}.norm1")
        h = self.conv(h, f"{at}.conv1", channels, (x,))
        h = self.norm(h, f"{at}.norm2", (x,))
        across = x if channels == x.channels else self.conv(x, f"{at}.nin_shortcut", channels, (h,), reach=1)
        return self.conv(h, f"{at}.conv2", channels, add=across)

    def attention(self, x: Maps, at: str) -> Maps:
        """Attention of one head over the pixels of each map, added to x."""
        C, N, B, P = x.channels, x.N, len(x.sides), x.pixels
        h = self.norm(x, f"{at}.norm", silu=False)
        qkv = self.new(C, x.sides, (x, h), stored=3 * N)
        places = self._places(qkv, h)
        grid = (-(-3 * N // 64), -(-P // 64), B)
        self.put(
            "conv.m", grid,
            a=self.address(h), w=self._weights.parts(f"{at}.qkv.weight", 3, C),
            bias=self._weights.parts(f"{at}.qkv.bias", 3, C), x=0, out=self.address(qkv), maps=places, K=N, N=3 * N,
            reach=1, lead=0, stride=1, doubled=0, silu=0, adds=0,
        )  # fmt: skip
        mixed = self.new(C, x.sides, (x, qkv))
        tile = kernels()["pixel_attention.all"].constants
        self.put(
            "pixel_attention.all", (-(-N // tile["BN"]), -(-P // tile["BM"]), B),
            a=self.address(qkv), out=self.address(mixed), P=P, channels=C, N=N,
        )  # fmt: skip
        return self.conv(mixed, f"{at}.proj_out", C, reach=1, add=x)

    def pixels_in(self, images: Sequence[int], sides: tuple[int, ...]) -> Maps:
        """Images uint8 [side, side, 3] as maps."""
        maps, tile = self.new(3, sides), kernels()["from_pixels.all"].constants["BP"]
        for image, side, first in zip(images, sides, maps.firsts, strict=True):
            out = self.address(maps) + 2 * first * maps.N
            self.put("from_pixels.all", (-(-side * side // tile),), pixels=image, out=out, P=side * side)
        return maps

    def pixels_out(self, x: Maps, image: int) -> None:
        """Maps as images uint8 [B, side, side, 3]."""
        tile = kernels()["to_pixels.all"].constants["BP"]
        self.put("to_pixels.all", (-(-x.rows // tile),), a=self.address(x), pixels=image, P=x.rows)

    def latent_in(self, f_hat: int, B: int, Z: int, E: int) -> Maps:
        """f̂ f32 [B, Z, E, E] as maps."""
        maps, tile = self.new(Z, (E,) * B), kernels()["channels_last.all"].constants
        grid = (-(-E * E // tile["BP"]), -(-maps.N // tile["BN"]), B)
        self.put("channels_last.all", grid, f_hat=f_hat, out=self.address(maps), P=E * E, Z=Z, N=maps.N)
        return maps

    def _places(self, out: Maps, x: Maps) -> int:
        rows = zip(out.firsts, out.sides, x.firsts, x.sides, strict=True)
        return self._weights.numbers(np.array(list(rows), np.int32))

    def _need(self, name: str, size: int) -> None:
        self.sizes[name] = max(self.sizes.get(name, 0), size)


def decode(net: Net, shapes: Shapes, f_hat: int, image: int, B: int, Z: int, E: int) -> None:
    """The tokenizer's decoder: f̂ f32 [B, Z, E, E] → images uint8 [B, H, W, 3]."""
    at = "vqvae.decoder"
    h = net.conv(net.latent_in(f_hat, B, Z, E), "vqvae.post_quant_conv", Z)
    h = net.conv(h, f"{at}.conv_in", _outputs(shapes, f"{at}.conv_in"))
    h = _middle(net, f"{at}.mid", h)
    levels = _count(shapes, at + ".levels.{}.block.0.conv1.weight")
    for level in reversed(range(levels)):
        here = f"{at}.levels.{level}"
        h = _level(net, shapes, here, h)
        if level:
            h = net.conv(h, f"{here}.resample.conv", h.channels, doubled=True)
    h = net.conv(net.norm(h, f"{at}.norm_out"), f"{at}.conv_out", 3)
    net.pixels_out(h, image)


def encode(net: Net, shapes: Shapes, image: int, size: int, tokenizer: str = "vqvae") -> Maps:
    """The tokenizer's encoder: an image uint8 [size, size, 3] → the latent's maps, of Z channels.

    tokenizer: its module's name, or that of a copy of its encoder.
    """
    at = f"{tokenizer}.encoder"
    h = net.conv(net.pixels_in([image], (size,)), f"{at}.conv_in", _outputs(shapes, f"{at}.conv_in"))
    levels = _count(shapes, at + ".levels.{}.block.0.conv1.weight")
    for level in range(levels):
        here = f"{at}.levels.{level}"
        h = _level(net, shapes, here, h)
        if level + 1 < levels:  # one zero right and below
            h = net.conv(h, f"{here}.resample.conv", h.channels, stride=2, lead=0)
    h = net.norm(_middle(net, f"{at}.mid", h), f"{at}.norm_out")
    Z = _outputs(shapes, f"{at}.conv_out")
    return net.conv(net.conv(h, f"{at}.conv_out", Z), f"{tokenizer}.quant_conv", Z)


def _level(net: Net, shapes: Shapes, at: str, h: Maps) -> Maps:
    """Residual blocks of one resolution, each with attention where it has one."""
    for i in range(_count(shapes, at + ".block.{}.conv1.weight")):
        h = net.residual(h, f"{at}.block.{i}", _outputs(shapes, f"{at}.block.{i}.conv1"))
        if f"{at}.attn.{i}.qkv.weight" in shapes:
            h = net.attention(h, f"{at}.attn.{i}")
    return h


def _middle(net: Net, at: str, h: Maps) -> Maps:
    h = net.attention(net.residual(h, f"{at}.block_1", h.channels), f"{at}.attn_1")
    return net.residual(h, f"{at}.block_2", h.channels)


def encode_control(
    net: Net, shapes: Shapes, branch: str, strides: Sequence[int], controls: Sequence[int], sides: tuple[int, ...],
    features: int,
) -> None:  # fmt: skip
    """𝓕 on control images of all scales, uint8 [side, side, 3] each → features f32 [L, C].

    strides: none where 𝓕 is a copy of the tokenizer's encoder and a projection, whose norms are of one scale each.
    """
    at, row = f"branches.{branch}.encoder", 0
    if not strides:
        for control, side in zip(controls, sides, strict=True):
            h, C = encode(net, shapes, control, side, at), _outputs(shapes, f"{at}.proj")
            net.features(h, f"{at}.proj", C, features + 4 * row * C, reach=1)
            row += h.rows
        return
    h = net.conv(net.pixels_in(controls, sides), f"{at}.conv_in", _outputs(shapes, f"{at}.conv_in"), silu=True)
    for i, stride in enumerate(strides):
        h = net.conv(h, f"{at}.steps.{i}", _outputs(shapes, f"{at}.steps.{i}"), stride=stride, silu=True)
    net.features(h, f"{at}.conv_out", _outputs(shapes, f"{at}.conv_out"), features)


def _outputs(shapes: Shapes, module: str) -> int:
    if len(shapes.get(f"{module}.weight", ())) != 4:
        raise UnsupportedGraphError(f"the plan's table has no convolution {module}")
    return shapes[f"{module}.weight"][0]


def _count(shapes: Shapes, pattern: str) -> int:
    return next(i for i in range(len(shapes) + 1) if pattern.format(i) not in shapes)


def _tiles(kernel: str, out: Maps) -> tuple[str, tuple[int, int, int]]:
    """A convolution's variant, the largest whose programs fill a GPU, and its grid."""
    largest = max(out.sides) ** 2

    def grid(size: str) -> tuple[int, int, int]:
        tile = kernels()[f"{kernel}.{size}"].constants
        return -(-out.N // tile["BN"]), -(-largest // tile["BM"]), len(out.sides)

    for size in ("l", "m"):
        name = f"{kernel}.{size}"
        if name not in kernels() or kernels()[name].constants["BN"] // 2 >= out.N:
            continue
        tiles = sum(-(-side * side // kernels()[name].constants["BM"]) for side in out.sides)
        if tiles * grid(size)[0] >= FILLS:
            return name, grid(size)
    return f"{kernel}.s", grid("s")
