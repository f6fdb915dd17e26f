"""Build a plan from a checkpoint or the published .pth files, verify it against PyTorch, compile its engines, or make
its int8 form."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from car_export.command import add_model_arguments, flags_of, load_model, run_command
from car_export.config import ExportOptions, Int8Options
from car_export.files import write_file
from car_export.plan import reference_model
from car_export.plan2 import build_plan_of_2
from car_export.published import find_published
from car_export.quantize.int8 import to_int8
from car_export.tensorrt import build as engines
from car_export.tensorrt.compiler import Compiler
from car_export.upgrade import upgrade
from car_export.verify import verify_plan
from car_export.verify2 import verify_plan_of_2
from car_runtime.format import manifest as schema
from car_runtime.format import signature
from car_train import checkpoint
from car_train.config import CONTROL_TYPES, ConfigError
from car_train.files import scratch, sha256
from car_train.flags import add_flags, given, integers
from car_train.interop.command import load_official
from car_train.model import Model

Log = Callable[[str], None]
EXAMPLES = """examples:
  python export/build_engines.py runs/car -o emoji.plan --weights fp16
  python export/build_engines.py --vae vae_ch160v4096z32.pth --var var_d16.pth --car car_depth_d16.pth \\
      --control-type depth -o d16.plan
  python export/build_engines.py --from-published downloads/ -o d16.plan  # finds these files itself
  python export/build_engines.py runs/canny runs/depth -o both.plan  # one base, two control branches
  python export/build_engines.py old.plan --upgrade -o new.plan  # a plan of format 1, without its checkpoint
  python export/build_engines.py runs/car -o emoji.plan --verify  # compare an existing plan with its checkpoint again
  python export/build_engines.py runs/car -o emoji.plan --target rtx --sm 89  # and engines (no GPU is needed)
  python export/build_engines.py emoji.plan --target rtx --sm 89,120  # engines of an existing plan
  python export/build_engines.py d16.plan --weights int8 -o d16-int8.plan --calibrate depths/  # INT8, for CPUs
  python export/build_engines.py d16.plan --sign key.pem  # say that the plan is yours
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments; exits with code 2 on misuse."""
    parser = argparse.ArgumentParser(
        prog="build_engines.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(
        parser,
        "checkpoint or run of car_train (else: --vae --var [--car]), or a plan, to build engines of (--target), "
        "to make an int8 plan of (--weights int8) or to upgrade (--upgrade)",
        several=True,
    )
    parser.add_argument(
        "others",
        type=Path,
        nargs="*",
        metavar="BRANCH",
        help="more checkpoints on the same base, each a further control branch of the plan; "
        "NAME=CHECKPOINT names one, else its control type does",
    )
    parser.add_argument(
        "--from-published",
        type=Path,
        metavar="DIR",
        help="find the published tokenizer, transformer and control branches in a folder, by their tensors",
    )
    parser.add_argument("-o", "--output", type=Path, help="the plan to write, NAME.plan")
    parser.add_argument("--name", help="the model's name in the manifest (default: that of the plan)")
    add_flags(parser, ExportOptions)
    parser.add_argument(
        "--calibrate",
        type=Path,
        nargs="+",
        default=(),
        metavar="PATH",
        help="with --weights int8: control images, or folders of them, to calibrate on (default: synthetic images)",
    )
    parser.add_argument(
        "--upgrade", action="store_true", help="write a plan of format 1 as one of format 2; no checkpoint is needed"
    )
    parser.add_argument("--default-branch", metavar="NAME", help="the branch of a control that names none (first)")
    parser.add_argument("--class-names", type=Path, help="text file with one class name per line")
    parser.add_argument("--verify", action="store_true", help="don't build: compare the existing plan with the model")
    parser.add_argument(
        "--target",
        choices=["rtx", "trt"],
        help="also compile engines: TensorRT for RTX (anywhere), or classic TensorRT (on the GPU that will run them)",
    )
    parser.add_argument(
        "--sm",
        type=integers,
        help="compute capabilities to compile for: 75, 80, 86, 89 (RTX 40), 120 (RTX 50) (default: the GPU here)",
    )
    parser.add_argument(
        "--sign", type=Path, metavar="KEY", help="sign the plan with this private key (Ed25519, PEM); extra `sign`"
    )
    args = parser.parse_args(argv)
    if args.output is None and not is_plan(args.checkpoint):
        parser.error("the following arguments are required: -o/--output")
    return args


def is_plan(path: Path | None) -> bool:
    return path is not None and (path / "manifest.json").is_file()


def read_class_names(path: Path) -> tuple[str, ...]:
    """One name a line, UTF-8. Raises ConfigError."""
    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: class names can't be read ({error}); give a UTF-8 text, one name a line"
        ) from error
    if not all(name.strip() for name in names) or len(set(names)) != len(names):
        raise ConfigError(f"{path}: a class name is empty or there twice; give each class a name of its own")
    return names


def build_engines_only(args: argparse.Namespace, log: Log) -> Path:
    """Engines of an existing plan, in place."""
    plan: Path = args.checkpoint
    if args.target is None:
        raise ConfigError(
            f"{plan} is a plan already; say what to build for, e.g. --target rtx --sm 89, or --weights int8"
        )
    if args.output is not None and args.output.resolve() != plan.resolve():
        raise ConfigError(f"engines are built inside their plan; leave out -o {args.output}, or copy the plan first")
    _check_chosen(args, "target", "sm", "sign")
    engines.build_engines(plan, engines.choose_targets(args.target, args.sm), log)
    return plan


def _check_chosen(args: argparse.Namespace, *allowed: str) -> None:
    """Raise ConfigError if a plan is given with flags that only an export heeds."""
    defaults = parse_args([str(args.checkpoint)])
    chosen = [
        name
        for name, value in vars(args).items()
        if name not in ("checkpoint", "output", *allowed) and value != getattr(defaults, name)
    ]
    if chosen:
        raise ConfigError(
            f"{args.checkpoint} is a plan already, and {flags_of(chosen)} settle how one is exported; "
            "give its checkpoint"
        )


def make_int8(args: argparse.Namespace, log: Log) -> Path:
    """Write the int8 form of an existing plan next to it."""
    if args.output is None:
        raise ConfigError(f"an int8 plan is another plan; name it, e.g. -o {args.checkpoint.stem}-int8.plan")
    _check_chosen(args, "weights", "calibrate", "name", "sign")
    return to_int8(
        Int8Options(source=args.checkpoint, output=args.output, name=args.name, controls=tuple(args.calibrate or ())),
        log,
    )


def make_upgrade(args: argparse.Namespace, log: Log) -> Path:
    """Write a plan of format 1 as one of format 2."""
    if args.output is None or args.output.resolve() == args.checkpoint.resolve():
        raise ConfigError(f"the upgraded plan is another one; name it, e.g. -o {args.checkpoint.stem}-2.plan")
    _check_chosen(args, "upgrade", "name", "sign")
    return upgrade(args.checkpoint, args.output, args.name, log)


def check_int8(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags that don't go with `--weights int8`, or that need it."""
    if args.weights != "int8":
        if args.calibrate:
            raise ConfigError(f"--calibrate {args.calibrate[0]} serves --weights int8; add that, or leave it out")
        return
    if args.precision != "fp32":
        raise ConfigError(
            f"--weights int8 is for CPUs, which compute in fp32; leave out --precision {args.precision}"
        )
    if args.target is not None:
        raise ConfigError(f"--weights int8 is for CPUs; for --target {args.target} use --precision fp16")
    if args.verify:
        raise ConfigError("--verify compares with float32 arithmetic; an int8 plan is checked by car-run verify")


def check_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags that don't go together."""
    if args.sm is not None and args.target is None:
        raise ConfigError(f"--sm {','.join(map(str, args.sm))} needs a compiler; add --target rtx")
    if args.verify and args.target is not None:
        raise ConfigError("--verify builds nothing; leave out --target, or leave out --verify")
    if args.verify and args.sign is not None:
        raise ConfigError("--verify changes nothing; leave out --sign, or leave out --verify")
    check_int8(args)
    if args.upgrade and not is_plan(args.checkpoint):
        raise ConfigError(f"--upgrade is for a plan, but {args.checkpoint} is none; leave it out")


def use_published(args: argparse.Namespace, log: Log) -> None:
    """Set --vae, --var and --car to what --from-published finds. Raises ConfigError."""
    folder = args.from_published
    if folder is None:
        return
    if args.checkpoint is not None:
        raise ConfigError(f"--from-published {folder} and {args.checkpoint} are two models; give one of them")
    if needless := [name for name in ("vae", "car", "control_type") if getattr(args, name)]:
        raise ConfigError(f"--from-published finds the files itself; leave out {flags_of(needless)}, or that flag")
    found = find_published(folder, log, args.var)
    args.vae, args.var = found.vae, found.var
    args.car = [Path(f"{kind}={path}") for kind, path in found.cars.items()] or None


def run(args: argparse.Namespace, log: Log) -> Path:
    """Do what the arguments say, and sign; returns the plan."""
    use_published(args, log)
    check_flags(args)
    if args.sign is not None:
        signature.private_key(args.sign)  # whether there is one shows before the work
        if is_plan(args.checkpoint) and args.target is None and args.weights != "int8" and not args.upgrade:
            _check_chosen(args, "sign")
            return sign(args.checkpoint, args.sign, log)
    plan = build(args, log)
    if args.sign is not None:
        return sign(plan, args.sign, log)
    if not args.verify and (plan / signature.SIGNATURE).exists():
        (plan / signature.SIGNATURE).unlink()
        log(f"{signature.SIGNATURE} was of the manifest before, and is removed; sign again with --sign")
    return plan


def sign(plan: Path, key: Path, log: Log) -> Path:
    """Put a plan's signature next to its manifest."""
    write_file(plan / signature.SIGNATURE, signature.sign(plan, key))
    log(f"signed: {signature.SIGNATURE}")
    return plan


def build(args: argparse.Namespace, log: Log) -> Path:
    """An export, an int8 plan, engines, or a comparison; returns the plan."""
    if is_plan(args.checkpoint):
        if args.upgrade:
            return make_upgrade(args, log)
        if args.others:
            raise ConfigError(f"{args.checkpoint} is a plan, and {args.others[0]} a second input; give one plan")
        return make_int8(args, log) if args.weights == "int8" else build_engines_only(args, log)
    # Whatever can be wrong with the targets shows before the export, which takes minutes.
    targets = engines.choose_targets(args.target, args.sm) if args.target else []
    for target in targets:
        Compiler(target.flavour).check_target(target.name)
    options = export_options(args)
    models, sources = load_models(args)
    model = next(iter(models.values()))
    options = dataclasses.replace(options, provenance=sources)
    names = options.class_names
    if names is not None and model.car is not None and len(names) != model.car.base.config.classes:
        raise ConfigError(
            f"{args.class_names} has {len(names)} names for {model.car.base.config.classes} classes; give one a line"
        )
    if args.verify:
        return verify_again(models, args.output, log)
    if args.weights == "int8":
        return export_int8(models, options, tuple(args.calibrate), log)
    with engines.keeping_engines(args.output, log):
        build_plan_of_2(models, options, log)
    if targets:
        engines.build_engines(args.output, targets, log)
    return args.output


def export_options(args: argparse.Namespace) -> ExportOptions:
    """The options of the export itself; an int8 plan is made of one in float32."""
    chosen = given(args, ExportOptions) | {
        "output": args.output,
        "name": args.name or args.output.name.removesuffix(".plan"),
        "weights": "fp32" if args.weights == "int8" else args.weights,
        "class_names": read_class_names(args.class_names) if args.class_names is not None else None,
    }
    return ExportOptions(**chosen)


def load_models(args: argparse.Namespace) -> tuple[dict[str, Model], dict[str, str]]:
    """Branch name → model, the default branch first ("" → one without a branch), and where they came from.

    Raises ConfigError, or what loading raises.
    """
    cars = [_named(path) for path in args.car or ()]
    own, path = _named(args.checkpoint) if args.checkpoint is not None else cars[0] if cars else (None, None)
    first = {"checkpoint": path if args.checkpoint is not None else None, **_official_branch(args, cars[:1])}
    model, sources = load_model(argparse.Namespace(**{**vars(args), **first}))
    models = {own or control_type_of(model): model}
    for name, path in cars[1:]:
        model = load_official(argparse.Namespace(**{**vars(args), **_official_branch(args, [(name, path)])}))
        _add_branch(models, name, path, model)
        sources[f"sha256 car {path.name}"] = sha256(path)
    for name, path in map(_named, args.others):
        branch = _add_branch(models, name, path, checkpoint.load(path))
        sources |= {f"sha256 {branch} {file}": digest for file, digest in checkpoint.fingerprint(path).items()}
    if "" in models and len(models) > 1:
        raise ConfigError(f"{args.checkpoint} has no control branch; leave it out, the others bring the same base")
    default: str | None = args.default_branch
    if default is not None and default not in models:
        raise ConfigError(f"--default-branch {default} is not one of the branches: {', '.join(models)}")
    if default is not None:
        models = {default: models[default]} | models
    return models, sources


def _official_branch(args: argparse.Namespace, named: list[tuple[str | None, Path]]) -> dict[str, object]:
    """`--car` and `--control-type` of one published branch, whose name is its control type if it is one."""
    if not named:
        return {"car": None}
    name, path = named[0]
    return {"car": path, "control_type": name if name in CONTROL_TYPES else args.control_type}


def _add_branch(models: dict[str, Model], name: str | None, path: Path, model: Model) -> str:
    """Add a branch under its name, or its control type. Raises ConfigError for none, or one that is there already."""
    name = name or control_type_of(model)
    if not name:
        raise ConfigError(f"{path} has no control branch; give a checkpoint that was trained with a control")
    if name in models:
        raise ConfigError(f"two branches are called {name!r}; name one, e.g. {name}-2={path}")
    models[name] = model
    return name


def control_type_of(model: Model) -> str:
    """What names a model's branch; empty without one."""
    return model.config.car.control_type if model.config.car is not None else ""


def _named(given_path: Path) -> tuple[str | None, Path]:
    """NAME=CHECKPOINT; a path that exists is taken as it is."""
    name, equals, path = str(given_path).partition("=")
    return (name, Path(path)) if equals and not given_path.exists() else (None, given_path)


def verify_again(models: dict[str, Model], plan: Path, log: Log) -> Path:
    """Compare an existing plan with its model. Raises VerificationError."""
    manifest = schema.read_manifest(plan)
    schema.verify_files(plan, manifest)
    stored = (manifest.precision.compute, manifest.precision.weights)
    references = {name: reference_model(one, *stored) for name, one in models.items()}
    base = next(iter(references.values()))
    if manifest.format == 1 and len(references) == 1:
        verify_plan(plan, base, log)
        return plan
    references.pop("", None)
    branches = list(manifest.model.branches) or [kind for kind in (manifest.model.control_type,) if kind]
    if set(references) != set(branches):
        raise ConfigError(
            f"{plan} has the branches {', '.join(branches) or 'none'}, and the checkpoints "
            f"{', '.join(references) or 'none'}; give the ones that it was made from"
        )
    verify_plan_of_2(plan, base, references, log)
    return plan


def export_int8(models: dict[str, Model], options: ExportOptions, controls: tuple[Path, ...], log: Log) -> Path:
    """Export a float32 plan aside, verified, and make the int8 one of it."""
    output = options.output
    with scratch(output) as aside:
        exact = build_plan_of_2(models, dataclasses.replace(options, output=aside / "fp32.plan"), log)
        return to_int8(Int8Options(source=exact, output=output, controls=controls), log)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 0: done; 1: the plan disagrees with its model; 2: arguments that can't be used."""
    args = parse_args(argv)

    def command(log: Log) -> int:
        print(run(args, log))
        return 0

    return run_command("build_engines", command)
