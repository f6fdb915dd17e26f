"""How many tokens change when only a part of the keys and values is kept: a static choice per layer and scale.

ScaleKV (arXiv 2505.19602) and HACK (arXiv 2504.15932) keep what is attended to. Here, for each layer and scale, the
share of places that received most attention, summed over heads, rows and later queries of calibration images of other
seeds; a first token is always kept. Two ways of leaving the others out:

    past    a scale sees itself whole and what is kept of those before it; only what is kept stays in memory after it
    all     nothing else is ever a key, not within its own scale either: the whole cache is as small as the budget

Tokens are compared with the whole cache's, greedily (the most probable one) and sampled by the same uniform numbers:
`given` the same tokens at all coarser scales, which is what a single step changes, and `drawn` freely, where a token
that changed changes those after it.

Shapes: A layers of base and branch, L tokens of an image, B images; the others as in `car_train.model.var`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from car_train.evaluation.generate import uniform_numbers
from car_train.model import Model
from car_train.model.kernels import linear
from car_train.model.sample import Recording, draw_kept, keep_top, limits, sample
from car_train.model.var import Attention, KVCache
from car_train.sampling import Sampling

WAYS = ("past", "all")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Images to draw."""

    labels: Tensor
    """int64 [B]."""
    uniforms: Tensor
    """f32 [B, L] in [0, 1)."""
    controls: list[Tensor] | None
    """One f32 [B, 3, S·f, S·f] per scale; None without a branch."""
    sampling: Sampling


class BudgetCache(KVCache):
    """A cache that shows only some of its places."""

    def __init__(self, kept_AL: Tensor, way: str, *size: Any, **like: Any):
        super().__init__(*size, **like)
        self.kept_AL, self.way = kept_AL, way

    def append(self, layer: int, k_NRHd: Tensor, v_NRHd: Tensor) -> tuple[Tensor, Tensor]:
        k_TRHd, v_TRHd = super().append(layer, k_NRHd, v_NRHd)
        kept_T = self.kept_AL[layer, : len(k_TRHd)].clone()
        if self.way == "past":
            kept_T[self.start :] = True
        return k_TRHd[kept_T], v_TRHd[kept_T]


@contextmanager
def attention_received(model: Model) -> Iterator[tuple[Tensor, Tensor]]:
    """Within: what sampling attends to, f64 [A, L] each, received from later scales and from the own one.

    Sums over queries and rows, means over heads: every query gives 1.
    """
    car = model.car
    assert car is not None, "config.var"
    later_AL, own_AL = torch.zeros(2, car.layers, model.config.vqvae.tokens, dtype=torch.float64)

    def add(attention: nn.Module, given: tuple[Any, ...], _: Tensor) -> None:
        assert isinstance(attention, Attention)
        x_NRC, cache, layer, _ = given
        (N, R, C), H = x_NRC.shape, attention.heads
        q, k, _ = linear(x_NRC, attention.qkv_weight).split(C, dim=-1)
        q_NRHd, _ = attention.scaled(q, k, (N, R, H, C // H), x_NRC.dtype)
        k_TRHd = cache.k_LTRHd[layer, : cache.start + N]
        weights_RHNT = torch.einsum("nrhd,trhd->rhnt", q_NRHd, k_TRHd).softmax(-1)
        received_T = weights_RHNT.double().mean(1).sum((0, 1))
        later_AL[layer, : cache.start] += received_T[: cache.start]
        own_AL[layer, cache.start : cache.start + N] += received_T[cache.start :]

    blocks = [*car.base.blocks, *car.branch_blocks]
    hooks = [block.attn.register_forward_hook(add) for block in blocks]
    try:
        yield later_AL, own_AL
    finally:
        for hook in hooks:
            hook.remove()


def choose(received_AL: Tensor, sides: Sequence[int], budget: float) -> Tensor:
    """The places to keep, bool [A, L]: of each layer and scale the ⌈budget·S²⌉ that received most."""
    kept_AL, start = torch.zeros_like(received_AL, dtype=torch.bool), 0
    for side in sides:
        n = side * side
        ranked = received_AL[:, start : start + n].argsort(dim=1, descending=True, stable=True)
        kept_AL.scatter_(1, start + ranked[:, : math.ceil(budget * n)], True)
        start += n
    return kept_AL


def draw(model: Model, request: Request, cache: Any = KVCache, given_BL: Tensor | None = None) -> tuple[Tensor, ...]:
    """(greedy tokens of every place, sampled ones), int64 [B, L] each, by a kind of cache.

    given: the tokens that the coarser scales have; None: they are drawn, those of each result by itself.
    """
    car, s = model.car, request.sampling
    assert car is not None, "config.var"
    common: dict[str, Any] = {
        "vqvae": model.vqvae,
        "model": car,
        "label_B": request.labels,
        "controls": request.controls,
    }
    common |= {"uniforms_BL": request.uniforms, "cfg": s.cfg, "decoded": False, "make_cache": cache}
    if given_BL is None:
        return sample(**common, top_k=1)[0], sample(**common, top_k=s.top_k, top_p=s.top_p)[0]
    seen = Recording()
    everywhere = torch.ones_like(given_BL, dtype=torch.bool)
    sample(**common, record=seen, known_BL=given_BL, known_mask_BL=everywhere)
    logits_BLV = torch.cat([scale["logits"] for scale in seen.scales], 1)
    return logits_BLV.argmax(-1), sampled(logits_BLV, request)


def sampled(logits_BLV: Tensor, request: Request) -> Tensor:
    """The tokens that a request's settings and uniform numbers draw, int64 [B, L]."""
    s = request.sampling
    return draw_kept(keep_top(logits_BLV, *limits(s.top_k, s.top_p, logits_BLV.shape[-1])), request.uniforms)


def changed(model: Model, calibration: Request, request: Request, budgets: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each way and budget: what is kept, and the shares of tokens that change."""
    sides = model.config.vqvae.sides
    with torch.no_grad(), attention_received(model) as (later_AL, own_AL):
        draw(model, calibration)
    whole = draw(model, request)
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        for budget in budgets:
            # What a scale keeps for later ones is what these attend to; the last has none.
            kept_AL = choose(later_AL if way == "past" else later_AL + own_AL, sides, budget)
            cache = partial(BudgetCache, kept_AL, way)
            row = {"left out of": way, "budget": budget, "bytes": kept_share(kept_AL, sides, way)}
            free = draw(model, request, cache)
            for k, name in enumerate(("greedy", "sampled")):
                given = draw(model, request, cache, whole[k])[k]  # the whole cache gives whole[k] again
                row[f"{name}, given"] = (given != whole[k]).double().mean().item()
                row[f"{name}, drawn"] = (free[k] != whole[k]).double().mean().item()
            rows.append(row)
    return rows


def kept_share(kept_AL: Tensor, sides: Sequence[int], way: str) -> float:
    """Bytes of the cache that are needed at most, vs. the whole cache: with `past`, those of the last scale whole."""
    stored = kept_AL.clone()
    if way == "past":
        stored[:, -(sides[-1] ** 2) :] = True
    return stored.double().mean().item()


def make_request(
    model: Model, first_seed: int, images: int, controls: Sequence[Sequence[Tensor]], sampling: Sampling
) -> Request:
    """Images of seeds from `first_seed` on, of all classes in turn, with the control images in turn."""
    assert model.config.var is not None, "config.var"
    classes, L = model.config.var.classes, model.config.vqvae.tokens
    seeds = range(first_seed, first_seed + images)
    pyramid = [
        torch.cat([controls[seed % len(controls)][k] for seed in seeds])
        for k in range(len(model.config.vqvae.sides) if controls else 0)
    ]
    label_B = torch.tensor([seed % classes for seed in seeds])
    return Request(labels=label_B, uniforms=uniform_numbers(seeds, L), controls=pyramid or None, sampling=sampling)
