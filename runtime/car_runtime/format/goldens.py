"""`goldens.npz`: what the float32 PyTorch model computes for one control image, stored in a plan by its export.

Shapes: L tokens per image; G logits kept per token, the largest.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.errors import PlanError, error_line, printable
from car_runtime.format.folder import PlanFolder
from car_runtime.format.manifest import Manifest, open_plan_folder

GOLDENS = "goldens.npz"
"""What the model of a plan computes; of a plan of format 2, what its base computes without control."""
GOLDENS_BYTES = 256 * 1024 * 1024
"""A larger file isn't read; a d16's has 0.4 MB."""


_HEADER = re.compile(
    rb"\{'descr': '(?P<descr>[|<>][biuf][1248])', 'fortran_order': (?P<fortran>False|True), "
    rb"'shape': \((?P<shape>|\d{1,9},|\d{1,9}(, \d{1,9}){1,7})\), \} *\n"
)
_HEADER_BYTES = 10_000


@dataclass(frozen=True, kw_only=True)
class Goldens:
    """The arrays of `goldens.npz`; docs/reference/plan-format.md lists them."""

    control: NDArray[np.uint8] | None
    label: int
    cfg: float
    tokens: NDArray[np.int64]
    """[L], greedy."""
    logit_index: NDArray[np.int64]
    """[L, G]."""
    logit_value: NDArray[np.float32]
    """[L, G], largest first."""
    logit_range: float
    image: NDArray[np.uint8]
    """[H, W, 3], the greedy image."""
    sampled_tokens: NDArray[np.int64]
    """[L]."""
    seed: int
    top_k: int
    top_p: float
    branch: str = ""
    """Which the control is for; empty in format 1, and without control."""

    @property
    def source(self) -> NDArray[np.uint8] | dict[str, NDArray[np.uint8]] | None:
        """What a request takes as its control."""
        return {self.branch: self.control} if self.branch and self.control is not None else self.control


def golden_file(branch: str = "") -> str:
    """The file of a plan of format 2 with what it computes with a branch, or with none."""
    return f"goldens.{branch}.npz" if branch else GOLDENS


def read_goldens(root: Path, manifest: Manifest, branch: str = "") -> Goldens:
    """`goldens_in` a plan's directory. Raises PlanError."""
    with open_plan_folder(root) as folder:
        return goldens_in(folder, manifest, branch)


def read_all_goldens(root: Path, manifest: Manifest) -> list[Goldens]:
    """`all_goldens_in` a plan's directory. Raises PlanError."""
    with open_plan_folder(root) as folder:
        return all_goldens_in(folder, manifest)


def all_goldens_in(folder: PlanFolder, manifest: Manifest) -> list[Goldens]:
    """Those of the default branch first, then of the others, then those without control. Raises PlanError."""
    default = manifest.model.default_branch
    branches = sorted(manifest.model.branches, key=lambda name: name != default)
    return [goldens_in(folder, manifest, branch) for branch in (*branches, "")]


def goldens_in(folder: PlanFolder, manifest: Manifest, branch: str = "") -> Goldens:
    """The goldens of a plan; of one of format 2, those of a branch, or without control.

    Raises PlanError: an older export has none, or they do not fit the plan.
    """
    file = golden_file(branch)
    outputs = {port.name for port in manifest.graphs["step"].outputs}
    if file not in manifest.files or "logits" not in outputs:
        lacks = file if file not in manifest.files else "the step's output 'logits'"
        raise PlanError(
            f"the plan {manifest.name!r} lacks {lacks}, which verifying needs; export it again with this version"
        )
    vocab = manifest.model.vocab
    try:
        steered = bool(branch) if manifest.format > 1 else manifest.model.control_type is not None
        arrays = _read_arrays(file, folder.read(file, GOLDENS_BYTES), _expected(manifest, steered), vocab)
    except (
        OSError,
        ValueError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise PlanError(f"cannot read {file} ({error_line(error)}); export the plan again") from error
    for name in ("tokens", "logit_index", "sampled_tokens"):
        if arrays[name].size and not 0 <= arrays[name].min() <= arrays[name].max() < vocab:
            raise PlanError(f"{file}: {name} leaves 0…{vocab - 1}; export the plan again")
    values: dict[str, Any] = {name: array if array.shape else array.item() for name, array in arrays.items()}
    return Goldens(**{"control": None, "branch": branch, **values})


def _read_arrays(
    file: str, data: bytes, expected: Mapping[str, tuple[str, tuple[int | None, ...]]], vocab: int
) -> dict[str, NDArray[Any]]:
    """The arrays that a file of goldens holds. Each one's header is looked at before memory is taken for it.

    Raises PlanError where one is missing or of another kind.
    """
    arrays: dict[str, NDArray[Any]] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {one.filename for one in archive.infolist()}
        unknown = members - {f"{name}.npy" for name in expected}
        if unknown:
            raise PlanError(f"{file} also has {printable(min(unknown)):.40}; export the plan again")
        kept = 1
        for name, (dtype, shape) in expected.items():
            if f"{name}.npy" not in members:
                raise PlanError(f"{file}: {name} is missing, not {dtype} {list(shape)}; export the plan again")
            with archive.open(f"{name}.npy") as member:
                have_dtype, have_shape = _read_header(member)
                if name == "logit_index" and len(have_shape) == 2:
                    kept = min(have_shape[1], vocab)
                wanted = tuple(kept if size is None else size for size in shape)
                if (have_dtype.name, have_shape) != (dtype, wanted):
                    have = f"{printable(have_dtype.name)} {list(have_shape)}"
                    raise PlanError(f"{file}: {name} is {have}, not {dtype} {list(wanted)}; export the plan again")
                content = member.read(math.prod(wanted) * have_dtype.itemsize)
            arrays[name] = np.frombuffer(content, have_dtype).reshape(wanted).copy()
    return arrays


def _read_header(member: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """dtype and shape of a .npy file, in C order, in the very words that numpy writes. ValueError for another kind.

    numpy's own reader evaluates the header as Python and mends it with Python's tokenizer, for files of Python 2.
    """
    start = member.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\1\0", b"\2\0"):
        raise ValueError("an array that is not stored as .npy of version 1 or 2")
    length = int.from_bytes(member.read(2 if start[6] == 1 else 4), "little")
    found = _HEADER.fullmatch(member.read(length)) if length <= _HEADER_BYTES else None
    if found is None:
        raise ValueError("an array whose header is not as numpy writes it, or one of objects, which are pickled")
    shape = tuple(int(size) for size in found["shape"].split(b",") if size.strip())
    if found["fortran"] == b"True" and len(shape) > 1:
        raise ValueError("an array in Fortran's order")
    return np.dtype(found["descr"].decode()), shape


def _expected(manifest: Manifest, steered: bool) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Name → dtype and shape of what goldens hold; `logit_index` itself decides on G, None here."""
    L, size = manifest.tokens, manifest.model.image_size
    control: dict[str, tuple[str, tuple[int | None, ...]]] = {"control": ("uint8", (size, size, 3))}
    return {
        **(control if steered else {}),
        "label": ("int64", ()),
        "cfg": ("float32", ()),
        "tokens": ("int64", (L,)),
        "logit_index": ("int64", (L, None)),
        "logit_value": ("float32", (L, None)),
        "logit_range": ("float32", ()),
        "image": ("uint8", (size, size, 3)),
        "sampled_tokens": ("int64", (L,)),
        "seed": ("int64", ()),
        "top_k": ("int64", ()),
        "top_p": ("float32", ()),
    }
