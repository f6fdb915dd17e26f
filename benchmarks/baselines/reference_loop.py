"""CAR's sampling loop in PyTorch the way it is published, to measure ours against.

Same weights, same arithmetic and, in float32, the same tokens as `car_train.model.sample.sample`. What differs is how
it is arranged, as in the published code:

- the six AdaLN vectors of every block are computed from the class again at every scale;
- the K/V cache is grown by `torch.cat`, so that every scale copies the past of every block;
- the control encoder runs inside the loop, once a scale, for every image of the batch;
- everything is eager; in bfloat16 it is autocast over float32 weights, which are cast again in every product.

It has what eager PyTorch offers as well: `scaled_dot_product_attention`, one product for q, k and v, no gradients.
Sampling is ours (sort, softmax, inverse CDF on given uniform numbers), so that tokens can be compared.

Models with a convolutional encoder, transformer blocks and concatenation in the branch (the published ones), or with
no branch. Shapes: B images, R rows, N tokens of this scale, C width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.errors import BenchmarkError
from car_train.model import Model
from car_train.model.car import ConcatFusion
from car_train.model.sample import draw, limits, mix
from car_train.model.var import EPS, MAX_LOG_SCALE, VAR, Attention, Block, unit_length
from car_train.model.vqvae import join_tokens

Clock = Callable[[str, float], None]
"""Receives the seconds of "control" (once a scale), of "scale_0" … without it, and of "decoder"."""


class GrownCache:
    """Keys and values of the scales so far, [R, H, T, d] per block, copied into a longer tensor at each."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k_RHNd: Tensor, v_RHNd: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self._seen:
            k, v = self._seen[layer]
            k_RHNd, v_RHNd = torch.cat((k, k_RHNd), dim=2), torch.cat((v, v_RHNd), dim=2)
        self._seen[layer] = (k_RHNd, v_RHNd)
        return k_RHNd, v_RHNd


def attend(attention: Attention, x_RNC: Tensor, cache: GrownCache, layer: int) -> Tensor:
    """One attention over this scale and all before it."""
    R, N, C = x_RNC.shape
    bias = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
    qkv = F.linear(x_RNC, attention.qkv_weight, bias).view(R, N, 3, attention.heads, C // attention.heads)
    q_RHNd, k_RHNd, v_RHNd = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    assert attention.log_scale_H is not None, "published models have attention norm"
    scale_H11 = attention.log_scale_H.clamp_max(MAX_LOG_SCALE).exp()[:, None, None]
    q_RHNd = (unit_length(q_RHNd) * scale_H11).to(v_RHNd.dtype)
    k_RHTd, v_RHTd = cache.append(layer, unit_length(k_RHNd).to(v_RHNd.dtype), v_RHNd)
    out_RHNd = F.scaled_dot_product_attention(q_RHNd, k_RHTd, v_RHTd, scale=1.0)
    return attention.proj(out_RHNd.transpose(1, 2).reshape(R, N, C))


def run_block(
    block: Block, x_RNC: Tensor, cond_RC: Tensor, shared_R6C: Tensor | None, cache: GrownCache, layer: int
) -> Tensor:
    """One block, with its AdaLN computed on the spot."""
    gamma1, gamma2, scale1, scale2, shift1, shift2 = block.modulation(cond_RC, shared_R6C).split(1, dim=1)
    h = F.layer_norm(x_RNC, x_RNC.shape[-1:], eps=EPS) * (1 + scale1) + shift1
    x_RNC = x_RNC + attend(block.attn, h, cache, layer) * gamma1
    h = F.layer_norm(x_RNC, x_RNC.shape[-1:], eps=EPS) * (1 + scale2) + shift2
    return x_RNC + block.mlp(h) * gamma2


def shared_modulation(base: VAR, cond_RC: Tensor) -> Tensor | None:
    """The projection that blocks with `shared_aln` have in common, [R, 6, C]."""
    return None if base.shared_ada_linear is None else base.shared_ada_linear(cond_RC).view(len(cond_RC), 6, -1)


def check_published(model: Model) -> None:
    """BenchmarkError for a model whose loop was never published."""
    if model.car is None:
        raise BenchmarkError("the checkpoint holds a tokenizer only; give one with a transformer")
    if model.config.car is not None:
        parts = (model.config.car.encoder, model.config.car.transformer, model.config.car.fusion)
        if parts != ("conv", "blocks", "concat"):
            raise BenchmarkError(
                f"the branch is made of {', '.join(parts)}, and the published loop has conv, blocks, concat; "
                "give another checkpoint, or leave the loop out with --no-reference"
            )


@torch.inference_mode()
def sample_published(
    model: Model,
    label_B: Tensor,
    uniforms_BL: Tensor,
    controls: Sequence[Tensor] | None = None,
    *,
    cfg: float = 4.0,
    top_k: int = 0,
    top_p: float = 0.0,
    dtype: torch.dtype = torch.float32,
    clock: Clock | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Generate as `car_train.model.sample.sample` does: (tokens int64 [B, L], pixels f32 [B, 3, H, W] in [-1, 1]).

    controls: one f32 [B, 3, S·f, S·f] in [-1, 1] per scale. Guidance is always on. dtype: float32, or bfloat16 or
    float16 for autocast over all of it, the decoder too. `clock` receives each stage's seconds; on a GPU every stage
    is waited for then, so leave it out where the whole is timed. compiled: the transformer and the decoder under
    `torch.compile`; the first images compile.
    """
    check_published(model)
    device = label_B.device
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
        return _Loop(model, label_B, cfg, top_k, top_p, clock, compiled).run(uniforms_BL, controls)


class _Loop:
    """One call's settings and cache."""

    def __init__(
        self,
        model: Model,
        label_B: Tensor,
        cfg: float,
        top_k: int,
        top_p: float,
        clock: Clock | None,
        compiled: bool,
    ):
        assert model.car is not None
        self.vqvae, self.base, self.branch = model.vqvae, model.car.base, model.car.branch
        self.B, self.cfg, self.clock = len(label_B), cfg, clock
        self.rows = torch.cat([label_B, torch.full_like(label_B, self.base.config.classes)])
        self.top_k, self.top_p = limits(top_k, top_p, self.vqvae.config.vocab, label_B.device)
        self.cache = GrownCache()
        # What is compiled is found again by its code: a new loop for every image compiles nothing anew.
        wrap: Callable[..., Callable[..., Tensor]] = torch.compile if compiled else lambda function: function
        self.run_trunk, self.decode = wrap(self.trunk), wrap(self.vqvae.decode_latent)

    def run(self, uniforms_BL: Tensor, controls: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        config, quantizer, base = self.vqvae.config, self.vqvae.quantizer, self.base
        E, device = config.latent_size, self.rows.device
        cond_RC = F.silu(base.class_embedding(self.rows))
        x_RSSC = base.start(self.rows)[:, None]
        position_LC = base.position()
        f_hat = torch.zeros(self.B, config.latent_channels, E, E, device=device)
        grids: list[Tensor] = []
        for k, (side, (start, stop)) in enumerate(zip(config.sides, config.ranges, strict=True)):
            features = self.control_features(controls[k]) if controls is not None else None
            began = self.now()
            logits_RNV = self.run_trunk(x_RSSC, features, position_LC[start:stop], cond_RC)
            logits_BNV = mix(logits_RNV.float(), self.cfg * config.ratios[k], self.B)
            tokens_BN = draw(logits_BNV, uniforms_BL[:, start:stop], self.top_k, self.top_p)
            grids.append(tokens_BN.view(self.B, side, side))
            f_hat = f_hat + quantizer.contribution(F.embedding(grids[-1], quantizer.embedding), k)
            if k + 1 < len(config.sides):
                x_RSSC = base.embed(quantizer.next_input(f_hat, k)).repeat(2, 1, 1, 1)
            self.report(f"scale_{k}", began)
        began = self.now()
        pixels = self.decode(f_hat)
        self.report("decoder", began)
        return join_tokens(grids), pixels

    def control_features(self, control_B3HW: Tensor) -> Tensor:
        """𝓕 of one scale, for both guidance rows of every image, [R, N, C]."""
        assert self.branch is not None, "controls given to a model without a control branch"
        began = self.now()
        features = self.branch.features(control_B3HW).repeat(2, 1, 1)
        self.report("control", began)
        return features

    def trunk(self, x_RSSC: Tensor, features: Tensor | None, position_NC: Tensor, cond_RC: Tensor) -> Tensor:
        """Logits [R, N, V] of one scale."""
        base, blocks = self.base, self.base.blocks
        shared = shared_modulation(base, cond_RC)
        outputs: list[Tensor] = []
        if features is not None:
            assert self.branch is not None
            c = self.branch.inject(x_RSSC, features) + position_NC
            for j, block in enumerate(self.branch.attention_blocks):
                c = run_block(block, c, cond_RC, shared, self.cache, len(blocks) + j)
                outputs.append(c)
        first = len(blocks) - len(outputs)
        x = x_RSSC.flatten(1, 2) + position_NC
        for i, block in enumerate(blocks):
            if i >= first:
                assert self.branch is not None
                fusion = self.branch.fusions[i - first]
                assert isinstance(fusion, ConcatFusion)
                x = fusion.linear(fusion.norm(torch.cat((x, outputs.pop()), -1)))
            x = run_block(block, x, cond_RC, shared, self.cache, i)
        assert base.head_ada_linear is not None, "published models have AdaLN"
        scale, shift = base.head_ada_linear(cond_RC).view(len(cond_RC), 2, -1).split(1, dim=1)
        return base.head(F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift)

    def now(self) -> float:
        if self.clock is not None and self.rows.device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter()

    def report(self, stage: str, began: float) -> None:
        if self.clock is not None:
            self.clock(stage, self.now() - began)
