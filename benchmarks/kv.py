"""What the keys and values of an image take, counted from a plan's manifest and measured as a backend's buffers.

    python -m benchmarks.kv                             # the shipped plan
    python -m benchmarks.kv d16.plan --batch 16,4,1
    python -m benchmarks.kv --published                 # the published sizes, counted alone

Counted: 2 (K and V) · layers · tokens · rows · width · bytes of the cache's type. An image has two rows.
Measured: the bytes of such buffers as the plan's backend allocates them for a batch, and by how much the process's
resident memory (RssAnon) grows when they are written; give the largest batch first, since freed memory is used again.
No image is drawn: a cache is as large as its last scale needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.cli import Log, make_parser, numbers, run_command
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.records import Record, record
from benchmarks.harness.tables import markdown_table
from car_runtime.backends.registry import open_backend
from car_runtime.errors import CarError
from car_runtime.format.folder import open_folder
from car_runtime.format.manifest import Manifest, read_manifest
from car_runtime.plan import default_plan
from car_train.config import SIDES_256, SIDES_512

PUBLISHED = ((16, SIDES_256), (20, SIDES_256), (24, SIDES_256), (30, SIDES_256), (36, SIDES_512))
"""(depth, scales) of the published models; a branch adds half of the layers."""
HALF = 2
"""Bytes of a number in half precision."""


def kv_bytes(layers: int, tokens: int, rows: int, width: int, item: int) -> int:
    """Bytes of all keys and values: 2·layers·tokens·rows·width·item."""
    return 2 * layers * tokens * rows * width * item


def counted(manifest: Manifest, batch: int) -> int:
    """The bytes of a plan's cache for a guided batch, from its manifest."""
    item = np.dtype(cache_type(manifest).replace("bfloat16", "uint16")).itemsize
    model = manifest.model
    return kv_bytes(cache_layers(manifest), manifest.tokens, 2 * batch, model.width, item)


def cache_layers(manifest: Manifest) -> int:
    """Pairs of keys and values with the default branch in use: those of format 1 are all the step's."""
    model = manifest.model
    branch = model.branches.get(model.default_branch or "")
    return model.cache_layers + (branch.cache_layers if branch is not None else 0)


def cache_type(manifest: Manifest) -> str:
    """The type of the cache's numbers, as the step's ports have it."""
    return next(port.dtype for port in manifest.graphs["step"].inputs if port.name == "past_k_0")


def measured(path: Path, manifest: Manifest, batch: int, backend: str) -> tuple[int, int]:
    """(bytes of the cache's buffers, growth of the process's resident memory when they are written)."""
    folder = open_folder(path)
    try:
        opened, _ = open_backend(backend, path, manifest, 1, folder, False)
        try:
            model = manifest.model
            shape = (manifest.tokens, 2 * batch, model.heads, model.width // model.heads)
            dtype = cache_type(manifest)
            cache = [np.asarray(opened.allocate(shape, dtype)) for _ in range(2 * cache_layers(manifest))]
            before = resident()
            for array in cache:
                array.fill(1)
            return sum(array.nbytes for array in cache), resident() - before
        finally:
            opened.close()
    finally:
        folder.close()


def resident() -> int:
    """The process's own pages in memory, bytes; 0 where the system doesn't say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def published_rows() -> list[dict[str, Any]]:
    """The published sizes in half precision, guided, with and without a branch; counted."""
    rows = []
    for depth, sides in PUBLISHED:
        tokens = sum(side * side for side in sides)
        size = {"model": f"d{depth}", "pixels": 16 * sides[-1], "tokens": tokens}
        rows.append(
            size
            | {"VAR, MB an image": kv_bytes(depth, tokens, 2, 64 * depth, HALF) / 1e6}
            | {"CAR, MB an image": kv_bytes(depth + depth // 2, tokens, 2, 64 * depth, HALF) / 1e6}
        )
    return rows


def measure(args: argparse.Namespace, log: Log) -> Record:
    if args.published:
        return record("kv", {"published": True, "type": "fp16"}, published_rows())
    path = args.plan or default_plan()
    try:
        manifest = read_manifest(path)
        rows = []
        for batch in args.batch:
            log(f"{manifest.name}: batch {batch}")
            buffers, grown = measured(path, manifest, batch, args.backend)
            row = {
                "plan": manifest.name,
                "pixels": manifest.model.image_size,
                "tokens": manifest.tokens,
                "batch": batch,
            }
            rows.append(row | {"counted": counted(manifest, batch), "buffers": buffers, "resident": grown})
    except CarError as error:
        raise BenchmarkError(str(error)) from error
    return record("kv", {"backend": args.backend, "published": False}, rows)


def tables(found: Record) -> list[str]:
    return [markdown_table(found["results"])]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("kv", __doc__)
    parser.add_argument("plan", type=Path, nargs="?", help="plan directory (default: the shipped one)")
    parser.add_argument("--batch", type=numbers, default=(4, 1), help="batch sizes (default: 4,1)")
    parser.add_argument(
        "--backend", default="ort-cpu", help="a backend whose buffers are the host's (default: ort-cpu)"
    )
    parser.add_argument("--published", action="store_true", help="the published models instead, counted")
    parser.add_argument("-o", "--output", type=Path, help="append the result to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.kv", parse_args(argv), measure, tables)


if __name__ == "__main__":
    sys.exit(main())
