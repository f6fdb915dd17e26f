"""The tokenizer's adversarial loss: what a verdict sees, hinge losses by hand, the adaptive weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from car_train.config import ConfigError
from car_train.training.losses import (
    PatchDiscriminator,
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
)
from fixtures.random_images import smooth_images


@pytest.mark.parametrize(
    ("size", "layers", "side"), [(256, 3, 30), (64, 3, 6), (32, 3, 2), (31, 2, 5), (28, 2, 5), (16, 2, 2), (8, 1, 2)]
)
def test_small_images_get_fewer_layers(size: int, layers: int, side: int) -> None:
    discriminator = PatchDiscriminator(size, width=4)
    assert discriminator.layers == layers
    assert discriminator(smooth_images(2, size)).shape == (2, 1, side, side)


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_verdict_sees_its_patch(layers: int, field: int) -> None:
    discriminator = PatchDiscriminator(128, width=4, layers=layers)
    for i, block in enumerate(discriminator.blocks):
        if isinstance(block, nn.GroupNorm):  # its statistics are the whole image's
            discriminator.blocks[i] = nn.Identity()
    image = smooth_images(1, 128).requires_grad_()
    verdict = discriminator(image)
    middle = verdict.shape[-1] // 2
    verdict[0, 0, middle, middle].backward()
    assert image.grad is not None
    seen = image.grad.abs().sum((0, 1)) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == field


def test_sizes_that_vanish_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"7 pixels are too small .* give at least 8"):
        PatchDiscriminator(7)
    with pytest.raises(ConfigError, match="width 0, layers 3"):
        PatchDiscriminator(64, width=0)
    discriminator = PatchDiscriminator(64, width=4)
    with pytest.raises(ConfigError, match=r"\[23, 64\] pixels .* 3 layers; give at least 24"):
        discriminator(smooth_images(1, 23, 64))
    assert discriminator(smooth_images(1, 24)).shape == (1, 1, 1, 1)


def test_a_verdict_is_its_own_images() -> None:
    discriminator = PatchDiscriminator(32, width=8)
    x = smooth_images(4, 32)
    with torch.no_grad():
        together, alone = discriminator(x), torch.cat([discriminator(one[None]) for one in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert not list(discriminator.buffers())  # nothing but weights to restore


def test_autocast_keeps_verdicts_in_float32() -> None:
    discriminator = PatchDiscriminator(64, width=8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = discriminator(smooth_images(2, 64))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, discriminator(smooth_images(2, 64)).detach(), rtol=0.05, atol=0.02)


def test_it_learns_to_distinguish_sharp_from_blurred() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(32, width=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    generator = torch.Generator().manual_seed(1)

    def draw() -> tuple[Tensor, Tensor]:
        sharp = torch.rand(8, 3, 8, 8, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
        return sharp, F.avg_pool2d(sharp, 5, 1, 2)

    losses = []
    for _ in range(40):
        real, fake = draw()
        loss = hinge_discriminator_loss(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.1)  # undecided
    assert losses[-1] < 0.3
    real, fake = draw()
    with torch.no_grad():
        assert (discriminator(real).mean((1, 2, 3)) > discriminator(fake).mean((1, 2, 3))).all()


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 3 / 3))
    assert generator_loss(fake).item() == pytest.approx(2 / 3)
    assert hinge_discriminator_loss(torch.full((2,), 1.0), torch.full((2,), -1.0)) == 0  # sure enough
    assert hinge_discriminator_loss(real.bfloat16(), fake.bfloat16()).dtype == torch.float32


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    last = nn.Parameter(torch.tensor([1.0, 2.0]))
    nll, adversarial = (last * torch.tensor([3.0, 4.0])).sum(), (last * torch.tensor([0.0, -0.5])).sum()
    weight = adaptive_weight(nll, adversarial, last)
    assert weight.item() == pytest.approx(5 / 0.5001)
    assert not weight.requires_grad
    assert last.grad is None
    (nll + weight * adversarial).backward()  # both graphs are still there
    assert last.grad is not None
    torch.testing.assert_close(last.grad, torch.tensor([3.0, 4.0]) + weight * torch.tensor([0.0, -0.5]))
    assert adaptive_weight(last.sum() * 3, last.sum() * 0, last, limit=7.0) == 7
    assert adaptive_weight(last.sum() * 0, last.sum(), last) == 0
