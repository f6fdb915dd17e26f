"""The adversarial term of the tokenizer's loss (L_G of VAR eq. 5); the perceptual one is in `perceptual`.

    L = ‖im − îm‖² + ‖f − f̂‖² + λ_P·L_P(îm) + λ_G·L_G(îm)

L_G is a PatchGAN with hinge losses, weighted as in VQGAN (Esser et al. 2021, eq. 7). Images are [B, 3, H, W] in
[-1, 1], RGB. Every loss is computed in float32, under autocast too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from car_train.config import ConfigError
from car_train.model.vqvae import Norm


class PatchDiscriminator(nn.Module):
    """PatchGAN: one verdict for each patch of an image (Isola et al. 2017, section 3.2.2 and appendix 6.1.2).

    `layers` 4×4 convolutions of stride 2, two of stride 1, LeakyReLU 0.2 between. With 3 layers a verdict sees 70×70
    pixels, with 2 34×34, with 1 16×16.

    The norm is GroupNorm instead of the papers' BatchNorm: a verdict then depends on its own image alone. Batches
    of 1 to 4 work, real and fake images may share a batch or not, ranks of a distributed run need no statistics of
    each other, and there are none that an interrupted run would have to restore.
    """

    SMALLEST = 8
    """Pixels; one layer makes 2×2 verdicts of them."""

    def __init__(self, image_size: int, width: int = 64, layers: int = 3):
        """A discriminator for images of about `image_size` pixels.

        image_size: shortest edge. It takes fewer layers where fewer than 2×2 verdicts would be left: 3 from 32
                    pixels on, 2 from 16, 1 from 8.
        width:      channels of the first layer; they double with each, up to 8·width.
        layers:     strided convolutions, at most.

        Raises ConfigError for images below 8 pixels, width or layers below 1.
        """
        super().__init__()
        if width < 1 or layers < 1:
            raise ConfigError(f"width {width}, layers {layers}; give a discriminator at least 1 of each")
        if image_size < self.SMALLEST:
            raise ConfigError(
                f"images of {image_size} pixels are too small for the discriminator; "
                f"give at least {self.SMALLEST}, or leave the adversarial loss out"
            )
        self.layers = max(n for n in range(1, layers + 1) if n == 1 or verdicts(image_size, n) >= 2)
        widths = [width * min(2**i, 8) for i in range(self.layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, self.layers + 1):
            stride = 2 if i < self.layers else 1
            blocks += [nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1), Norm(widths[i])]
            blocks.append(nn.LeakyReLU(0.2))
        self.blocks = nn.Sequential(*blocks)
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as in the paper's appendix 6.2
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # all of them have one

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Images in [-1, 1] → verdicts f32 [B, 1, h, w], unbounded: above 0 real, below 0 made.

        Raises ConfigError for images of which no verdict would be left.
        """
        if verdicts(min(image_B3HW.shape[2:]), self.layers) < 1:
            raise ConfigError(
                f"images of {list(image_B3HW.shape[2:])} pixels are too small for a discriminator of "
                f"{self.layers} layers; give at least {3 * 2**self.layers}"
            )
        return self.conv_out(self.blocks(image_B3HW)).float()


def verdicts(side: int, layers: int) -> int:
    """Edge of a PatchGAN's map: strided convolutions halve it, rounding down; the last two take one off each."""
    return side // 2**layers - 2


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator minimises: ½·(E[max(0, 1 − D(x))] + E[max(0, 1 + D(x̂))]), f32 [].

    The hinge loss of Lim & Ye 2017 (Geometric GAN), halved as in VQGAN. x̂ must come detached from the decoder.
    """
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """What the decoder minimises: L_G = −E[D(x̂)], f32 []; VAR eq. 5's L_G with hinge losses."""
    return -fake_logits.float().mean()


def adaptive_weight(nll: Tensor, adversarial: Tensor, last_layer: nn.Parameter, limit: float = 1e4) -> Tensor:
    """λ = ‖∇L_rec‖ / (‖∇L_G‖ + δ), both gradients at the decoder's last layer; f32 [], detached, in [0, limit].

    VQGAN eq. 7, with δ = 1e-4. The adversarial term then pulls on the decoder as hard as pixels and features do.

    nll:         reconstruction loss, with its perceptual term (VQGAN's L_rec).
    adversarial: `generator_loss` of the same images.
    last_layer:  weight of the decoder's last convolution.

    Both graphs are kept for the backward pass to come; `.grad` is left as it is. In a distributed run each rank finds
    the λ of its own batch: average it over the ranks where all must weigh alike.
    """
    # Without `create_graph` the gradients are plain numbers: λ is a constant to the backward pass.
    (of_nll,) = torch.autograd.grad(nll, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    weight = of_nll.float().norm() / (of_adversarial.float().norm() + 1e-4)
    return weight.clamp(0, limit)
