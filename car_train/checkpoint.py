"""Our checkpoints: a directory of safetensors and `config.json`; nothing in it can run code.

    step-0003500/  config.json  vqvae.safetensors  var.safetensors  car.safetensors  trainer.pt

`trainer.pt` (optimizer and random state; only to resume) is read with `weights_only=True`. A checkpoint is written
aside and renamed, so it is whole or not there, and it holds finite numbers alone. A run's own checkpoints are named
`step-` and digits; what else lies in its folder, such as `step-best`, is somebody's and left alone.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from car_train.config import ConfigError, ModelConfig
from car_train.errors import UserError
from car_train.files import check_archive, folder_aside, sha256
from car_train.model import Model

CONFIG_BYTES = 4 * 1024 * 1024
HEADER_BYTES = 16 * 1024 * 1024
"""Of a safetensors file; d36's has 0.2 MB."""
METADATA = "__metadata__"
FLOATS = ("F64", "F32", "F16", "BF16")
STEP = re.compile(r"step-([0-9]+)")


class CheckpointError(UserError, ValueError):
    """A checkpoint that can't be read or written; the message ends with the remedy."""


def modules(model: Model) -> dict[str, nn.Module]:
    """The modules of a model by file name: vqvae, var, car (the branch alone)."""
    found: dict[str, nn.Module] = {"vqvae": model.vqvae}
    if model.car is not None:
        found["var"] = model.car.base
        if model.car.branch is not None:
            found["car"] = model.car.branch
    return found


def save(model: Model, directory: str | Path, trainer: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint directory atomically.

    An existing one of this name is replaced only when the new one is whole. Raises CheckpointError: weights or
    optimizer state that are not finite, a folder that is something else, a full disk.
    """
    directory = Path(directory)
    broken = not_finite(tensors_of(model.state_dict())) or not_finite(tensors_of(trainer))
    if broken:
        raise CheckpointError(
            f"{directory}: not written, {broken} is not finite; use the last checkpoint that was written"
        )
    if directory.exists() and not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} exists and is not a checkpoint; choose another folder")
    try:
        with folder_aside(directory) as aside:
            (aside / "config.json").write_text(model.config.to_json(), encoding="utf-8")
            for name, module in modules(model).items():
                # Contiguous copies: training may keep weights channels-last.
                save_file(
                    {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()},
                    aside / f"{name}.safetensors",
                )
            if trainer is not None:
                torch.save(trainer, aside / "trainer.pt")
    except (OSError, SafetensorError, RuntimeError) as error:  # a full disk is any of these, by who meets it
        raise CheckpointError(
            f"{directory}: could not be written ({error}); free some space or choose another folder"
        ) from error
    return directory


def of_run(folder: str | Path) -> list[Path]:
    """The checkpoints that a run wrote into its folder, by number, the newest last: `step-` and digits, whole."""
    found = [(STEP.fullmatch(p.name), p) for p in Path(folder).glob("step-*")]
    numbered = [(int(match[1]), p) for match, p in found if match and (p / "config.json").is_file()]
    return [p for _, p in sorted(numbered)]


def tensors_of(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors within dicts, lists and tuples, with the keys that lead to them."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from tensors_of(value, f"{name}.{key}".strip("."))


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with NaN or infinity in it; None where all numbers are finite."""
    return next((name for name, x in tensors if x.is_floating_point() and not bool(x.isfinite().all())), None)


def locate(path: str | Path) -> Path:
    """The checkpoint at `path`: itself, or the newest of a run's folder (`of_run`)."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    steps = of_run(path)
    if not steps:
        raise CheckpointError(
            f"{path}: no checkpoint there (no config.json, no step-… folder); give the folder that training wrote"
        )
    return steps[-1]


def load(path: str | Path) -> Model:
    """The model of a checkpoint, frozen and in eval mode.

    CheckpointError names what is missing, doesn't fit or isn't finite.
    """
    path = locate(path)
    try:
        config = ModelConfig.from_json(_regular(path / "config.json", CONFIG_BYTES).read_text(encoding="utf-8"))
    except (ConfigError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        model = Model(config)
    for name, module in modules(model).items():
        file = path / f"{name}.safetensors"
        if not file.is_file():
            raise CheckpointError(
                f"{file}: missing, though config.json names this part; copy the whole checkpoint folder"
            )
        _check_header(file, module)
        try:
            # Other floats than float32 are taken for what they say: a layer can't multiply two types.
            values = {key: x.float() if x.is_floating_point() else x for key, x in load_file(file).items()}
            module.load_state_dict(values, assign=True)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{file}: doesn't fit its config.json or is damaged ({str(error).splitlines()[0]}); copy it again"
            ) from error
        broken = not_finite(module.named_parameters())
        if broken is not None:
            raise CheckpointError(f"{file}: {broken} is not finite, the model is broken; give an earlier checkpoint")
    model.vqvae.quantizer.reset_buffers()
    return model.requires_grad_(False).eval()


def _regular(file: Path, most: int | None = None) -> Path:
    """The path of a file; CheckpointError where it is none, as a FIFO would be waited for, or over `most` bytes."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{file}: not a file; copy the whole checkpoint folder")
    if most is not None and found.st_size > most:
        raise CheckpointError(f"{file}: {found.st_size} bytes, over {most}; use one that car_train wrote")
    return file


def _check_header(file: Path, module: nn.Module) -> None:
    """Compare a safetensors header with the module before anything is allocated: names, types, shapes, bytes."""
    size = _regular(file).stat().st_size
    damaged = f"{file}: doesn't fit its config.json or is damaged"
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(size - 8, HEADER_BYTES):
            raise CheckpointError(f"{damaged} (a header of {length} bytes in {size}); copy it again")
        try:
            header = json.loads(opened.read(length))
            found = {name: (one["dtype"], tuple(one["shape"])) for name, one in header.items() if name != METADATA}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{damaged} ({repr(error)[:80]}); copy it again") from error
    wanted = module.state_dict()
    odd = sorted(wanted.keys() ^ found.keys())
    if odd:
        kind = "is missing" if odd[0] in wanted else "is not of this model"
        raise CheckpointError(f"{damaged} ({odd[0][:80]!r} {kind}); copy it again")
    for name, (dtype, shape) in found.items():
        if shape != tuple(wanted[name].shape):
            raise CheckpointError(
                f"{damaged} ({name}: {repr(shape)[:60]}, not {tuple(wanted[name].shape)}); copy it again"
            )
        if wanted[name].is_floating_point() and dtype not in FLOATS:
            raise CheckpointError(f"{damaged} ({name}: {dtype!r:.20}, not a float); copy it again")


def load_trainer(path: str | Path) -> dict[str, Any]:
    """Optimizer and random state of a checkpoint."""
    file = locate(path) / "trainer.pt"
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; a run can be resumed only from a checkpoint that training wrote")
    try:
        check_archive(file)
        state = torch.load(file, weights_only=True, map_location="cpu")
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        return state
    except Exception as error:  # unpickling fails in many ways
        reason = str(error).splitlines()[0][:160]
        raise CheckpointError(f"{file}: can't be read ({reason}); resume from an older step-… folder") from error


def fingerprint(path: str | Path) -> dict[str, str]:
    """sha256 of every file of a checkpoint that defines the model. CheckpointError for what is no file."""
    return {
        p.name: sha256(_regular(p)) for p in sorted(locate(path).iterdir()) if p.suffix in (".json", ".safetensors")
    }
