"""CAR (arXiv 2410.04671, section 3.2): a control branch 𝓕, 𝒯, 𝓖 that steers a frozen VAR.

Without its branch it is VAR. 𝓕, 𝒯 and 𝓖 each have the alternatives that the paper compares in Table 3.

Shapes as in `var.py`; S side of a scale in tokens, f pixels per latent edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from car_train.config import CARConfig, ConfigError, ModelConfig, VQVAEConfig
from car_train.model.kernels import Linear, convolve, linear
from car_train.model.var import EPS, VAR, Block, Cache, drop_path_rates, module_list
from car_train.model.vqvae import VQVAE, Encoder


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
        return self.scales([x])[0]

    def scales(self, controls: Sequence[Tensor]) -> list[Tensor]:
        """`forward` of several scales at once: [B, 3, S·f, S·f] each → [B, C, S, S] each."""
        maps = list(controls)
        for conv in (self.conv_in, *self.steps):
            maps = [F.silu(m) for m in convolve(conv.weight, conv.bias, maps, conv.stride[0])]
        return convolve(self.conv_out.weight, self.conv_out.bias, maps)


class TokenizerEncoder(nn.Module):
    """𝓕 from the tokenizer: its encoder, frozen, and a trained 1×1 projection; shapes as `ControlEncoder`'s.

    A copy, so that a branch is whole without the tokenizer it came from. Nothing is quantised: the projection reads
    the latent that the codes are nearest to. ConfigError for a tokenizer that is too narrow for feature maps of one
    pixel.
    """

    def __init__(self, config: VQVAEConfig, width: int):
        super().__init__()
        Z = config.latent_channels
        self.encoder, self.quant_conv = Encoder(config), nn.Conv2d(Z, Z, 3, padding=1)
        self.proj = nn.Conv2d(Z, width, 1)
        norm = self.encoder.norm_out
        if norm.num_groups == norm.num_channels:
            # The first scale is one pixel at the lowest level: a group of one channel would be normalised to zero.
            raise ConfigError(
                f"encoder is 'vqvae', but the tokenizer's lowest level has {norm.num_channels} channels, each a norm "
                "group of its own; choose encoder conv, or a tokenizer with more channels"
            )
        self.freeze()

    def initialise(self, vqvae: VQVAE) -> None:
        """Take the tokenizer's weights."""
        self.encoder.load_state_dict(vqvae.encoder.state_dict())
        self.quant_conv.load_state_dict(vqvae.quant_conv.state_dict())

    def freeze(self) -> None:
        """All but the projection stays as the tokenizer has it."""
        self.encoder.requires_grad_(False)
        self.quant_conv.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.quant_conv(self.encoder(x)))

    def scales(self, controls: Sequence[Tensor]) -> list[Tensor]:
        """`forward` of several scales at once: [B, 3, S·f, S·f] each → [B, C, S, S] each."""
        return [self(control) for control in controls]


def to_maps(x_RNC: Tensor, sides: Sequence[int]) -> list[Tensor]:
    """Tokens of whole scales → one feature map [R, C, S, S] per scale. Without sides the tokens are one scale's."""
    sides = sides or (math.isqrt(x_RNC.shape[1]),)
    segments = x_RNC.split([s * s for s in sides], 1) if len(sides) > 1 else (x_RNC,)
    return [segment.unflatten(1, (s, s)).permute(0, 3, 1, 2) for segment, s in zip(segments, sides, strict=True)]


def to_tokens(maps: Sequence[Tensor]) -> Tensor:
    """The inverse of `to_maps`: feature maps [R, C, S, S] → [R, N, C]."""
    segments = [m.flatten(2).transpose(1, 2) for m in maps]
    return torch.cat(segments, 1) if len(segments) > 1 else segments[0]


def tokens_first(x_RNC: Tensor) -> Tensor:
    """[R, N, C] → token-major [N, R, C], contiguous."""
    return x_RNC.transpose(0, 1).contiguous()


class ConvBlock(nn.Module):
    """A block of the convolutional 𝒯: c + conv3(SiLU(LN(conv3(c)))) on each scale's feature map, the norm in float32.

    No attention: a scale sees nothing of the others, and the class only by way of its inputs. The norm is over the
    channels of one token, because the first scale is a single pixel: a group norm of as many groups as channels would
    leave nothing of it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, c_RNC: Tensor, sides: Sequence[int]) -> Tensor:
        """c f32 [R, N, C] of the scales `sides` (of one scale without them) → [R, N, C] f32."""
        return c_RNC + to_tokens([self._residual(c_RCSS) for c_RCSS in to_maps(c_RNC, sides)])

    def _residual(self, c_RCSS: Tensor) -> Tensor:
        dtype = self.conv1.weight.dtype
        h = self.conv1(c_RCSS.to(dtype)).permute(0, 2, 3, 1).float()
        h = F.layer_norm(h, h.shape[-1:], self.norm.weight.float(), self.norm.bias.float(), EPS)
        return self.conv2(F.silu(h).to(dtype).permute(0, 3, 1, 2)).float()


LITTLE = 0.003
"""The control's share in what a concat fusion of a fresh branch passes on."""


class ConcatFusion(nn.Module):
    """𝓖: x ← Linear(LayerNorm([x, c])), the norm in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(2 * width, eps=EPS), Linear(2 * width, width)

    @torch.no_grad()
    def initialise(self, deviation: float = 1.0) -> None:
        """Start as "x, a little of c".

        deviation: what the norm divides x by. `linear` multiplies it back, else the blocks that follow would see x at
        another size than they know.
        """
        C, device = self.linear.out_features, self.linear.weight.device
        self.norm.reset_parameters()
        self.linear.weight[:, :C] = deviation * torch.eye(C, device=device)
        nn.init.normal_(self.linear.weight[:, C:], std=LITTLE * deviation / math.sqrt(C))
        nn.init.zeros_(self.linear.bias)

    def calibrate(self, x: Tensor, c: Tensor) -> None:
        """`initialise` for what is met here, f32 [R, N, C] each: the mean joint deviation of x and c over tokens."""
        both = torch.cat([x, c], -1).float()
        self.initialise((both.var(-1, correction=0) + EPS).sqrt().mean().item())

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        both = torch.cat([x, c], -1).float()
        h = F.layer_norm(both, both.shape[-1:], self.norm.weight.float(), self.norm.bias.float(), EPS)
        return self.linear(h.to(self.linear.weight.dtype)).float()


class ZeroFusion(nn.Module):
    """𝓖 of ControlNet (arXiv 2302.05543): x ← x + Linear(c), a 1×1 convolution that starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = Linear(width, width)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Start as the base: nothing of c."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + self.linear(c.to(self.linear.weight.dtype)).float()


class CrossNormFusion(nn.Module):
    """𝓖 of ControlNeXt (arXiv 2408.06070): x ← x + gain · `cross_normalise`(c, x).

    One gain per channel, learned, from zero.
    """

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))

    @torch.no_grad()
    def initialise(self) -> None:
        """Start as the base: nothing of c."""
        nn.init.zeros_(self.gain)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + self.gain.float() * cross_normalise(c, x)


def cross_normalise(c: Tensor, x: Tensor) -> Tensor:
    """c with the mean and variance of x, both over the channels of one token, f32.

    ControlNeXt takes them over a whole feature map. A feature map of all tokens would show a coarse scale what the
    finer ones hold, and one of a single scale has one token at first; over a token's channels, as in every other norm
    of this model, teacher forcing and sampling compute the same.
    """
    mean = x.mean(-1, keepdim=True)
    deviation = ((x - mean).square().mean(-1, keepdim=True) + EPS).sqrt()
    return F.layer_norm(c, c.shape[-1:], eps=EPS) * deviation + mean


class ControlBranch(nn.Module):
    """All that CAR adds to a base, and all that its training changes."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.var is not None, "config.var"
        assert config.car is not None, "config.car"
        self.config = config.car
        car, var, C, depth = config.car, config.var, config.var.C, config.var.depth // 2
        rates = iter(drop_path_rates(var.drop_path_rate, var.depth))  # as the blocks of the base's first half
        encoders: dict[str, Callable[[], ControlEncoder | TokenizerEncoder]] = {
            "conv": lambda: ControlEncoder(car, C),
            "vqvae": lambda: TokenizerEncoder(config.vqvae, C),
        }
        blocks: dict[str, Callable[[], Block | ConvBlock]] = {
            "blocks": lambda: Block(var, next(rates)),
            "conv": lambda: ConvBlock(C),
        }
        fusions: dict[str, Callable[[int], ConcatFusion | ZeroFusion | CrossNormFusion]] = {
            "concat": ConcatFusion,
            "zero": ZeroFusion,
            "cross_norm": CrossNormFusion,
        }
        self.encoder = encoders[car.encoder]()
        self.input_conv = nn.Conv2d(C, C, 3, padding=1)
        self.blocks = module_list(blocks[car.transformer]() for _ in range(depth))
        self.fusions = module_list(fusions[car.fusion](C) for _ in range(depth))

    @property
    def attention_blocks(self) -> Sequence[Block]:
        """The blocks with modulation, keys and values: all of 𝒯, or none."""
        return [block for block in self.blocks if isinstance(block, Block)]

    @torch.no_grad()
    def initialise(self, base: VAR, vqvae: VQVAE) -> None:
        """𝒯 from the base's first half (paper), 𝓕 from the tokenizer if it is its encoder, 𝓖 so that c hardly counts.

        With the fusions "zero" and "cross_norm" the model then computes exactly what its base does; "concat" comes
        close once it is calibrated (`calibrate_fusion`).
        """
        if isinstance(self.encoder, TokenizerEncoder):
            self.encoder.initialise(vqvae)
        for mine, theirs in zip(self.attention_blocks, base.blocks, strict=False):
            mine.load_state_dict(theirs.state_dict())
        for fusion in self.fusions:
            fusion.initialise()

    def requires_grad_(self, requires_grad: bool = True) -> ControlBranch:
        """Let the branch train, or not. The tokenizer's encoder in it never does."""
        super().requires_grad_(requires_grad)
        if isinstance(self.encoder, TokenizerEncoder):
            self.encoder.freeze()
        return self

    def features(self, control_3HW: Tensor) -> Tensor:
        """𝓕 of one batch of control images of one scale, [B, 3, S·f, S·f] → f32 [B, S·S, C]."""
        dtype = self.input_conv.weight.dtype
        return self.encoder(control_3HW.to(dtype)).float().flatten(2).transpose(1, 2)

    def inject(self, x_RSSC: Tensor, features: Tensor) -> Tensor:
        """Branch input of one scale before position embeddings: conv3(base input) + 𝓕(control), f32 [R, S·S, C]."""
        x = x_RSSC.permute(0, 3, 1, 2).to(self.input_conv.weight.dtype)
        return self.input_conv(x).float().flatten(2).transpose(1, 2) + features

    def inject_all(
        self,
        start_R1C: Tensor,
        inputs_RlZ: Tensor,
        embedding: nn.Linear,
        controls: Sequence[Tensor],
        sides: Sequence[int],
    ) -> Tensor:
        """`features` and `inject` of all scales `sides` at once, f32 [R, L, C].

        start, inputs: as the base's blocks get them, but before `embedding`, which is linear: it goes into the
        kernel, so that the convolution has Z + 1 channels (the last is one: the bias, within the feature map) instead
        of C.
        """
        dtype, Z = self.input_conv.weight.dtype, embedding.in_features
        # The first scale is one pixel, of which only the kernel's middle sees anything: columns of the same product.
        columns = torch.cat([embedding.weight, embedding.bias[:, None], start_R1C[:, 0].T.to(dtype)], 1)
        kernel_O33E = linear(self.input_conv.weight.permute(0, 2, 3, 1), columns.T)
        bias = self.input_conv.get_parameter("bias")
        ones = torch.ones_like(inputs_RlZ[..., :1])
        maps = to_maps(torch.cat([inputs_RlZ, ones], -1).to(dtype), sides[1:])
        finer = convolve(kernel_O33E[..., : Z + 1].permute(0, 3, 1, 2), bias, maps)
        first = kernel_O33E[:, 1, 1, Z + 1 :].T.float() + bias.float()
        inputs = [first[:, None], *(to_tokens([m]).float() for m in finer)]
        features = self.encoder.scales([control.to(dtype) for control in controls])
        return torch.cat([x + to_tokens([c]).float() for x, c in zip(inputs, features, strict=True)], 1)

    def forward(
        self, c: Tensor, rows: Sequence[Tensor], cache: Cache | None, layer: int, sides: Sequence[int]
    ) -> list[Tensor]:
        """𝒯: the outputs of all blocks, f32, first to last, in the shape of c: as in `Block.forward`.

        c with its positions; `rows`: the branch's modulation; `layer`: its first in the cache.
        """
        outputs = []
        for j, block in enumerate(self.blocks):
            if isinstance(block, Block):
                c = block(c, rows[6 * j : 6 * j + 6], cache, layer + j, sides)
            elif cache is None:
                c = block(c, sides)
            else:
                c = tokens_first(block(c.transpose(0, 1).contiguous(), sides))
            outputs.append(c)
        return outputs


class CAR(nn.Module):
    """A base and, if it is to be steered, a branch. One trunk serves teacher forcing, sampling and export."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.base = VAR(config)
        self.branch = ControlBranch(config) if config.car is not None else None

    @property
    def branch_blocks(self) -> Sequence[Block]:
        """The branch's blocks with modulation, keys and values."""
        return self.branch.attention_blocks if self.branch is not None else ()

    @property
    def layers(self) -> int:
        """Number of K/V pairs in a cache: base blocks first, then the branch's."""
        return len(self.base.blocks) + len(self.branch_blocks)

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth in base and branch from here on: `rate` at the base's last block, 0 switches it off.

        Blocks drop in training mode alone. A frozen base drops too while its branch trains, so put the whole of this
        module in training mode, and not the branch alone.
        """
        rates = drop_path_rates(rate, len(self.base.blocks))
        for blocks in (self.base.blocks, self.branch_blocks):
            for block, block_rate in zip(blocks, rates, strict=False):
                block.drop_path_rate = block_rate

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
        sides: Sequence[int] = (),
    ) -> Tensor:
        """Embedded inputs (without positions) of base and branch → logits f32 [R, N, V].

        c is None without control. With a cache the N tokens are one scale; without, those of the scales `sides`.
        A trace names `sides` with a cache too: a symbolic N has no root.
        """
        # With a cache all is token-major, as the cache is: no transpose stands between any two products of a block.
        rows_first = cache is None
        rows = (
            modulation_RMC.split(1, dim=1)
            if rows_first
            else modulation_RMC.transpose(0, 1).contiguous().split(1, dim=0)
        )
        x = x_RNC + position_NC if rows_first else tokens_first(x_RNC + position_NC)
        depth = len(self.base.blocks)
        outputs: list[Tensor] = []
        if self.branch is not None and c_RNC is not None:
            c = c_RNC + position_NC if rows_first else tokens_first(c_RNC + position_NC)
            outputs = self.branch(c, rows[6 * depth : -2], cache, depth, sides)
        first = depth - len(outputs)
        for i, block in enumerate(self.base.blocks):
            if i >= first:
                assert self.branch is not None
                x = self.branch.fusions[i - first](x, outputs.pop())  # the branch's last output first
            x = block(x, rows[6 * i : 6 * i + 6], cache, i, sides)
        logits = self.base.logits(x, rows[-2], rows[-1])
        return logits if rows_first else logits.transpose(0, 1)

    def forward(self, label_B: Tensor, inputs_BlZ: Tensor, controls: Sequence[Tensor] | None = None) -> Tensor:
        """Teacher forcing: logits f32 [B, L, V].

        label: int64 [B]. inputs: f32 [B, L-1, Z], f̂ at the sizes of scales 2…K (`MultiScaleQuantizer.decode`).
        controls: one f32 [B or 1, 3, S·f, S·f] in [-1, 1] per scale, or None for the base alone.
        """
        base, start = self.base, self.base.start(label_B)
        x = torch.cat([start, base.embed(inputs_BlZ)], 1)
        c = None
        if controls is not None:
            assert self.branch is not None, "controls given to a model without a control branch"
            c = self.branch.inject_all(start, inputs_BlZ, base.word_embedding, controls, base.sides)
        return self.trunk(x, c, base.position(), self.modulations(label_B), sides=base.sides)


@torch.no_grad()
def calibrate_fusion(car: CAR, label_B: Tensor, inputs_BlZ: Tensor, controls: Sequence[Tensor]) -> None:
    """Let a fresh branch start as its base, whatever its fusion is; leaves the model in eval mode.

    label, inputs, controls: one batch, as `CAR.forward` takes it. A concat fusion is given the deviation that it
    meets there, fusion after fusion in one pass, so that each is measured behind the calibrated ones before it. The
    other fusions start as the base by themselves.
    """
    assert car.branch is not None, "calibrate_fusion needs a branch"
    car.eval()

    def calibrate(fusion: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        assert isinstance(fusion, ConcatFusion)
        fusion.calibrate(*inputs)

    concats = [fusion for fusion in car.branch.fusions if isinstance(fusion, ConcatFusion)]
    hooks = [fusion.register_forward_pre_hook(calibrate) for fusion in concats]
    try:
        if hooks:
            car(label_B, inputs_BlZ, controls)
    finally:
        for hook in hooks:
            hook.remove()
