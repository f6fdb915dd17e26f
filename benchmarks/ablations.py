"""The runs behind the papers' ablations, each resumable, and a table of what they come to.

    python -m benchmarks.ablations branch --data D --base runs/var -o branch.json -- --steps 2000 --bf16
    python -m benchmarks.ablations depth --data D --vqvae runs/vqvae --depths 2,4,6,8 -o depth.json -- --steps 2000
    python -m benchmarks.ablations classes --data D --base runs/var --seen 0-2 -o classes.json -- --steps 2000
    python -m benchmarks.ablations transformer --data D --vqvae runs/vqvae --raster-vqvae runs/raster -o t.json -- …

branch: a branch as published, and with each alternative for its three parts alone (CAR table 3): the tokenizer as 𝓕,
convolutions as 𝒯, zero projection or cross normalisation as 𝓖; equal steps, batches and seed.
depth: a base of each depth, width `--width-per-depth` times it, and a branch of half that depth on it (figure 3).
classes: a branch trained on the classes `--seen`, measured on them and on all others, which it never saw; the paper
trains on 100 of ImageNet's classes and evaluates on the other 900.
transformer: VAR's table 3: token by token in raster order (`benchmarks.baselines.raster`) vs. scale by scale, then
AdaLN, top-k, guidance and attention norm, each on top of those before. Every model draws one image for each held-out
one, of its class; the distances are from one half of the held-out images to what was drawn for the other
(`car_train.evaluation.sets`), with those of held-out images alone as the noise floor. `--raster-vqvae` is a tokenizer
of the scales 1 and E alone, e.g. trained on from the other one: `car_train vqvae --init runs/vqvae --patch-nums 1,E`;
losses in nats per token of two tokenizers can't be compared.

What follows `--` goes to every `python -m car_train var` and `car`. Runs stand in `--runs`; one that was interrupted
goes on from its checkpoint, a finished one is not trained again, one of other flags is refused. Losses are the
trainer's own, over all held-out images with the teacher's tokens, in nats per token; `base` is the model without its
control. How well images follow their control is measured on one drawn for each held-out image, by the published
sampling (`car_train eval`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baselines.raster import RasterStage, raster_sample
from benchmarks.harness.cli import Log, guarded, make_parser, numbers
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.records import record
from benchmarks.harness.tables import markdown_table
from car_train import checkpoint, cli
from car_train.data.dataset import ControlledImages
from car_train.data.pretrained import fetch
from car_train.evaluation.evaluate import evaluate
from car_train.evaluation.features import EfficientNetLite0
from car_train.evaluation.generate import uniform_numbers
from car_train.evaluation.options import EvalOptions
from car_train.evaluation.runs import read_run, summary
from car_train.evaluation.sets import compare_sets
from car_train.files import check_writable, write_text, written_aside
from car_train.images import to_pixels
from car_train.model.sample import sample
from car_train.training import command as training
from car_train.training.options import FREE
from car_train.training.stages import Stage

BRANCHES: dict[str, list[str]] = {
    "as published": [],
    "𝓕 of the tokenizer": ["--control-encoder", "vqvae"],
    "𝒯 of convolutions": ["--control-transformer", "conv"],
    "𝓖 zero projection": ["--fusion", "zero"],
    "𝓖 cross normalisation": ["--fusion", "cross_norm"],
}
"""Row of the table → flags of `python -m car_train car`."""

PLAIN = ["--no-adaln", "--no-attn-norm"]
TRANSFORMERS: list[tuple[str, str, list[str], bool, bool]] = [
    ("AR, raster order", "raster", PLAIN, False, False),
    ("VAR", "plain", PLAIN, False, False),
    ("+ AdaLN", "adaln", ["--no-attn-norm"], False, False),
    ("+ top-k", "adaln", ["--no-attn-norm"], True, False),
    ("+ guidance", "adaln", ["--no-attn-norm"], True, True),
    ("+ attention norm", "published", [], True, True),
]
"""Row of VAR's table 3, its run, flags of `python -m car_train var`, and whether it samples by top-k and guided."""
BATCH = 50

Row = dict[str, Any]
Make = Callable[[argparse.Namespace], Stage]


def train(stage: str, folder: Path, flags: Sequence[str], log: Log, make: Make | None = None) -> Path:
    """A run's newest checkpoint, trained or gone on with first. BenchmarkError, UserError: training fails.

    make: of the command's flags what is trained in the place of the command's own.
    """
    command, finished = [stage, "-o", str(folder), *flags], folder / "finished"
    check_flags(folder, command)
    if not finished.is_file():
        log(f"{folder.name}: training")
        command += ["--resume"] if checkpoint.of_run(folder) else []
        if make is not None:
            training.run(cli.parse_args(command), make)
        elif cli.main(command):
            raise BenchmarkError(f"{folder.name}: training failed; see above, and run the same command again")
        write_text(finished, "")
    return checkpoint.locate(folder)


def check_flags(folder: Path, command: Sequence[str]) -> None:
    """Keep what a run is trained with next to its folder. BenchmarkError: the run was begun with something else."""
    given = {k: v for k, v in vars(cli.parse_args(list(command))).items() if k not in FREE | {"token_root"}}
    now = json.loads(json.dumps(given, default=str))
    file = folder.with_name(f"{folder.name}.flags.json")
    if file.is_file() and checkpoint.of_run(folder):
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [f"{k} {before.get(k)!r} → {v!r}" for k, v in now.items() if before.get(k) != v]
        if changed:
            raise BenchmarkError(f"{folder}: was trained with {'; '.join(changed)}; give these, or another --runs")
    write_text(file, json.dumps(now, indent=1) + "\n")


def raster_stage(args: argparse.Namespace) -> Stage:
    """The autoregressive baseline, of the sizes of `car_train var`."""
    return RasterStage(training.var_model(args))


def row_of(name: str, folder: Path) -> Row:
    """What a finished run of a transformer or branch came to, by its last validation."""
    found = summary(folder)
    last = found["last"]
    return {
        "model": name,
        "parameters": found["parameters"]["trainable"],
        "steps": last["step"],
        "loss": last["val_loss"],
        "loss_last": last["val_loss_last"],
        "accuracy": last["val_accuracy"],
        "seconds": read_run(folder).seconds,
    }


def fidelity(path: Path, args: argparse.Namespace, log: Log) -> Row:
    """How well a branch's images follow the controls of all held-out images, and another image's: chance."""
    log(f"{path.parent.name}: drawing the held-out images' controls")
    control = evaluate(EvalOptions(checkpoint=path, data=args.data, baseline=False))["control"]
    measure = measure_of(control["generated"])
    return {measure: control["generated"][measure], f"chance {measure}": control.get("shuffled", {}).get(measure)}


def measure_of(measures: Mapping[str, Any]) -> str:
    """The one of a control type's measures that stands for it."""
    return "f1" if "f1" in measures else next(iter(measures))


def branch(args: argparse.Namespace, log: Log) -> list[Row]:
    rows = []
    for i, (name, flags) in enumerate(BRANCHES.items()):
        folder = args.runs / f"branch-{i}"
        path = train("car", folder, [*args.common, "--base", str(args.base), *flags], log)
        rows.append(row_of(name, folder) | fidelity(path, args, log))
    return rows


def depth(args: argparse.Namespace, log: Log) -> list[Row]:
    rows = []
    for depth in args.depths:
        size = ["--depth", str(depth), "--width", str(args.width_per_depth * depth), "--heads", str(depth)]
        base, steered = (args.runs / f"{stage}-d{depth}" for stage in ("var", "car"))
        train("var", base, [*args.plain, "--vqvae", str(args.vqvae), *size], log)
        path = train("car", steered, [*args.common, "--base", str(base)], log)
        rows += [row_of(f"base d{depth}", base), row_of(f"CAR d{depth}", steered) | fidelity(path, args, log)]
    if args.plot is not None:
        with written_aside(args.plot) as file:
            file.write_bytes(depth_plot(args.depths, rows[::2], rows[1::2]))
    return rows


def depth_plot(depths: Sequence[int], bases: Sequence[Row], steered: Sequence[Row]) -> bytes:
    """Loss and fidelity vs. depth as PNG."""
    from benchmarks.analysis.plots import COLOURS, page

    measure, chance = (name for name in steered[0] if name not in bases[0])
    panels = (
        ("validation loss, nats per token", ("base", bases, "loss"), ("CAR", steered, "loss")),
        (f"{measure} of the control", ("CAR", steered, measure), ("another image's", steered, chance)),
    )
    with page(2.8, 1, 2) as (axes, finished):
        for panel, (title, *lines) in zip(axes, panels, strict=True):
            for colour, (name, rows, key) in zip(COLOURS, lines, strict=False):
                panel.plot(depths, [row[key] for row in rows], "o-", color=colour, label=name)
            panel.set_title(title, loc="left")
            panel.set_xticks(depths)
            panel.set_xlabel("depth")
            panel.legend()
        return finished()


def classes(args: argparse.Namespace, log: Log) -> list[Row]:
    folder = args.runs / "classes"
    path = train("car", folder, [*args.common, "--base", str(args.base), "--classes", args.seen], log)
    rows = []
    others = args.seen.removeprefix("!") if args.seen.startswith("!") else f"!{args.seen}"
    for name, chosen in (("seen", args.seen), ("not seen", others)):
        log(f"evaluating the classes {name}")
        found = evaluate(EvalOptions(checkpoint=path, data=args.data, classes=chosen))
        losses, control = found["teacher_forced"], found["control"]
        measure = measure_of(control["generated"])
        rows.append(
            {
                "classes": f"{name} ({chosen})",
                "images": found["data"]["pictures"],
                "loss": losses["model"]["loss"],
                "base's loss": losses["base"]["loss"],
                measure: control["generated"][measure],
                f"base's {measure}": control["base"][measure],
                f"chance {measure}": control.get("shuffled", {}).get(measure),
            }
        )
    return rows


def transformer(args: argparse.Namespace, log: Log) -> list[Row]:
    paths: dict[str, Path] = {}
    for _, run, flags, *_ in TRANSFORMERS:
        folder, raster = args.runs / f"transformer-{run}", run == "raster"
        flags = [*args.plain, "--vqvae", str(args.raster_vqvae if raster else args.vqvae), *flags]
        paths[run] = train("var", folder, flags, log, raster_stage if raster else None)
    rows = [row_of(name, args.runs / f"transformer-{run}") for name, run, *_ in TRANSFORMERS]
    if args.features == "none":
        return rows
    network = EfficientNetLite0(Path(args.features) if args.features else fetch("efficientnet"))
    size = checkpoint.load(paths["published"]).config.vqvae.image_size
    data = ControlledImages(args.data, size, split="val", preload=False)
    items = [data[i] for i in range(len(data))]
    labels_B = torch.tensor([item["label"] for item in items])
    bank = {"truth": in_batches(network, to_pixels(torch.stack([item["image"] for item in items])))}
    for name, run, _, top, guided in TRANSFORMERS:
        log(f"{name}: drawing {len(items)} images")
        images = drawn(paths[run], run == "raster", labels_B, args.top_k if top else 0, args.cfg if guided else 0.0)
        bank[name] = in_batches(network, images)
    found: dict[str, Row] = compare_sets(bank, 0, [])
    shown = ("kid_half", "kid_half_std", "fid_half", "fid_half_std", "precision_half", "recall_half")
    rows.append({"model": "held-out images"})
    for row in rows:
        of = found.get(row["model"], found.get("floor", {}))
        row.update({measure: of.get(measure) for measure in shown})
    return rows


def in_batches(network: EfficientNetLite0, images_NHW3: Any) -> Any:
    """Features of so many images, f32 [N, D]."""
    return np.concatenate([network(images_NHW3[i : i + BATCH]) for i in range(0, len(images_NHW3), BATCH)])


def drawn(path: Path, raster: bool, labels_B: torch.Tensor, top_k: int, cfg: float) -> Any:
    """One image of each label, uint8 [B, H, W, 3]; image i is of seed i."""
    model = checkpoint.load(path)
    assert model.car is not None
    config = model.config.vqvae
    uniforms_BL, k = uniform_numbers(range(len(labels_B)), config.tokens), min(top_k, config.vocab)
    images = []
    for labels, uniforms in zip(labels_B.split(BATCH), uniforms_BL.split(BATCH), strict=True):
        if raster:
            images.append(raster_sample(model, labels, uniforms, cfg, k)[1])
        else:
            images.append(sample(model.vqvae, model.car, labels, uniforms, None, cfg, k)[1])
    return to_pixels(torch.cat(images))


SERIES = {"branch": branch, "depth": depth, "classes": classes, "transformer": transformer}


def run(args: argparse.Namespace, log: Log) -> None:
    args.plain = ["--data", str(args.data), *args.flags]
    args.common = [*args.plain, "--control", args.control]
    for file, suffix in ((args.output, ".json"), (getattr(args, "plot", None), ".png")):
        if file is not None:
            check_writable(file, suffix)
    args.runs.mkdir(parents=True, exist_ok=True)
    rows = SERIES[args.series](args, log)
    found = record("ablations", {"series": args.series, "control": args.control, "flags": args.flags}, rows)
    write_text(args.output, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(markdown_table(rows))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    given = list(sys.argv[1:] if argv is None else argv)
    own, flags = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = make_parser("ablations", __doc__)
    series = parser.add_subparsers(dest="series", required=True)
    for name in SERIES:
        one = series.add_parser(name, allow_abbrev=False)
        one.add_argument("--data", type=Path, required=True, help="folder of class folders")
        one.add_argument("--control", default="canny", help="control type (default: canny)")
        one.add_argument("-o", "--output", type=Path, required=True, help="the result, .json")
        one.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="(default: runs/ablations)")
        if name in ("depth", "transformer"):
            one.add_argument("--vqvae", type=Path, required=True, help="checkpoint or run of the tokenizer")
        if name == "depth":
            one.add_argument("--depths", type=numbers, default=(2, 4, 6, 8), help="(default: 2,4,6,8)")
            one.add_argument("--width-per-depth", type=int, default=32, help="(default: 32; published: 64)")
            one.add_argument("--plot", type=Path, help="loss and fidelity vs. depth, .png")
        if name in ("branch", "classes"):
            one.add_argument("--base", type=Path, required=True, help="checkpoint or run of the base")
        if name == "classes":
            one.add_argument("--seen", required=True, help="classes to train on, e.g. 0-99")
        if name == "transformer":
            one.add_argument("--raster-vqvae", type=Path, required=True, help="the tokenizer of scales 1 and E")
            one.add_argument("--top-k", type=int, default=900, help="of the rows with top-k (default: 900)")
            one.add_argument("--cfg", type=float, default=1.5, help="of the guided rows (default: 1.5)")
            one.add_argument("--features", metavar="FILE", help="as of `car_train eval`; none leaves distances out")
    args = parser.parse_args(own)
    args.flags = flags
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("benchmarks.ablations", lambda log: run(args, log), "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
