"""A process that runs the kernels, its own for AddressSanitizer: `run_graphs.py LIBRARY PLAN SEED COUNT`.

First a plan's own base, branch and control encoder, which must run; then `COUNT` cases: these with something changed
in the table of parameters or in the manifest's sizes, decoders of random architectures, as they are and changed, and
transformers of random sizes with calls that fit them or don't. Prints each case before it runs; a sanitizer's report
ends the process, and so does any error but a refusal.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from car_runtime.backends.amx.convnet import Convnet, ConvnetBuffers
from car_runtime.backends.amx.description import UnsupportedGraphError
from car_runtime.backends.amx.memory import Workspace
from car_runtime.backends.amx.parameters import named_base, named_branch, named_encoder
from car_runtime.backends.amx.transformer import PackedFusions, Transformer
from car_runtime.format.manifest import WEIGHTS, Scale, read_manifest
from car_runtime.format.parameters import Parameters
from fixtures.kernel_graphs import THREADS, RandomTransformer, changed_table, random_decoder

KINDS = (
    *("decoder", "changed decoder", "transformer", "changed transformer"),
    *("changed base", "changed branch", "changed encoder"),
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the manifest says, and a stranger's may say anything."""

    depth: int
    blocks: int
    width: int
    heads: int
    vocab: int
    patch: int


def encode(library: Any, branch: Parameters, sizes: Sizes, sides: Sequence[int]) -> list[Any]:
    """What a branch's encoder makes of grey."""
    network = named_encoder(branch, sizes.width, sizes.patch)
    buffers = ConvnetBuffers(Convnet(library, network, THREADS), tuple((side, side) for side in sides))
    for k in range(len(sides)):
        buffers.pixels(k)[:] = 100
    buffers.run()
    return [buffers.output(k).copy() for k in range(len(sides))]


def run_scales(library: Any, parameters: Parameters, sizes: Sizes, scales: Sequence[Scale], base: bool) -> list[Any]:
    """What a base without branches, or a branch, gives at some scales."""
    shape = {"width": sizes.width, "heads": sizes.heads}
    if base:
        described, blocks = named_base(parameters, depth=sizes.depth, **shape), sizes.depth
    else:
        described, blocks = named_branch(parameters, blocks=sizes.blocks, **shape), sizes.blocks
    transformer, workspace, rng = (
        Transformer(library, described, THREADS),
        Workspace(library),
        np.random.default_rng(1),
    )
    C, H, found = sizes.width, sizes.heads, []
    for rows, images in ((1, 1), (6, 3)):
        for scale in scales:
            S = scale.side
            shapes = {"x": (rows, S, S, C), "pos": (S, S, C), "control": (images, S, S, C)}
            shapes |= {"modulation": (rows, 6 * blocks + 2 * base, C), "cfg": (images,), "cfg_ratio": (1,)}
            inputs: dict[str, Any] = {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}
            inputs |= {"rows": np.arange(rows) % images, "twin": np.arange(images) + rows - images}
            outputs: dict[str, Any] = {"logits": np.zeros((images, S, S, sizes.vocab), np.float32)}
            outputs["c"] = np.zeros((blocks, S, S, rows, C), np.float32)
            for name in (f"{kind}_{i}" for kind in "kv" for i in range(blocks)):
                inputs[f"past_{name}"] = np.zeros((scale.start, rows, H, C // H), transformer.cache_dtype)
                outputs[f"new_{name}"] = np.zeros((S * S, rows, H, C // H), transformer.cache_dtype)
            (transformer.run_step if base else transformer.run_branch)(inputs, outputs, workspace)
            found.append(outputs["logits" if base else "c"])
    return found


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


class OnePlan:
    """A plan of format 2, of whose parts any may be run, as it is or with something changed."""

    def __init__(self, library: Any, root: Path) -> None:
        manifest = read_manifest(root)
        self._library, self._weights = library, root / WEIGHTS
        self._table, self._scales = manifest.parameters, manifest.scales
        self._branch, branch = next(iter(manifest.model.branches.items()))
        model = manifest.model
        self._sizes = Sizes(
            depth=model.depth,
            blocks=branch.blocks,
            width=model.width,
            heads=model.heads,
            vocab=model.vocab,
            patch=model.patch,
        )

    def run(self, part: str, seed: int | None = None) -> None:
        """`part`: "base", "branch" or "encoder". `seed`: of what is changed."""
        prefix = "base." if part == "base" else f"branches.{self._branch}."
        table, sizes, off = self._table, self._sizes, 0
        if seed is not None:
            rng = np.random.default_rng(seed)
            inside = f"{prefix}encoder." if part == "encoder" else prefix
            table = changed_table(table, rng, inside)
            if rng.random() < 0.3:
                name = str(rng.choice(list(vars(sizes))))
                sizes = replace(sizes, **{name: int(rng.choice([0, 1, 2, 64, 128, getattr(sizes, name) + 1]))})
            off = int(rng.choice([0, 0, 0, 1, -1, -self._scales[0].control_size]))
        parameters = Parameters(table, self._weights, prefix)
        if part == "encoder":
            made = encode(self._library, parameters, sizes, [scale.control_size + off for scale in self._scales])
        else:
            scales = self._scales[:3] if seed is None else self._scales[:2]
            made = run_scales(self._library, parameters, sizes, scales, part == "base")
        assert seed is not None or all(np.isfinite(one).all() for one in made)


def main(library: Any, root: Path, seed: int, count: int) -> None:
    """See the top of the file."""
    plan, tried = OnePlan(library, root), Counter[str]()
    for part in ("encoder", "base", "branch"):
        print(f"the plan's {part}", flush=True)
        plan.run(part)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(seed, seed + count):
            kind = KINDS[i % len(KINDS)]
            print(f"{kind}, {i}", flush=True)
            try:
                if kind.endswith("transformer"):
                    random_transformer(library, i, kind != "transformer")
                elif kind.endswith("decoder"):
                    random_decoder(library, Path(folder), i, kind != "decoder")
                else:
                    plan.run(kind.partition(" ")[2], i)
            except (UnsupportedGraphError, MemoryError, ValueError):
                if not kind.startswith("changed"):  # nothing is wrong with it
                    raise
                tried["refused"] += 1
            else:
                tried["ran"] += 1
    print(f"{tried['ran']} ran, {tried['refused']} refused", flush=True)


if __name__ == "__main__":
    main(ctypes.CDLL(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
