"""What an image costs on a GPU with the `cuda` kernels: launches, bytes and FLOPs by count, time by a model.

    python -m benchmarks.analysis.gpu_model                 d16 with one branch, guided, one image
    python -m benchmarks.analysis.gpu_model --batch 4 --gpu h100

Counts are exact: they are read from the launch plan itself, as the runtime makes it, on addresses that nobody
allocated. Times are computed from them with the assumptions of `GPUS` and `times`, and nothing was measured. What a
new class (`condition`) and a new control image (`control`) cost is computed once for all seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.backends.cuda.buffers import ITEM_BYTES, DeviceArray
from car_runtime.backends.cuda.kernels import Launch, kernels
from car_runtime.backends.cuda.launch_plan import Arrays, LaunchPlan, Sizes
from car_runtime.backends.cuda.weights import padded
from car_runtime.format.schema import Branch

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
DECODER, ENCODER = (160, 160, 320, 320, 640), (64, 128, 256, 512, 1024)
"""Channels of the published decoder's levels, the finest first, and of the published control encoder's."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a time is computed from. The vendor's numbers, and shares of them that are assumed."""

    multiprocessors: int
    bandwidth: float
    """Of memory, bytes/s, published."""
    peak: float
    """fp16 with fp32 sums, dense, FLOP/s, published."""
    share: float
    """Of the peak that a full tile loop is assumed to reach."""
    per_multiprocessor: float
    """Bytes/s from L2 to one multiprocessor, assumed."""
    launch: float
    """Seconds from one kernel of a recorded graph to the next, assumed."""


GPUS = {
    "rtx4090": Gpu(
        multiprocessors=128, bandwidth=1.008e12, peak=165.2e12, share=0.8, per_multiprocessor=60e9, launch=2.5e-6
    ),
    "h100": Gpu(
        multiprocessors=132, bandwidth=3.35e12, peak=989e12, share=0.5, per_multiprocessor=90e9, launch=2.5e-6
    ),
    "h200": Gpu(
        multiprocessors=132, bandwidth=4.8e12, peak=989e12, share=0.5, per_multiprocessor=90e9, launch=2.5e-6
    ),
}
REACHED = 0.85
"""Share of the published bandwidth that a stream of data is assumed to reach."""
DRAW = 35e-6
"""Seconds of one program of the draw, assumed: 64 sums over the vocabulary, one after the other."""
PER_MULTIPROCESSOR = 2
"""Programs that are assumed to run on a multiprocessor at once."""


_PLACES: list[NDArray[np.int32]] = []
"""Where maps lie, by the addresses that `CountedWeights` gave out."""


class CountedWeights:
    """Parameters that nobody loads: how many bytes they take on a GPU."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[str, str], int] = {}

    @property
    def bytes(self) -> int:
        """Of all that were asked for."""
        return sum(self._sizes.values())

    def matrix(self, name: str, K: int, N: int) -> int:
        """See `Weights`."""
        return self._count("matrix", name, 2 * K * padded(N))

    def vector(self, name: str, size: int) -> int:
        """See `Weights`."""
        return self._count("vector", name, 2 * padded(size))

    def neighbours(self, name: str, C: int) -> int:
        """See `Weights`."""
        return self._count("matrix", name, 2 * 9 * C * C)

    def floats(self, name: str, *shape: int) -> int:
        """See `Weights`."""
        return self._count("floats", name, 4 * math.prod(shape))

    def rows(self, name: str, number: int, C: int) -> int:
        """See `Weights`."""
        return self._count("rows", name, 2 * number * C)

    def conv(self, name: str, N: int, K: int, reach: int) -> int:
        """See `Weights`."""
        return self._count("conv", name, 2 * reach**2 * padded(K) * padded(N))

    def parts(self, name: str, number: int, C: int) -> int:
        """See `Weights`."""
        return self._count("parts", name, 2 * number * padded(C) * (1 if name.endswith("bias") else padded(C)))

    def numbers(self, values: NDArray[np.int32]) -> int:
        """See `Weights`. The first address is 16."""
        _PLACES.append(values)
        self._count("numbers", values.tobytes().hex(), values.nbytes)
        return 16 * len(_PLACES)

    def constant(self, name: str, values: NDArray[Any]) -> int:
        """See `Weights`."""
        return self._count("constant", name, values.nbytes)

    def _count(self, kind: str, name: str, size: int) -> int:
        self._sizes[kind, name] = size
        return 0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one launch, or the sum of many."""

    launches: int = 1
    flops: int = 0
    weight_bytes: int = 0
    """What is read once from memory at every step."""
    bytes: int = 0
    """All else that is read and written, each number once."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


NOTHING = Cost(launches=0)


def d16(branches: int = 1, depth: int = 16) -> Sizes:
    """A published model: width 64·depth, and control branches of half its depth."""
    branch = Branch(
        control_type="canny", fusion="concat", transformer="blocks", blocks=depth // 2, cache_layers=depth // 2
    )
    return Sizes(
        half="fp16",
        depth=depth,
        width=64 * depth,
        heads=depth,
        hidden=256 * depth,
        vocab=4096,
        latent_channels=32,
        latent_size=16,
        phis=4,
        largest=max(SIDES) ** 2,
        branches={f"branch{i}": branch for i in range(branches)},
        classes=1000,
        control_sides=tuple(16 * side for side in SIDES),
        strides={f"branch{i}": (1, 2) * (len(ENCODER) - 1) for i in range(branches)},
        shapes=dict(_convolutions(64 * depth, branches)),
    )


def _convolutions(width: int, branches: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the published decoder's convolutions, as far as launches depend on them, and of 𝓕's."""
    yield "vqvae.decoder.conv_in.weight", (DECODER[-1], 32, 3, 3)
    for level, channels in enumerate(DECODER):
        for i in range(3):
            yield f"vqvae.decoder.levels.{level}.block.{i}.conv1.weight", (channels, channels, 3, 3)
            if level == len(DECODER) - 1:
                yield f"vqvae.decoder.levels.{level}.attn.{i}.qkv.weight", (3 * channels, channels, 1, 1)
    for branch in range(branches):
        at = f"branches.branch{branch}.encoder"
        yield f"{at}.conv_in.weight", (ENCODER[0], 3, 3, 3)
        for i, pair in enumerate(pairwise(ENCODER)):
            for j, channels in enumerate(pair):
                yield f"{at}.steps.{2 * i + j}.weight", (channels, pair[0], 3, 3)
        yield f"{at}.conv_out.weight", (width, ENCODER[-1], 3, 3)


def steps(model: Sizes, batch: int, sides: tuple[int, ...] = SIDES) -> list[list[Launch]]:
    """What each scale launches for `batch` guided images: all branches, then the base's step."""
    plan = LaunchPlan(model, CountedWeights())
    ends = [0, *accumulate(side * side for side in sides)]
    return [
        [
            launch
            for graph in [*(g for g in plan.graphs if g.startswith("branch.")), "step"]
            for launch in plan.launches(
                graph, *_ports(model, batch, side, start, following), dict.fromkeys(plan.scratch_bytes(1, 1, 1), 0)
            )
        ]
        for side, start, following in zip(sides, ends, [*sides[1:], 1], strict=False)
    ]


def others(model: Sizes, batch: int) -> dict[str, list[Launch]]:
    """What `batch` images launch apart from steps: for a new class, for one new control image, and to decode them."""
    plan, C, E = LaunchPlan(model, CountedWeights()), model.width, model.latent_size

    def at(shape: tuple[int, ...]) -> DeviceArray:
        return DeviceArray(shape, "float32", 0, None)

    label, modulation = at((2 * batch,)), at((2 * batch, 6 * model.depth + 2, C))
    found = {
        "condition": plan.launches("condition", {"label": label}, {"modulation": modulation, "start": label}, {})
    }
    for name, branch in model.branches.items():
        rows = {"modulation": at((2 * batch, 6 * branch.blocks, C))}
        found["condition"] += plan.launches(f"condition.{name}", {"label": label}, rows, {})
        controls = {f"control_{k}": at((side, side, 3)) for k, side in enumerate(model.control_sides)}
        found[f"control.{name}"] = plan.launches(f"control.{name}", controls, {"features": label}, {})
    f_hat = at((1, model.latent_channels, E, E))
    found["decoder"] = batch * plan.launches("decoder", {"f_hat": f_hat}, {"image": label}, {})
    return found


def memory(model: Sizes, batch: int, tokens: int) -> dict[str, int]:
    """Bytes on the GPU for `batch` guided images of so many tokens, with all branches mixed, by what they are for.

    Without the driver's context, ONNX Runtime, recordings, and what is kept of earlier controls and classes.
    """
    weights = CountedWeights()
    plan, B, R, C, m = LaunchPlan(model, weights), batch, 2 * batch, model.width, len(model.branches)
    branches, largest = list(model.branches.values()), model.largest
    fused = branches[0].blocks if branches else 0
    f_hat = DeviceArray((1, model.latent_channels, model.latent_size, model.latent_size), "float32", 0, None)
    scratch = [plan.scratch_bytes(R, B, max(m, 1)), plan.scratch("decoder", {"f_hat": f_hat})]
    controls = {f"control_{k}": f_hat for k in range(len(model.control_sides))}
    scratch += [plan.scratch(f"control.{name}", controls) for name in model.strides]
    names = {name for sizes in scratch for name in sizes}
    layers = model.depth + sum(branch.blocks for branch in branches)
    per_code = 4 * B * largest * model.vocab
    steering = 4 * R * C * (6 * model.depth + 2 + sum(6 * branch.blocks for branch in branches))
    outputs = 4 * max(m, 1) * fused * largest * R * C
    return {
        "weights": weights.bytes + m * fused * (2 * 2 * C * 4 + 2 * C * C * 2 + 2 * C),
        "keys and values": 2 * 2 * layers * tokens * R * C,
        "scratch": sum(max(sizes.get(name, 0) for sizes in scratch) for name in names),
        "loop": per_code + steering + outputs + 4 * m * B * tokens * C + 8 * largest * R * C,
    }


def _ports(model: Sizes, B: int, S: int, P: int, T: int) -> tuple[Arrays, Arrays]:
    """Buffers of the right shapes, all at address 0 but a slot of the cache, which follows its past."""
    C, R, D, h = (
        model.width,
        2 * B,
        model.width // model.heads,
        max((b.blocks for b in model.branches.values()), default=0),
    )
    m, E = len(model.branches), model.latent_size
    wide = {
        "x": (R, S, S, C),
        "modulation": (R, 6 * model.depth + 2, C),
        "c": (m, h, S, S, R, C),
        "control": (B, S, S, C),
        "uniforms": (B, S, S),
        "next_x": (R, T, T, C),
        "f_hat": (B, model.latent_channels, E, E),
    }
    names = ["rows", "twin", "cfg", "top_k", "top_p", "bias", "known", "known_mask", "mix", "keep", "plain"]
    names += ["control_cfg", "pos", "up", "down", "phi", "cfg_ratio", "tokens", "f_hat_out"]
    fused = ("norm_weight", "norm_bias", "linear_weight", "linear_bias")
    names += [f"fusion_{name}_{i}" for i in range(h) for name in fused]
    ports = {name: DeviceArray(shape, "float32", 0, None) for name, shape in wide.items()}
    ports |= {name: DeviceArray((1,), "float32", 0, None) for name in names}
    if not m:
        del ports["c"]
    slot = P * R * C * ITEM_BYTES["float16"]
    for i in range(model.depth):
        for kind in "kv":
            ports[f"past_{kind}_{i}"] = DeviceArray((P, R, model.heads, D), "float16", 0, None)
            ports[f"new_{kind}_{i}"] = DeviceArray((S * S, R, model.heads, D), "float16", slot, None)
    return ports, ports


def cost(launch: Launch) -> Cost:
    """By the numbers that a launch carries."""
    kernel = kernels()[launch.kernel]
    a = dict(zip(kernel.arguments, launch.arguments, strict=True))
    M, C, R, N, K = (a.get(name, 0) for name in "MCRNK")
    kind = kernel.kernel
    if kind in ("ln_qkv", "qkv"):
        return _product(M, 3 * C, C, (4 if kind == "ln_qkv" else 2) * M * C + 6 * M * C)
    if kind in ("ln_gelu", "gelu"):
        return _product(M, N, K or C, (2 if K else 4) * M * (K or C) + 2 * M * N)
    if kind == "gate":
        return _product(M, C, K, 2 * M * K + 8 * M * C)
    if kind == "head":
        return _product(M, N, K, 2 * M * K + 4 * M * N)
    if kind == "fuse":
        return _product(M, C, a["branches"] * K, a["branches"] * 2 * M * K + 8 * M * C)
    if kind == "inject":
        rows = a["S"] ** 2 * R
        return _product(rows, C, 9 * C, 8 * rows * C + 8 * a["S"] ** 2 * C)
    if kind == "embed":
        return _product(M, C, a["Z"], 2 * M * a["Z"] + 4 * M * C)
    if kind == "attention":
        T = a["past"] + a["tokens"]
        return Cost(flops=4 * a["tokens"] * R * T * C, bytes=4 * T * R * C + 4 * a["tokens"] * R * C)
    if kind == "draw":
        return Cost(bytes=4 * a["cells"] * R * a["N"])
    if kind in ("upsample", "accumulate", "downsample"):
        maps = launch.grid[0] * launch.grid[1] if kind != "accumulate" else launch.grid[2] * a["Z"]
        return Cost(
            bytes=8 * maps * a["E"] ** 2, flops=18 * maps * a["Z"] * a["E"] ** 2 if kind == "accumulate" else 0
        )
    if kind in ("conv", "conv_wide"):
        places = _PLACES[a["maps"] // 16 - 1].astype(np.int64)
        rows, given = int((places[:, 1] ** 2).sum()), int((places[:, 3] ** 2).sum())
        written = (4 if kind == "conv_wide" else 2 + 2 * a["adds"]) * rows * N
        return _product(rows, N, a["reach"] ** 2 * K, 2 * given * K + written)
    if kind == "condition":
        return _product(R, N, K, 2 * R * K + 4 * R * N)
    if kind == "pixel_attention":
        B, P = launch.grid[2], a["P"]
        return Cost(flops=2 * B * P * P * N * (launch.grid[0] + 1), bytes=8 * B * P * N)
    if kind in ("group_moments", "group_norm"):
        return Cost(bytes=(2 if kind == "group_moments" else 4) * launch.grid[2] * a["P"] * N)
    if kind == "group_affine":
        return Cost(bytes=8 * launch.grid[1] * a["chunks"] * N)
    if kind in ("from_pixels", "to_pixels"):
        return Cost(bytes=35 * a["P"])
    if kind == "channels_last":
        return Cost(bytes=launch.grid[2] * a["P"] * (4 * a["Z"] + 2 * N))
    if kind == "start":
        return Cost(bytes=8 * launch.grid[0] * C)
    rows, branches = launch.grid[:2]
    return Cost(bytes=(12 if kind == "fusion_norm" else 6 if kind == "ln_mod" else 8) * rows * branches * C)


def _product(M: int, N: int, K: int, activations: int) -> Cost:
    return Cost(flops=2 * M * N * K, weight_bytes=2 * padded(N) * K, bytes=activations)


def seconds(launch: Launch, gpu: Gpu) -> float:
    """Computed: the longest of its FLOPs, its bytes and its waves of tiles, and the cost of a launch."""
    one, kernel = cost(launch), kernels()[launch.kernel]
    programs = math.prod(launch.grid)
    slots = PER_MULTIPROCESSOR * gpu.multiprocessors
    waves = math.ceil(programs / slots)
    times = [(one.weight_bytes + one.bytes) / (gpu.bandwidth * REACHED), one.flops / (gpu.peak * gpu.share)]
    if kernel.kernel == "draw":
        times.append(waves * DRAW)
    if kernel.product and "BK" in kernel.constants:
        tile = kernel.constants
        columns = tile.get("BN", tile.get("D", 0))
        inner = one.flops / (2 * programs * tile["BM"] * columns)  # K, with rows and columns that are cut off
        together = min(PER_MULTIPROCESSOR, math.ceil(programs / gpu.multiprocessors))
        loaded = together * (tile["BM"] + columns) * inner * 2 / gpu.per_multiprocessor
        times.append(waves * loaded)
    return max(times) + gpu.launch


def table(model: Sizes, batch: int, gpu: Gpu) -> dict[str, dict[str, float]]:
    """A row for each scale's side, and for each other graph by its name."""
    graphs = {str(side): launches for side, launches in zip(SIDES, steps(model, batch), strict=True)}
    rows = {}
    for name, launches in (graphs | others(model, batch)).items():
        total = sum((cost(launch) for launch in launches), NOTHING)
        rows[name] = {**asdict(total), "ms": 1e3 * sum(seconds(launch, gpu) for launch in launches)}
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.analysis.gpu_model", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), default="rtx4090", help="whose assumptions (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images at once (%(default)s)")
    parser.add_argument("--branches", type=int, default=1, help="control branches at once (%(default)s)")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(arguments)
    rows = table(d16(options.branches), options.batch, GPUS[options.gpu])
    held = memory(d16(options.branches), options.batch, sum(side * side for side in SIDES))
    if options.json:
        print(json.dumps({"computed": True, "gpu": asdict(GPUS[options.gpu]), "graphs": rows, "memory": held}))
        return 0
    print(f"d16, {options.branches} branches, batch {options.batch}, {options.gpu}: computed, not measured")
    print(f"assumed: {GPUS[options.gpu]}")
    print("           side  launches     GFLOP  MB of weights, of all else, ms")
    scales = [row for name, row in rows.items() if name.isdigit()]
    ends = [("all steps", scales), ("next seed", [*scales, rows["decoder"]]), ("new control", list(rows.values()))]
    totals = {name: {key: sum(row[key] for row in some) for key in some[0]} for name, some in ends}
    for name, row in (rows | totals).items():
        sizes = (row["flops"] / 1e9, row["weight_bytes"] / 1e6, row["bytes"] / 1e6, row["ms"])
        print(f"{name:>15}  {row['launches']:8.0f}  {'  '.join(f'{size:8.1f}' for size in sizes)}")
    print(f"MB of memory: {', '.join(f'{size / 1e6:.0f} of {name}' for name, size in held.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
