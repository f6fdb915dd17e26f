"""`python -m car_train`: fetch data, train the three stages, evaluate, sample, import the published weights."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from car_train import checkpoint
from car_train.config import (
    CONTROL_TYPES,
    ENCODERS,
    FUSIONS,
    TRANSFORMERS,
    CARConfig,
    ConfigError,
    VARConfig,
    VQVAEConfig,
)
from car_train.data import annotate, hed, pretrained
from car_train.data.dataset import DataError, find_pictures, load_control
from car_train.data.datasets import DEFAULT_ROOT, DatasetError, fetch
from car_train.evaluation import evaluate, report
from car_train.interop import official
from car_train.model import Model
from car_train.model.sample import control_pyramid
from car_train.model.sample import sample as reference_loop
from car_train.training.losses import PatchDiscriminator, Perceptual
from car_train.training.stages import Stage, TransformerStage, VQVAEStage, add_branch, add_var, new_vqvae
from car_train.training.trainer import (
    PRECISIONS,
    SCHEDULES,
    Trainer,
    TrainingError,
    TrainOptions,
    seed_everything,
    sheet,
    stage_name,
)

EXAMPLES = """examples:
  python -m car_train data emoji
  python -m car_train vqvae --data ~/.cache/car/data/emoji -o runs/vqvae --sides 1,2,3,4,6,8 \\
      --channels 24 --multipliers 1,2,3,4
  python -m car_train var --data ~/.cache/car/data/emoji --vqvae runs/vqvae -o runs/var \\
      --depth 6 --width 192 --heads 6
  python -m car_train car --data ~/.cache/car/data/emoji --base runs/var -o runs/car --control canny
  torchrun --nproc-per-node 4 -m car_train car --device cuda --bf16 --base runs/var -o runs/car --data photos
  python -m car_train controls --data photos --annotator hed -o photos-hed
  python -m car_train eval runs/car --data ~/.cache/car/data/emoji
  python -m car_train report runs/vqvae runs/var runs/car -o report.png
  python -m car_train sample runs/car --control edges.png --class 3 -o sample.png
  python -m car_train import --vae vae_ch160v4096z32.pth --var var_d16.pth --car car_depth_d16.pth \\
      --control-type depth -o d16
"""


def integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,2,3,4") from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m car_train", description=__doc__, epilog=EXAMPLES, formatter_class=formatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="fetch a real data set and lay it out as class folders")
    data.add_argument("name", choices=["emoji", "fashion"])
    data.add_argument("-o", "--output", type=Path, help=f"folder (default: {DEFAULT_ROOT}/NAME)")

    vqvae = _stage(commands, "vqvae", "train the multi-scale tokenizer")
    defaults = VQVAEConfig()
    vqvae.add_argument(
        "--sides",
        type=integers,
        default=(1, 2, 3, 4, 6, 8),
        help="tokens per edge of each scale (default: 1,2,3,4,6,8)",
    )
    vqvae.add_argument("--vocab", type=int, default=1024, help="codes (default: 1024)")
    vqvae.add_argument("--latent-channels", type=int, default=16, help="(default: 16)")
    vqvae.add_argument("--channels", type=int, default=32, help="channels of the finest level (default: 32)")
    vqvae.add_argument(
        "--multipliers",
        type=integers,
        default=(1, 2, 2, 4),
        help="channels of each level; its length sets f (default: 1,2,2,4)",
    )
    vqvae.add_argument("--res-blocks", type=int, default=1, help="residual blocks per level (default: 1)")
    vqvae.add_argument(
        "--beta", type=float, default=defaults.beta, help=f"weight of the commitment loss (default: {defaults.beta})"
    )
    vqvae.add_argument(
        "--perceptual", type=float, default=0.0, metavar="W", help="weight of the perceptual loss (default: 0, off)"
    )
    vqvae.add_argument(
        "--perceptual-net", choices=["squeezenet", "vgg"], default="squeezenet", help="(default: squeezenet)"
    )
    vqvae.add_argument(
        "--perceptual-weights",
        type=Path,
        help="its weights, .safetensors (default: those of `car_train weights squeezenet`, or torchvision's VGG)",
    )
    vqvae.add_argument(
        "--adversarial",
        type=float,
        default=0.0,
        metavar="W",
        help="weight of the PatchGAN loss, times its adaptive weight (default: 0, off; VQGAN: 0.8)",
    )
    vqvae.add_argument(
        "--adversarial-start", type=int, default=0, metavar="STEP", help="first step with it (default: 0)"
    )
    vqvae.add_argument("--critic-width", type=int, default=64, help="channels of the PatchGAN (default: 64)")

    var = _stage(commands, "var", "train the next-scale transformer on a tokenizer")
    var.add_argument("--vqvae", type=Path, required=True, help="checkpoint or run of the tokenizer")
    var.add_argument("--depth", type=int, default=6, help="blocks (default: 6)")
    var.add_argument("--width", type=int, help="(default: 64·depth)")
    var.add_argument("--heads", type=int, help="(default: depth)")
    var.add_argument("--shared-aln", action="store_true", help="one AdaLN projection for all blocks")
    var.add_argument("--drop-path", type=float, help="largest drop-path rate (default: 0.1·depth/24)")

    car = _stage(commands, "car", "train a control branch on a frozen transformer")
    car.add_argument("--base", type=Path, required=True, help="checkpoint or run of the transformer")
    car.add_argument(
        "--control",
        choices=CONTROL_TYPES,
        default="canny",
        help="made on the fly, unless --control-root is given (default: canny)",
    )
    car.add_argument("--control-root", type=Path, help="folder of control images that mirrors --data")
    car.add_argument(
        "--encoder-widths",
        type=integers,
        help="of the control encoder (default: 16, doubling at each halving; published: 64,128,256,512,1024)",
    )

    car.add_argument("--control-encoder", choices=ENCODERS, default="conv", help="𝓕 (default: conv)")
    car.add_argument("--control-transformer", choices=TRANSFORMERS, default="blocks", help="𝒯 (default: blocks)")
    car.add_argument("--fusion", choices=FUSIONS, default="concat", help="𝓖 (default: concat)")

    _command(commands, "controls", "precompute control images of a data set", annotate)
    _command(commands, "eval", "losses, FID and KID, control fidelity of a checkpoint", evaluate)
    _command(commands, "report", "one page of curves and samples of training runs", report)
    _command(commands, "weights", "fetch pretrained weights for losses, annotators, evaluation", pretrained)

    draw = commands.add_parser("sample", help="sample from a checkpoint with PyTorch (the reference loop)")
    draw.add_argument("checkpoint", type=Path)
    draw.add_argument("--control", type=Path, help="control image")
    draw.add_argument("--class", dest="label", type=int, help="class index (default: no class)")
    draw.add_argument("--seed", type=int, default=0)
    draw.add_argument("--cfg", type=float, default=4.0)
    draw.add_argument("--top-k", type=int, default=0, help="0 = off")
    draw.add_argument("--top-p", type=float, default=0.0, help="0 = off")
    draw.add_argument("-o", "--output", type=Path, default=Path("sample.png"))

    imp = commands.add_parser("import", help="turn official .pth files into a checkpoint")
    add_official_arguments(imp)
    imp.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args(argv)


def add_official_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name official files, shared with the exporter."""
    parser.add_argument("--vae", type=Path, help="official tokenizer, e.g. vae_ch160v4096z32.pth")
    parser.add_argument("--var", type=Path, help="official transformer, e.g. var_d16.pth")
    parser.add_argument(
        "--car", type=Path, help="official control branch, e.g. car_depth_d16.pth; without it: no control"
    )
    parser.add_argument("--control-type", choices=CONTROL_TYPES, help="what --car was trained on")
    parser.add_argument(
        "--sides", type=integers, help="tokens per edge of each scale, where they are not the official ones"
    )


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_text: str, module: Any
) -> None:
    """A command that lives in a module of its own: `add_arguments(parser)` and `run(args)`."""
    parser = commands.add_parser(
        name,
        help=help_text,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)


def _stage(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder of this run: checkpoints, samples, log.jsonl"
    )
    parser.add_argument("--steps", type=int, default=5000, help="(default: 5000)")
    parser.add_argument("--init", type=Path, metavar="RUN", help="start from its weights for what is trained here")
    parser.add_argument(
        "--batch", type=int, default=32, help="pictures a step, over all processes and parts (default: 32)"
    )
    parser.add_argument("--accumulate", type=int, default=1, help="parts a batch is computed in (default: 1)")
    parser.add_argument("--lr", type=float, default=6e-4, help="peak learning rate (default: 6e-4)")
    parser.add_argument("--lr-per-256", type=float, help="instead of --lr: this times batch/256, as in the papers")
    parser.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="(default: cosine; VAR: linear)")
    parser.add_argument("--warmup", type=int, default=200, help="steps (default: 200)")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="(default: 0.05)")
    parser.add_argument("--clip", type=float, default=2.0, help="largest gradient norm (default: 2)")
    parser.add_argument(
        "--ema", type=float, default=0.0, metavar="DECAY", help="keep a moving average of the weights, e.g. 0.999"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="autocast; fp16 with gradient scaling (default: fp32)"
    )
    precision.add_argument("--bf16", dest="precision", action="store_const", const="bf16", help="--precision bf16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks (needs a C++ compiler)")
    parser.add_argument(
        "--recompute", action="store_true", help="less memory: recompute activations in the backward pass"
    )
    parser.add_argument("--device", default="cpu", help="e.g. cuda (default: cpu); under torchrun: one GPU a process")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: 0, all)")
    parser.add_argument("--workers", type=int, default=1, help="data loader processes (default: 1)")
    parser.add_argument("--no-augment", dest="augment", action="store_false", help="no flips, shifts and zooms")
    parser.add_argument(
        "--no-preload", dest="preload", action="store_false", help="don't keep all pictures in memory (large sets)"
    )
    parser.add_argument("--classes", help='some classes only, e.g. 0-99, or "!0-99" for all others (labels stay)')
    if name != "vqvae":
        parser.add_argument(
            "--no-token-cache", dest="token_cache", action="store_false", help="encode pictures anew at every step"
        )
        parser.add_argument("--token-root", type=Path, help="folder of token caches (default: ~/.cache/car/tokens)")
        parser.add_argument(
            "--views", type=int, default=8, help="augmentations of each picture in the token cache (default: 8)"
        )
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard logs too")
    parser.add_argument("--keep", type=int, default=2, help="checkpoints kept (default: 2)")
    parser.add_argument("--validate-every", type=int, default=500, help="steps (default: 500)")
    parser.add_argument("--save-every", type=int, default=500, help="steps (default: 500)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    return parser


def train(args: argparse.Namespace) -> Path:
    if not args.resume and list(args.output.glob("step-*")):
        raise ConfigError(f"{args.output} holds a run already; add --resume to continue it, or give another folder")
    fields = {f.name for f in dataclasses.fields(TrainOptions)}
    given = {k: v for k, v in vars(args).items() if k in fields and v is not None}
    if args.lr_per_256 is not None:
        given["lr"] = args.lr_per_256 * args.batch / 256
    options = TrainOptions(**given)
    seed_everything(args.seed)
    stage = _new_stage(args)
    if args.init is not None and not args.resume:
        start_from(stage, args.init)
    trainer = Trainer(stage, options)
    if args.resume:
        trainer.resume()
    return trainer.run()


def start_from(stage: Stage, path: Path) -> None:
    """Give what the stage trains the weights of another run's like part.

    ConfigError where there is none, or none of this shape.
    """
    part = stage_name(stage)
    theirs, mine = (checkpoint.parts(m).get(part) for m in (checkpoint.load(path), stage.model))
    assert mine is not None
    if theirs is None:
        raise ConfigError(f"--init {path}: has no {part} part; give a run of `python -m car_train {part}`")
    try:
        mine.load_state_dict(theirs.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(
            f"--init {path}: its {part} has other sizes ({reason}); give the same model options"
        ) from error


def _new_stage(args: argparse.Namespace) -> Stage:
    if args.command == "vqvae":
        tokenizer = VQVAEConfig(
            sides=args.sides,
            vocab=args.vocab,
            latent_channels=args.latent_channels,
            channels=args.channels,
            multipliers=args.multipliers,
            res_blocks=args.res_blocks,
            beta=args.beta,
        )
        critic = PatchDiscriminator(tokenizer.image_size, args.critic_width) if args.adversarial else None
        return VQVAEStage(
            new_vqvae(tokenizer),
            perceptual=Perceptual(args.perceptual_weights, args.perceptual_net) if args.perceptual else None,
            perceptual_weight=args.perceptual,
            adversary=critic,
            adversarial_weight=args.adversarial,
            adversarial_start=args.adversarial_start,
        )
    if args.command == "var":
        names = tuple(find_pictures(args.data.expanduser())[0])
        transformer = VARConfig(
            depth=args.depth,
            width=args.width,
            heads=args.heads,
            classes=len(names),
            shared_aln=args.shared_aln,
            drop_path=args.drop_path,
        )
        return TransformerStage(add_var(checkpoint.load(args.vqvae), transformer, names))
    base = checkpoint.load(args.base)
    if base.car is None:
        raise ConfigError(
            f"{args.base} holds a tokenizer only; give a transformer trained with `python -m car_train var`"
        )
    halvings = len(base.config.vqvae.multipliers) - 1
    widths = args.encoder_widths or tuple(16 * 2**i for i in range(halvings + 1))
    branch = CARConfig(
        control_type=args.control,
        encoder=args.control_encoder,
        transformer=args.control_transformer,
        fusion=args.fusion,
        encoder_widths=widths,
        encoder_strides=(2,) * halvings + (1,) * (len(widths) - 1 - halvings),
    )
    return TransformerStage(add_branch(base, branch), fresh=args.init is None and not args.resume)


def sample(args: argparse.Namespace) -> Path:
    model = checkpoint.load(args.checkpoint)
    if model.car is None:
        raise ConfigError(f"{args.checkpoint} holds a tokenizer only; give a transformer or a CAR checkpoint")
    config, classes = model.config.vqvae, model.car.base.config.classes
    label = classes if args.label is None else args.label
    if not 0 <= label <= classes:
        raise ConfigError(f"class {label} is out of range; give 0 to {classes - 1}, or {classes} for no class")
    if (args.control is not None) != (model.car.branch is not None):
        needs, remedy = ("needs", "add") if model.car.branch else ("has no", "leave out")
        raise ConfigError(f"{args.checkpoint} {needs} control; {remedy} --control")
    if not 0 <= args.top_k <= config.vocab or not 0 <= args.top_p <= 1 or not 0 <= args.cfg < float("inf"):
        raise ConfigError(
            f"top-k {args.top_k}, top-p {args.top_p}, cfg {args.cfg}: "
            f"give top-k in 0…{config.vocab}, top-p in 0…1, cfg from 0"
        )
    if args.seed < 0 or args.output.suffix.lower() != ".png" or not args.output.absolute().parent.is_dir():
        raise ConfigError(
            f"seed {args.seed}, output {args.output}: give a seed from 0 and a .png in a folder that exists"
        )
    controls = None
    if args.control is not None:
        controls = control_pyramid(load_control(args.control), [s * config.patch for s in config.sides])
    uniforms = torch.from_numpy(np.random.default_rng(args.seed).random((1, config.tokens), dtype=np.float32))
    _, drawn = reference_loop(
        model.vqvae, model.car, torch.tensor([label]), uniforms, controls, args.cfg, args.top_k, args.top_p
    )
    sheet([drawn]).save(args.output)
    return args.output


def load_official(args: argparse.Namespace) -> Model:
    """The model of `add_official_arguments`' files."""
    if args.vae is None:
        raise ConfigError("--vae is missing; give the official tokenizer, e.g. --vae vae_ch160v4096z32.pth")
    if args.car is not None and args.control_type is None:
        raise ConfigError(
            f"--control-type is missing; say what {args.car.name} was trained on: {', '.join(CONTROL_TYPES)}"
        )
    var, car = (official.load_pth(p) if p is not None else None for p in (args.var, args.car))
    return official.build_model(official.load_pth(args.vae), var, car, args.control_type or "canny", args.sides)


def run(args: argparse.Namespace) -> Path | None:
    if args.command == "data":
        return fetch(args.name, args.output)
    if "run" in args:
        return args.run(args)
    if args.command == "sample":
        return sample(args)
    if args.command == "import":
        return checkpoint.save(load_official(args), args.output)
    return train(args)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        made = run(args)
        if made is not None and os.environ.get("RANK", "0") == "0":
            print(made)
    except (
        ConfigError,
        DataError,
        DatasetError,
        checkpoint.CheckpointError,
        official.OfficialCheckpointError,
        annotate.AnnotatorError,
        evaluate.EvaluationError,
        hed.HedError,
        pretrained.WeightsError,
        report.ReportError,
        TrainingError,
        OSError,
    ) as error:
        print(f"car_train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("car_train: interrupted; a training run continues with --resume, `controls` by itself", file=sys.stderr)
        return 130
    return 0
