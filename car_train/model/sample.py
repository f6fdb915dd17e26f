"""The reference loop: next-scale sampling in PyTorch (CAR algorithm 1, VAR section 3.2).

It is also the sampling definition of the exported graphs.

Randomness comes in as one uniform number per token, so that every backend draws the same image from the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from car_train.model.car import CAR
from car_train.model.var import KVCache
from car_train.model.vqvae import VQVAE, join_tokens

TOP_P_OFF = 2.0
"""More than all the probability there is: every token is kept."""


def mix(logits_RNV: Tensor, t: Tensor | float, images: int) -> Tensor:
    """Classifier-free guidance, (1 + t)·cond − t·uncond.

    The first `images` rows are conditional, the last ones are not.
    With as many rows as images both are the same rows, and guidance is off.
    """
    cond, uncond = logits_RNV[:images], logits_RNV[logits_RNV.shape[0] - images :]
    return (1 + t) * cond - t * uncond


def limits(top_k: int, top_p: float, vocab: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Settings, where 0 is off, as `keep_top` takes them: int64 [1] and f32 [1]."""
    p = top_p if 0 < top_p < 1 else TOP_P_OFF
    return torch.tensor([top_k or vocab], device=device), torch.tensor([p], device=device)


def keep_top(logits_NV: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The logits f32 [..., N, V] with -inf for every token that top-k and top-p leave out.

    top_k: int64 [1], 1…V (V keeps all). top_p: f32 [1]; `TOP_P_OFF` keeps all.

    Kept are the logits not below the k-th largest and, of these, from the most probable downward, those before which
    less than top_p of the probability has passed. Ties at a border stay together.
    """
    ranked = logits_NV.sort(dim=-1, descending=True).values
    kept = ranked >= ranked.index_select(-1, top_k - 1)
    p = ranked.masked_fill(~kept, -torch.inf).softmax(-1)
    kept = kept & (p.cumsum(-1) - p < top_p)
    border = ranked.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    return logits_NV.masked_fill(logits_NV < border, -torch.inf)


def draw_kept(kept_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """One categorical draw per row by inverse CDF, int64 [..., N]; kept as `keep_top` returns it.

    uniforms: f32 [..., N] in [0, 1). The first token, in vocabulary order, whose running sum exceeds uniform × total.
    """
    cdf = kept_NV.softmax(-1).cumsum(-1)
    return (cdf <= uniforms_N[..., None] * cdf[..., -1:]).sum(-1)


def draw(logits_NV: Tensor, uniforms_N: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """`keep_top`, then `draw_kept`: one token per row, int64 [..., N]."""
    return draw_kept(keep_top(logits_NV, top_k, top_p), uniforms_N)


def smooth_codes(kept_NV: Tensor, noise_NV: Tensor, ratio: Tensor, codes_VZ: Tensor) -> Tensor:
    """`more_smooth` of the published code: a Gumbel-softmax mixture of the kept codes, f32 [..., N, Z].

    kept: as `keep_top` returns it. noise: f32 [..., N, V], standard Gumbel. ratio: f32 [1], where the scale stands
    between coarse (0) and fine (1); temperature max(0.27·(1 − 0.95·ratio), 0.005). codes: the codebook.
    """
    temperature = (0.27 * (1 - 0.95 * ratio)).clamp_min(0.005)
    return ((kept_NV * (1 + ratio) + noise_NV) / temperature).softmax(-1) @ codes_VZ


def gumbel_noise(seeds: Sequence[int], tokens: int, vocab: int) -> Tensor:
    """The noise of `smooth_codes` of one image per seed, f32 [B, L, V]: the same on every machine, up to a logarithm.

    −log of the standard exponential float32 numbers of numpy's default generator, seeded with [seed, 1]: a stream
    next to that of the uniform numbers. The exponential numbers are at least 2^-100, so that all noise is finite.
    """
    exponential = [
        np.random.default_rng([seed, 1]).standard_exponential((tokens, vocab), dtype=np.float32) for seed in seeds
    ]
    return torch.from_numpy(-np.log(np.maximum(np.stack(exponential), np.float32(2**-100))))


def control_pyramid(control: Image.Image, sizes: Sequence[int]) -> list[Tensor]:
    """A control image at every scale's size, f32 [1, 3, s, s] in [-1, 1].

    Pillow's default filter, as the published data loader.
    """
    images = [np.asarray(control.convert("RGB").resize((s, s))) for s in sizes]
    return [torch.from_numpy(i.copy()).permute(2, 0, 1)[None].float() / 255 * 2 - 1 for i in images]


@dataclass
class Recording:
    """What went into and came out of every scale of one run: the exporter's goldens."""

    scales: list[dict[str, Tensor]] = field(default_factory=list)
    cache: KVCache | None = None


@torch.no_grad()
def sample(
    vqvae: VQVAE,
    model: CAR,
    label_B: Tensor,
    uniforms_BL: Tensor,
    controls: Sequence[Tensor] | None = None,
    cfg: float = 4.0,
    top_k: int = 0,
    top_p: float = 0.0,
    record: Recording | None = None,
    smooth_noise_BLV: Tensor | None = None,
    known_BL: Tensor | None = None,
    known_mask_BL: Tensor | None = None,
    decoded: bool = True,
    make_cache: Callable[..., KVCache] = KVCache,
) -> tuple[Tensor, Tensor]:
    """Generate: (tokens int64 [B, L], pixels f32 [B, 3, H, W] in [-1, 1]).

    label: int64 [B] in 0…classes (`classes` is "no class"). uniforms: f32 [B, L] in [0, 1). controls as in
    `CAR.forward`. top_k 0 and top_p 0 keep everything; cfg 0 is off, as it is when no image has a class. `record`
    collects what went into and came out of every scale.
    smooth_noise: `gumbel_noise`, for `smooth_codes` instead of each token's own code (`more_smooth`: for looks, not
    for evaluation); None is off.
    known, known_mask: int64 and bool [B, L], tokens to keep instead of drawn ones where the mask is true (VAR section
    6).
    decoded: False for the tokens alone; the pixels are then f32 [B, 3, 0, 0].
    make_cache: called as `KVCache` is; another one may show attention less than all.
    """
    quantizer, base = vqvae.quantizer, model.base
    config, B = vqvae.config, label_B.shape[0]
    k_keep, p_keep = limits(top_k, top_p, config.vocab, label_B.device)
    if (label_B == base.config.classes).all():
        cfg = 0.0  # nothing to guide: both kinds of rows would be the same
    rows = torch.cat([label_B, torch.full_like(label_B, base.config.classes)]) if cfg else label_B
    R, C, H = rows.shape[0], base.config.C, base.config.H
    modulation, position = model.modulations(rows), base.position()
    cache = make_cache(model.layers, config.tokens, R, H, C // H, like=base.blocks[0].attn.qkv_weight)
    x_RSSC = base.start(rows)[:, None]
    f_hat = torch.zeros(B, config.latent_channels, config.latent_size, config.latent_size, device=label_B.device)
    grids: list[Tensor] = []
    for k, (side, (start, stop), ratio) in enumerate(zip(config.sides, config.ranges, config.ratios, strict=True)):
        features = c = None
        if controls is not None:
            assert model.branch is not None, "controls given to a model without a control branch"
            features = model.branch.features(controls[k])
            # The control reaches both guidance rows; one control for all images broadcasts.
            own = features.shape[0] > 1
            c = model.branch.inject(x_RSSC, features.repeat(R // B, 1, 1) if own else features)
        logits_RNV = model.trunk(x_RSSC.flatten(1, 2), c, position[start:stop], modulation, cache)
        cache.advance(stop - start)
        logits_BNV = mix(logits_RNV, cfg * ratio, B)
        kept_BNV = keep_top(logits_BNV, k_keep, p_keep)
        tokens_BN = draw_kept(kept_BNV, uniforms_BL[:, start:stop])
        given_BN = torch.zeros_like(tokens_BN, dtype=torch.bool)
        if known_BL is not None and known_mask_BL is not None:
            given_BN = known_mask_BL[:, start:stop]
            tokens_BN = torch.where(given_BN, known_BL[:, start:stop], tokens_BN)
        tokens_BSS, codes_BNZ = tokens_BN.view(B, side, side), F.embedding(tokens_BN, quantizer.embedding)
        if smooth_noise_BLV is not None:
            noise_BNV, at = smooth_noise_BLV[:, start:stop], torch.tensor([ratio], device=label_B.device)
            smooth_BNZ = smooth_codes(kept_BNV, noise_BNV, at, quantizer.embedding)
            codes_BNZ = torch.where(given_BN[..., None], codes_BNZ, smooth_BNZ)
        codes_BSSZ = codes_BNZ.unflatten(1, (side, side))
        before, f_hat = f_hat, f_hat + quantizer.contribution(codes_BSSZ, k)
        grids.append(tokens_BSS)
        if record is not None:
            scale = {"x": x_RSSC, "f_hat": before, "f_hat_out": f_hat, "logits": logits_BNV, "tokens": tokens_BSS}
            record.scales.append({**scale, "control": features} if features is not None else scale)
            record.cache = cache
        if k + 1 < len(config.sides):
            x_RSSC = base.embed(quantizer.next_input(f_hat, k)).repeat(R // B, 1, 1, 1)
    return join_tokens(grids), vqvae.decode_latent(f_hat) if decoded else f_hat.new_zeros(B, 3, 0, 0)
