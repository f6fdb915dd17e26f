"""Multi-scale residual quantisation (VAR, arXiv 2404.02905, algorithms 1 and 2).

A latent map is written as K token grids, coarse to fine. Every scale quantises what the coarser ones left over.
"Area" and bicubic resizing are linear on each axis, so they are constant matrices here: the same arithmetic in
training, in sampling and in the exported graphs.

Shapes: B images, Z latent channels, E edge of the latent, S edge of a scale, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from car_train.config import VQVAEConfig


def bicubic_matrix(source: int, target: int) -> Tensor:
    """[target, source] f32: bicubic resize of one axis (`align_corners=False`), identity when the sizes agree."""
    eye = torch.eye(source).view(1, source, source, 1)
    return F.interpolate(eye, size=(target, 1), mode="bicubic").view(source, target).T.contiguous()


def area_matrix(source: int, target: int) -> Tensor:
    """[target, source] f32: adaptive average pooling of one axis, identity when the sizes agree."""
    return F.adaptive_avg_pool1d(torch.eye(source)[None], target)[0].T.contiguous()


def resize(x_BZHW: Tensor, matrix: Tensor) -> Tensor:
    """Apply one resize matrix [t, s] to both axes of a square feature map: [B, Z, s, s] → [B, Z, t, t]."""
    return matrix @ x_BZHW @ matrix.T


class MultiScaleQuantizer(nn.Module):
    """Codebook, the shared φ, and the algorithms over them."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        Z = config.latent_channels
        self.embedding = nn.Parameter(torch.randn(config.vocab, Z))
        # φ(h) = ½h + ½conv3(h): stacked, so that one convolution can serve every scale of an exported graph.
        self.phi_weight = nn.Parameter(torch.randn(config.phis * Z, Z, 3, 3) * (1 / (3 * Z**0.5)))
        self.phi_bias = nn.Parameter(torch.zeros(config.phis * Z))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """(Re)make the resize matrices, on the parameters' device.

        They follow from the config and are never saved.
        """
        E = self.config.latent_size
        with torch.device("cpu"):
            for k, side in enumerate(self.config.sides):
                self.register_buffer(f"up_{k}", bicubic_matrix(side, E).to(self.embedding.device), persistent=False)
                self.register_buffer(f"down_{k}", area_matrix(E, side).to(self.embedding.device), persistent=False)

    def up(self, k: int) -> Tensor:
        """[E, S] f32: from scale k to the latent's size."""
        return self.get_buffer(f"up_{k}")

    def down(self, k: int) -> Tensor:
        """[S, E] f32: from the latent's size to scale k."""
        return self.get_buffer(f"down_{k}")

    def phi(self, h_BZEE: Tensor, index: int) -> Tensor:
        """φ_index of an upsampled code map, [B, Z, E, E] → [B, Z, E, E]."""
        Z = self.config.latent_channels
        mine = slice(index * Z, (index + 1) * Z)
        return 0.5 * h_BZEE + 0.5 * F.conv2d(h_BZEE, self.phi_weight[mine], self.phi_bias[mine], padding=1)

    def contribution(self, codes_BSSZ: Tensor, k: int) -> Tensor:
        """What scale k's codes add to f̂: φ_k(bicubic(codes)), [B, S, S, Z] → [B, Z, E, E]."""
        return self.phi(resize(codes_BSSZ.permute(0, 3, 1, 2), self.up(k)), self.config.phi_index[k])

    def next_input(self, f_hat_BZEE: Tensor, k: int) -> Tensor:
        """Input of scale k+1: f̂ so far at its size, [B, Z, E, E] → [B, T, T, Z]."""
        return resize(f_hat_BZEE, self.down(k + 1)).permute(0, 2, 3, 1)

    def nearest(self, z_BSSZ: Tensor) -> Tensor:
        """Nearest code by Euclidean distance, [B, S, S, Z] → int64 [B, S, S]."""
        z = z_BSSZ.reshape(-1, z_BSSZ.shape[-1])
        distance = z.square().sum(1, keepdim=True) + self.embedding.square().sum(1) - 2 * (z @ self.embedding.T)
        return distance.argmin(1).view(z_BSSZ.shape[:-1])

    def encode(self, f_BZEE: Tensor) -> list[Tensor]:
        """Algorithm 1: latent map → token grids int64 [B, S, S], coarse first."""
        rest, out = f_BZEE, []
        for k in range(len(self.config.sides)):
            tokens = self.nearest(resize(rest, self.down(k)).permute(0, 2, 3, 1))
            rest = rest - self.contribution(F.embedding(tokens, self.embedding), k)
            out.append(tokens)
        return out

    def decode(self, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Algorithm 2: token grids → f̂ [B, Z, E, E], and the teacher's input of scales 2…K, [B, L-1, Z]."""
        E, Z = self.config.latent_size, self.config.latent_channels
        f_hat = self.embedding.new_zeros(tokens[0].shape[0], Z, E, E)
        inputs = []
        for k, grid in enumerate(tokens):
            f_hat = f_hat + self.contribution(F.embedding(grid, self.embedding), k)
            if k + 1 < len(tokens):
                inputs.append(self.next_input(f_hat, k).flatten(1, 2))
        return f_hat, torch.cat(inputs, 1)

    @torch.no_grad()
    def revive(self, f_BZEE: Tensor, used_V: Tensor) -> int:
        """Move every code that nobody used onto a random residual of this batch; returns how many were moved.

        f: latents, f32 [B, Z, E, E]. used: bool [V]. Without this a small codebook collapses to a few codes.
        """
        rest, residuals = f_BZEE, []
        for k, side in enumerate(self.config.sides):
            z = resize(rest, self.down(k)).permute(0, 2, 3, 1)
            residuals.append(z.reshape(-1, z.shape[-1])[:: max(1, side // 2)])
            rest = rest - self.contribution(F.embedding(self.nearest(z), self.embedding), k)
        pool, dead = torch.cat(residuals), (~used_V).nonzero().flatten()
        self.embedding[dead] = pool[torch.randint(len(pool), (len(dead),), device=pool.device)]
        return len(dead)

    def forward(self, f_BZEE: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Quantise for training: (f̂ with straight-through gradient, loss, token grids).

        The loss is the codebook term plus β times the commitment term, averaged over the scales (paper eq. 5).
        """
        f_detached = f_BZEE.detach()
        rest, f_hat = f_detached, torch.zeros_like(f_BZEE)
        loss, grids = f_BZEE.new_zeros(()), []
        for k in range(len(self.config.sides)):
            with torch.no_grad():
                tokens = self.nearest(resize(rest, self.down(k)).permute(0, 2, 3, 1))
            h = self.contribution(F.embedding(tokens, self.embedding), k)
            f_hat = f_hat + h
            rest = rest - h.detach()
            loss = loss + F.mse_loss(f_hat, f_detached) + self.config.beta * F.mse_loss(f_hat.detach(), f_BZEE)
            grids.append(tokens)
        return f_BZEE + (f_hat - f_BZEE).detach(), loss / len(grids), grids
