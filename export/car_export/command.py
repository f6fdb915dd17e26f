"""What the exporter's commands share: the arguments that name a model, progress on stderr, errors as one line."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from car_export.errors import ExportError, VerificationError
from car_runtime.errors import CarError, printable_lines
from car_train import checkpoint
from car_train.config import ConfigError
from car_train.errors import UserError, error_lines
from car_train.files import sha256
from car_train.interop.command import add_official_arguments, load_official
from car_train.model import Model
from car_train.streams import Terminated, after_broken_pipe, open_closed_streams, terminated_politely

Log = Callable[[str], None]


def add_model_arguments(parser: argparse.ArgumentParser, help: str, several: bool = False) -> None:
    """The positional checkpoint, and the options for the published files. several: `--car` makes a list."""
    parser.add_argument("checkpoint", type=Path, nargs="?", help=help)
    add_official_arguments(parser, several)


def load_model(args: argparse.Namespace) -> tuple[Model, dict[str, str]]:
    """The model, and where it came from as facts for the manifest. Raises ConfigError, or what loading raises."""
    if (args.checkpoint is None) == (args.vae is None):
        raise ConfigError(
            "give either a checkpoint of car_train, or --vae and --var (and --car) with the published files"
        )
    if args.checkpoint is not None:
        if needless := [name for name in _official_arguments() if getattr(args, name) is not None]:
            raise ConfigError(
                f"{args.checkpoint} is asked for, which is a whole model; leave out {flags_of(needless)}"
            )
        hashes = checkpoint.fingerprint(args.checkpoint)
        return checkpoint.load(args.checkpoint), {f"sha256 {name}": digest for name, digest in hashes.items()}
    if args.var is None and args.car is None:
        raise ConfigError("--var is missing; give the published transformer, e.g. --var var_d16.pth")
    files = {name: path for name in ("vae", "var", "car") if (path := getattr(args, name)) is not None}
    model = load_official(args)
    return model, {f"sha256 {name} {path.name}": sha256(path) for name, path in files.items()}


def flags_of(names: Iterable[str]) -> str:
    """The flags that set these arguments, for a message."""
    return ", ".join("--patch-nums" if name == "sides" else f"--{name.replace('_', '-')}" for name in names)


def _official_arguments() -> list[str]:
    """The names, among the parsed arguments, of what describes the published files."""
    parser = argparse.ArgumentParser(add_help=False)
    add_official_arguments(parser)
    return list(vars(parser.parse_args([])))


def run_command(name: str, command: Callable[[Log], int], stopped: str = "nothing half-made was left") -> int:
    """Run a command with a log on stderr and return its exit code.

    2: something that the user can put right, 1: a plan that disagrees with its model, or output that nobody reads,
    130: interrupted; 143: by SIGTERM.
    stopped: what an interruption leaves.
    """
    open_closed_streams()
    began = time.monotonic()

    def log(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {printable_lines(text)}", file=sys.stderr, flush=True)

    try:
        with terminated_politely():
            code = command(log)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return after_broken_pipe()
    except VerificationError as error:
        print(f"{name}: {error_lines(error)}", file=sys.stderr)
        return 1
    except (UserError, ExportError, CarError, OSError) as error:
        print(f"{name}: error: {error_lines(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{name}: interrupted; {stopped}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
