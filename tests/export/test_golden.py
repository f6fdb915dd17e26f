"""The golden numbers of the published model, through PyTorch and through the exported plan, from one test body."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from car_runtime import GenerationConfig, Plan, open_plan
from car_runtime.cli.main import main as car_run
from car_train.model import Model
from car_train.model.sample import Recording, control_pyramid, sample
from car_train.model.vqvae import join_tokens, split_tokens
from fixtures.golden import Golden

CFG = 4.0
LOGITS = 2e-4
"""Relative to the largest logit: float32 sums in another order."""
PIXELS = 2e-3
"""Tolerance of an image in [0, 1], over the 2^-12 to which the golden images are stored."""
PLAN_PIXELS = PIXELS + 2**-12 + 0.5 / 255
"""For a plan, over half of a level of 255 too."""


class Drawn(NamedTuple):
    """Both rows of the golden batch: tokens [2, L], images [2, 3, H, W] in [0, 1], and how far a pixel may be off."""

    tokens: np.ndarray
    images: np.ndarray
    pixels: float


@pytest.fixture(scope="module")
def reference(models: Callable[..., Model]) -> Callable[[Golden, bool], tuple[Drawn, Recording]]:
    """What the reference loop draws greedily, with control or without, and its logits; made once."""

    @cache
    def draw(name: str, control: bool) -> tuple[Drawn, Recording]:
        golden = Golden(name)
        model = models(golden)
        label = torch.from_numpy(golden["label"])
        sizes = [s * model.config.vqvae.patch for s in golden.sides]
        controls = control_pyramid(Image.fromarray(golden["control_png"]), sizes) if control else None
        uniforms = torch.rand(len(label), model.config.vqvae.tokens, generator=torch.Generator().manual_seed(1))
        record = Recording()
        assert model.car is not None
        tokens, pixels = sample(model.vqvae, model.car, label, uniforms, controls, CFG, top_k=1, record=record)
        return Drawn(tokens.numpy(), (pixels.numpy() + 1) / 2, PIXELS + 2**-12), record

    return lambda golden, control: draw(golden.name, control)


@pytest.fixture(scope="module")
def plan(golden: Golden, plans: Callable[..., Path]) -> Iterator[Plan]:
    with open_plan(plans(golden), "ort-cpu", threads=1) as opened:
        yield opened


def by_plan(plan: Plan, golden: Golden, control: bool) -> Drawn:
    """With control one image after the other, by the graphs of one image; without it both in one batch."""
    image = Image.fromarray(golden["control_png"]) if control else None
    configs = [
        GenerationConfig(control=image, label=int(label), cfg=CFG, top_k=1, seed=5) for label in golden["label"]
    ]
    results = [plan.generate(config) for config in configs] if control else plan.generate_many(configs)
    images = np.concatenate([result.images for result in results]).transpose(0, 3, 1, 2) / 255
    return Drawn(np.concatenate([result.tokens for result in results]), images, PLAN_PIXELS)


def assert_drawn(found: Drawn, golden: Golden, control: bool) -> None:
    prefix = "car" if control else "var"
    np.testing.assert_array_equal(found.tokens, golden[f"{prefix}_greedy_tokens"])
    assert np.abs(found.images - golden[f"{prefix}_greedy_image"].astype(np.float32)).max() <= found.pixels


@pytest.mark.parametrize("control", [False, True], ids=["var", "car"])
@pytest.mark.parametrize("engine", ["torch", "plan"])
def test_greedy_tokens_are_equal_and_the_image_is_close(
    request: pytest.FixtureRequest, golden: Golden, engine: str, control: bool
) -> None:
    """A plan with a branch draws plain VAR where no control is given."""
    if engine == "torch":
        found, _ = request.getfixturevalue("reference")(golden, control)
    else:
        found = by_plan(request.getfixturevalue("plan"), golden, control)
    assert_drawn(found, golden, control)


@pytest.mark.parametrize("control", [False, True], ids=["var", "car"])
def test_the_command_draws_the_golden_tokens(
    tiny: Golden, plans: Callable[..., Path], control: bool, tmp_path: Path
) -> None:
    """One image per label, without torch; plain VAR from a plan without a branch."""
    Image.fromarray(tiny["control_png"]).save(tmp_path / "control.png")
    tokens, images = [], []
    for label in tiny["label"]:
        output, npz = tmp_path / f"{label}.png", tmp_path / f"{label}.npz"
        argv = ["--engine", plans(tiny, car=control), "--class", label, "--cfg", CFG, "--top-k", 1, "--seed", 5]
        argv += ["-o", output, "--tokens", npz, *(["--control", tmp_path / "control.png"] if control else [])]
        assert car_run([str(a) for a in argv]) == 0
        with np.load(npz) as saved:
            np.testing.assert_array_equal(saved["sides"], tiny.sides)
            tokens.append(saved["tokens"])
        images.append(np.asarray(Image.open(output))[None])
    pixels = np.concatenate(images).transpose(0, 3, 1, 2) / 255
    assert_drawn(Drawn(np.concatenate(tokens), pixels, PLAN_PIXELS), tiny, control)


def test_encoded_tokens_are_equal(golden: Golden, models: Callable[..., Model]) -> None:
    # PyTorch only: the golden image is noise in float32, a plan's encoder takes uint8
    # (test_export.py compares the two).
    with torch.no_grad():
        tokens = join_tokens(models(golden).vqvae.encode(torch.from_numpy(golden["image"])))
    np.testing.assert_array_equal(tokens.numpy(), golden["image_tokens"])


@pytest.mark.parametrize("control", [False, True], ids=["var", "car"])
def test_guided_logits_of_a_greedy_run(
    golden: Golden, reference: Callable[[Golden, bool], tuple[Drawn, Recording]], control: bool
) -> None:
    _, record = reference(golden, control)
    logits = torch.cat([s["logits"] for s in record.scales], 1).numpy()
    expected = golden[f"{'car' if control else 'var'}_cfg_logits"]
    stride = logits.shape[-1] // expected.shape[-1]
    assert_close(logits[..., ::stride], expected)


@pytest.mark.parametrize("name", ["tiny", "tiny_saln"])
@pytest.mark.parametrize("control", [False, True], ids=["var", "car"])
def test_teacher_forced_logits(name: str, models: Callable[..., Model], control: bool) -> None:
    tiny = Golden(name)
    model = models(tiny)
    assert model.car is not None
    controls = [
        torch.from_numpy(tiny[f"control_{k}"]).permute(2, 0, 1)[None].float() / 255 * 2 - 1
        for k in range(len(tiny.sides))
    ]
    with torch.no_grad():
        _, inputs = model.vqvae.quantizer.decode(
            split_tokens(torch.from_numpy(tiny["image_tokens"]).long(), tiny.sides)
        )
        logits = model.car(torch.from_numpy(tiny["label"]), inputs, controls if control else None).numpy()
    assert_close(logits, tiny[f"{'car' if control else 'var'}_teacher_logits"])


def test_reconstruction_and_teacher_input(golden: Golden, models: Callable[..., Model]) -> None:
    model = models(golden)
    with torch.no_grad():
        f_hat, inputs = model.vqvae.quantizer.decode(
            split_tokens(torch.from_numpy(golden["image_tokens"]).long(), golden.sides)
        )
        recon = model.vqvae.decode_latent(f_hat).numpy()
    assert_close(inputs.numpy(), golden["teacher_input"])
    assert np.abs(recon - golden["recon"].astype(np.float32)).max() <= 2 * (PIXELS + 2**-12)  # a range of 2, [-1, 1]


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    """Within LOGITS of the largest value, plus what float16 storage of the golden numbers lost."""
    wide = expected.astype(np.float32)
    stored = np.abs(wide) * 2**-11 if expected.dtype == np.float16 else 0
    assert (np.abs(got - wide) <= LOGITS * np.abs(wide).max() + stored).all()
