"""`car-run detect IMAGE --key KEY`: does an image have the watermark of a key?"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from car_runtime.cli.options import Parser, add_setting, image_source
from car_runtime.cli.run import add_engine_flags, add_plan_flag, opened, plan_of
from car_runtime.config import key_text

ABOUT = "Say how likely it is that an image has the watermark of a key by chance: a small p means that it is marked."
EXAMPLES = """examples:
  car-run detect image.jpg --key "my key"                 prints p
  car-run detect image.png --key @key.txt -e d16.plan     of images that another plan drew; the key is in a file
"""


def run(arguments: Sequence[str]) -> int:
    """p goes to stdout, or with `--json` one object. Returns the exit code."""
    from car_runtime.images import load_image
    from car_runtime.request import check_fit, resolve_watermark

    parser = Parser("car-run detect", ABOUT, EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", help="image to test; - reads stdin")
    parser.add_argument("--key", type=key_text, required=True, metavar="KEY", help="the watermark's; @FILE reads it")
    add_plan_flag(parser)
    add_setting(parser, "fit")
    add_engine_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of p")
    parser.add_argument("--debug", action="store_true", help="show a traceback when the program itself fails")
    args = parser.parse_args(arguments)
    root, manifest = plan_of(args)
    resolve_watermark(manifest, args.key)
    check_fit(args.fit)
    image = load_image(image_source(args.image))
    with opened(args, root) as plan:
        found = plan.detect(image, args.key, fit=args.fit or "crop")
    report = {"image": str(Path(args.image)), "p": found.p, "score": found.score}
    print(json.dumps(report) if args.json else f"{found.p:.2g}")
    sys.stdout.flush()
    return 0
