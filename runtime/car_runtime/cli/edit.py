"""`car-run paint`, `extend`, `restyle`, `vary`: an image is changed, not made from nothing (VAR section 6)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from car_runtime.cli.options import Parser
from car_runtime.cli.run import add_flags, check_names, generate, plan_of, print_report
from car_runtime.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from car_runtime.format.manifest import Manifest

RULES = ("published", "strict")
PAINT = "Draw a part of a photo anew. All else of it stays as it is, at the photo's own resolution."
PAINT_EXAMPLES = """examples:
  car-run paint room.png --mask hole.png --class lamp -o lamp.png        white in the mask is drawn anew
  car-run paint room.png --box 40,40,120,120 -n 4 --grid                 a box in pixels instead: x0,y0,x1,y1
  car-run paint room.png --mask hole.png --feather 0 --harmonise 6       a hard edge; colours matched in a second pass
"""
EXTEND = "Draw what lies beyond the edges of a photo. The frame grows, the photo keeps its pixels."
EXTEND_EXAMPLES = """examples:
  car-run extend photo.png --right 25%                     a quarter of its width more
  car-run extend photo.png --left 64 --top 64 -o more.png  64 pixels more on two sides
"""
RESTYLE = "Draw an image as another class: its coarse scales are kept, the fine ones drawn anew."
RESTYLE_EXAMPLES = """examples:
  car-run restyle cat.png --class dog                      the coarse half of the scales stays
  car-run restyle cat.png --class dog --from-scale 3       less stays: the first three scales
  car-run restyle cat.png --class dog --mask head.png      only where the mask is white
"""
VARY = "Draw the details of an image anew on its own composition."
VARY_EXAMPLES = """examples:
  car-run vary out.png --from-scale 5 -n 8 --grid          eight variations on the first five scales
"""


def paint(arguments: Sequence[str]) -> int:
    """`car-run paint`. Returns the exit code."""
    parser = _parser("paint", PAINT, PAINT_EXAMPLES, "photo to change")
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mask", metavar="IMAGE", help="image of the photo's size, white where it is drawn anew")
    where.add_argument("--box", metavar="X0,Y0,X1,Y1", type=_box, help="box in pixels that is drawn anew instead")
    _add_seam_flags(add)
    args = _parsed(parser, arguments)
    return _run(args, _seam(args) | {"mask": args.mask, "box": args.box})


def extend(arguments: Sequence[str]) -> int:
    """`car-run extend`. Returns the exit code."""
    parser = _parser("extend", EXTEND, EXTEND_EXAMPLES, "photo to extend")
    add = parser.add_argument
    for side in ("left", "top", "right", "bottom"):
        add(f"--{side}", type=_margin, default="0", metavar="N", help="pixels more there, or a share: 25%%")
    _add_seam_flags(add)
    args = _parsed(parser, arguments)
    return _run(args, _seam(args) | {"extend": tuple(getattr(args, s) for s in ("left", "top", "right", "bottom"))})


def restyle(arguments: Sequence[str]) -> int:
    """`car-run restyle`. Returns the exit code."""
    parser = _parser("restyle", RESTYLE, RESTYLE_EXAMPLES, "image to draw as another class")
    add = parser.add_argument
    _add_from_scale(add)
    add("--mask", metavar="IMAGE", help="image of IMAGE's size, white where it is drawn anew (default: everywhere)")
    _add_seam_flags(add)
    args = _parsed(parser, arguments)
    if args.label is None:
        parser.error("restyle draws another class, and none is named; add --class")
    return _run(args, _seam(args) | {"mask": args.mask, "from_scale": args.from_scale})


def vary(arguments: Sequence[str]) -> int:
    """`car-run vary`. Returns the exit code."""
    parser = _parser("vary", VARY, VARY_EXAMPLES, "image to vary, best one that car-run wrote")
    _add_from_scale(parser.add_argument)
    args = _parsed(parser, arguments)
    return _run(args, {"from_scale": args.from_scale}, varied=True)


def _parser(name: str, about: str, examples: str, what: str) -> Parser:
    parser = Parser(f"car-run {name}", about, examples)
    parser.add_argument("image", metavar="IMAGE", help=what)
    add_flags(parser)
    return parser


def _parsed(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    args = parser.parse_args(arguments)
    check_names(parser, args)
    return args


def _add_from_scale(add: Any) -> None:
    add("--from-scale", type=int, metavar="K", help="first scale that is drawn anew (default: half of them are kept)")


def _add_seam_flags(add: Any) -> None:
    add("--feather", type=float, metavar="PX", help="width of the seam, 0 = hard (default: 2%% of the edited square)")
    add("--rule", choices=RULES, default="published", help="how the mask becomes one of tokens (default: published)")
    add("--no-match", dest="match", action="store_false", help="leave the tones of what is drawn as they come out")
    add("--harmonise", type=int, default=0, metavar="K", help="second pass on K coarse scales of the first's result")


def _seam(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("feather", "rule", "match", "harmonise")}


def _box(text: str) -> tuple[int, int, int, int]:
    numbers = text.split(",")
    if len(numbers) != 4 or not all(re.fullmatch(r"-?[0-9]{1,6}", number.strip()) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no box; give four numbers, x0,y0,x1,y1")
    x0, y0, x1, y1 = map(int, numbers)
    return x0, y0, x1, y1


def _margin(text: str) -> str:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?%|[0-9]{1,6}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no size; give pixels, 64, or a share, 25%")
    return text


def _pixels(margins: Sequence[str], size: tuple[int, int]) -> tuple[int, ...]:
    """Pixels of left, top, right, bottom; shares are of the photo's width or height."""
    return tuple(
        round(float(text[:-1]) * size[axis % 2] / 100) if text.endswith("%") else int(text)
        for axis, text in enumerate(margins)
    )


def _run(args: argparse.Namespace, edit: Mapping[str, Any], varied: bool = False) -> int:
    from car_runtime.editing.edit import Edit
    from car_runtime.images import open_image

    began = perf_counter()
    root, manifest = plan_of(args)
    changes: dict[str, Any] = {}
    edit = dict(edit)
    if "from_scale" in edit:
        if edit["from_scale"] is None:
            edit["from_scale"] = len(manifest.scales) // 2
        K = len(manifest.scales)
        drawn = K if args.stop_after is None else args.stop_after + 1
        if drawn <= edit["from_scale"] <= K:
            which = f"all {K} scales" if drawn >= K else f"all {drawn} scales up to --stop-after"
            raise RequestError(f"--from-scale is {edit['from_scale']}, which keeps {which}; give 0…{drawn - 1}")
        edit["tokens"], changes = _of_receipt(args, manifest, varied)
        if edit["tokens"] is not None:
            known = sum(edit["tokens"][scale.start] >= 0 for scale in manifest.scales)
            _check_kept(args.image, int(known), edit["from_scale"])
    if "extend" in edit:
        edit["extend"] = _pixels(edit["extend"], open_image(args.image).size)
    inputs = [args.image, *([edit["mask"]] if edit.get("mask") else [])]
    changes["edit"] = Edit(image=args.image, **edit)
    print_report(args, generate(args, root, manifest, began, changes, inputs))
    return 0


def _check_kept(image: str, drawn: int, from_scale: int) -> None:
    """Raise RequestError where scales are to be kept that are not among the `drawn` ones of the image's receipt."""
    if not 0 <= from_scale <= drawn:
        raise RequestError(
            f"--from-scale is {from_scale}, but {image!r} has {drawn} scales, as it was drawn; give 0…{drawn}"
        )


def _of_receipt(
    args: argparse.Namespace, manifest: Manifest, varied: bool
) -> tuple[NDArray[Any] | None, dict[str, Any]]:
    """The image's tokens, if it has a receipt of this plan; to vary it, its class and control, too, where none are
    given. An image without one is encoded."""
    from car_runtime.cli.errors import note
    from car_runtime.images import open_image, text_chunks
    from car_runtime.receipt import control_of, receipt_of

    chunks = text_chunks(args.image)
    try:
        receipt = receipt_of(chunks, manifest)
    except RequestError as error:
        note(f"car-run: warning: {error}; the image is encoded instead")
        return None, {}
    if receipt is None:
        return None, {}
    if not receipt.is_of(open_image(args.image)):
        note("car-run: warning: the image was changed after it was drawn, so it is encoded; its receipt is ignored")
        return None, {}
    changes: dict[str, Any] = {}
    if varied and args.label is None:
        changes["label"] = receipt.settings.get("label")
    if args.control is None and args.photo is None and receipt.control is not None:
        control = control_of(chunks, receipt, manifest.model.image_size)
        changes |= {} if control is None else {"control": control}
        if control is None:
            note("car-run: warning: the image encloses no control image, or another, so none is followed; --control")
    part = receipt.settings.get("edit") == "part"
    return None if part else receipt.tokens, changes
