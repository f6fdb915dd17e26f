"""Reference statistics and sample archives as the evaluation of ADM (Dhariwal and Nichol 2021) has them.

An archive is a .npz of uint8 images [N, H, W, 3] named `arr_0`. A reference may have these and, or instead, mean and
covariance of Inception's features: `mu`, `sigma` of the 2048 of the last pooling (FID), `mu_s`, `sigma_s` of the 7
first channels of mixed_6/conv at their 17×17 places (sFID, Nash et al. 2021).
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_train.evaluation.options import EvaluationError

Pixels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
UNREADABLE = (
    *(OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile),
    *(zlib.error, MemoryError, NotImplementedError, RuntimeError),  # spoiled, absurd sizes, other packing, encrypted
)
NEGATIVE = 1e-3
"""Of the largest eigenvalue of a covariance, what the least may lie below 0: rounding in float32 gives 1e-5."""
LARGEST = 1e12
"""Of a mean and a covariance: products of them stay finite."""
Gaussian = tuple[Floats, Floats]
"""Mean [D] and covariance [D, D]."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a reference file holds; None for what it lacks, but not all of it."""

    images: Pixels | None
    """uint8 [N, H, W, 3]."""
    pool: Gaussian | None
    spatial: Gaussian | None


def physical_memory() -> float:
    """Bytes; infinite where the system doesn't say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def read_reference(file: Path) -> Reference:
    """Read a reference; nothing in it is unpickled. Raises EvaluationError."""
    remedy = "give a .npz with arr_0 (uint8 images), or mu and sigma"
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked, memory = sum(entry.file_size for entry in archive.infolist()), physical_memory()
        if unpacked > memory:
            raise MemoryError(f"it unpacks to {unpacked / 1e9:.1f} GB, and there are {memory / 1e9:.1f} GB of memory")
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("arr_0", "mu", "sigma", "mu_s", "sigma_s") if name in arrays}
    except UNREADABLE as error:
        why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise EvaluationError(f"{file}: can't be read ({why}); {remedy}") from error
    images = found.get("arr_0")
    if images is not None and (
        images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.size == 0
    ):
        raise EvaluationError(f"{file}: arr_0 is {images.dtype} {list(images.shape)}; {remedy}")
    reference = Reference(
        images=images,
        pool=_gaussian(file, found, "mu", "sigma", remedy),
        spatial=_gaussian(file, found, "mu_s", "sigma_s", remedy),
    )
    if images is None and reference.pool is None:
        held = ", ".join(sorted(found)) or "none of them"
        raise EvaluationError(f"{file}: has {held}, and neither arr_0 nor mu and sigma; {remedy}")
    return reference


def _gaussian(file: Path, found: dict[str, Any], mean: str, covariance: str, remedy: str) -> Gaussian | None:
    if mean not in found and covariance not in found:
        return None
    m, c = found.get(mean), found.get(covariance)
    shapes = [None if x is None else list(x.shape) for x in (m, c)]
    if m is None or c is None or m.ndim != 1 or len(m) == 0 or c.shape != (len(m), len(m)):
        raise EvaluationError(f"{file}: {mean} and {covariance} are of shapes {shapes}; {remedy}")
    if m.dtype.kind != "f" or c.dtype.kind != "f":
        raise EvaluationError(f"{file}: {mean} and {covariance} are {m.dtype} and {c.dtype}, not floats; {remedy}")
    m, c = m.astype(np.float64), c.astype(np.float64)
    if not (np.abs(m).max() <= LARGEST and np.abs(c).max() <= LARGEST):
        raise EvaluationError(f"{file}: {mean} or {covariance} has a number over {LARGEST:g} or not finite; {remedy}")
    if not np.allclose(c, c.T, rtol=0, atol=NEGATIVE * np.abs(c).max()):
        raise EvaluationError(f"{file}: {covariance} is no covariance, it is not symmetric; {remedy}")
    values = np.linalg.eigvalsh(c)
    if values[0] < -NEGATIVE * abs(values[-1]):
        raise EvaluationError(
            f"{file}: {covariance} is no covariance, eigenvalues from {values[0]:.3g} to {values[-1]:.3g}; {remedy}"
        )
    return m, c
