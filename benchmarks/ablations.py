"""The runs behind CAR's ablations, each resumable, and a table of what they come to.

    python -m benchmarks.ablations branch --data D --base runs/var -o branch.json -- --steps 2000 --bf16
    python -m benchmarks.ablations depth --data D --vqvae runs/vqvae --depths 2,4,6,8 -o depth.json -- --steps 2000
    python -m benchmarks.ablations classes --data D --base runs/var --seen 0-2 -o classes.json -- --steps 2000

branch: a branch as published, and with each alternative for its three parts alone (CAR table 3): the tokenizer as 𝓕,
convolutions as 𝒯, zero projection or cross normalisation as 𝓖; equal steps, batches and seed.
depth: a base of each depth, width `--width-per-depth` times it, and a branch of half that depth on it (figure 3).
classes: a branch trained on the classes `--seen`, measured on them and on all others, which it never saw; the paper
trains on 100 of ImageNet's classes and evaluates on the other 900.

What follows `--` goes to every `python -m car_train var` and `car`. Runs stand in `--runs`; one that was interrupted
goes on from its checkpoint, a finished one is not trained again. Losses are the trainer's own, over all held-out
images with the teacher's tokens, in nats per token; `base` is the model without its control.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.cli import Log, guarded, make_parser, numbers
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.records import record
from benchmarks.harness.tables import markdown_table
from car_train import checkpoint, cli
from car_train.evaluation.evaluate import evaluate
from car_train.evaluation.options import EvalOptions
from car_train.evaluation.runs import read_run, summary
from car_train.files import write_text

BRANCHES: dict[str, list[str]] = {
    "as published": [],
    "𝓕 of the tokenizer": ["--control-encoder", "vqvae"],
    "𝒯 of convolutions": ["--control-transformer", "conv"],
    "𝓖 zero projection": ["--fusion", "zero"],
    "𝓖 cross normalisation": ["--fusion", "cross_norm"],
}
"""Row of the table → flags of `python -m car_train car`."""

Row = dict[str, Any]


def train(stage: str, folder: Path, flags: Sequence[str], log: Log) -> Path:
    """A run's newest checkpoint, trained or gone on with first. Raises BenchmarkError where training fails."""
    finished = folder / "finished"
    if not finished.is_file():
        log(f"{folder.name}: training")
        resume = ["--resume"] if checkpoint.of_run(folder) else []
        if cli.main([stage, "-o", str(folder), *flags, *resume]):
            raise BenchmarkError(f"{folder.name}: training failed; see above, and run the same command again")
        write_text(finished, "")
    return checkpoint.locate(folder)


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


def branch(args: argparse.Namespace, log: Log) -> list[Row]:
    rows = []
    for i, (name, flags) in enumerate(BRANCHES.items()):
        folder = args.runs / f"branch-{i}"
        train("car", folder, [*args.common, "--base", str(args.base), *flags], log)
        rows.append(row_of(name, folder))
    return rows


def depth(args: argparse.Namespace, log: Log) -> list[Row]:
    rows = []
    for depth in args.depths:
        size = ["--depth", str(depth), "--width", str(args.width_per_depth * depth), "--heads", str(depth)]
        base, steered = (args.runs / f"{stage}-d{depth}" for stage in ("var", "car"))
        train("var", base, [*args.plain, "--vqvae", str(args.vqvae), *size], log)
        train("car", steered, [*args.common, "--base", str(base)], log)
        rows += [row_of(f"base d{depth}", base), row_of(f"CAR d{depth}", steered)]
    return rows


def classes(args: argparse.Namespace, log: Log) -> list[Row]:
    folder = args.runs / "classes"
    path = train("car", folder, [*args.common, "--base", str(args.base), "--classes", args.seen], log)
    rows = []
    for name, chosen in (("seen", args.seen), ("not seen", f"!{args.seen}")):
        log(f"evaluating the classes {name}")
        found = evaluate(EvalOptions(checkpoint=path, data=args.data, classes=chosen))
        losses, control = found["teacher_forced"], found["control"]
        measure = "f1" if "f1" in control["generated"] else next(iter(control["generated"]))
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


SERIES = {"branch": branch, "depth": depth, "classes": classes}


def run(args: argparse.Namespace, log: Log) -> None:
    args.plain = ["--data", str(args.data), *args.flags]
    args.common = [*args.plain, "--control", args.control]
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
        if name == "depth":
            one.add_argument("--vqvae", type=Path, required=True, help="checkpoint or run of the tokenizer")
            one.add_argument("--depths", type=numbers, default=(2, 4, 6, 8), help="(default: 2,4,6,8)")
            one.add_argument("--width-per-depth", type=int, default=32, help="(default: 32; published: 64)")
        else:
            one.add_argument("--base", type=Path, required=True, help="checkpoint or run of the base")
        if name == "classes":
            one.add_argument("--seen", required=True, help="classes to train on, e.g. 0-99")
    args = parser.parse_args(own)
    args.flags = flags
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded("benchmarks.ablations", lambda log: run(args, log), "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
