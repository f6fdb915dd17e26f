"""What the keys and values of an image take, counted from a plan's manifest and measured as a backend's buffers.

    python -m benchmarks.kv                             # the shipped plan, as it draws by default
    python -m benchmarks.kv d16.plan --batch 16,4,1
    python -m benchmarks.kv --published                 # the published sizes, counted alone
    python -m benchmarks.kv --budget 0.5,0.75           # tokens that change where only a part is kept

Counted: 2 (K and V) · layers · tokens · rows · width · bytes of the cache's type. A guided image has two rows,
another one; a plan's own sampling says which, and the published sizes are guided.
Measured: the bytes of such buffers as the plan's backend allocates them for a batch, and by how much the process's
resident memory (RssAnon) grows when they are written; give the largest batch first, since freed memory is used again.
No image is drawn: a cache is as large as its last scale needs.

With --budget images are drawn in PyTorch, in float32, with the plan's own sampling, classes and `--control` images in
turn: 16 of seeds from 1000 on to choose what is kept, `--images` of seeds from 0 on to measure
(`benchmarks.analysis.kv_budget`). No backend has such a budget.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from benchmarks.analysis.kv_budget import changed, make_request
from benchmarks.from_plan import plan_model
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
from car_train.model.sample import control_pyramid
from car_train.sampling import Sampling

PUBLISHED = ((16, SIDES_256), (20, SIDES_256), (24, SIDES_256), (30, SIDES_256), (36, SIDES_512))
"""(depth, scales) of the published models; a branch adds half of the layers."""
HALF = 2
"""Bytes of a number in half precision."""
CALIBRATION_SEED, CALIBRATION_IMAGES = 1000, 16
EXAMPLES = Path(__file__).parents[1] / "examples"


def kv_bytes(layers: int, tokens: int, rows: int, width: int, item: int) -> int:
    """Bytes of all keys and values: 2·layers·tokens·rows·width·item."""
    return 2 * layers * tokens * rows * width * item


def rows_of(manifest: Manifest, batch: int) -> int:
    """Rows of a batch under the plan's own sampling: two an image with guidance."""
    return batch * (2 if manifest.sampling.cfg else 1)


def counted(manifest: Manifest, batch: int) -> int:
    """The bytes of a plan's cache for a batch under its own sampling, from its manifest."""
    item = np.dtype(cache_type(manifest).replace("bfloat16", "uint16")).itemsize
    model = manifest.model
    return kv_bytes(cache_layers(manifest), manifest.tokens, rows_of(manifest, batch), model.width, item)


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
            shape = (manifest.tokens, rows_of(manifest, batch), model.heads, model.width // model.heads)
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


def budget_rows(path: Path, args: argparse.Namespace, log: Log) -> list[dict[str, Any]]:
    """The shares of tokens that change by way and budget."""
    model, own = plan_model(path), read_manifest(path).sampling
    controls = []
    if model.config.car is not None:
        sizes = [side * model.config.vqvae.patch for side in model.config.vqvae.sides]
        try:
            controls = [control_pyramid(Image.open(file), sizes) for file in args.control]
        except (OSError, UnidentifiedImageError) as error:
            raise BenchmarkError(f"a control image can't be read ({error}); give others with --control") from error
    sampling = Sampling(cfg=own.cfg, top_k=own.top_k, top_p=own.top_p)
    calibration = make_request(model, CALIBRATION_SEED, CALIBRATION_IMAGES, controls, sampling)
    log(f"{args.images} images of {model.config.vqvae.tokens} tokens, {len(args.budget)} budgets in two ways")
    return changed(model, calibration, make_request(model, 0, args.images, controls, sampling), args.budget)


def measure(args: argparse.Namespace, log: Log) -> Record:
    if args.published:
        return record("kv", {"published": True, "type": "fp16"}, published_rows())
    path = args.plan or default_plan()
    if args.budget is not None:
        return record("kv", {"plan": path.name, "images": args.images}, budget_rows(path, args, log))
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
                "rows": rows_of(manifest, batch),
            }
            rows.append(row | {"counted": counted(manifest, batch), "buffers": buffers, "resident": grown})
    except CarError as error:
        raise BenchmarkError(str(error)) from error
    return record("kv", {"backend": args.backend, "published": False}, rows)


def tables(found: Record) -> list[str]:
    return [markdown_table(found["results"])]


def shares(text: str) -> tuple[float, ...]:
    """ "0.5,0.75" as shares above 0 and up to 1, for argparse."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of shares in 0…1; give e.g. 0.5,0.75")
    return found


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("kv", __doc__)
    parser.add_argument("plan", type=Path, nargs="?", help="plan directory (default: the shipped one)")
    parser.add_argument("--batch", type=numbers, default=(4, 1), help="batch sizes (default: 4,1)")
    parser.add_argument(
        "--backend", default="ort-cpu", help="a backend whose buffers are the host's (default: ort-cpu)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--published", action="store_true", help="the published models instead, counted")
    what.add_argument("--budget", type=shares, help="shares of the keys and values to keep, e.g. 0.5,0.75")
    parser.add_argument("--images", type=int, default=32, help="drawn with --budget (default: 32)")
    parser.add_argument(
        "--control",
        type=Path,
        nargs="+",
        default=sorted(EXAMPLES.glob("*.png")),
        help="(default: those in examples/)",
    )
    parser.add_argument("-o", "--output", type=Path, help="append the result to this file")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f"images is {args.images}; give at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.kv", parse_args(argv), measure, tables)


if __name__ == "__main__":
    sys.exit(main())
