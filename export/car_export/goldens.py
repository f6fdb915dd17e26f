"""Goldens: what the float32 PyTorch model computes on one control image, stored in the plan.

`goldens.npz`; in a plan of format 2 it is what the base computes without control, and `goldens.NAME.npz` what it
computes with a branch. `car-run verify` holds any machine and engine to them, without PyTorch and without the
checkpoint. The files are the same to the byte at every export of the same model on the same machine.

Shapes: L tokens of an image, V vocabulary, s pixels per edge.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from car_export.verify import Greedy, scene
from car_runtime.controls import derive
from car_runtime.format.goldens import GOLDENS
from car_train.model import Model
from car_train.model.car import CAR
from car_train.model.sample import Recording, control_pyramid, sample
from car_train.model.vqvae import VQVAE

KEPT = 16
"""Logits kept per token: the largest. At d16 that is 65 kB of 11 MB, and holds what sampling looks at first."""
SEED = 0
_DATE = (1980, 1, 1, 0, 0, 0)
"""The earliest that a zip file can hold."""


def write_goldens(
    directory: Path,
    reference: Model,
    *,
    cfg: float,
    top_k: int,
    top_p: float,
    file: str = GOLDENS,
    steered: bool = True,
) -> Greedy:
    """Write `directory/goldens.npz` from a float32 model in eval mode; cfg, top_k, top_p are the plan's defaults.

    Guidance is at least 1, so that both rows count. steered: with control, if the model has a branch.
    docs/reference/plan-format.md lists the arrays. Returns the greedy run.
    """
    greedy = greedy_run(reference, max(cfg, 1.0), steered)
    (directory / file).write_bytes(npz_bytes(goldens(reference, greedy, top_k=top_k, top_p=top_p)))
    return greedy


def greedy_run(reference: Model, cfg: float, steered: bool = True) -> Greedy:
    """The most probable tokens of the class in the middle, and the control image of the goldens if steered."""
    car, config = reference.car, reference.config.vqvae
    assert car is not None
    control = None
    if car.branch is not None and steered:
        image = Image.fromarray(scene(config.image_size, np.random.default_rng(0)))
        control = derive(image, "canny-grey", config.image_size)
    label, record = car.base.config.classes // 2, Recording()
    tokens, pixels = sample(*_given(reference, label, control, cfg), top_k=1, record=record)
    return Greedy(control, label, cfg, tokens, pixels, record)


def _given(
    reference: Model, label: int, control: np.ndarray | None, cfg: float
) -> tuple[VQVAE, CAR, Tensor, Tensor, list[Tensor] | None, float]:
    """What `sample` is given."""
    assert reference.car is not None
    config = reference.config.vqvae
    pyramid = None
    if control is not None:
        pyramid = control_pyramid(Image.fromarray(control), [side * config.patch for side in config.sides])
    noise = np.random.default_rng(SEED).random((1, config.tokens), dtype=np.float32)
    return reference.vqvae, reference.car, torch.tensor([label]), torch.from_numpy(noise), pyramid, cfg


def goldens(reference: Model, greedy: Greedy, *, top_k: int, top_p: float) -> dict[str, np.ndarray]:
    """The arrays by name: a greedy run with its logits, which are those of teacher forcing too, and a sampled run."""
    label, cfg, tokens, pixels, record = greedy[1:]
    control, vocab = greedy.control, reference.config.vqvae.vocab
    assert not isinstance(control, dict)
    top_k = min(top_k, vocab)
    sampled, _ = sample(*_given(reference, label, control, cfg), top_k=top_k, top_p=top_p, decoded=False)
    logits_LV = torch.cat([scale["logits"] for scale in record.scales], 1)[0]
    value, index = logits_LV.topk(min(KEPT, vocab), dim=-1)
    arrays = {
        "label": np.int64(label),
        "cfg": np.float32(cfg),
        "tokens": tokens[0].numpy(),
        "logit_index": index.numpy(),
        "logit_value": value.numpy(),
        "logit_range": np.float32(logits_LV.abs().max().item()),
        "image": ((pixels[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy(),
        "sampled_tokens": sampled[0].numpy(),
        "seed": np.int64(SEED),
        "top_k": np.int64(top_k),
        "top_p": np.float32(top_p),
    }
    if control is not None:
        arrays["control"] = control
    return {name: np.asarray(array) for name, array in arrays.items()}


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays as a compressed npz whose bytes depend on them alone: `np.savez` puts the time of day into it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in sorted(arrays):
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape))
            entry = zipfile.ZipInfo(f"{name}.npy", _DATE)
            entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
            archive.writestr(entry, content.getvalue(), compresslevel=9)
    return stream.getvalue()
