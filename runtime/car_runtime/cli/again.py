"""`car-run again PNG`: the same image from what its file says, or with other flags a variation of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from car_runtime.cli.errors import note
from car_runtime.cli.options import Parser, add_settings, settings_of
from car_runtime.cli.run import add_input_flags, add_output_flags, check_names, generate, print_report
from car_runtime.config import flags
from car_runtime.errors import RequestError

if TYPE_CHECKING:
    from car_runtime.format.manifest import Manifest
    from car_runtime.receipt import Receipt

ABOUT = "Draw an image that car-run wrote once more, from its receipt; flags change it."
EXAMPLES = """examples:
  car-run again out.png -o same.png                the very image, on any backend
  car-run again out.png --seed 5 -o other.png      the same but for the seed
  car-run again out.png --class cat --cfg 2 -n 4   or for any other flag of car-run
"""


def run(arguments: Sequence[str]) -> int:
    """Draw again, and say on stderr whether sampling anew agrees with the receipt. Returns the exit code."""
    from car_runtime.format.manifest import read_manifest
    from car_runtime.plan import default_plan
    from car_runtime.receipt import control_of, read_receipt

    began = perf_counter()
    parser = _parser()
    args = parser.parse_args(arguments)
    check_names(parser, args)
    root = Path(args.engine) if args.engine is not None else default_plan()
    manifest = read_manifest(root)
    found = read_receipt(args.image, manifest)
    if found is None:
        raise RequestError(
            f"{args.image!r} has no receipt; only PNG files that car-run wrote have one, and saving them anew in "
            "another program may lose it"
        )
    image, receipt = found
    if receipt.settings.get("edit") == "part":
        raise RequestError(
            f"{args.image!r} is an edit of a photo, which its receipt does not hold; run the edit again on the photo"
        )
    asked = _with_receipt(parser, receipt, arguments)
    changes: dict[str, Any] = {}
    if asked.control is None and asked.photo is None and receipt.control is not None:
        changes["control"] = control_of(image, receipt, manifest.model.image_size)
        if changes["control"] is None:
            raise RequestError(f"{args.image!r} encloses no control image, or another; give it with --control")
    changed = _changed(parser, receipt, asked)
    if not changed and receipt.tokens is not None:
        _note_agreement(asked, root, manifest, receipt, changes)
        changes |= _given_tokens(receipt)
    elif receipt.settings.get("edit") is not None:
        raise RequestError(f"{args.image!r} was made from another image; change it with car-run vary or restyle")
    print_report(asked, generate(asked, root, manifest, began, changes, [args.image]))
    return 0


def _parser() -> Parser:
    parser = Parser("car-run again", ABOUT, EXAMPLES)
    parser.add_argument("image", metavar="PNG", help="an image that car-run wrote")
    add_input_flags(parser)
    add_settings(parser, "sampling")
    add_settings(parser, "schedule")
    add_output_flags(parser)
    return parser


def _with_receipt(parser: Parser, receipt: Receipt, arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments once more, with the receipt's settings where no flag is given."""
    parser.set_defaults(**{name: value for name, value in receipt.settings.items() if name in flags()})
    return parser.parse_args(arguments)


def _changed(parser: Parser, receipt: Receipt, asked: argparse.Namespace) -> bool:
    """Whether a flag asks for another image than the receipt's."""
    plain = settings_of(parser.parse_args([asked.image]))
    return settings_of(asked) != plain or asked.photo is not None


def _given_tokens(receipt: Receipt) -> dict[str, Any]:
    """All tokens as known ones."""
    import numpy as np

    assert receipt.tokens is not None
    drawn = receipt.tokens >= 0
    return {"known_tokens": np.where(drawn, receipt.tokens, 0), "known_mask": drawn}


def _note_agreement(
    args: argparse.Namespace, root: Path, manifest: Manifest, receipt: Receipt, changes: dict[str, Any]
) -> None:
    """Draw by the seed, without the receipt's tokens, and say how many tokens are the same."""
    from car_runtime.config import GenerationConfig
    from car_runtime.plan import open_plan

    if receipt.settings.get("edit") is not None:
        return
    settings = settings_of(args) | changes
    with open_plan(root, args.backend, threads=args.threads, verify=not args.no_verify) as plan:
        tokens = plan.generate(GenerationConfig(**settings)).tokens[0]
        same, of = int((tokens == receipt.tokens).sum()), len(tokens)
        what = "agrees" if same == of else "differs, so the image is made of the receipt's tokens"
        note(f"car-run: sampling anew on {plan.backend_name} {what}: {same} of {of} tokens")
