"""The autoregressive baseline of VAR (table 3): the same transformer, one token at a time in raster order.

Nothing but the order differs: a sequence of scales of one token each is a causal mask, and a token's input is the
code before it instead of f̂ at its size. The tokenizer has the scales 1 and E alone, so that an image is one token and
then the raster of its latent, E² tokens; coarse scales between are what a VAR has more.

Shapes as in `car_train.model.var`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from car_train.model import Model
from car_train.model.sample import draw, limits, mix
from car_train.model.var import KVCache
from car_train.model.vqvae import join_tokens, split_tokens
from car_train.sampling import CAR
from car_train.training.stages import Batch, TransformerStage


def raster_logits(model: Model, label_B: Tensor, tokens_BL: Tensor) -> Tensor:
    """Teacher forcing: f32 [B, L, V] for every token, given those before it.

    label: int64 [B]. tokens: int64 [B, L].
    """
    car = model.car
    assert car is not None, "config.var"
    before_BlZ = F.embedding(tokens_BL[:, :-1], model.vqvae.quantizer.embedding)
    x_BLC = torch.cat([car.base.start(label_B), car.base.embed(before_BlZ)], 1)
    ones = (1,) * tokens_BL.shape[1]
    return car.trunk(x_BLC, None, car.base.position(), car.modulations(label_B), sides=ones)


@torch.no_grad()
def raster_sample(
    model: Model, label_B: Tensor, uniforms_BL: Tensor, cfg: float = 0.0, top_k: int = 0, top_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Generate: (tokens int64 [B, L], pixels f32 [B, 3, H, W] in [-1, 1]); arguments as of `sample`.

    Guidance grows with the token's place as `sample`'s grows with its scale.
    """
    car, config = model.car, model.config.vqvae
    assert car is not None, "config.var"
    base, B, L = car.base, len(label_B), config.tokens
    k_keep, p_keep = limits(top_k, top_p, config.vocab)
    rows_R = torch.cat([label_B, torch.full_like(label_B, base.config.classes)]) if cfg else label_B
    R, H = len(rows_R), base.config.H
    modulation, position = car.modulations(rows_R), base.position()
    cache = KVCache(car.layers, L, R, H, base.config.C // H, like=base.blocks[0].attn.qkv_weight)
    x_R1C, drawn = base.start(rows_R), []
    for n in range(L):
        logits_R1V = car.trunk(x_R1C, None, position[n : n + 1], modulation, cache)
        cache.advance(1)
        token_B1 = draw(mix(logits_R1V, cfg * n / (L - 1), B), uniforms_BL[:, n : n + 1], k_keep, p_keep)
        drawn.append(token_B1)
        x_R1C = base.embed(F.embedding(token_B1, model.vqvae.quantizer.embedding)).repeat(R // B, 1, 1)
    tokens_BL = torch.cat(drawn, 1)
    return tokens_BL, model.vqvae.decode(split_tokens(tokens_BL, config.sides))


class RasterStage(TransformerStage):
    """Next-token cross-entropy, averaged over all L tokens; logs what `TransformerStage` logs."""

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        label, base = batch["label"], self.car.base
        grids, _ = self._teacher_forcing(batch)
        if self.trainable.training:
            label = torch.where(batch["drop"] < base.config.label_dropout, base.config.classes, label)
        target = join_tokens(grids)
        logits = raster_logits(self.model, label, target)
        each_BL = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        hit, last = (logits.argmax(-1) == target).float(), self.model.config.vqvae.sides[-1] ** 2
        metrics = {"accuracy": hit.mean(), "loss_last": each_BL[:, -last:].mean()}
        return each_BL.mean(), metrics | {"accuracy_last": hit[:, -last:].mean()}

    def samples(self, batch: Batch) -> dict[str, Tensor]:
        config = self.model.config.vqvae
        uniforms = torch.rand(len(batch["image"]), config.tokens, generator=torch.Generator().manual_seed(0))
        top_k = min(CAR.top_k, config.vocab)
        drawn = raster_sample(self.model, batch["label"], uniforms, CAR.cfg, top_k, CAR.top_p)[1]
        return {"drawn": drawn, "real": batch["image"]}
