"""What an image has that its model did not expect of it: where a watermark is looked for.

What an image shows hides a watermark. So it is encoded, and the model says, scale by scale, which codes it expects
after the coarser ones, with the image's own control and without a class: what is taken off is their mean. Encoding
rounds to codes, too, which swallows much of a watermark; the mean over encodings with some noise keeps more of it.
None of this knows a key, so a test of what is left is as exact as one of the image.

Shapes: n encodings; L tokens of an image; Z latent channels; V vocabulary; N pixels of the model's side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from car_runtime.config import GenerationConfig
from car_runtime.controls import derive
from car_runtime.errors import ImageError
from car_runtime.format.manifest import Manifest
from car_runtime.images import WHITE, Source, fitted, load_image
from car_runtime.request import check_fit
from car_runtime.watermark import Floats

ENCODINGS = 4
"""More of them find hardly more."""
NOISE = 12.0
"""Standard deviation in grey levels: found 0.95 of 20 images of the 64×64 plan, 20 levels 0.85, none 0.70."""


class Model(Protocol):
    """What of an opened plan is used here: `car_runtime.plan.Plan`."""

    manifest: Manifest

    def encode(self, images: Any) -> NDArray[np.int64]: ...

    def stream(self, config: GenerationConfig, *, logits: bool) -> Iterator[Any]: ...


def unexpected_codes(plan: Model, image: Source, codes_VZ: Floats, fit: str) -> Floats:
    """The codes of an image without those that the model expects, f64 [L, Z].

    Raises RequestError: a plan without encoder, `fit`. ImageError.
    """
    check_fit(fit)
    size = plan.manifest.model.image_size
    pixels_NN3 = np.array(fitted(load_image(image, background=WHITE), size, fit, WHITE), np.uint8)
    noise_nNN3 = np.random.default_rng(0).normal(0, NOISE, (ENCODINGS, *pixels_NN3.shape))
    noisy_nNN3 = np.rint(np.clip(pixels_NN3 + noise_nNN3, 0, 255)).astype(np.uint8)
    found_nLZ = codes_VZ[plan.encode(noisy_nNN3)]
    logits_LV = _logits(plan, pixels_NN3).astype(np.float64)
    likelihood_LV = np.exp(logits_LV - logits_LV.max(-1, keepdims=True))
    expected_LZ = likelihood_LV / likelihood_LV.sum(-1, keepdims=True) @ codes_VZ
    return np.asarray(found_nLZ.mean(0) - expected_LZ)


def _logits(plan: Model, pixels_NN3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Teacher forcing on an image's tokens, f32 [L, V]."""
    model, tokens_L = plan.manifest.model, plan.encode(pixels_NN3)[0]
    control = None
    name, convention = model.default_branch, model.conventions.get(model.default_branch or "")
    if name is not None and convention is not None:
        with suppress(ImageError):  # of a type that needs more than pixels, such as depth
            control = {name: derive(pixels_NN3, convention, model.image_size)}
    mask_L = np.ones(tokens_L.shape, np.bool_)
    config = GenerationConfig(control=control, cfg=0, known_tokens=tokens_L, known_mask=mask_L)
    scales = plan.stream(config, logits=True)
    return np.concatenate([np.asarray(scale.logits).reshape(-1, model.vocab) for scale in scales])
