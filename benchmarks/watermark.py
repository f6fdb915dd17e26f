"""What a watermark costs, and how often it is found: the same held-out images with and without one, in one run.

    python -m benchmarks.watermark -o results.jsonl               # the shipped plan, on the held-out emoji
    python -m benchmarks.watermark --plan d16.plan --data photos  # another plan, on images of its classes

Cost: each held-out image of `--data` is drawn plain and with one key, the same for all images, and measured as by
`benchmarks.schedules`.

Finding: each is drawn once more with a key of its own, changed in the ways of `CHANGES`, and tested for that key. The
same changed images are tested for `--keys` other keys each: how often one of those is found is the rate of false
positives, which p promises to be.

Tables go to stdout, then one line of JSON (`benchmarks.harness.records`) whose results are flat rows, each with
"question":

    cost     drawn ("plain" or "marked"), images, kid, kid_std, f1, f1_change, f1_change_error: of
             `benchmarks.schedules`
    found    change, images, found_1 and found_01 (share with p < 0.01 and < 0.001), p50 (median p), others (tests of
             other keys), false_1 (share of those with p < 0.01)
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from benchmarks.harness.cli import Log, check_options, make_parser, run_command
from benchmarks.harness.records import Record, Row, record, rows_of
from benchmarks.harness.tables import markdown_table
from benchmarks.schedules import (
    EMOJI,
    Candidate,
    HeldOut,
    Pixels,
    add_data_options,
    candidates,
    features,
    schedule_row,
)
from car_runtime import open_plan
from car_runtime.detection import unexpected_codes
from car_runtime.format.folder import open_folder
from car_runtime.plan import Plan, Result, default_plan
from car_runtime.request import resolve_watermark
from car_runtime.system.cpu import usable_cores
from car_runtime.watermark import Pattern

if TYPE_CHECKING:
    from car_train.evaluation.features import FeatureNetwork

KEY = "a key"
"""Of all images that KID and F1 are of."""


def _unchanged(image: Image.Image) -> Image.Image:
    return image


def _jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return Image.open(file).convert("RGB")


def _smaller(image: Image.Image) -> Image.Image:
    side = round(0.75 * image.width)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _cropped(image: Image.Image) -> Image.Image:
    margin = round(0.05 * image.width)
    return image.crop((margin, margin, image.width - margin, image.height - margin))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as the PNG": _unchanged,
    "JPEG, quality 85": _jpeg,
    "resized to 0.75": _smaller,
    "cropped by 10 %": _cropped,
}


def cost_rows(plan: Plan, held_out: HeldOut, seed: int, log: Log) -> list[Row]:
    """KID and F1 without a watermark, and with one of the same key on all images."""
    base = {"cfg": None, "top_k": None, "top_p": None}
    chosen = candidates(plan.manifest, {"marked": f'--watermark "{KEY}"'}, base)

    def draw(candidate: Candidate, control: Pixels | None, label: int, seed: int) -> Result:
        return plan.generate(control, label, seed, **candidate.settings)

    drawn = held_out.draw(draw, chosen, seed, log)
    distances = held_out.distances(drawn, seed, log)
    untimed: dict[str, None] = defaultdict(lambda: None)
    rows = [schedule_row(c, untimed, drawn[c.name], drawn["exact"], distances, False) for c in chosen]
    kept = ("images", "kid", "kid_std", "f1", "f1_change", "f1_change_error")
    return [
        {"question": "cost", "drawn": name, **{key: row[key] for key in kept}}
        for name, row in zip(("plain", "marked"), rows, strict=True)
    ]


def found_rows(plan: Plan, held_out: HeldOut, seed: int, keys: int, log: Log) -> list[Row]:
    """How often a key is found that an image has, and others that it hasn't, after each change."""
    own: dict[str, list[float]] = {name: [] for name in CHANGES}
    others: dict[str, list[float]] = {name: [] for name in CHANGES}
    manifest = plan.manifest
    with open_folder(plan.path) as folder:
        pattern = Pattern(manifest, folder)

    def p(codes_LZ: np.ndarray, key: str) -> float:
        digest = resolve_watermark(manifest, key)
        assert digest is not None
        return pattern.detect(codes_LZ, digest).p

    for done, position in enumerate(held_out.order):
        item, key = held_out.data[position], f"key of {position}"
        control = item["control"].numpy() if held_out.convention is not None else None
        image = plan.generate(control, item["label"], seed + position, watermark=key).images[0]
        for name, change in CHANGES.items():
            codes_LZ = unexpected_codes(plan, change(Image.fromarray(image)), pattern.codes, "crop")
            own[name].append(p(codes_LZ, key))
            others[name] += [p(codes_LZ, f"key {i} of others than {position}") for i in range(keys)]
        if (done + 1) % 16 == 0:
            log(f"tested {done + 1} of {len(held_out.order)} images")
    return [
        {
            "question": "found",
            "change": name,
            "images": len(own[name]),
            **{f"found_{digits}": _share_below(own[name], level) for digits, level in (("1", 0.01), ("01", 0.001))},
            "p50": float(np.median(own[name])),
            "others": len(others[name]),
            "false_1": _share_below(others[name], 0.01),
        }
        for name in CHANGES
    ]


def _share_below(values: Sequence[float], level: float) -> float | None:
    return float((np.array(values) < level).mean()) if values else None


def measure(args: argparse.Namespace, log: Log, network: FeatureNetwork | None = None) -> Record:
    """Everything, as one record. `network`: other features than those of `--features`. Raises CarError."""
    with open_plan(args.plan or default_plan(), args.backend, threads=args.threads) as plan:
        held_out = HeldOut(plan.manifest, args, network or features(args))
        rows = cost_rows(plan, held_out, args.seed, log) + found_rows(plan, held_out, args.seed, args.keys, log)
        settings = {
            "plan": plan.manifest.name,
            "backend": {"name": plan.backend_name, **plan.backend_report()},
            **{name: getattr(args, name) for name in ("threads", "seed", "keys")},
            "data": {"name": args.data.name, "split": args.split, "images": len(held_out.order)},
            "features": None if held_out.network is None else dict(held_out.network.about),
        }
    return record("watermark", settings, rows)


def tables(found: Record) -> Iterator[str]:
    """A heading and a table per question."""
    yield "What does a watermark cost? One key on all images"
    yield markdown_table([{k: v for k, v in row.items() if k != "question"} for row in rows_of(found, "cost")])
    yield "How often is a key found? A key for each image; false: others than the image's"
    yield markdown_table([{k: v for k, v in row.items() if k != "question"} for row in rows_of(found, "found")])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("watermark", __doc__)
    parser.add_argument("--plan", type=Path, help="plan directory of format 2 (default: the shipped plan)")
    parser.add_argument("--backend", default="auto", help="auto, or a backend such as ort-cpu (default: auto)")
    parser.add_argument(
        "--keys", type=int, default=20, metavar="N", help="other keys that each image is tested for (default: 20)"
    )
    add_data_options(parser)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="CPU threads (default: all cores)")
    parser.add_argument("-o", "--output", type=Path, help="append the line of JSON to this file")
    args = parser.parse_args(argv)
    check_options(parser, args)
    args.data = EMOJI if args.data is None else Path(args.data)
    if not args.data.expanduser().is_dir():
        parser.error(f"there is no folder {args.data}; fetch one: python -m car_train data emoji")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("benchmarks.watermark", parse_args(argv), measure, tables)


if __name__ == "__main__":
    sys.exit(main())
