"""Tracing wrappers: the model as a plan's graphs (docs/reference/plan-format.md). The model knows nothing of ONNX.

Shapes: R transformer rows, B images, S side of this scale, T side of the next, P past tokens, C width, Z latent
channels, E edge of f̂, H heads, d head width, V vocabulary, M modulation rows, L tokens of an image.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from car_export.trace import OPSET
from car_runtime.format.schema import FUSIONS
from car_train.model import Model
from car_train.model.car import CAR, cross_normalise, tokens_first
from car_train.model.sample import draw_kept, keep_top, mix, smooth_codes
from car_train.model.var import EPS, module_list
from car_train.model.vqvae import VQVAE, Up, join_tokens


@dataclass
class TracedCache:
    """The KV cache of a traced step.

    The past comes in as tensors, this scale's keys and values are collected as outputs.
    """

    past: Sequence[tuple[Tensor, Tensor] | None]
    new: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def append(self, layer: int, k_NRHd: Tensor, v_NRHd: Tensor) -> tuple[Tensor, Tensor]:
        self.new[layer] = (k_NRHd, v_NRHd)
        before = self.past[layer]
        if before is None:
            return k_NRHd, v_NRHd
        return torch.cat([before[0], k_NRHd]), torch.cat([before[1], v_NRHd])


class ControlGraph(nn.Module):
    """uint8 control images [s, s, 3] of every scale → features f32 [L, C]."""

    def __init__(self, model: Model):
        super().__init__()
        assert model.car is not None
        assert model.car.branch is not None
        self.branch = model.car.branch

    def forward(self, *controls: Tensor) -> Tensor:
        pixels = (c.permute(2, 0, 1)[None].float() / 255 * 2 - 1 for c in controls)
        return torch.cat([self.branch.features(p)[0] for p in pixels])


class ConditionGraph(nn.Module):
    """Labels int64 [R] → start tokens f32 [R, 1, 1, C] and AdaLN modulation f32 [R, M, C]."""

    def __init__(self, model: Model):
        super().__init__()
        assert model.car is not None
        self.car = model.car

    def forward(self, label: Tensor) -> tuple[Tensor, Tensor]:
        return self.car.base.start(label)[:, None], self.car.modulations(label)


class StepGraph(nn.Module):
    """One scale of the loop (CAR algorithm 1).

    Inputs and outputs as docs/reference/plan-format.md lists them.
    """

    def __init__(self, model: Model, has_past: bool = True, more_smooth: bool = False):
        super().__init__()
        assert model.car is not None
        self.car: CAR = model.car
        self.quantizer = model.vqvae.quantizer
        self.has_past, self.more_smooth = has_past, more_smooth

    @property
    def input_names(self) -> list[str]:
        control = ["control"] if self.car.branch is not None else []
        sampling = ["f_hat", "uniforms", "cfg", "top_k", "top_p", "known", "known_mask"]
        sampling += ["smooth", "smooth_noise"] if self.more_smooth else []
        past = [f"past_{x}_{i}" for i in range(self.car.layers) for x in "kv"] if self.has_past else []
        return ["x", "modulation", *control, *sampling, "pos", "up", "down", "phi", "cfg_ratio", *past]

    @property
    def output_names(self) -> list[str]:
        new = [f"new_{x}_{i}" for i in range(self.car.layers) for x in "kv"]
        return ["tokens", "f_hat_out", "next_x", *new, "logits"]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        i = dict(zip(self.input_names, inputs, strict=True))
        x_RSSC, position_NC = i["x"], i["pos"].flatten(0, 1)
        images, side = i["uniforms"].shape[0], x_RSSC.shape[1]
        past = [(i[f"past_k_{n}"], i[f"past_v_{n}"]) if self.has_past else None for n in range(self.car.layers)]
        cache = TracedCache(past)
        c = self.car.branch.inject(x_RSSC, i["control"].flatten(0, 1)) if self.car.branch is not None else None
        logits_RNV = self.car.trunk(x_RSSC.flatten(1, 2), c, position_NC, i["modulation"], cache, (side,))
        logits_BSSV = mix(logits_RNV, i["cfg"] * i["cfg_ratio"], images).unflatten(1, (side, side))
        kept_BSSV = keep_top(logits_BSSV, i["top_k"], i["top_p"])
        tokens_BSS = torch.where(i["known_mask"], i["known"], draw_kept(kept_BSSV, i["uniforms"]))
        codes_BSSZ = F.embedding(tokens_BSS, self.quantizer.embedding)
        if self.more_smooth:
            smooth_BSSZ = smooth_codes(kept_BSSV, i["smooth_noise"], i["cfg_ratio"], self.quantizer.embedding)
            smoothed = (i["smooth"] & ~i["known_mask"]).unsqueeze(-1)
            codes_BSSZ = torch.where(smoothed, smooth_BSSZ, codes_BSSZ)
        f_hat = i["f_hat"] + self._contribution(codes_BSSZ, i["up"], i["phi"])
        down = i["down"]
        next_BTTC = self.car.base.embed((down @ f_hat @ down.T).permute(0, 2, 3, 1))
        # Rows beyond the first B are the unconditional twins: the same tokens come in.
        next_x = next_BTTC.repeat(x_RSSC.shape[0] // images, 1, 1, 1)
        new = [t for n in range(self.car.layers) for t in cache.new[n]]
        return tokens_BSS, f_hat, next_x, *new, logits_BSSV

    def _contribution(self, codes_BSSZ: Tensor, up: Tensor, phi: Tensor) -> Tensor:
        """`MultiScaleQuantizer.contribution` with the scale's constants as tensors.

        All φ in one small convolution, then one picked.
        """
        h = up @ codes_BSSZ.permute(0, 3, 1, 2) @ up.T
        every = F.conv2d(h, self.quantizer.phi_weight, self.quantizer.phi_bias, padding=1)
        picked = every.unflatten(1, (-1, h.shape[1])).index_select(1, phi).squeeze(1)
        return 0.5 * h + 0.5 * picked


class PhasedUp(nn.Module):
    """`Up` without the doubled feature map: each quarter of the output (odd and even rows, columns) by a 2×2 kernel.

    Pixels that nearest-neighbour doubling repeats meet several of the 3×3 weights, which are added here instead: 16
    products a small pixel and channel pair, not 36. The result is the same up to the rounding of those sums. A plan
    stores the 3×3 weights: engines add them once, when they load the graph.
    """

    def __init__(self, up: Up, kernels: Sequence[Tensor] = ()):
        """kernels: what was added already, where the module's own weights are known from that alone."""
        super().__init__()
        self.weight, self.bias = up.conv.weight, up.conv.bias
        self.kernels = nn.ParameterList(nn.Parameter(kernel, requires_grad=False) for kernel in kernels)

    def forward(self, x: Tensor) -> Tensor:
        quarters = []
        for i, kernel in enumerate(self.kernels or phases_of(self.weight)):
            below, right = divmod(i, 2)
            quarters.append(F.conv2d(F.pad(x, (1 - right, right, 1 - below, below)), kernel, self.bias))
        phases = torch.cat(quarters, 1)
        B, C, (H, W) = x.shape[0], phases.shape[1] // 4, x.shape[2:]
        if torch.compiler.is_exporting():
            return torch.onnx.ops.symbolic(
                "DepthToSpace",
                (phases,),
                {"blocksize": 2, "mode": "DCR"},
                dtype=x.dtype,
                shape=(B, C, 2 * H, 2 * W),
                version=OPSET,
            )
        return phases.view(B, 2, 2, C, H, W).permute(0, 3, 4, 1, 5, 2).reshape(B, C, 2 * H, 2 * W)


def phases_of(kernel: Tensor) -> list[Tensor]:
    """A 3×3 kernel [O, I, 3, 3] → the 2×2 kernels of `PhasedUp`'s quarters."""
    rows = [_neighbours(kernel, 2, shift) for shift in (0, 1)]
    return [_neighbours(row, 3, shift) for row in rows for shift in (0, 1)]


def _neighbours(kernel: Tensor, axis: int, shift: int) -> Tensor:
    """Three taps along an axis → the two that meet different pixels: of even rows (shift 0) or odd ones (shift 1)."""
    first, middle, last = kernel.unbind(axis)
    return torch.stack([first + middle, last] if shift else [first, middle + last], axis)


class DecoderGraph(nn.Module):
    """f̂ f32 [B, Z, E, E] → images uint8 [B, H, W, 3].

    In float32, in which CPUs compute, feature maps are doubled in phases. In half precision they are not: cuDNN
    took kernels without tensor cores for the phases, and a d16's decoder twice the time.
    """

    def __init__(self, model: Model, phases: Mapping[str, Sequence[Tensor]] | None = None):
        """phases: `Up`s that double in phases, by name, with kernels if known alone; None: all of `ups_of`."""
        super().__init__()
        self.vqvae: VQVAE = copy.copy(model.vqvae)
        if phases is None:
            phases = dict.fromkeys(ups_of(model), ())
        self.vqvae._modules = {**model.vqvae._modules, "decoder": _with_phases(model.vqvae.decoder, phases)}

    def forward(self, f_hat: Tensor) -> Tensor:
        pixels = self.vqvae.decode_latent(f_hat)
        return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def ups_of(model: Model) -> dict[str, Up]:
    """The decoder's `Up`s that double in phases, by name: all of them in float32, none in half precision."""
    if model.vqvae.post_quant_conv.weight.dtype != torch.float32:
        return {}
    return {name: module for name, module in model.vqvae.decoder.named_modules() if isinstance(module, Up)}


def _with_phases(module: nn.Module, phases: Mapping[str, Sequence[Tensor]], path: str = "") -> nn.Module:
    """The module, or a shallow copy that has `PhasedUp`s instead of the `Up`s in it that are named there."""
    if isinstance(module, Up) and path in phases:
        return PhasedUp(module, phases[path])
    children = {
        name: child and _with_phases(child, phases, f"{path}.{name}".lstrip("."))
        for name, child in module._modules.items()
    }
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    phased = copy.copy(module)
    phased._modules = children
    return phased


class EncoderGraph(nn.Module):
    """Images uint8 [B, H, W, 3] → tokens of all scales int64 [B, L]."""

    def __init__(self, model: Model):
        super().__init__()
        self.vqvae: VQVAE = model.vqvae

    def forward(self, image: Tensor) -> Tensor:
        pixels = image.permute(0, 3, 1, 2).float() / 255 * 2 - 1
        return join_tokens(self.vqvae.encode(pixels.to(self.vqvae.quant_conv.weight.dtype)))


# -- format 2: a base, and branches that are graphs of their own -----------------------------------------------------


class BaseConditionGraph(nn.Module):
    """Labels int64 [R] → start tokens f32 [R, 1, 1, C] and the base's AdaLN modulation f32 [R, 6·depth + 2, C]."""

    def __init__(self, model: Model):
        super().__init__()
        assert model.car is not None
        self.base = model.car.base

    def forward(self, label: Tensor) -> tuple[Tensor, Tensor]:
        return self.base.start(label)[:, None], self.base.modulations(label)


class BranchConditionGraph(nn.Module):
    """Labels int64 [R] → AdaLN modulation f32 [R, 6·blocks, C] of a branch's blocks."""

    def __init__(self, model: Model):
        super().__init__()
        assert model.car is not None
        self.base, self.blocks = model.car.base, module_list(model.car.branch_blocks)

    def forward(self, label: Tensor) -> Tensor:
        cond = F.silu(self.base.class_embedding(label))
        shared = self.base.shared_ada_linear
        shared_R6C = shared(cond).view(cond.shape[0], 6, -1).float() if shared is not None else None
        return torch.cat([block.modulation(cond, shared_R6C) for block in self.blocks], 1)


class BranchGraph(nn.Module):
    """One scale of 𝒯: what the base's step takes in, f32 [blocks, S, S, R, C], in the order of the base's blocks."""

    def __init__(self, model: Model):
        super().__init__()
        assert model.car is not None
        assert model.car.branch is not None
        self.branch = model.car.branch
        self.layers = len(self.branch.attention_blocks)

    @property
    def input_names(self) -> list[str]:
        past = [f"past_{x}_{i}" for i in range(self.layers) for x in "kv"]
        return ["x", *(["modulation"] if self.layers else []), "control", "rows", "pos", *past]

    @property
    def output_names(self) -> list[str]:
        return ["c", *(f"new_{x}_{i}" for i in range(self.layers) for x in "kv")]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        i = dict(zip(self.input_names, inputs, strict=True))
        x_RSSC, side = i["x"], i["x"].shape[1]
        features_RNC = i["control"].index_select(0, i["rows"]).flatten(1, 2)
        c_RNC = self.branch.inject(x_RSSC, features_RNC) + i["pos"].flatten(0, 1)
        rows = i["modulation"].transpose(0, 1).contiguous().split(1, dim=0) if self.layers else ()
        cache = TracedCache([(i[f"past_k_{n}"], i[f"past_v_{n}"]) for n in range(self.layers)])
        outputs = self.branch(tokens_first(c_RNC), rows, cache, 0, (side,))
        c = torch.stack([out.unflatten(0, (side, side)) for out in reversed(outputs)])
        return c, *(t for n in range(self.layers) for t in cache.new[n])


class BaseStepGraph(StepGraph):
    """One scale of the base: each image its own settings, and any number m of branches mixed in where 𝓖 stands.

    At a fused block x becomes keep·x + Σ mixᵢ·𝓖ᵢ(x, cᵢ), with keep = 1 − Σ mixᵢ; 𝓖's parameters are inputs.
    """

    def __init__(self, model: Model, more_smooth: bool = False):
        super().__init__(model, more_smooth=more_smooth)
        branch = self.car.branch
        self.fused = len(branch.fusions) if branch is not None else 0
        self.fusion = branch.config.fusion if branch is not None else ""

    @property
    def layers(self) -> int:
        return len(self.car.base.blocks)

    @property
    def fusion_names(self) -> list[str]:
        return [f"fusion_{name}_{i}" for i in range(self.fused) for name in FUSIONS[self.fusion]]

    @property
    def input_names(self) -> list[str]:
        sampling = ["f_hat", "uniforms", "cfg", "top_k", "top_p", "bias", "known", "known_mask"]
        sampling += ["smooth", "smooth_noise"] if self.more_smooth else []
        mixed = ["c", "mix", "keep", "plain", "control_cfg", *self.fusion_names] if self.fused else []
        past = [f"past_{x}_{i}" for i in range(self.layers) for x in "kv"]
        return ["x", "modulation", "rows", "twin", *sampling, *mixed, "pos", "up", "down", "phi", "cfg_ratio", *past]

    @property
    def output_names(self) -> list[str]:
        return [
            "tokens",
            "f_hat_out",
            "next_x",
            *(f"new_{x}_{i}" for i in range(self.layers) for x in "kv"),
            "logits",
        ]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        i = dict(zip(self.input_names, inputs, strict=True))
        side = i["x"].shape[1]
        cache = TracedCache([(i[f"past_k_{n}"], i[f"past_v_{n}"]) for n in range(self.layers)])
        logits_BSSV = self._guided(self._logits(i, cache), i).unflatten(1, (side, side))
        kept_BSSV = _keep_top_of_each(logits_BSSV + i["bias"], i["top_k"], i["top_p"])
        tokens_BSS = torch.where(i["known_mask"], i["known"], draw_kept(kept_BSSV, i["uniforms"]))
        codes_BSSZ = F.embedding(tokens_BSS, self.quantizer.embedding)
        if self.more_smooth:
            smooth_BSSZ = smooth_codes(kept_BSSV, i["smooth_noise"], i["cfg_ratio"], self.quantizer.embedding)
            smoothed = (i["smooth"][:, None, None] & ~i["known_mask"]).unsqueeze(-1)
            codes_BSSZ = torch.where(smoothed, smooth_BSSZ, codes_BSSZ)
        f_hat = i["f_hat"] + self._contribution(codes_BSSZ, i["up"], i["phi"])
        down = i["down"]
        next_BTTC = self.car.base.embed((down @ f_hat @ down.T).permute(0, 2, 3, 1))
        new = [t for n in range(self.layers) for t in cache.new[n]]
        return tokens_BSS, f_hat, next_BTTC.index_select(0, i["rows"]), *new, logits_BSSV

    def _logits(self, i: dict[str, Tensor], cache: TracedCache) -> Tensor:
        """`CAR.trunk` of the base, token-major, with the branches' outputs given: f32 [N, R, V]."""
        x_RSSC, base = i["x"], self.car.base
        rows = i["modulation"].transpose(0, 1).contiguous().split(1, dim=0)
        x = tokens_first(x_RSSC.flatten(1, 2) + i["pos"].flatten(0, 1))
        for n, block in enumerate(base.blocks):
            fused = n - (self.layers - self.fused)
            if self.fused and fused >= 0:
                x = self._fuse(x, fused, i)
            x = block(x, rows[6 * n : 6 * n + 6], cache, n, (x_RSSC.shape[1],))
        return base.logits(x, rows[-2], rows[-1])

    def _guided(self, logits_NRV: Tensor, i: dict[str, Tensor]) -> Tensor:
        """Each image's guidance by class and by control, f32 [B, N, V]."""
        rows_RNV = logits_NRV.transpose(0, 1)
        cond, twin = rows_RNV[: i["uniforms"].shape[0]], rows_RNV.index_select(0, i["twin"])
        t = (i["cfg"] * i["cfg_ratio"])[:, None, None]
        mixed = (1 + t) * cond - t * twin
        if not self.fused:
            return mixed
        g = (i["control_cfg"] * i["cfg_ratio"])[:, None, None]
        return mixed + g * (cond - rows_RNV.index_select(0, i["plain"]))

    def _fuse(self, x_NRC: Tensor, at: int, i: dict[str, Tensor]) -> Tensor:
        """keep·x + Σ mixᵢ·𝓖ᵢ(x, cᵢ) before the block that fuses as number `at`."""
        shape = x_NRC.shape
        x_TC = x_NRC.flatten(0, 1)
        c_mTC = i["c"][:, at].flatten(1, 3)
        p = {name: i[f"fusion_{name}_{at}"] for name in FUSIONS[self.fusion]}
        every_mNRC = _fusions(self.fusion, x_TC, c_mTC, p).unflatten(1, shape[:2])
        return i["keep"][None, :, None] * x_NRC + (i["mix"][:, None, :, None] * every_mNRC).sum(0)


def _fusions(kind: str, x_TC: Tensor, c_mTC: Tensor, p: dict[str, Tensor]) -> Tensor:
    """𝓖 of each branch on the same x, f32 [m, T, C]. p: parameters by name, the first axis m; matrices transposed."""
    if kind == "cross_norm":
        return x_TC + p["gain"].float()[:, None] * cross_normalise(c_mTC, x_TC)
    weight, bias = p["linear_weight"], p["linear_bias"][:, None]
    if kind == "zero":
        return x_TC + (c_mTC.to(weight.dtype) @ weight + bias).float()
    both = torch.cat([x_TC.expand_as(c_mTC), c_mTC], -1)
    h = F.layer_norm(both, both.shape[-1:], eps=EPS) * p["norm_weight"][:, None] + p["norm_bias"][:, None]
    return (h.to(weight.dtype) @ weight + bias).float()


def _keep_top_of_each(logits_BSSV: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """`keep_top` with each image's own top-k and top-p."""
    ranked = logits_BSSV.sort(dim=-1, descending=True).values
    at = (top_k_B - 1)[:, None, None, None].expand(*ranked.shape[:-1], 1)
    kept = ranked >= ranked.gather(-1, at)
    p = ranked.masked_fill(~kept, -torch.inf).softmax(-1)
    kept = kept & (p.cumsum(-1) - p < top_p_B[:, None, None, None])
    border = ranked.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    return logits_BSSV.masked_fill(logits_BSSV < border, -torch.inf)
