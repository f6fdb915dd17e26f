"""`build_engines.py --from-published DIR`: which files of a folder are tokenizer, transformer and branches.

What a file is shows in its tensors, and which files belong together in their widths. Only the type of a control isn't
in the tensors: it is in the file's name, `car_depth_d16.pth`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from car_train.config import CONTROL_TYPES, ConfigError
from car_train.interop.official import OfficialCheckpointError, load_pth

SUFFIXES = {".pth", ".pt", ".ckpt"}
MOST_FILES = 64
"""Files that are looked into; the published ones are a dozen."""
SYNONYMS = {"normals": "normal", "softedge": "hed", "scribble": "sketch"}
"""What the names of files say for a control type besides its own name."""

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file and what its tensors make it."""

    path: Path
    kind: str
    """"vae", "var" or "car"."""
    width: int | None = None
    """Of the transformer, or of the one that a branch is for."""
    depth: int | None = None
    """Blocks, of a branch its own."""
    has_base: bool = False
    """Whether a branch's file has its base in it too."""

    @property
    def control_type(self) -> str | None:
        """What the name says that a branch follows."""
        words = re.split(r"[^a-z]+", self.path.stem.lower())
        named = {SYNONYMS.get(word, word) for word in words} & set(CONTROL_TYPES)
        return named.pop() if len(named) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Published:
    """The files of one plan, as the options --vae, --var and --car name them."""

    vae: Path
    var: Path | None
    """None where the only branch's file has its base in it."""
    cars: dict[str, Path]
    """Control type → file, in the order of `CONTROL_TYPES`; empty for plain VAR."""


def find_published(folder: Path, log: Log, var: Path | None = None) -> Published:
    """The files of a folder, or of one below it. Reads names and shapes alone, without running anything.

    var: the transformer that is meant, where there are several.

    Raises ConfigError: a part is missing, or there are several of it and nothing decides; OfficialCheckpointError for
    a file that can't be read.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give the one that holds the published .pth files")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ConfigError(f"{folder} has no .pth file; give the folder that holds the published files")
    if len(paths) > MOST_FILES:
        raise ConfigError(
            f"{folder} has {len(paths)} files like {paths[0].name}; give a folder with one model's files"
        )
    found = [one for path in paths if (one := _look(path, log)) is not None]
    vae = _only(folder, [one for one in found if one.kind == "vae"], "tokenizer", "vae_ch160v4096z32.pth", "--vae")
    cars = [one for one in found if one.kind == "car"]
    bases = [one for one in found if one.kind == "var"]
    if var is not None:
        bases = [one for one in [_look(var, log)] if one is not None and one.kind == "var"]
        if not bases:
            raise ConfigError(f"{var} is no transformer; give one such as var_d16.pth with --var")
    if len(cars) == 1 and cars[0].has_base:
        return _chosen(vae, None, cars, log)
    base = bases[0] if var is not None else _base(folder, bases, cars)
    others = [one for one in cars if one.width != base.width]
    for one in others:
        log(f"left out: {one.path.name}, a branch for width {one.width}, the transformer has {base.width}")
    return _chosen(vae, base, [one for one in cars if one.width == base.width], log)


def _look(path: Path, log: Log) -> Found | None:
    """What a file is; None for one of nothing that is known here, which is said."""
    tensors = load_pth(path)
    if "quantize.embedding.weight" in tensors and "encoder.conv_in.weight" in tensors:
        return Found(path=path, kind="vae")
    if any(name.startswith("car_control_convs.") for name in tensors):
        depth = _blocks(tensors, "car_blocks")
        width = _width(path, tensors, "car_var_conv.weight")
        return Found(path=path, kind="car", width=width, depth=depth, has_base="pos_1LC" in tensors)
    if "pos_1LC" in tensors and "word_embed.weight" in tensors:
        width = _width(path, tensors, "word_embed.weight")
        return Found(path=path, kind="var", width=width, depth=_blocks(tensors, "blocks"))
    log(f"left out: {path.name}, whose tensors are neither a tokenizer's, a transformer's nor a control branch's")
    return None


def _blocks(tensors: Mapping[str, Tensor], name: str) -> int:
    found = [int(match[1]) for key in tensors if (match := re.match(rf"{name}\.(\d{{1,4}})\.", key))]
    return 1 + max(found, default=-1)


def _width(path: Path, tensors: Mapping[str, Tensor], name: str) -> int:
    if name not in tensors or tensors[name].ndim < 2:
        raise OfficialCheckpointError(f"{path}: there is no matrix {name!r}; is it an official file, and whole?")
    return int(tensors[name].shape[0])


def _only(folder: Path, found: list[Found], what: str, example: str, flag: str) -> Found:
    if not found:
        raise ConfigError(f"{folder} has no {what} (such as {example}); put it there")
    if len(found) > 1:
        names = ", ".join(one.path.name for one in found)
        raise ConfigError(f"{folder} has several files of a {what}: {names}; name them by {flag}, --var and --car")
    return found[0]


def _base(folder: Path, bases: list[Found], cars: list[Found]) -> Found:
    """The transformer: the only one, or the only one that there are branches for."""
    if not bases:
        raise ConfigError(f"{folder} has no transformer (such as var_d16.pth); put it there, or name it with --var")
    fitting = [one for one in bases if one.width in {car.width for car in cars}] if cars else bases
    if not fitting:
        widths = ", ".join(f"{one.path.name} {one.width}" for one in (*bases, *cars))
        raise ConfigError(f"no transformer fits a branch, by their widths: {widths}; put the matching one there")
    if len(fitting) > 1:
        names = ", ".join(one.path.name for one in fitting)
        raise ConfigError(f"{folder} has several transformers that would do: {names}; name one with --var")
    return fitting[0]


def _chosen(vae: Found, base: Found | None, cars: list[Found], log: Log) -> Published:
    """The files, by control type, with a line about each. Raises ConfigError: a type is unknown, or there twice."""
    by_type: dict[str, Path] = {}
    for one in cars:
        kind = one.control_type
        if kind is None:
            raise ConfigError(
                f"what {one.path.name} follows is not in its name; rename it, car_TYPE_d16.pth with one of "
                f"{', '.join(CONTROL_TYPES)}, or name the files by --vae, --var and --car TYPE={one.path.name}"
            )
        if kind in by_type:
            raise ConfigError(f"{by_type[kind].name} and {one.path.name} both follow {kind}; leave one of them there")
        by_type[kind] = one.path
    log(f"tokenizer: {vae.path.name}")
    if base is not None:
        log(f"transformer: {base.path.name}, depth {base.depth}, width {base.width}")
    ordered = {kind: by_type[kind] for kind in CONTROL_TYPES if kind in by_type}
    for kind, path in ordered.items():
        log(f"control {kind}: {path.name}")
    if not ordered:
        log("no control branch: the plan is plain VAR")
    return Published(vae=vae.path, var=None if base is None else base.path, cars=ordered)
