"""CAR (arXiv 2410.04671, section 3.2): a control branch 𝓕, 𝒯, 𝓖 that steers a frozen VAR.

Without its branch it is VAR.

Shapes as in `var.py`; S side of a scale in tokens, f pixels per latent edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import CARConfig, ModelConfig
from .var import EPS, VAR, Block, Cache, block_causal_mask, module_list


class ControlEncoder(nn.Module):
    """𝓕: a control image at a scale's size → its features, [1, 3, S·f, S·f] in [-1, 1] → [1, C, S, S].

    Shared by all scales.
    """

    def __init__(self, config: CARConfig, width: int):
        super().__init__()
        widths = config.encoder_widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.steps = nn.ModuleList()
        for (a, b), stride in zip(pairwise(widths), config.encoder_strides, strict=True):
            self.steps += [nn.Conv2d(a, a, 3, padding=1), nn.Conv2d(a, b, 3, padding=1, stride=stride)]
        self.conv_out = nn.Conv2d(widths[-1], width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.conv_in(x))
        for conv in self.steps:
            h = F.silu(conv(h))
        return self.conv_out(h)


class Fusion(nn.Module):
    """𝓖: x ← Linear(LayerNorm([x, c])), the norm in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(2 * width, eps=EPS), nn.Linear(2 * width, width)

    def forward(self, x_RNC: Tensor, c_RNC: Tensor) -> Tensor:
        both = torch.cat([x_RNC, c_RNC], -1).float()
        h = F.layer_norm(both, both.shape[-1:], self.norm.weight.float(), self.norm.bias.float(), EPS)
        return self.linear(h.to(self.linear.weight.dtype)).float()


class ControlBranch(nn.Module):
    """All that CAR adds to a base, and all that its training changes."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.var is not None, "config.var"
        assert config.car is not None, "config.car"
        self.config = config.car
        C, depth = config.var.C, config.var.depth // 2
        self.encoder = ControlEncoder(config.car, C)
        self.input_conv = nn.Conv2d(C, C, 3, padding=1)
        self.blocks = module_list(Block(config.var, 0.0) for _ in range(depth))
        self.fusions = module_list(Fusion(C) for _ in range(depth))

    @torch.no_grad()
    def initialise(self, base: VAR) -> None:
        """𝒯 from the base's first half (paper); 𝓖 starts as "x, a little of c".

        So the first pictures are the base's.
        """
        C = base.config.C
        for mine, theirs in zip(self.blocks, base.blocks, strict=False):
            mine.load_state_dict(theirs.state_dict())
        for fusion in self.fusions:
            nn.init.trunc_normal_(fusion.linear.weight, std=0.02)
            fusion.linear.weight[:, :C] += torch.eye(C)
            nn.init.zeros_(fusion.linear.bias)

    def features(self, control_3HW: Tensor) -> Tensor:
        """𝓕 of one batch of control images of one scale, [B, 3, S·f, S·f] → f32 [B, S·S, C]."""
        dtype = self.input_conv.weight.dtype
        return self.encoder(control_3HW.to(dtype)).float().flatten(2).transpose(1, 2)

    def inject(self, x_RSSC: Tensor, features: Tensor) -> Tensor:
        """Branch input of one scale before position embeddings: conv3(base input) + 𝓕(control), f32 [R, S·S, C]."""
        x = x_RSSC.permute(0, 3, 1, 2).to(self.input_conv.weight.dtype)
        return self.input_conv(x).float().flatten(2).transpose(1, 2) + features


class CAR(nn.Module):
    """A base and, if it is to be steered, a branch. One trunk serves teacher forcing, sampling and export."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.base = VAR(config)
        self.branch = ControlBranch(config) if config.car is not None else None

    @property
    def branch_blocks(self) -> Sequence[Block]:
        return self.branch.blocks if self.branch is not None else ()

    @property
    def layers(self) -> int:
        """Number of K/V pairs in a cache: base blocks first, then the branch's."""
        return len(self.base.blocks) + len(self.branch_blocks)

    def modulations(self, label_R: Tensor) -> Tensor:
        """AdaLN of everything that depends on the class alone, f32 [R, M, C]."""
        return self.base.modulations(label_R, self.branch_blocks)

    def trunk(
        self,
        x_RNC: Tensor,
        c_RNC: Tensor | None,
        position_NC: Tensor,
        modulation_RMC: Tensor,
        cache: Cache | None = None,
        mask_NT: Tensor | None = None,
    ) -> Tensor:
        """Embedded inputs (without positions) of base and branch → logits f32 [R, N, V].

        c is None without control.
        """
        rows = modulation_RMC.split(1, dim=1)  # M × [R, 1, C]
        depth = len(self.base.blocks)
        outputs: list[Tensor] = []
        if self.branch is not None and c_RNC is not None:
            c = c_RNC + position_NC
            for j, block in enumerate(self.branch.blocks, start=depth):
                c = block(c, rows[6 * j : 6 * j + 6], cache, j, mask_NT)
                outputs.append(c)
        x = x_RNC + position_NC
        for i, block in enumerate(self.base.blocks):
            fused = i - (depth - len(self.branch_blocks))
            if outputs and fused >= 0:
                assert self.branch is not None
                x = self.branch.fusions[fused](x, outputs.pop())  # the branch's last output first
            x = block(x, rows[6 * i : 6 * i + 6], cache, i, mask_NT)
        return self.base.logits(x, rows[-2], rows[-1])

    def forward(self, label_B: Tensor, inputs_BlZ: Tensor, controls: Sequence[Tensor] | None = None) -> Tensor:
        """Teacher forcing: logits f32 [B, L, V].

        label: int64 [B]. inputs: f32 [B, L-1, Z], f̂ at the sizes of scales 2…K (`MultiScaleQuantizer.decode`).
        controls: one f32 [B or 1, 3, S·f, S·f] in [-1, 1] per scale, or None for the base alone.
        """
        x = torch.cat([self.base.start(label_B), self.base.embed(inputs_BlZ)], 1)
        c = None
        if controls is not None:
            assert self.branch is not None, "controls given to a model without a control branch"
            grids = x.split([s * s for s in self.base.sides], 1)
            c = torch.cat(
                [
                    self.branch.inject(grid.unflatten(1, (s, s)), self.branch.features(control))
                    for grid, control, s in zip(grids, controls, self.base.sides, strict=True)
                ],
                1,
            )
        mask = block_causal_mask(self.base.sides, x.device)
        return self.trunk(x, c, self.base.position(), self.modulations(label_B), mask_NT=mask)
