"""`goldens.npz`: what the float32 PyTorch model computes for one control image, stored in a plan by its export.

Shapes: L tokens per image; G logits kept per token, the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from car_runtime.errors import PlanError
from car_runtime.format.manifest import Manifest

GOLDENS = "goldens.npz"


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


def read_goldens(root: Path, manifest: Manifest) -> Goldens:
    """The goldens of a plan. Raises PlanError: an older export has none, or they do not fit the plan."""
    outputs = {port.name for port in manifest.graphs["step"].outputs}
    if GOLDENS not in manifest.files or "logits" not in outputs:
        lacks = GOLDENS if GOLDENS not in manifest.files else "the step's output 'logits'"
        raise PlanError(
            f"the plan {manifest.name!r} lacks {lacks}, which verifying needs; export it again with this version"
        )
    try:
        with np.load(root / GOLDENS, allow_pickle=False) as stored:
            arrays: dict[str, Any] = dict(stored)
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read {GOLDENS} ({error}); export the plan again") from error
    expected = _expected(manifest, arrays)
    for name, (dtype, shape) in expected.items():
        found = arrays.get(name)
        if found is None or (found.dtype.name, found.shape) != (dtype, shape):
            have = "missing" if found is None else f"{found.dtype.name} {list(found.shape)}"
            raise PlanError(f"{GOLDENS}: {name} is {have}, not {dtype} {list(shape)}; export the plan again")
    vocab = manifest.model.vocab
    for name in ("tokens", "logit_index", "sampled_tokens"):
        if arrays[name].size and not 0 <= arrays[name].min() <= arrays[name].max() < vocab:
            raise PlanError(f"{GOLDENS}: {name} leaves 0…{vocab - 1}; export the plan again")
    values = {name: arrays[name] if expected[name][1] else arrays[name].item() for name in expected}
    return Goldens(**{"control": None, **values})


def _expected(manifest: Manifest, arrays: Mapping[str, NDArray[Any]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → dtype and shape of what a plan's goldens hold; the arrays themselves decide on G."""
    L, size = manifest.tokens, manifest.model.image_size
    G = arrays["logit_index"].shape[-1] if "logit_index" in arrays and arrays["logit_index"].ndim else 1
    control: dict[str, tuple[str, tuple[int, ...]]] = {"control": ("uint8", (size, size, 3))}
    return {
        **(control if manifest.model.control_type is not None else {}),
        "label": ("int64", ()),
        "cfg": ("float32", ()),
        "tokens": ("int64", (L,)),
        "logit_index": ("int64", (L, G)),
        "logit_value": ("float32", (L, G)),
        "logit_range": ("float32", ()),
        "image": ("uint8", (size, size, 3)),
        "sampled_tokens": ("int64", (L,)),
        "seed": ("int64", ()),
        "top_k": ("int64", ()),
        "top_p": ("float32", ()),
    }
