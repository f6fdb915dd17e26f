"""A process that runs the kernels on graphs, its own for AddressSanitizer: `run_graphs.py LIBRARY PLAN SEED COUNT`.

First the plan's own step and control encoder, which must run; then `COUNT` graphs: these with something changed,
decoders of random architectures, as they are and changed, and transformers of random sizes with calls that fit them
or don't. Prints each case before it runs; a sanitizer's report ends the process, and so does any error but a refusal.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from car_runtime.backends.amx.convnet import Convnet, ConvnetBuffers
from car_runtime.backends.amx.convolutions import read_encoder
from car_runtime.backends.amx.description import UnsupportedGraphError
from car_runtime.backends.amx.match_transformer import read_step
from car_runtime.backends.amx.memory import Workspace
from car_runtime.backends.amx.transformer import CombinedTransformer, PackedFusions, Transformer
from car_runtime.format.manifest import Scale, read_manifest
from fixtures.kernel_graphs import THREADS, WEIGHTS, RandomDecoder, RandomTransformer, decode, mutated

KINDS = ("decoder", "changed decoder", "changed step", "transformer", "changed transformer", "changed control")


def encode(library: Any, folder: Path, sides: tuple[int, ...]) -> None:
    """A folder's control.onnx on grey."""
    network = read_encoder(folder / "control.onnx", folder / WEIGHTS, sides)
    buffers = ConvnetBuffers(Convnet(library, network, THREADS), tuple((side, side) for side in sides))
    for k in range(len(sides)):
        buffers.pixels(k)[:] = 100
    buffers.run()
    assert all(np.isfinite(buffers.output(k)).sum() for k in range(len(sides)))


def step(library: Any, folder: Path, scales: Sequence[Scale], rng: np.random.Generator) -> None:
    """A folder's step.onnx at some scales."""
    graph = read_step(folder / "step.onnx", folder / WEIGHTS)
    transformer, workspace = CombinedTransformer(library, graph, THREADS), Workspace(library)
    base = graph.base
    assert base.head is not None
    layers, head = range(base.layers), base.width // base.heads
    for rows, images in ((1, 1), (6, 3)):
        for scale in scales:
            S, C = scale.side, base.width
            shapes = {"x": (rows, S, S, C), "pos": (S, S, C), "control": (S, S, C)}
            shapes["modulation"] = (rows, base.modulation_rows, C)
            inputs: dict[str, Any] = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
            inputs |= {name: np.ones(1, np.float32) for name in ("cfg", "cfg_ratio")}
            outputs: dict[str, Any] = {"logits": np.zeros((images, S, S, len(base.head.matrix)), np.float32)}
            for name in (f"{kind}_{i}" for kind in "kv" for i in layers):
                inputs[f"past_{name}"] = np.zeros((scale.start, rows, base.heads, head), transformer.cache_dtype)
                outputs[f"new_{name}"] = np.zeros((S * S, rows, base.heads, head), transformer.cache_dtype)
            transformer.run(inputs, outputs, workspace)


def random_decoder(library: Any, folder: Path, seed: int, change: bool) -> None:
    """A decoder of a random architecture; on demand with something changed, and other sizes of what goes in."""
    made, rng = RandomDecoder(seed), np.random.default_rng(seed)
    made.write(folder)
    f_hat, size = made.f_hat(), made.image_side
    if change:
        file = folder / "decoder.onnx"
        file.write_bytes(mutated(file.read_bytes(), seed))
        side = int(rng.choice([made.side, made.side, made.side + 1, made.side - 1, 0]))
        f_hat = np.zeros((int(rng.choice([made.channels, made.channels, 0])), side, side), np.float32)
        size = int(rng.choice([size, size, side, 0]))
    decode(library, folder, f_hat, np.zeros((1, size, size, 3), np.uint8))


def random_transformer(library: Any, seed: int, change: bool) -> None:
    """A base or a branch of random sizes, and a call; on demand one that doesn't fit in some place."""
    made = RandomTransformer(seed)
    if change:
        made.change()
    transformer, workspace = Transformer(library, made.described, THREADS), Workspace(library)
    inputs, outputs = made.call(transformer.cache_dtype)
    if made.described.head is None:
        transformer.run_branch(inputs, outputs, workspace)
        assert np.isfinite(outputs["c"]).all()
        return
    fusions = (
        PackedFusions(library, made.fusions, made.mixed, made.described.width, THREADS) if made.fusions else None
    )
    transformer.run_step(inputs, outputs, workspace, fusions)
    assert np.isfinite(outputs["logits"]).all()


def changed_graph(library: Any, plan: Path, folder: Path, graph: str, seed: int) -> None:
    """The plan's step or control encoder with something changed."""
    manifest, rng = read_manifest(plan), np.random.default_rng(seed)
    (folder / f"{graph}.onnx").write_bytes(mutated((plan / f"{graph}.onnx").read_bytes(), seed))
    if graph == "step":
        step(library, folder, manifest.scales[:2], rng)
    else:
        off = int(rng.choice([0, 0, 0, 1, -1, -manifest.scales[0].control_size]))
        encode(library, folder, tuple(scale.control_size + off for scale in manifest.scales))


def main(library: Any, plan: Path, seed: int, count: int) -> None:
    """See the top of the file."""
    manifest, tried = read_manifest(plan), Counter[str]()
    print("the plan's control encoder", flush=True)
    encode(library, plan, tuple(scale.control_size for scale in manifest.scales))
    print("the plan's step", flush=True)
    step(library, plan, manifest.scales[:3], np.random.default_rng(seed))
    with tempfile.TemporaryDirectory() as name:
        plain, changed = Path(name) / "plain", Path(name) / "changed"
        for folder in (plain, changed):
            folder.mkdir()
        shutil.copyfile(plan / WEIGHTS, changed / WEIGHTS)
        for i in range(seed, seed + count):
            kind = KINDS[i % len(KINDS)]
            print(f"{kind}, {i}", flush=True)
            try:
                if kind.endswith("transformer"):
                    random_transformer(library, i, kind != "transformer")
                elif kind.endswith("decoder"):
                    random_decoder(library, plain, i, kind != "decoder")
                else:
                    changed_graph(library, plan, changed, kind.partition(" ")[2], i)
            except (UnsupportedGraphError, MemoryError, ValueError):
                if kind == "transformer":  # nothing is wrong with it
                    raise
                tried["refused"] += 1
            else:
                tried["ran"] += 1
    print(f"{tried['ran']} ran, {tried['refused']} refused", flush=True)


if __name__ == "__main__":
    main(ctypes.CDLL(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
