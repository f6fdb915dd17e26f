"""`python -m car_train vqvae`, `var` and `car`: the three stages as commands; `cca` fine-tunes the last two."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from car_train import checkpoint
from car_train.config import CARConfig, ConfigError, VARConfig, VQVAEConfig
from car_train.conventions import DERIVED
from car_train.data.folder import scan
from car_train.files import one_writer
from car_train.flags import add_flags, given
from car_train.model import Model
from car_train.model.var import ALNG, VAR, take_over
from car_train.training.cca import CCAStage
from car_train.training.distributed import World
from car_train.training.losses import PatchDiscriminator
from car_train.training.options import CCAOptions, TokenizerLossOptions, TrainOptions
from car_train.training.perceptual import Perceptual
from car_train.training.stages import Stage, TransformerStage, VQVAEStage, add_branch, add_var, new_vqvae
from car_train.training.trainer import Trainer, seed_everything

STAGES = {
    "vqvae": "train the multi-scale tokenizer",
    "var": "train the next-scale transformer on a tokenizer",
    "car": "train a control branch on a frozen transformer",
    "cca": "fine-tune a transformer or its branch for an epoch, so that it needs no guidance",
}
# What the commands make without further flags: a model for 64×64 pixels that trains on a CPU.
TOKENIZER = VQVAEConfig(
    sides=(1, 2, 3, 4, 6, 8), vocab=1024, latent_channels=16, channels=32, multipliers=(1, 2, 2, 4), res_blocks=1
)
TRANSFORMER = VARConfig(depth=6)

ALNG_HELP = (
    "scale of the γ rows of AdaLN at first: how far a new block stays out of the residual stream (published: 1e-3 "
    "for d16 and d20, 1e-4 for d24, 1e-5 for d30, 5e-6 for d36 at 512 pixels)"
)
TOKENS = ("token_cache", "token_root", "views")
"""Options for stages that train on tokens."""
CCA = {"steps": None, "lr": 2e-5, "warmup": 0, "schedule": "constant"}
"""What an alignment begins with in the place of the stages' defaults; without --steps it takes --epochs 1."""
CONTROLS = ("control_root", "val_control_root", "drop_strokes")
RUN = tuple("batch grad_accum lr schedule final_lr warmup weight_decay weight_decay_end grad_clip ema seed".split())
MACHINE = tuple("compile activation_checkpointing device threads workers augment flip fit preload classes".split())
RECORD = tuple("tensorboard keep validate_every save_every".split())


def add_arguments(parser: argparse.ArgumentParser, stage: str) -> None:
    """The flags of one stage's command."""
    add_flags(parser, TrainOptions, "data", "val", "output")
    if stage == "vqvae":
        model = parser.add_argument_group("tokenizer")
        add_flags(model, TOKENIZER)
        add_flags(model, TokenizerLossOptions())
    elif stage == "var":
        model = parser.add_argument_group("transformer")
        model.add_argument("--vqvae", type=Path, required=True, help="checkpoint or run of the tokenizer")
        add_flags(model, TRANSFORMER)
        model.add_argument("--alng", type=float, default=ALNG, help=f"{ALNG_HELP} (default: {ALNG:g})")
    elif stage == "cca":
        model = parser.add_argument_group("alignment")
        model.add_argument("--model", type=Path, required=True, help="checkpoint or run of `var` or `car`")
        add_flags(model, CCAOptions)
        add_flags(model, TrainOptions, *CONTROLS)
    else:
        model = parser.add_argument_group("control branch")
        model.add_argument("--base", type=Path, required=True, help="checkpoint or run of the transformer")
        add_flags(model, CARConfig(), encoder_widths=None)
        model.add_argument(
            "--drop-path", type=float, help="largest drop-path rate in base and branch (default: that of the base)"
        )
        add_flags(model, TrainOptions, *CONTROLS)
    run = parser.add_argument_group("training")
    instead = CCA if stage == "cca" else {}
    add_flags(run.add_mutually_exclusive_group(), TrainOptions, "steps", "epochs", **instead)
    add_flags(run, TrainOptions, *RUN, **instead)
    run.add_argument("--lr-per-256", type=float, help="instead of --lr: this times batch/256, as in the papers")
    precision = run.add_mutually_exclusive_group()
    add_flags(precision, TrainOptions, "precision")
    precision.add_argument("--bf16", dest="precision", action="store_const", const="bf16", help="--precision bf16")
    add_flags(run, TrainOptions, *MACHINE, *(() if stage == "vqvae" else TOKENS), *RECORD)
    if stage != "cca":
        run.add_argument("--init", type=Path, metavar="RUN", help="start from its weights for what is trained here")
    run.add_argument("--resume", action="store_true", help="continue the run in --output")


def run(args: argparse.Namespace, make: Callable[[argparse.Namespace], Stage] | None = None) -> Path:
    """Train; returns the last checkpoint. One process, or one group of them, at a time. Raises UserError.

    make: of the arguments what is trained; None: what the command's name says.
    Under `torchrun --max-restarts N` a run goes on from its newest checkpoint, if there is one: a restarted process
    has the arguments of the first, and on the other machines nothing says that it was restarted.
    """
    if World.may_restart() and checkpoint.of_run(args.output):
        args.resume = True
    if not args.resume and checkpoint.of_run(args.output):
        raise ConfigError(f"{args.output} holds a run already; add --resume to continue it, or give another folder")
    if args.steps is None:
        args.steps, args.epochs = TrainOptions.steps, args.epochs or 1.0
    lr = {} if args.lr_per_256 is None else {"lr": args.lr_per_256 * args.batch / 256}
    options = TrainOptions(**given(args, TrainOptions) | lr)
    seed_everything(args.seed)
    with one_writer(args.output) if World.is_first() else nullcontext():
        return _train(args, options, make or MAKE[args.command])


def _train(args: argparse.Namespace, options: TrainOptions, make: Callable[[argparse.Namespace], Stage]) -> Path:
    stage = make(args)
    if args.command != "cca" and args.init is not None and not args.resume:
        start_from(stage, args.init)
    trainer = Trainer(stage, options)
    if args.resume:
        trainer.resume()
    return trainer.run()


def start_from(stage: Stage, path: Path) -> None:
    """Give what the stage trains the weights of another run's like part; a base may have other scales and classes.

    ConfigError where there is none, or none of this shape.
    """
    source = checkpoint.load(path)
    theirs, mine = (checkpoint.modules(m).get(stage.name) for m in (source, stage.model))
    assert mine is not None
    if theirs is None:
        raise ConfigError(
            f"--init {path}: has no {stage.name} part; give a run of `python -m car_train {stage.name}`"
        )
    try:
        if isinstance(mine, VAR) and isinstance(theirs, VAR):
            take_over(mine, theirs, stage.model.config.class_names, source.config.class_names)
        else:
            mine.load_state_dict(theirs.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(
            f"--init {path}: its {stage.name} has other sizes ({reason}); give the same model options"
        ) from error


def _vqvae(args: argparse.Namespace) -> Stage:
    config, loss = VQVAEConfig(**given(args, VQVAEConfig)), TokenizerLossOptions(**given(args, TokenizerLossOptions))
    if loss.decoder_only and args.init is None:
        raise ConfigError("decoder_only trains the decoder of a tokenizer that is there; give its run by --init")
    critic = PatchDiscriminator(config.image_size, loss.critic_width) if loss.adversarial else None
    return VQVAEStage(
        new_vqvae(config),
        perceptual=Perceptual(loss.perceptual_weights, loss.perceptual_net) if loss.perceptual else None,
        perceptual_weight=loss.perceptual,
        adversary=critic,
        adversarial_weight=loss.adversarial,
        adversarial_start=loss.adversarial_start,
        untrained=args.init is None,
        decoder_only=loss.decoder_only,
    )


def var_model(args: argparse.Namespace) -> Model:
    """A new transformer on a tokenizer, as the flags of `var` say. Raises UserError."""
    names = scan(args.data).class_names
    config = VARConfig(**given(args, VARConfig) | {"classes": len(names)})
    if not 0 < args.alng <= 1:
        raise ConfigError(f"alng is {args.alng}; it must be in (0, 1], e.g. 1e-3")
    return add_var(checkpoint.load(args.vqvae), config, names, args.alng)


def _var(args: argparse.Namespace) -> Stage:
    return TransformerStage(var_model(args))


def _car(args: argparse.Namespace) -> Stage:
    base = checkpoint.load(args.base)
    if base.car is None:
        raise ConfigError(
            f"{args.base} holds a tokenizer only; give a transformer trained with `python -m car_train var`"
        )
    halvings = len(base.config.vqvae.multipliers) - 1
    widths = args.encoder_widths or tuple(16 * 2**i for i in range(halvings + 1))
    strides = (2,) * halvings + (1,) * (len(widths) - 1 - halvings)
    sizes = {"encoder_widths": widths, "encoder_strides": strides}
    options = given(args, CARConfig) | sizes
    if options["convention"] is None:
        on_the_fly = args.control_root is None
        options["convention"] = DERIVED[options["control_type"]] if on_the_fly else options["control_type"]
    branch = add_branch(base, CARConfig(**options))
    rate = VARConfig(drop_path=args.drop_path).drop_path  # checked there
    return TransformerStage(branch, fresh=args.init is None and not args.resume, drop_path=rate)


def _cca(args: argparse.Namespace) -> Stage:
    model = checkpoint.load(args.model)
    if model.car is None:
        raise ConfigError(f"{args.model} holds a tokenizer only; give a run of `var` or `car`")
    return CCAStage(model, CCAOptions(**given(args, CCAOptions)))


MAKE = {"vqvae": _vqvae, "var": _var, "car": _car, "cca": _cca}
"""Command → what it trains."""
