"""The golden numbers of the published model, through PyTorch and through the exported plan, from one test body."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch
from PIL import Image

from car_runtime import GenerationConfig, open_plan
from car_runtime.cli.main import main as car_run
from car_train.model import Model
from car_train.model.sample import Recording, control_pyramid, sample
from car_train.model.vqvae import join_tokens, split_tokens
from fixtures.golden import Golden

CFG = 4.0
LOGITS = 2e-4
"""Relative to the largest logit: float32 sums in another order."""
PIXELS = 2e-3
"""Tolerance of an image in [0, 1], over the 2^-12 to which the golden images are stored.

For a plan, over half of a level of 255 too.
"""


class Engine(Protocol):
    pixels: float

    def greedy(self, golden: Golden, control: bool) -> tuple[np.ndarray, np.ndarray]: ...


class Torch:
    """The reference loop; both rows of the golden batch at once."""

    pixels = PIXELS + 2**-12

    def __init__(self, golden: Golden, models: Callable[..., Model]):
        self.model = models(golden)

    def greedy(self, golden: Golden, control: bool) -> tuple[np.ndarray, np.ndarray]:
        tokens, pixels, _ = torch_greedy(self.model, golden, control)
        return tokens.numpy(), (pixels.numpy() + 1) / 2


class Exported:
    """The plan through `car-run`, as a user would: one image per label, in ONNX Runtime without torch."""

    pixels = PIXELS + 2**-12 + 0.5 / 255

    def __init__(self, golden: Golden, plans: Callable[..., Path], folder: Path):
        self.paths = {control: plans(golden, car=control) for control in (True, False)}
        self.folder = folder

    def greedy(self, golden: Golden, control: bool) -> tuple[np.ndarray, np.ndarray]:
        Image.fromarray(golden["control_png"]).save(self.folder / "control.png")
        tokens, images = [], []
        for label in golden["label"]:
            output, npz = self.folder / f"{label}.png", self.folder / f"{label}.npz"
            argv = ["--engine", self.paths[control], "--class", label, "--cfg", CFG, "--top-k", 1, "--seed", 5]
            argv += ["-o", output, "--tokens", npz, *(["--control", self.folder / "control.png"] if control else [])]
            assert car_run([str(a) for a in argv]) == 0
            with np.load(npz) as saved:
                np.testing.assert_array_equal(saved["sides"], golden.sides)
                tokens.append(saved["tokens"])
            images.append(np.asarray(Image.open(output))[None])
        return np.concatenate(tokens), np.concatenate(images).transpose(0, 3, 1, 2) / 255


@pytest.fixture(params=["torch", "plan"])
def engine(
    request: pytest.FixtureRequest,
    golden: Golden,
    models: Callable[..., Model],
    plans: Callable[..., Path],
    tmp_path: Path,
) -> Engine:
    return Torch(golden, models) if request.param == "torch" else Exported(golden, plans, tmp_path)


def torch_greedy(model: Model, golden: Golden, control: bool) -> tuple[torch.Tensor, torch.Tensor, Recording]:
    label = torch.from_numpy(golden["label"])
    sizes = [s * model.config.vqvae.patch for s in golden.sides]
    controls = control_pyramid(Image.fromarray(golden["control_png"]), sizes) if control else None
    uniforms = torch.rand(len(label), model.config.vqvae.tokens, generator=torch.Generator().manual_seed(1))
    record = Recording()
    assert model.car is not None
    tokens, pixels = sample(model.vqvae, model.car, label, uniforms, controls, CFG, top_k=1, record=record)
    return tokens, pixels, record


@pytest.mark.parametrize("control", [False, True], ids=["var", "car"])
def test_greedy_tokens_are_equal_and_the_image_is_close(engine: Engine, golden: Golden, control: bool) -> None:
    prefix = "car" if control else "var"
    tokens, pixels = engine.greedy(golden, control)
    np.testing.assert_array_equal(tokens, golden[f"{prefix}_greedy_tokens"])
    assert np.abs(pixels - golden[f"{prefix}_greedy_image"].astype(np.float32)).max() <= engine.pixels


def test_a_plan_with_a_branch_draws_plain_var_where_no_control_is_given(
    golden: Golden, plans: Callable[..., Path]
) -> None:
    with open_plan(plans(golden, car=True), "ort-cpu", threads=1) as plan:
        configs = [GenerationConfig(label=int(label), cfg=CFG, top_k=1, seed=5) for label in golden["label"]]
        tokens = np.concatenate([result.tokens for result in plan.generate_many(configs)])
    np.testing.assert_array_equal(tokens, golden["var_greedy_tokens"])


def test_encoded_tokens_are_equal(golden: Golden, models: Callable[..., Model]) -> None:
    # PyTorch only: the golden image is noise in float32, a plan's encoder takes uint8
    # (test_export.py compares the two).
    with torch.no_grad():
        tokens = join_tokens(models(golden).vqvae.encode(torch.from_numpy(golden["image"])))
    np.testing.assert_array_equal(tokens.numpy(), golden["image_tokens"])


@pytest.mark.parametrize("control", [False, True], ids=["var", "car"])
def test_guided_logits_of_a_greedy_run(golden: Golden, models: Callable[..., Model], control: bool) -> None:
    _, _, record = torch_greedy(models(golden), golden, control)
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
