"""What half precision is measured on: one image's inputs, the float32 model's run, and the comparison with it.

Shapes: S side of a scale; N tokens of a scale; L tokens of an image; V vocabulary; s pixels per edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from car_export.verify import scene
from car_runtime.controls import derive
from car_train.model import Model
from car_train.model.sample import TOP_P_OFF, Recording, control_pyramid, draw, sample


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image's inputs, and what the float32 model makes of them."""

    cfg: float
    top_k: int
    top_p: float
    label: int
    image: np.ndarray
    """uint8 [s, s, 3]."""
    control: np.ndarray | None
    """uint8 [s, s, 3]; None without a control branch."""
    pyramid: list[Tensor] | None
    """The control at every scale's size, as the PyTorch model takes it."""
    uniforms: Tensor
    """f32 [L]."""
    tokens: Tensor
    """int64 [L], greedy."""
    logits: Tensor
    """f32 [L, V], guided."""


@torch.no_grad()
def make_case(reference: Model, cfg: float, top_k: int, top_p: float) -> Case:
    """Canny edges of a synthetic image, the middle class, and a greedy run of the float32 model."""
    car, config = reference.car, reference.config.vqvae
    assert car is not None
    image = scene(config.image_size, np.random.default_rng(0))
    control = pyramid = None
    if car.branch is not None:
        control = derive(Image.fromarray(image), "canny-grey", config.image_size)
        pyramid = control_pyramid(Image.fromarray(control), [side * config.patch for side in config.sides])
    uniforms = torch.from_numpy(np.random.default_rng(0).random((1, config.tokens), dtype=np.float32))
    label, record = car.base.config.classes // 2, Recording()
    given = (reference.vqvae, car, torch.tensor([label]), uniforms, pyramid, cfg)
    tokens, _ = sample(*given, top_k=1, record=record, decoded=False)
    return Case(
        cfg=cfg,
        top_k=min(top_k, config.vocab) or config.vocab,
        top_p=top_p if 0 < top_p < 1 else TOP_P_OFF,
        label=label,
        image=image,
        control=control,
        pyramid=pyramid,
        uniforms=uniforms[0],
        tokens=tokens[0],
        logits=torch.cat([scale["logits"] for scale in record.scales], 1)[0],
    )


def compare(case: Case, logits_LV: Tensor, sides: tuple[int, ...]) -> dict[str, Any]:
    """Logits and what is drawn from them, per scale and over all: the keys are explained in `numerics.measure`."""
    scales, start = [], 0
    for side in sides:
        stop = start + side * side
        scales.append({"side": side, **_compared(case, logits_LV, slice(start, stop))})
        start = stop
    return {"scales": scales, "all": _compared(case, logits_LV, slice(0, start))}


def _compared(case: Case, logits_LV: Tensor, part: slice) -> dict[str, Any]:
    want, got = case.logits[part], logits_LV[part]
    span = float(case.logits.abs().max())
    error = (got - want).abs()
    keep = torch.tensor([case.top_k]), torch.tensor([case.top_p])
    drawn = [draw(logits, case.uniforms[part], *keep) for logits in (want, got)]
    flipped = want.argmax(-1) != got.argmax(-1)
    gaps = want.amax(-1) - want.gather(-1, got.argmax(-1, keepdim=True))[:, 0]
    finite = bool(torch.isfinite(got).all())
    return {
        "finite": finite,
        "max": float(error.max()) if finite else None,
        "rms": float(error.square().mean().sqrt()) if finite else None,
        "relative_max": float(error.max()) / span if finite else None,
        "top1": float((~flipped).float().mean()),
        "largest_flipped_gap": float(gaps[flipped].max()) / span if bool(flipped.any()) else 0.0,
        "sampled": float((drawn[0] == drawn[1]).float().mean()),
    }
