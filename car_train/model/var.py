"""The VAR transformer (arXiv 2404.02905, section 3.3): next-scale prediction with AdaLN conditioning.

Shapes: R rows (images, or twice as many with classifier-free guidance), N tokens of this call, T tokens seen (past
and present), L tokens of an image, C width, H heads, d = C/H, V vocabulary, Z latent channels, D depth,
M = modulation rows.

Types: the residual stream, norms, softmax and logits are float32 whatever the weights are; matrix products run in
the weights' type. In float32 all the casts vanish.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from car_train.config import ModelConfig, VARConfig
from car_train.model.kernels import Linear, attend, linear

EPS = 1e-6
MAX_LOG_SCALE = math.log(100)
ALNG = 1e-5
"""Scale of the γ rows of AdaLN at first, unless another is asked for."""
COARSE_TOKENS = 160
"""Teacher forcing: scales that end before this share one masked square."""
SomeModule = TypeVar("SomeModule", bound=nn.Module)


class Cache(Protocol):
    """Where attention finds the keys and values of the coarser scales."""

    def append(self, layer: int, k_NRHd: Tensor, v_NRHd: Tensor) -> tuple[Tensor, Tensor]:
        """Store this scale's keys and values; return all that this scale may see, token-major [T, R, H, d]."""
        ...


class KVCache:
    """Keys and values of all scales, one preallocated token-major array per layer.

    The past is a prefix, a scale is a slot.
    """

    def __init__(self, layers: int, tokens: int, rows: int, heads: int, head_width: int, like: Tensor):
        shape = (layers, tokens, rows, heads, head_width)
        self.k_LTRHd, self.v_LTRHd = like.new_empty(shape), like.new_empty(shape)
        self.start = 0

    def append(self, layer: int, k_NRHd: Tensor, v_NRHd: Tensor) -> tuple[Tensor, Tensor]:
        stop = self.start + k_NRHd.shape[0]
        self.k_LTRHd[layer, self.start : stop] = k_NRHd
        self.v_LTRHd[layer, self.start : stop] = v_NRHd
        return self.k_LTRHd[layer, :stop], self.v_LTRHd[layer, :stop]

    def advance(self, tokens: int) -> None:
        """The scale is done in every layer: its slot becomes past."""
        self.start += tokens


def module_list(modules: Iterable[SomeModule]) -> Sequence[SomeModule]:
    """An `nn.ModuleList` whose elements keep their type for the type checker."""
    return cast("Sequence[SomeModule]", nn.ModuleList(modules))


class Attention(nn.Module):
    """Multi-head attention on unit-length queries and keys with a learned temperature per head.

    Without `norm` (VAR table 3) they are as long as they are, and scores are divided by 4√d as in the published code.
    """

    def __init__(self, width: int, heads: int, norm: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv_weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.log_scale_H = nn.Parameter(torch.full((heads,), math.log(4.0))) if norm else None
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, cache: Cache | None, layer: int, sides: Sequence[int]) -> Tensor:
        """x [R, N, C] without a cache, token-major [N, R, C] with one → the same."""
        rows_or_tokens, C = x.shape[:2], x.shape[2]
        q, k, v = linear(x, self.qkv_weight).split(C, dim=-1)
        heads = (*rows_or_tokens, self.heads, C // self.heads)
        q, k = self.scaled(q, k, heads, x.dtype)
        v = (v + self.v_bias).view(heads)
        if cache is None:
            return self.proj(self._teacher_forced(q, k, v, sides))
        return self.proj(self._cached(q, *cache.append(layer, k, v)))

    def scaled(self, q: Tensor, k: Tensor, heads: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the projections give, [..., C] → shape `heads`, [..., H, d]: their products are the scores."""
        if self.log_scale_H is None:
            q = (q + self.q_bias).view(heads) * (0.25 / math.sqrt(heads[-1]))
            return q.to(dtype), k.view(heads).to(dtype)
        scale_H1 = self.log_scale_H.float().clamp_max(MAX_LOG_SCALE).exp()[:, None]
        q = (unit_length((q + self.q_bias).view(heads)) * scale_H1).to(dtype)
        return q, unit_length(k.view(heads)).to(dtype)

    @staticmethod
    def _teacher_forced(q_RNHd: Tensor, k_RNHd: Tensor, v_RNHd: Tensor, sides: Sequence[int]) -> Tensor:
        """Block-causal attention: each scale looks at its own prefix, and nothing computed is masked away.

        At the published sides that is 62 % of the work of the masked [L, L] square, and every call takes the
        kernel for full attention. The coarse scales are one small masked square: one call costs less than many.
        """
        q, k, v = (t.transpose(1, 2) for t in (q_RNHd, k_RNHd, v_RNHd))
        ends = list(accumulate(side * side for side in sides))
        coarse = sum(end <= COARSE_TOKENS for end in ends)
        outputs = []
        if coarse:
            scale_N = torch.cat([torch.full((s * s,), i, device=q.device) for i, s in enumerate(sides[:coarse])])
            mask, n = scale_N[:, None] >= scale_N, ends[coarse - 1]
            square = (q[:, :, :n], k[:, :, :n], v[:, :, :n])
            outputs.append(attend(*square, mask))
        for start, stop in pairwise([0, *ends][coarse:]):
            prefix = (q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop])
            outputs.append(attend(*prefix))
        return torch.cat(outputs, 2).transpose(1, 2).flatten(2)

    @staticmethod
    def _cached(q_NRHd: Tensor, k_TRHd: Tensor, v_TRHd: Tensor) -> Tensor:
        """One scale's queries on everything so far; G = R·H independent attentions. [N, R, C]."""
        # Written out, not scaled_dot_product_attention: the exported graph must show the float32 softmax.
        q_GNd, k_GdT = q_NRHd.flatten(1, 2).transpose(0, 1), k_TRHd.flatten(1, 2).permute(1, 2, 0)
        weights_GNT = (q_GNd @ k_GdT).float().softmax(-1).to(v_TRHd.dtype)
        out_GNd = weights_GNT @ v_TRHd.flatten(1, 2).transpose(0, 1)
        return out_GNd.transpose(0, 1).contiguous().view(*q_NRHd.shape[:2], -1)


class MLP(nn.Module):
    """Two linear layers around GELU(tanh): [..., C] → the same; the hidden width is `ratio`·C."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, ratio * width), Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def unit_length(x: Tensor) -> Tensor:
    """Vectors of the last axis divided by their length, in float32."""
    x = x.float()
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth of each of `depth` blocks: linearly from 0 at the first to `rate` at the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth: zero whole rows of [R, N, C] with probability `rate` and scale the rest up."""
    keep = torch.empty(x.shape[0], 1, 1, device=x.device).bernoulli_(1 - rate)
    return x * (keep / (1 - rate)).to(x.dtype)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """LN(x)·(1 + scale) + shift in float32, then cast to `dtype`, that of the matrix product that follows.

    x: [..., C], any float type. scale, shift: f32, broadcast against x."""
    return (F.layer_norm(x.float(), x.shape[-1:], eps=EPS) * (1 + scale) + shift).to(dtype)


class Block(nn.Module):
    """One transformer block, for base and branch, teacher forcing, sampling and export alike."""

    def __init__(self, config: VARConfig, drop_path_rate: float):
        super().__init__()
        C = config.C
        self.attn, self.mlp = Attention(C, config.H, config.attn_norm), MLP(C, config.mlp_ratio)
        # γ1, γ2, scale1, scale2, shift1, shift2: an own projection, or an offset to the shared one; or γ is 1 and the
        # others are the same for every class.
        self.ada_linear = nn.Linear(C, 6 * C) if config.adaln and not config.shared_aln else None
        self.ada_offset = nn.Parameter(torch.zeros(6, C)) if config.shared_aln else None
        self.norm_4C = None if config.adaln else nn.Parameter(torch.zeros(4, C))
        self.drop_path_rate = drop_path_rate
        """Training only: probability that a row skips the attention, and that it skips the MLP."""
        self.activation_checkpointing = False
        """Training only: keep no activations, compute them again in the backward pass."""

    def modulation(self, cond_RC: Tensor, shared_R6C: Tensor | None) -> Tensor:
        """SiLU(condition) → [R, 6, C] f32; depends on the class alone."""
        if self.norm_4C is not None:
            plain_6C = torch.cat([torch.ones_like(self.norm_4C[:2]), self.norm_4C]).float()
            return plain_6C.expand(cond_RC.shape[0], -1, -1)
        if self.ada_linear is None:
            assert shared_R6C is not None
            assert self.ada_offset is not None
            return shared_R6C + self.ada_offset.float()
        return self.ada_linear(cond_RC).view(cond_RC.shape[0], 6, -1).float()

    def forward(
        self,
        x: Tensor,
        modulation: Sequence[Tensor],
        cache: Cache | None = None,
        layer: int = 0,
        sides: Sequence[int] = (),
    ) -> Tensor:
        """x f32 → the same: [R, N, C] of the scales `sides`, or with a cache token-major [N, R, C] of one scale.

        `modulation`: the six f32 of `modulation()`, each [R, 1, C] or, with a cache, [1, R, C].
        """
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self._forward, x, modulation, cache, layer, sides, use_reentrant=False)
        return self._forward(x, modulation, cache, layer, sides)

    def _forward(
        self, x: Tensor, modulation: Sequence[Tensor], cache: Cache | None, layer: int, sides: Sequence[int]
    ) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        dtype = self.mlp.fc1.weight.dtype
        h = self.attn(modulate(x, scale1, shift1, dtype), cache, layer, sides).float() * gamma1
        drops = self.training and cache is None and self.drop_path_rate > 0  # sampling skips nothing
        x = x + (drop_path(h, self.drop_path_rate) if drops else h)
        h = self.mlp(modulate(x, scale2, shift2, dtype)).float() * gamma2
        return x + (drop_path(h, self.drop_path_rate) if drops else h)


class VAR(nn.Module):
    """The base: embeddings, blocks and head. `CAR` runs it, with or without a control branch."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.var is not None, "config.var"
        self.config, self.sides = config.var, config.vqvae.sides
        C, L, D = config.var.C, config.vqvae.tokens, config.var.depth
        self.class_embedding = nn.Embedding(config.var.classes + 1, C)  # the last row is "no class"
        self.word_embedding = nn.Linear(config.vqvae.latent_channels, C)
        self.pos_start = nn.Parameter(torch.zeros(C))
        self.pos_LC = nn.Parameter(torch.zeros(L, C))
        self.level_KC = nn.Parameter(torch.zeros(len(self.sides), C))
        self.shared_ada_linear = nn.Linear(C, 6 * C) if config.var.shared_aln else None
        self.blocks = module_list(Block(config.var, rate) for rate in drop_path_rates(config.var.drop_path_rate, D))
        self.head_ada_linear = nn.Linear(C, 2 * C) if config.var.adaln else None
        self.head_norm_2C = None if config.var.adaln else nn.Parameter(torch.zeros(2, C))
        self.head = Linear(C, config.vqvae.vocab)
        initialise(self)

    def start(self, label_R: Tensor) -> Tensor:
        """Input of the first scale: class embedding + `pos_start`, f32 [R, 1, C]."""
        return (self.class_embedding(label_R) + self.pos_start).float()[:, None]

    def embed(self, inputs_RNZ: Tensor) -> Tensor:
        """Input of a finer scale: f̂ at its size, projected, f32 [R, N, C]."""
        return self.word_embedding(inputs_RNZ.to(self.word_embedding.weight.dtype)).float()

    def position(self) -> Tensor:
        """Position plus level embedding of every token, f32 [L, C]."""
        level = torch.cat([self.level_KC[k].expand(s * s, -1) for k, s in enumerate(self.sides)])
        return (self.pos_LC + level).float()

    def modulations(self, label_R: Tensor, branch_blocks: Sequence[Block] = ()) -> Tensor:
        """AdaLN of all base blocks, all branch blocks and the head (scale, shift).

        f32 [R, M, C], M = 6·blocks + 2.
        """
        cond = F.silu(self.class_embedding(label_R))
        R = cond.shape[0]
        shared = self.shared_ada_linear(cond).view(R, 6, -1).float() if self.shared_ada_linear is not None else None
        rows = [block.modulation(cond, shared) for block in [*self.blocks, *branch_blocks]]
        if self.head_ada_linear is not None:
            head = self.head_ada_linear(cond).view(R, 2, -1)
        else:
            assert self.head_norm_2C is not None
            head = self.head_norm_2C.expand(R, -1, -1)
        return torch.cat([*rows, head.float()], 1)

    def logits(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The head: f32, V instead of C."""
        return self.head(modulate(x, scale, shift, self.head.weight.dtype)).float()


@torch.no_grad()
def initialise(var: VAR, alng: float = ALNG) -> None:
    """The published initialisation of a base, in place; everything that is not named starts at zero.

    - Linear layers, embeddings, positions: truncated normal, std √(1/(3C)).
    - Residual projections (`attn.proj`, `mlp.fc2`): ÷ √(2D).
    - Head: × 0.02. AdaLN of the head: × 0.5.
    - AdaLN of each block, an own projection or the offsets (normal, std 1/√C): γ × `alng`, scale and shift × 0.5. The
      projection that blocks share is left as it is.

    alng: small values keep a block out of the residual stream at first; published are 1e-3 for d16 and d20, 1e-4 for
    d24, 1e-5 for d30 and 5e-6 for d36-s (512 pixels, shared AdaLN).
    """
    C, D = var.config.C, var.config.depth
    std = math.sqrt(1 / (3 * C))
    for module in var.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        elif isinstance(module, Attention):
            nn.init.trunc_normal_(module.qkv_weight, std=std)
    for parameter in (var.pos_start, var.pos_LC, var.level_KC):
        nn.init.trunc_normal_(parameter, std=std)
    for block in var.blocks:
        block.attn.proj.weight.div_(math.sqrt(2 * D))
        block.mlp.fc2.weight.div_(math.sqrt(2 * D))
        if block.ada_offset is not None:
            block.ada_offset.normal_(std=1 / math.sqrt(C))
            block.ada_offset[:2].mul_(alng)
            block.ada_offset[2:].mul_(0.5)
        if block.ada_linear is not None:
            block.ada_linear.weight[: 2 * C].mul_(alng)
            block.ada_linear.weight[2 * C :].mul_(0.5)
    if var.head_ada_linear is not None:
        var.head_ada_linear.weight.mul_(0.5)
    var.head.weight.mul_(0.02)


@torch.no_grad()
def take_over(mine: VAR, theirs: VAR, names: Sequence[str] | None, their_names: Sequence[str] | None) -> None:
    """Give a base the weights of another, whose scales and classes may be others.

    A scale starts from the one with the most similar side: its level, and its positions resized (bicubic). Classes
    are found by their names, and new ones start as "no class"; without names both have the same classes.
    RuntimeError where anything else differs in shape.
    """
    state = theirs.state_dict()
    by_scale = dict(zip(theirs.sides, theirs.pos_LC.split([s * s for s in theirs.sides]), strict=True))
    nearest = [min(theirs.sides, key=lambda t, s=s: abs(math.log(t / s))) for s in mine.sides]  # type: ignore[misc]
    positions = []
    for side, source in zip(mine.sides, nearest, strict=True):
        grid_1CSS = by_scale[source].T.reshape(1, -1, source, source)
        resized = F.interpolate(grid_1CSS, size=(side, side), mode="bicubic") if side != source else grid_1CSS
        positions.append(resized[0].flatten(1).T)
    state["pos_LC"] = torch.cat(positions)
    state["level_KC"] = theirs.level_KC[[theirs.sides.index(source) for source in nearest]]
    if names is not None and their_names is not None:
        rows = [their_names.index(name) if name in their_names else -1 for name in names]
        state["class_embedding.weight"] = theirs.class_embedding.weight[[*rows, -1]]
    mine.load_state_dict(state)
