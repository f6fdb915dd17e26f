"""The tokenizer's CNN: the VQGAN encoder and decoder around the multi-scale quantizer (VAR section 3.2).

Norms are computed in float32 whatever the convolutions' type is: in float16 the mean of squares over a whole
feature map would lose its digits. Pixels are in [-1, 1], feature maps are [B, channels, H, W].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from car_train.config import VQVAEConfig
from car_train.model.quantizer import MultiScaleQuantizer


class Norm(nn.GroupNorm):
    """GroupNorm with 32 groups (fewer where the channels don't divide), eps 1e-6, computed in float32."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(32, channels), channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class ResBlock(nn.Module):
    """x + conv3(SiLU(norm(conv3(SiLU(norm(x)))))): [B, inp, H, W] → [B, out, H, W].

    Where the channels change, a 1×1 convolution carries x across.
    """

    def __init__(self, inp: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(inp), nn.Conv2d(inp, out, 3, padding=1)
        self.norm2, self.conv2 = Norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inp, out, 1) if inp != out else nn.Identity()
        self.activation_checkpointing = False
        """Training only: keep no activations, compute them again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels of a feature map, [B, C, H, W] → the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.qkv = Norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).split(C, dim=1)
        scores = (q.transpose(1, 2) * C**-0.5) @ k
        weights = scores.float().softmax(-1).to(v.dtype)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view(B, C, H, W))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution, [B, C, H, W] → the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Down(nn.Module):
    """Halve a feature map: one zero right and below, then a 3×3 convolution of stride 2; [B, C, H, W] → half."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Double a feature map: nearest neighbour, then a 3×3 convolution; [B, C, H, W] → double."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then maybe a change of resolution.

    Each block is followed by attention at the lowest resolution.
    """

    def __init__(self, inp: int, out: int, blocks: int, attention: bool, resample: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inp if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out) for _ in range(blocks)) if attention else nn.ModuleList()
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.resample(x)


class Encoder(nn.Module):
    """Pixels in [-1, 1], [B, 3, H, W] → latent [B, Z, H/f, W/f]."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)] if i else config.channels,
                w,
                config.res_blocks,
                i == last,
                Down(w) if i < last else nn.Identity(),
            )
            for i, w in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = Norm(widths[-1]), nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent [B, Z, h, w] → pixels [B, 3, h·f, w·f], not clamped.

    `levels[0]` is the finest, as in the published names.
    """

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.levels = nn.ModuleList(
            Level(widths[min(i + 1, last)], w, config.res_blocks + 1, i == last, Up(w) if i else nn.Identity())
            for i, w in enumerate(widths)
        )
        self.norm_out, self.conv_out = Norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.levels):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VQVAE(nn.Module):
    """Multi-scale VQVAE: pixels ↔ K grids of tokens."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        Z = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(Z, Z, 3, padding=1), nn.Conv2d(Z, Z, 3, padding=1)
        self.quantizer = MultiScaleQuantizer(config)

    def latent(self, image_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] → the latent before quantisation, f32 [B, Z, E, E]."""
        return self.quant_conv(self.encoder(image_B3HW)).float()

    def encode(self, image_B3HW: Tensor) -> list[Tensor]:
        """Pixels in [-1, 1] → token grids int64 [B, S, S], coarse first."""
        latent = self.latent(image_B3HW)
        with torch.autocast(latent.device.type, enabled=False):  # nearest codes are decided in float32
            return self.quantizer.encode(latent)

    def decode_latent(self, f_hat_BZEE: Tensor) -> Tensor:
        """f̂ → pixels in [-1, 1], [B, 3, H, W]."""
        dtype = self.post_quant_conv.weight.dtype
        return self.decoder(self.post_quant_conv(f_hat_BZEE.to(dtype))).float().clamp(-1, 1)

    def decode(self, tokens: list[Tensor]) -> Tensor:
        """Token grids → pixels in [-1, 1]."""
        return self.decode_latent(self.quantizer.decode(tokens)[0])

    def forward(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Training pass: (reconstruction, not clamped; quantisation loss; token grids)."""
        latent = self.latent(image_B3HW)
        with torch.autocast(latent.device.type, enabled=False):
            f_hat, loss, grids = self.quantizer(latent)
        return self.decoder(self.post_quant_conv(f_hat)), loss, grids


def split_tokens(tokens_BL: Tensor, sides: tuple[int, ...]) -> list[Tensor]:
    """[B, L] → grids [B, S, S] of each scale, coarse first."""
    return [t.view(-1, s, s) for t, s in zip(tokens_BL.split([s * s for s in sides], 1), sides, strict=True)]


def join_tokens(grids: list[Tensor]) -> Tensor:
    """Grids of all scales → [B, L]."""
    return torch.cat([g.flatten(1) for g in grids], 1)
