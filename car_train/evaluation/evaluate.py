"""What a checkpoint is worth on images it has not seen, in numbers; and what is noise in them.

    python -m car_train eval runs/car --data ~/.cache/car/data/emoji -o report.json --sheet sheet.png

From a tokenizer on: reconstruction (PSNR, SSIM, L1, codes in use); of the tokenizer alone, with `--tokenizer`, also a
perceptual distance (`car_train.training.perceptual`) and what is still read of rendered text. From a transformer on:
the loss with the teacher's tokens, and images drawn by the reference loop, one for each real one, of its class and
with its control, as a set against the set of real images: KID, Fréchet distance, precision and recall on features of
a network that is fetched (EfficientNet-Lite0), and with `--inception` FID and Inception Score as the literature has
them, by torch-fidelity.
With a control branch: how well an image follows its control (CAR section 4), alongside four yardsticks.

    base             the same classes and uniform numbers without the control: what the control adds
    reconstruction   the real image through the tokenizer: what no control can better
    truth            the real image itself: the error of deriving a control from an image
    shuffled         the drawn image against another image's control: chance

Real images alone give the noise floor of the distances between sets: random halves of them against each other.

Image i of the split is drawn with the uniform numbers of seed `seed + i`, as `car-run --seed` draws them, so
neither the batch nor the choice of images changes it (up to rounding: a sum may be taken in another order).

A plan, or `--samples`, is evaluated as the papers do it: so many images of every class, written as the .npz that the
usual FID suites take (`car_train.evaluation.sample_set`).

    python -m car_train eval emoji.plan --data ~/.cache/car/data/emoji --processes 2 -o report.json
    python -m car_train eval d16.plan --preset var-fid --reference VIRTUAL_imagenet256_labeled.npz --inception W.pth
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from car_train import checkpoint
from car_train.data.dataset import ControlledImages, select_classes
from car_train.data.folder import text_of
from car_train.data.pretrained import fetch
from car_train.errors import printable_lines
from car_train.evaluation.features import EfficientNetLite0, FeatureNetwork, Inception
from car_train.evaluation.legibility import legibility
from car_train.evaluation.measure import Measurements
from car_train.evaluation.options import EvalOptions, require
from car_train.evaluation.sample_set import evaluate_samples
from car_train.evaluation.table import table
from car_train.evaluation.targets import is_plan, open_target
from car_train.files import check_writable, write_text
from car_train.flags import add_flags, given
from car_train.images import contact_sheet, save_png, to_pixels
from car_train.model import Model
from car_train.training.perceptual import Perceptual

FORMAT = 1

Pixels = NDArray[np.uint8]
Report = dict[str, Any]


def open_images(model: Model, options: EvalOptions) -> ControlledImages:
    """The split of `options`, with controls if the model has a branch. Raises EvaluationError, DataError."""
    config = model.config
    for name in ("control_root", "annotator_onnx"):
        require(
            getattr(options, name) is None or config.car is not None,
            f"{options.checkpoint} has no control branch; leave out --{name.replace('_', '-')}",
        )
    require(options.data is not None, f"{options.checkpoint} is measured on images; give --data")
    assert options.data is not None
    data = ControlledImages(
        options.data,
        config.vqvae.image_size,
        split=options.split,
        control_type=config.car.control_type if config.car else None,
        convention=config.car.control_convention if config.car else None,
        fit=options.fit,
        control_root=options.control_root,
        preload=False,
    )
    if config.var is not None:
        names, known = data.class_names, config.class_names
        require(
            len(names) == config.var.classes and (known is None or tuple(names) == known),
            f"{options.data} has {len(names)} classes ({', '.join(names[:3])}, …), the model {config.var.classes} "
            f"({', '.join(known[:3]) + ', …' if known else 'without names'}); give a folder of the model's classes",
        )
    return data


def choose(data: ControlledImages, options: EvalOptions) -> list[int]:
    """Positions in the split of the images to evaluate, in an order that the seed decides."""
    wanted = select_classes(options.classes, data.class_names)
    left = dict.fromkeys(wanted, options.per_class or len(data))
    chosen: list[int] = []
    for i in np.random.default_rng(options.seed).permutation(len(data)).tolist():
        label = data.files[i][1]
        if left.get(label, 0):
            left[label] -= 1
            chosen.append(i)
    require(
        bool(chosen),
        f"{options.data}: no image of split {options.split!r} is of the classes {options.classes}; "
        "give others, or --split all",
    )
    return chosen[: options.limit or None]


@torch.no_grad()
def evaluate(
    options: EvalOptions,
    *,
    features: FeatureNetwork | None = None,
    inception: Inception | None = None,
    perceptual: Perceptual | None = None,
    sheet: Path | None = None,
) -> Report:
    """Evaluate a checkpoint; the report is made of what JSON knows (numbers that don't exist are None).

    features: compares sets of images; without it that part is left out. inception: adds FID, Inception Score,
    precision and recall. perceptual: adds the distance of images from their reconstructions. sheet: PNG to write, 64
    random images: control, drawn, real.

    Raises EvaluationError, CheckpointError, DataError, and what annotators raise.
    """
    began = time.monotonic()
    path = checkpoint.locate(options.checkpoint)
    model = checkpoint.load(path)
    model = tokenizer_alone(model) if options.tokenizer else model
    data = open_images(model, options)
    assert options.data is not None
    order = choose(data, options)
    networks: dict[str, FeatureNetwork] = {"features": features} if features is not None else {}
    if inception is not None:
        networks["inception"] = inception
    run = Measurements(model, options, networks, perceptual)
    if model.config.car is not None and len(order) > 1:
        run.previous = data[order[-1]]["control"].numpy()
    bar = tqdm(total=len(order), desc="evaluating", unit="img", file=sys.stderr, disable=None)
    with bar:
        for start in range(0, len(order), options.batch):
            positions = order[start : start + options.batch]
            run.add([data[i] for i in positions], [options.seed + i for i in positions])
            bar.update(len(positions))
    report: Report = {
        "format": FORMAT,
        "checkpoint": {
            "name": f"{path.parent.name}/{path.name}",
            "sha256": checkpoint.fingerprint(path),
            "control": model.config.car.control_type if model.config.car else None,
        },
        "data": {
            "name": text_of(options.data.expanduser().resolve().name),
            "split": options.split,
            "pictures": len(order),
            "classes": options.classes or "all",
        },
        "options": {
            "seed": options.seed,
            **asdict(options.sampling(run.config.vocab)),
            **{k: getattr(options, k) for k in ("batch", "limit", "per_class", "tolerance")},
        },
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        **run.report(data.class_names),
    }
    if options.tokenizer:
        through = partial(_reconstructed, model, options.device)
        report["text"] = legibility(through, run.config.image_size, options.seed)
    report["seconds"] = {
        **{k: round(v, 1) for k, v in run.seconds.items()},
        "all": round(time.monotonic() - began, 1),
    }
    if sheet is not None:
        save_png(contact_sheet(run.tiles, run.heads), sheet)
    finite: Report = _finite(report)
    return finite


def tokenizer_alone(model: Model) -> Model:
    """The same model without its transformer and branch."""
    alone = Model(replace(model.config, var=None, car=None, class_names=None))
    alone.vqvae = model.vqvae
    return alone


def _reconstructed(model: Model, device: str, images_BHW3: Pixels) -> Pixels:
    x = torch.from_numpy(images_BHW3).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return to_pixels(model.vqvae.decode(model.vqvae.encode(x)))


def _finite(value: Any) -> Any:
    """The value with plain numbers in it, and None for those that JSON doesn't have."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="plan, checkpoint, or folder of a run (its newest one)")
    add_flags(parser, EvalOptions)
    parser.add_argument(
        "--features",
        metavar="FILE",
        help="EfficientNet-Lite0 as .safetensors (default: fetched once); none leaves the comparison of sets out",
    )
    parser.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help="torch-fidelity's Inception weights: FID, IS; of samples also sFID",
    )
    parser.add_argument(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        help="also draw without the control, to compare (default: yes, but no of a plan and of --samples)",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="JSON", help="where to write the report")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="where to write 64 random images")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout, the table on stderr")


def run(args: argparse.Namespace) -> None:
    """Evaluate, write what was asked for, print the result."""
    for file, suffix in ((args.output, ".json"), (args.sheet, ".png")):
        if file is not None:
            check_writable(file, suffix)
    options = EvalOptions(checkpoint=args.checkpoint, baseline=args.baseline, **given(args, EvalOptions))
    drawn = options.samples is not None or is_plan(options.checkpoint)
    _check(args, options, drawn)
    if options.threads:
        torch.set_num_threads(options.threads)
        cv2.setNumThreads(options.threads)
    samples = options.samples or (args.output or Path("report.json")).with_name("samples.npz")
    if drawn:
        archives = [samples] if options.controls is None else [samples, options.controls]
        for file in archives:
            check_writable(file, ".npz")
        require(
            len({file.resolve() for file in archives}) == len(archives),
            f"{samples} can't be both the samples and their controls; give another --controls",
        )
    target = open_target(options) if drawn else None
    features = None
    if args.features != "none":
        features = EfficientNetLite0(
            Path(args.features).expanduser() if args.features else fetch("efficientnet"), args.device
        )
    inception = Inception(args.inception, args.device, spatial=drawn) if args.inception else None
    if target is not None:
        report = _finite(evaluate_samples(target, options, samples, features=features, inception=inception))
    else:
        perceptual = None
        if options.tokenizer:
            perceptual = Perceptual(fetch("squeezenet"))
        report = evaluate(options, features=features, inception=inception, perceptual=perceptual, sheet=args.sheet)
    if args.output is not None:
        write_text(args.output, json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    print(printable_lines(table(report)), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report, indent=2, allow_nan=False))


def _check(args: argparse.Namespace, options: EvalOptions, drawn: bool) -> None:
    """Raise EvaluationError for flags of the one kind of evaluation with the other."""
    require(
        options.branch is None or is_plan(options.checkpoint),
        f"--branch {options.branch} is of a plan; a checkpoint has one branch, leave it out",
    )
    if drawn:
        require(
            not options.tokenizer,
            "--tokenizer measures a checkpoint's tokenizer on images; leave out --samples, and give no plan",
        )
        require(
            args.sheet is None, f"--sheet {args.sheet} shows held-out images; leave it out with --samples or a plan"
        )
        require(options.limit == 0, f"--limit {options.limit} is of held-out images; give --per-class N")
        return
    for name in ("controls", "reference", "reject", "resume"):
        require(
            not getattr(options, name), f"--{name} is of images that are drawn by class; give --samples FILE.npz too"
        )
