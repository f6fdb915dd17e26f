"""`car-run again PNG`: the same image from what its file says, or with other flags a variation of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from car_runtime.cli.errors import note
from car_runtime.cli.options import Parser, settings_of
from car_runtime.cli.run import add_flags, check_names, generate, plan_of, print_report
from car_runtime.config import PRESETS, flags
from car_runtime.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from car_runtime.plan import Plan
    from car_runtime.receipt import Receipt

ABOUT = "Draw an image that car-run wrote once more, from its receipt; flags change it."
EXAMPLES = """examples:
  car-run again out.png -o same.png                the very image, on any backend
  car-run again out.png --seed 5 -o other.png      the same but for the seed
  car-run again out.png --class cat --cfg 2 -n 4   or for any other flag of car-run
"""


def run(arguments: Sequence[str]) -> int:
    """Draw again, and say on stderr whether sampling anew agrees with the receipt. Returns the exit code."""
    from car_runtime.images import open_image, text_chunks
    from car_runtime.receipt import blend_of, control_of, receipt_of

    began = perf_counter()
    parser = Parser("car-run again", ABOUT, EXAMPLES)
    parser.add_argument("image", metavar="PNG", help="an image that car-run wrote")
    add_flags(parser)
    args = parser.parse_args(arguments)
    check_names(parser, args)
    root, manifest = plan_of(args)
    chunks = text_chunks(args.image)
    receipt = receipt_of(chunks, manifest)
    if receipt is None:
        raise RequestError(
            f"{args.image!r} has no receipt; only PNG files that car-run wrote have one, and saving them anew in "
            "another program may lose it"
        )
    edit = receipt.settings.get("edit")
    if edit == "part":
        raise RequestError(
            f"{args.image!r} is an edit of a photo, which its receipt does not hold; run the edit again on the photo"
        )
    if not receipt.is_of(open_image(args.image)):
        note("car-run: the image was changed after it was drawn; its receipt is of what was drawn")
    asked = _with_receipt(parser, receipt, arguments)
    changes: dict[str, Any] = {"blend": blend_of(receipt, manifest.model.classes)}
    if asked.control is None and asked.photo is None and receipt.control is not None:
        changes["control"] = control_of(chunks, receipt, manifest.model.image_size)
        if changes["control"] is None:
            raise RequestError(f"{args.image!r} encloses no control image, or another; give it with --control")
    marked = bool(receipt.settings.get("watermarked"))
    if _changed(parser, asked) or receipt.tokens is None:
        if marked and asked.watermark is None:
            note("car-run: the image has a watermark, but no receipt has its key; --watermark KEY gives one again")
        if edit is not None:
            raise RequestError(f"{args.image!r} was made from another image; change it with car-run vary or restyle")
        print_report(asked, generate(asked, root, manifest, began, changes, [args.image]))
        return 0
    anew = settings_of(asked) | changes

    def compare(plan: Plan) -> None:
        if edit is None and not marked:  # else the seed alone doesn't make it
            _note_agreement(plan, receipt.tokens, anew)

    given = {"known_tokens": receipt.tokens.clip(0), "known_mask": receipt.tokens >= 0}
    print_report(asked, generate(asked, root, manifest, began, changes | given, [args.image], compare))
    return 0


def _with_receipt(parser: Parser, receipt: Receipt, arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments once more, with the receipt's settings where no flag is given: of a preset, the preset's."""
    named = parser.parse_args(arguments).preset is not None
    kept = flags().keys() - (PRESETS["car"].keys() if named else ())
    parser.set_defaults(**{name: value for name, value in receipt.settings.items() if name in kept})
    return parser.parse_args(arguments)


def _changed(parser: Parser, asked: argparse.Namespace) -> bool:
    """Whether a flag asks for another image than the receipt's, whose settings are the parser's defaults by now."""
    plain = settings_of(parser.parse_args([asked.image]))
    return settings_of(asked) != plain or asked.photo is not None


def _note_agreement(plan: Plan, tokens_L: NDArray[Any] | None, settings: dict[str, Any]) -> None:
    """Draw by the seed, without the receipt's tokens, and say how many tokens are the same."""
    from car_runtime.config import GenerationConfig

    anew = plan.generate(GenerationConfig(**settings)).tokens[0]
    same, of = int((anew == tokens_L).sum()), len(anew)
    what = "agrees" if same == of else "differs, so the image is made of the receipt's tokens"
    note(f"car-run: sampling anew on {plan.backend_name} {what}: {same} of {of} tokens")
